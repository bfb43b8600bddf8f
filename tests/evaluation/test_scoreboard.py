"""The scoreboard against a plain walk over rows and lists."""

import numpy as np
import pytest

from recexplore.evaluation import metrics, offline, statistics
from recexplore.evaluation.baselines import Rows
from recexplore.evaluation.offline import SUFFIXES
from recexplore.evaluation.scoreboard import Scoreboard

M, R = 30, 60
_RANDOM = np.random.default_rng(0)


def held_out_rows():
    seen = _RANDOM.random((R, M)) < 0.2
    last_two = np.array([_RANDOM.choice(M, 2, replace=False) for _ in range(R)])
    np.put_along_axis(seen, last_two, True, axis=1)
    targets = np.array([_RANDOM.choice(np.flatnonzero(~row)) for row in seen])
    users = np.array([f"u{i % 9}" for i in range(R)])
    return Rows(users, last_two.tolist(), last_two, targets, seen)


ROWS = held_out_rows()
POPULARITY = _RANDOM.dirichlet(np.ones(M))
PRIMITIVES = {kind: list(_RANDOM.random((2, R, M))) for kind in SUFFIXES}
SCORES = _RANDOM.random((R, M))


def lists_of(scores, kind):
    excluded = ROWS.known_mask if kind == "seen" else ROWS.history_mask
    ranked = [sorted(np.flatnonzero(~out), key=lambda c, r=r: -r[c]) for r, out in
              zip(scores, excluded, strict=True)]  # fmt: skip
    return [row[:10] for row in ranked]


def expected(lists, kind):
    """By hand, for lists without ties: name → value of each row, and the others' values."""
    primitives = [lists_of(scores, kind) for scores in PRIMITIVES[kind]]
    hits = [t in row for t, row in zip(ROWS.targets, lists, strict=True)]
    surprising = [
        hit and not any(t in primitive[i] for primitive in primitives)
        for i, (hit, t) in enumerate(zip(hits, ROWS.targets, strict=True))
    ]
    shown = [-np.log2(POPULARITY[c]) for row in lists for c in row]
    first = dict(zip(ROWS.users[::-1], lists[::-1], strict=True))  # the oldest row comes last
    pairs = {(user, cluster) for user, row in first.items() for cluster in row}
    engaged = pairs & set(zip(ROWS.users, ROWS.targets, strict=True))
    return {
        "recall": np.mean(hits),
        "serendipity": np.mean(surprising),
        "novelty": np.mean(shown),
        "engaged_pairs": len(engaged) / len(set(ROWS.users)),
        "coverage": len({c for row in lists for c in row}) / M,
    }


@pytest.mark.parametrize("kind", SUFFIXES)
def test_everything_is_what_a_walk_over_the_lists_says(kind):
    board = Scoreboard(ROWS, POPULARITY, PRIMITIVES)
    board.add_scores(kind, "scored", SCORES)
    lists = lists_of(SCORES, kind)
    board.add_lists(kind, "listed", np.array(lists))
    few = [row[: i % 4] for i, row in enumerate(lists)]  # some empty, none full
    board.add_lists(kind, "short", np.array([row + [-1] * (10 - len(row)) for row in few]))
    found = board.metrics()
    for name, its in (("scored", lists), ("listed", lists), ("short", few)):
        for measure, value in expected(its, kind).items():
            assert found[f"{name}/{measure}@10{SUFFIXES[kind]}"] == pytest.approx(value)
    assert found[f"scored/recall@20{SUFFIXES[kind]}"] >= found[f"scored/recall@10{SUFFIXES[kind]}"]
    assert f"listed/recall@20{SUFFIXES[kind]}" not in found


def test_intervals_resample_users_with_all_their_rows():
    board = Scoreboard(ROWS, POPULARITY, PRIMITIVES)
    board.add_scores("seen", "a", SCORES)
    board.add_scores("seen", "b", -SCORES)
    found = board.metrics()
    for name, scores in (("a", SCORES), ("b", -SCORES)):
        hits = metrics.recall(metrics.ranks(scores, ROWS.targets, ROWS.known_mask), 10)
        user = np.unique(ROWS.users, return_inverse=True)[1]
        sums = np.bincount(user, hits), np.bincount(user).astype(float)
        value, low, high = statistics.bootstrap_ratio(*sums)
        assert found[f"{name}/recall@10_unseen"] == pytest.approx(value)
        assert found[f"{name}/recall@10_unseen_low"] == pytest.approx(low)
        assert found[f"{name}/recall@10_unseen_high"] == pytest.approx(high)
    for measure in ("ndcg", "serendipity", "novelty", "engaged_pairs"):
        low, value, high = (found[f"a/{measure}@10_unseen{end}"] for end in ("_low", "", "_high"))
        assert low <= value <= high
    assert "a/coverage@10_unseen_low" not in found  # no mean over users


def test_a_primitive_has_no_serendipity_and_a_method_without_clusters_no_novelty():
    board = Scoreboard(ROWS, POPULARITY, PRIMITIVES)
    board.add_scores("history", "primitive", PRIMITIVES["history"][0])
    board.add_lists("history", "silent", np.full((R, 10), -1))
    found = board.metrics()
    assert found["primitive/serendipity@10"] == 0.0 < found["primitive/recall@10"]
    assert found["silent/recall@10"] == found["silent/coverage@10"] == 0.0
    assert "silent/novelty@10" not in found and "silent/novelty@10_low" not in found


def test_popularity_counts_the_training_moves_and_no_cluster_has_none():
    train = ROWS._replace(targets=np.array([3, 3, 5] * (R // 3)))
    shares = offline.popularity_shares(train)
    assert shares[3] == pytest.approx((40 + 1) / (R + M)) and shares[0] == pytest.approx(1 / 90)
    assert shares.sum() == pytest.approx(1.0)
