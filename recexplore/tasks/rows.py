"""Tokenised examples → rows of a batch, in numpy.

`tokens` [k, W] and what else there is of k examples come padded to whatever length; a grid of
example ids [R, E], `order.ABSENT` where there is none, says which row and place each of them goes
to. The k examples stand in the grid's order, row after row.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from recexplore.tasks.order import ABSENT

Arrays = dict[str, np.ndarray]


def single_rows(
    examples: Mapping[str, np.ndarray],
    grid: Int[np.ndarray, "R 1"],
    max_length: int,
    num_clusters: int,
) -> Arrays:
    """Rows of one example each.

    Args:
      examples: `tokens` int [k, W], `prompt_lengths`, `lengths` int [k], `seen` int [k, S] cluster
        ids and −1, `label`, `weight` float [k]; for pairs `other_tokens` and `other_lengths` too.
      grid: example ids.
      max_length: T.
      num_clusters: M.

    Returns:
      `tokens` int32 [R, T], prompt, description and EOS, right-padded; `prompt_lengths` and
      `lengths` int32 [R], which all masks come from; `seen` bool [R, M]; `label` and `weight`
      float32 [R]; `example_id` int64 [R]; for pairs `other_tokens` int32 [R, T] and `other_lengths`
      int32 [R], with the worse description. Absent ones weigh 0 and have one token of padding.
    """
    scalars = _scalars(examples, grid, num_clusters)
    rows, _ = np.nonzero(grid != ABSENT)
    made = {name: values[:, 0] for name, values in scalars.items()}
    for tokens, lengths in (("tokens", "lengths"), ("other_tokens", "other_lengths")):
        if tokens in examples:
            (example, within), values = _spread(examples[tokens], examples[lengths])
            made[tokens] = np.zeros((len(grid), max_length), np.int32)
            made[tokens][rows[example], within] = values
            made[lengths] = np.ones(len(grid), np.int32)
            made[lengths][rows] = examples[lengths]
    return made


def packed_rows(
    examples: Mapping[str, np.ndarray],
    grid: Int[np.ndarray, "R E"],
    max_length: int,
    num_clusters: int,
) -> Arrays:
    """Rows of up to E examples, one behind the other.

    Two examples of 3 and 2 tokens in a row of T = 6 and E = 3:

        segment_ids  1 1 1 2 2 0      starts   0 3 0
        positions    0 1 2 0 1 0      lengths  3 2 0

    Args:
      examples: as for `single_rows`, without pairs.
      grid: example ids.
      max_length: T.
      num_clusters: M.

    Returns:
      `tokens`, `segment_ids` (1..E, 0 for padding) and `positions` (within the example) int32
      [R, T]; `starts`, `prompt_lengths`, `lengths` int32 [R, E]; `seen` bool [R, E, M]; `label` and
      `weight` float32 [R, E]; `example_id` int64 [R, E]. Absent examples have id −1, weight 0,
      length 0, prompt length 1 and start 0.
    """
    made = _scalars(examples, grid, num_clusters)
    real = grid != ABSENT
    lengths = made["lengths"]
    made["starts"] = np.where(real, np.cumsum(lengths, axis=1) - lengths, 0).astype(np.int32)
    rows, slots = np.nonzero(real)
    (example, within), values = _spread(examples["tokens"], examples["lengths"])
    where = rows[example], made["starts"][rows, slots][example] + within
    shape = len(grid), max_length
    for name, numbers in (
        ("tokens", values),
        ("segment_ids", slots[example] + 1),
        ("positions", within),
    ):
        made[name] = np.zeros(shape, np.int32)
        made[name][where] = numbers
    return made


def _scalars(examples: Mapping[str, np.ndarray], grid: np.ndarray, num_clusters: int) -> Arrays:
    """What doesn't depend on tokens' places, laid out as the grid."""
    real = grid != ABSENT

    def laid_out(name: str, kind: type, absent: int) -> np.ndarray:
        values = np.full(grid.shape, absent, kind)
        values[real] = examples[name]
        return values

    example, which = np.nonzero(examples["seen"] >= 0)
    seen = np.zeros((len(examples["seen"]), num_clusters), bool)
    seen[example, examples["seen"][example, which]] = True
    all_seen = np.zeros((*grid.shape, num_clusters), bool)
    all_seen[real] = seen
    return {
        "prompt_lengths": laid_out("prompt_lengths", np.int32, 1),
        "lengths": laid_out("lengths", np.int32, 0),
        "seen": all_seen,
        "label": laid_out("label", np.float32, 0),
        "weight": laid_out("weight", np.float32, 0),
        "example_id": grid.astype(np.int64),
    }


def _spread(
    tokens: np.ndarray, lengths: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Of every token that is no padding: its example and place, and the token."""
    at = np.nonzero(np.arange(tokens.shape[1]) < lengths[:, None])
    return at, tokens[at]
