"""Small exploration tables, and slow, plain answers to compare theirs with."""

import numpy as np
from hypothesis import strategies as st
from scipy.special import expit

from recexplore.serving.exploration import Popular
from recexplore.serving.exploration_table import ExplorationTable

FINGERPRINTS = {"clusters": "c" * 64, "vocabulary": "v", "novelty": "n", "alignment": "a"}
CLUSTERS = FINGERPRINTS["clusters"]


def build(rows, *, num_clusters, num_chosen=2, popular=(), fingerprints=FINGERPRINTS):
    """A table of rows history → (count, clusters, scores); log-probabilities are score - 4."""
    clusters = np.full((len(rows), num_chosen), -1, np.int32)
    scores = np.full(clusters.shape, -np.inf, np.float32)
    for place, (_, chosen, values) in enumerate(rows.values()):
        clusters[place, : len(chosen)] = chosen
        scores[place, : len(chosen)] = values
    ranked = np.array(popular, np.int32)
    return ExplorationTable.build(
        [list(history) for history in rows],
        clusters,
        scores,
        scores - 4,
        np.where(clusters >= 0, np.float32(0.5), np.float32(0.0)),
        counts=np.array([count for count, _, _ in rows.values()], np.int64),
        popular=Popular(ranked, np.float32(ranked) / 8, -np.float32(ranked) - 1),
        num_clusters=num_clusters,
        fingerprints=fingerprints,
    )


def small(offset=0.0):
    """Four histories of two clusters; `offset` is added to all scores."""
    rows = {
        (0, 1): (3, [2, 3], [0.5 + offset, 0.25 + offset]),
        (1, 0): (1, [4], [1.5 + offset]),
        (2, 1): (1, [3, 0], [0.75 + offset, -0.5 + offset]),
        (4, 3): (2, [1, 5], [0.25 + offset, -1.0 + offset]),
    }
    return build(rows, num_clusters=6, popular=[3, 0, 5, 1, 2, 4])


@st.composite
def tables(draw):
    """Keyword arguments of `build`, with a history at least."""
    num_clusters = draw(st.integers(3, 7))
    longest = draw(st.integers(1, min(4, num_clusters - 1)))
    num_chosen = draw(st.integers(1, 3))
    ids = st.integers(0, num_clusters - 1)
    histories = st.lists(ids, min_size=1, max_size=longest, unique=True).map(tuple)
    rows = {}
    for history in draw(st.lists(histories, min_size=1, max_size=12, unique=True)):
        others = [cluster for cluster in range(num_clusters) if cluster not in history]
        chosen = draw(st.permutations(others))[: draw(st.integers(0, num_chosen))]
        scores = [draw(st.integers(-40, 40)) / 8 for _ in chosen]
        rows[history] = (draw(st.integers(0, 3)), chosen, scores)
    popular = draw(st.permutations(range(num_clusters)))[: draw(st.integers(0, num_clusters))]
    return dict(rows=rows, num_clusters=num_clusters, num_chosen=num_chosen, popular=popular)


def plain_answer(rows, history, banned, *, num_clusters, num_chosen, popular):
    """What a table answers, by going through all of its rows: (level, {cluster: score}, order)."""
    left_out = {*history, *banned}
    length = max(map(len, rows))
    asked = tuple(history[-length:])
    for end in (asked[place:] for place in range(len(asked))):
        if end in rows:
            _, clusters, scores = rows[end]
            level = "history" if end == asked else "shorter"
        else:
            level = "shorter"
            clusters, scores = _average(rows, end, num_chosen + length - 1)
        kept = [(c, s) for c, s in zip(clusters, scores, strict=True) if c not in left_out]
        if kept:
            return level, kept[:num_chosen]
    return "popular", [(c, c / 8) for c in popular if c not in left_out][:num_chosen]


def _average(rows, end, width):
    """The best clusters after an end, over the longer histories that have it."""
    alike = {h: row for h, row in rows.items() if len(h) > len(end) and h[-len(end) :] == end}
    total = sum(count for count, _, _ in alike.values())
    values, sums, weights = {}, {}, {}
    for count, clusters, scores in alike.values():
        weight = count if total else 1
        for cluster, score in zip(clusters, scores, strict=True):
            if weight:
                values[cluster] = values.get(cluster, 0.0) + weight * float(expit(score))
                sums[cluster] = sums.get(cluster, 0.0) + weight * score
                weights[cluster] = weights.get(cluster, 0) + weight
    best = sorted(values, key=lambda cluster: (-np.float32(values[cluster]), cluster))[:width]
    return best, [sums[cluster] / weights[cluster] for cluster in best]
