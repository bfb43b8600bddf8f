"""How well the next item is found within its cluster: the item recommender beside plain counts.

For every item that a user engages with in a period and had never met, all items of its cluster that
the user hasn't met are ranked by what the user engaged with before. What has the same timestamp is
not known to each other. The cluster is given, as it is when an exploration has chosen it.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int

from recexplore.evaluation import metrics
from recexplore.evaluation.statistics import bootstrap_ratio
from recexplore.feedback.engagements import Engagements, popularity

KS = (5, 10, 20)
_CHOSEN_AT = 10  # constants have the best NDCG at this place on validation
_HALF_LIVES = (None, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
_LAST = (3, 10, 30, 100)  # items of a history that co-occurrence is asked for
_POWERS = (0.25, 0.5)
_TIE = 1e-6


class NextItems(NamedTuple):
    """Items to be found, R of them.

    Attributes:
      users: whose they are, by place.
      targets: the items.
      clusters: theirs.
      contexts: what each user engaged with before, oldest first.
      met: all that each user met before, engaged with or not.
    """

    users: Int[np.ndarray, "R"]
    targets: Int[np.ndarray, "R"]
    clusters: Int[np.ndarray, "R"]
    contexts: list[np.ndarray]
    met: list[np.ndarray]


Scores = Callable[[NextItems, Int[np.ndarray, "N"]], Float[np.ndarray, "R N"]]


def next_items(
    met: Engagements,
    item_clusters: Int[np.ndarray, "I"],
    *,
    start: int,
    until: int | None = None,
    users: int | None = None,
    seed: int = 0,
) -> NextItems:
    """The items engaged with in a period.

    Args:
      met: of all users.
      item_clusters: of each item.
      start: of the period, in seconds since 1970.
      until: its end; None: that of the log.
      users: a sample of so many users who engaged with anything in the period; None: all.
      seed: of the sample.
    """
    inside = met.engaged & (met.times >= start)
    inside &= (met.times < until) if until is not None else True
    active = np.unique(met.users[inside])
    if users is not None and users < len(active):
        active = np.sort(np.random.default_rng(seed).choice(active, users, replace=False))
    places, targets, contexts, known = [], [], [], []
    for user in active.tolist():
        own = slice(met.starts[user], met.starts[user + 1])
        times, items, engaged = met.times[own], met.items[own], met.engaged[own]
        earlier, before = items[engaged], np.concatenate([[0], np.cumsum(engaged)])
        for place in np.flatnonzero(inside[own]).tolist():
            count = int(np.searchsorted(times, times[place]))
            places.append(user)
            targets.append(items[place])
            contexts.append(earlier[: before[count]])
            known.append(items[:count])
    targets = np.array(targets, np.int64)
    return NextItems(
        np.array(places, np.int64),
        targets,
        item_clusters[targets].astype(np.int64),
        contexts,
        known,
    )


def ranks(
    rows: NextItems, item_clusters: Int[np.ndarray, "I"], scores: Scores
) -> Float[np.ndarray, "R"]:
    """Place of each row's target among the items of its cluster that its user hasn't met.

    Ties count half, as in `metrics.ranks`.

    Args:
      rows: R items to be found.
      item_clusters: of each item.
      scores: of some items, for some rows.
    """
    order = np.argsort(item_clusters, kind="stable")
    bounds = np.searchsorted(item_clusters[order], np.arange(item_clusters.max() + 2))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    found = np.zeros(len(rows.targets))
    for cluster in np.unique(rows.clusters).tolist():
        which = np.flatnonzero(rows.clusters == cluster)
        begin, end = bounds[cluster], bounds[cluster + 1]
        excluded = np.zeros((len(which), end - begin), bool)
        for mask, row in zip(excluded, which.tolist(), strict=True):
            at = place[rows.met[row]]
            mask[at[(begin <= at) & (at < end)] - begin] = True
        own = scores(_some(rows, which), order[begin:end])
        found[which] = metrics.ranks(own, place[rows.targets[which]] - begin, excluded)
    return found


def _some(rows: NextItems, which: Int[np.ndarray, "S"]) -> NextItems:
    arrays = (part[which] for part in (rows.users, rows.targets, rows.clusters))
    lists = ([part[row] for row in which.tolist()] for part in (rows.contexts, rows.met))
    return NextItems(*arrays, *lists)


def by_popularity(met: Engagements, num_items: int, half_life: float | None = None) -> Scores:
    """How many users engaged with each item; see `engagements.popularity`."""
    counts = popularity(met, num_items, half_life)
    return lambda rows, items: np.tile(counts[items], (len(rows.targets), 1))


def by_cooccurrence(met: Engagements, num_items: int, last: int = 10, power: float = 0.5) -> Scores:
    """Items that users engaged with who also engaged with the last items of the history.

    With n_i users of item i and n_ij of both i and j, item j scores Σ n_ij / (n_i n_j) ** `power`
    over the last items i: the cosine for 1/2, plain counts for 0. Where that is level, the more
    popular item comes first.

    Args:
      met: of the training period.
      num_items: I.
      last: items of the history.
      power: of the normalisation.
    """
    users, items = met.users[met.engaged], met.items[met.engaged]
    shape = (len(met.user_ids), num_items)
    consumed = scipy.sparse.csr_array((np.ones(len(items)), (users, items)), shape)
    counts = np.bincount(items, minlength=num_items)
    scaled = consumed * np.maximum(counts, 1.0)[None, :] ** -power
    together = (scaled.T @ scaled).tocsc()
    ties = _TIE * counts / max(counts.max(), 1)

    def score(rows: NextItems, items: Int[np.ndarray, "N"]) -> Float[np.ndarray, "R N"]:
        lasts = [context[-last:] for context in rows.contexts]
        ends = np.concatenate([[0], np.cumsum([len(each) for each in lasts])])
        named = np.concatenate([np.zeros(0, np.int64), *lasts])
        asked = scipy.sparse.csr_array((np.ones(len(named)), named, ends), (len(lasts), num_items))
        return (asked @ together[:, items]).toarray() + ties[items]

    return score


def fit_baselines(
    train: Engagements, validation: NextItems, item_clusters: Int[np.ndarray, "I"]
) -> dict[str, Scores]:
    """Both baselines, with the constants that find most on validation.

    Args:
      train: the training period, to count in.
      validation: to choose constants on.
      item_clusters: of each item.
    """
    size = len(item_clusters)
    candidates: dict[str, Iterable[Scores]] = {
        "items_popularity": (by_popularity(train, size, each) for each in _HALF_LIVES),
        "items_cooccurrence": (
            by_cooccurrence(train, size, last, power) for power in _POWERS for last in _LAST
        ),
    }

    def quality(scores: Scores) -> float:
        found = ranks(validation, item_clusters, scores)
        return float(metrics.ndcg(found, _CHOSEN_AT).mean()) if len(found) else 0.0

    return {name: max(tried, key=quality) for name, tried in candidates.items()}


def ranking_metrics(
    users: Int[np.ndarray, "R"], found: dict[str, Float[np.ndarray, "R"]]
) -> dict[str, float]:
    """NAME/recall@k and NAME/ndcg@k with `_low` and `_high`, 95 % intervals with users resampled.

    Args:
      users: whose each row is.
      found: method → rank of each row's target, infinite where it isn't among the first.
    """
    _, place = np.unique(users, return_inverse=True)
    counts = np.bincount(place)
    told: dict[str, float] = {}
    names, sums = [], []
    for name, rank in found.items():
        for k in KS:
            for measure in (metrics.recall, metrics.ndcg):
                names.append(f"{name}/{measure.__name__}@{k}")
                sums.append(np.bincount(place, measure(rank, k)))
    above = np.stack(sums, axis=1)
    estimate = bootstrap_ratio(above, np.tile(counts[:, None], (1, len(names))))
    for suffix, values in zip(("", "_low", "_high"), estimate, strict=True):
        told |= {f"{name}{suffix}": float(v) for name, v in zip(names, values, strict=True)}
    return told


def ranks_in_clusters(
    rows: NextItems,
    recommend: Callable[[NextItems], Int[np.ndarray, "R k"]],
    progress: Callable[..., None],
    at_once: int = 1024,
) -> Float[np.ndarray, "R"]:
    """Place of each row's target in the list that a recommender gives for its cluster.

    Args:
      rows: R items to be found.
      recommend: some rows → the best items of each one's cluster.
      progress: called as progress(rows done, all rows).
      at_once: rows.
    """
    order = np.argsort(rows.clusters, kind="stable")  # those of one cluster beside each other
    found = np.zeros(len(order))
    for start in range(0, len(order), at_once):
        which = order[start : start + at_once]
        found[which] = metrics.ranks_in_lists(recommend(_some(rows, which)), rows.targets[which])
        progress(min(start + at_once, len(order)), len(order))
    return found
