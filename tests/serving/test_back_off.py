"""The clusters that are answered where nothing of a history is known."""

import math

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from recexplore.serving.back_off import popular_clusters

MOVES = st.tuples(st.sampled_from(["train", "validation", "test"]), st.integers(0, 5))
TOLD = st.tuples(MOVES, st.integers(1, 9), st.integers(0, 8).map(lambda label: label / 8))


@settings(deadline=None, max_examples=60)
@given(st.lists(MOVES), st.lists(TOLD), st.sets(st.integers(0, 5)))
def test_popular_clusters_are_counted_in_the_training_period(moves, told, banned):
    transitions = pa.table(
        {
            "split": pa.array([split for split, _ in moves], pa.string()),
            "next_cluster": pa.array([cluster for _, cluster in moves], pa.int32()),
        }
    )
    collective = pa.table(
        {
            "split": pa.array([split for (split, _), _, _ in told], pa.string()),
            "next_cluster": pa.array([cluster for (_, cluster), _, _ in told], pa.int32()),
            "weight": pa.array([weight for _, weight, _ in told], pa.float32()),
            "label": pa.array([label for _, _, label in told], pa.float32()),
        }
    )
    found = popular_clusters(transitions, collective, 6, sorted(banned))
    counts = [sum(move == ("train", cluster) for move in moves) for cluster in range(6)]
    expected = sorted(set(range(6)) - banned, key=lambda cluster: (-counts[cluster], cluster))
    assert found.clusters.tolist() == expected
    shares = [(counts[cluster] + 0.5) / (sum(counts) + 3) for cluster in expected]
    np.testing.assert_allclose(found.log_probabilities, np.log(shares), rtol=1e-5)
    learnt = [(cluster, n, label) for (split, cluster), n, label in told if split == "train"]
    users = sum(n for _, n, _ in learnt)
    mean = sum(n * label for _, n, label in learnt) / users if users else 0.5
    for cluster, score in zip(expected, found.scores, strict=True):
        own = [(n, label) for other, n, label in learnt if other == cluster]
        label = (sum(n * label for n, label in own) + mean) / (sum(n for n, _ in own) + 1)
        label = min(max(label, 1e-6), 1 - 1e-6)
        np.testing.assert_allclose(score, math.log(label / (1 - label)), rtol=1e-4, atol=1e-5)
