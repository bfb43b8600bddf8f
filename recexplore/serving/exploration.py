"""One history's answer, and what is answered where the table doesn't have the history.

    history   the table has it: what best of n chose
    shorter   the table has histories that end as this one does: what is best on average over them
    popular   the clusters that most users moved into

The first that has anything to propose answers. Never proposed are the clusters of the whole
history, also of the part of it that the answer doesn't look at, and what the caller bans.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from recexplore.errors import InputError

HISTORY, SHORTER, POPULAR = LEVELS = ("history", "shorter", "popular")


class Exploration(NamedTuple):
    """The clusters chosen for one history, best first, with both models' opinions.

    Attributes:
      clusters: cluster ids; fewer than k, even none, where more are left out than stood ready.
      scores: the alignment model's; of a shorter history their means over the histories it stands
        for; of popular clusters the logits of their mean labels.
      log_probabilities: the novelty model's; of a shorter history their means; of popular clusters
        those of their share of all novel moves.
      propensities: with which probability each was chosen among the proposals, given those before
        it; 1 where the choice was not randomised, as it isn't in backing off.
      level: which level answered: history, shorter or popular.
    """

    clusters: list[int]
    scores: list[float]
    log_probabilities: list[float]
    propensities: list[float]
    level: str


class Row(NamedTuple):
    """What is stored for one history.

    Attributes:
      answer: clusters, scores, log-probabilities, propensities: lists of the same length, best
        first. Places where the cluster is -1 aren't filled.
      exact: the models were asked about this history; otherwise it stands for those that end so.
    """

    answer: tuple[list[int], list[float], list[float], list[float]]
    exact: bool


class Answers(NamedTuple):
    """Many histories and what is answered to them, in arrays.

    Attributes:
      histories: cluster ids, oldest first; -1 in front of shorter histories.
      clusters: best first; -1 where a place isn't filled, and the others are 0 there.
      scores: see `Exploration`, as for the others.
      log_probabilities: of each cluster.
      propensities: of each cluster.
    """

    histories: Int[np.ndarray, "R K"]
    clusters: Int[np.ndarray, "R width"]
    scores: Float[np.ndarray, "R width"]
    log_probabilities: Float[np.ndarray, "R width"]
    propensities: Float[np.ndarray, "R width"]


class Popular(NamedTuple):
    """Clusters by how many users moved into them when they were new to them, most popular first.

    Attributes:
      clusters: cluster ids.
      scores: the logits of their mean labels.
      log_probabilities: of their share of all novel moves.
    """

    clusters: Int[np.ndarray, "P"]
    scores: Float[np.ndarray, "P"]
    log_probabilities: Float[np.ndarray, "P"]


# As `Popular`, where single values are read quickly: lists or memoryviews.
PopularValues = tuple[Sequence[int], Sequence[float], Sequence[float]]


def answer(
    find: Callable[[tuple[int, ...]], Row | None],
    popular: PopularValues,
    history: Sequence[int],
    banned: Iterable[int],
    *,
    history_length: int,
    num_chosen: int,
    num_clusters: int,
) -> Exploration:
    """Asks one level after the other.

    Args:
      find: gives the row of a history of at most K clusters, if there is one.
      popular: clusters, scores, log-probabilities, most popular first.
      history: cluster ids, oldest first; of more than K the last K are looked up.
      banned: clusters not to propose besides the history's.
      history_length: K.
      num_chosen: k, clusters of an answer at most.
      num_clusters: M.

    Raises:
      InputError: the history names a cluster that the table doesn't know.
    """
    known = checked(history, num_clusters)
    excluded = {*known, *banned}
    longest = min(len(known), history_length)
    for length in range(longest, 0, -1):
        row = find(tuple(known[-length:]))
        if row is None:
            continue
        clusters = row.answer[0]
        kept = [i for i, c in enumerate(clusters) if c >= 0 and c not in excluded][:num_chosen]
        if kept:
            level = HISTORY if row.exact and length == longest else SHORTER
            if kept[-1] < len(kept):  # mostly the first places, and slices take half the time
                return Exploration(*[values[: len(kept)] for values in row.answer], level)
            return Exploration(*[[values[i] for i in kept] for values in row.answer], level)
    return _most_popular(popular, excluded, num_chosen)


def checked(history: Sequence[int], num_clusters: int) -> list[int]:
    """A history as a list of Python's integers.

    Raises:
      InputError: something in it is no cluster id below `num_clusters`.
    """
    try:
        known = [operator.index(cluster) for cluster in history]
    except TypeError:
        known = [-1]
    if known and not (0 <= min(known) and max(known) < num_clusters):
        raise InputError(
            f"History {list(history)} names a cluster that the exploration table doesn't know; it "
            f"knows the whole numbers 0..{num_clusters - 1}. Take ids from the clusters that the "
            "table was made with."
        )
    return known


def _most_popular(popular: PopularValues, excluded: set[int], num_chosen: int) -> Exploration:
    found = Exploration([], [], [], [], POPULAR)
    for cluster, score, log_probability in zip(*popular, strict=True):
        if cluster not in excluded:
            for values, value in zip(found, (cluster, score, log_probability, 1.0), strict=False):
                values.append(value)
            if len(found.clusters) == num_chosen:
                break
    return found
