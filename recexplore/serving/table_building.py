"""The arrays of the compiled step → all rows of an exploration table, in order."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from recexplore.errors import InputError
from recexplore.serving.back_off import shorter_histories
from recexplore.serving.exploration import Answers, Popular
from recexplore.serving.table_files import About, Contents


def build(
    histories: Sequence[Sequence[int]],
    answers: tuple[Int[np.ndarray, "B k"], *tuple[Float[np.ndarray, "B k"], ...]],
    *,
    counts: Int[np.ndarray, "B"],
    popular: Popular,
    num_clusters: int,
    fingerprints: Mapping[str, str],
) -> Contents:
    """Adds what is answered to shorter histories, and puts all rows in order of their keys.

    Args:
      histories: as in `ExplorationTable.build`, as all that follows.
      answers: clusters, scores, log-probabilities, propensities.
      counts: how often users stood at each history.
      popular: clusters by popularity.
      num_clusters: M.
      fingerprints: of what the table is made from.

    Raises:
      InputError: a history stands there twice.
    """
    num_chosen, length = answers[0].shape[1], max(map(len, histories), default=1)
    about = About(length, num_chosen, num_clusters, len(histories), dict(fingerprints))
    rows = _answers(histories, answers, about)
    order, words = _in_order(rows, about)
    rows = Answers(*(values[order] for values in rows))
    same = np.all([word[1:] == word[:-1] for word in words], axis=0)
    if same.any():
        history = rows.histories[np.argmax(same)]
        raise InputError(
            f"The exploration table: history {history[history >= 0].tolist()} stands there twice. "
            "Name every history once."
        )
    every = [rows]
    for end in range(length - 1, 0, -1):
        every.append(shorter_histories(rows, counts[order], end, about.width))
    joined = Answers(*(np.concatenate(values) for values in zip(*every, strict=True)))
    exact = np.arange(len(joined.histories)) < len(histories)
    order, words = _in_order(joined, about)
    first = np.ones(len(order), bool)  # of equal keys the first is the models' own answer
    first[1:] = np.any([word[1:] != word[:-1] for word in words], axis=0)
    joined = Answers(*(values[order][first] for values in joined))
    exact = exact[order][first].astype(np.uint8)
    return Contents(about, [word[first] for word in words], exact, joined, popular)


def _answers(
    histories: Sequence[Sequence[int]], answers: Sequence[np.ndarray], about: About
) -> Answers:
    """In the layout of a table: histories and answers padded, zeros where no cluster is."""
    length = about.history_length
    padded = [[-1] * (length - len(history)) + list(history) for history in histories]
    missing = ((0, 0), (0, about.width - about.num_chosen))
    clusters, *others = answers
    filled = clusters >= 0
    return Answers(
        np.array(padded, np.int32).reshape(-1, length),
        np.pad(clusters, missing, constant_values=-1).astype(np.int32),
        *(np.pad(np.where(filled, x, 0), missing).astype(np.float32) for x in others),
    )


def _in_order(rows: Answers, about: About) -> tuple[np.ndarray, list[np.ndarray]]:
    """The order of the rows by their keys, the earlier of equal ones first, and the keys in it."""
    words = about.keys.pack_all(rows.histories)
    order = np.lexsort(words[::-1])
    return order, [word[order] for word in words]
