"""Tokenised examples → rows of a batch, in numpy.

What there is of k examples comes padded to whatever length: `inputs`, `targets` and, of pairs,
`rejected` int [k, …] token ids, `seen` int [k, …] cluster ids, each with `NOTHING` behind its end;
`label` and `weight` float [k]. A grid of example ids [R, E], `order.ABSENT` where there is none,
says which row and place each of them goes to; the k examples stand in its order, row after row.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from recexplore.tasks.order import ABSENT

NOTHING = -1
Arrays = dict[str, np.ndarray]


class Shape(NamedTuple):
    """What rows look like.

    Attributes:
      max_length: T.
      room: tokens of a prompt at most; a longer one loses its oldest tokens after the prefix.
      prefix_length: tokens that all prompts begin with.
      num_clusters: M.
    """

    max_length: int
    room: int
    prefix_length: int
    num_clusters: int


def single_rows(
    examples: Mapping[str, np.ndarray], grid: Int[np.ndarray, "R 1"], shape: Shape
) -> Arrays:
    """Rows of one example each.

    Args:
      examples: k of them.
      grid: example ids.
      shape: T and so on.

    Returns:
      `tokens` int32 [R, T], prompt, description and EOS, right-padded; `prompt_lengths` and
      `lengths` int32 [R], which all masks come from; `seen` bool [R, M]; `label` and `weight`
      float32 [R]; `example_id` int64 [R]; for pairs `other_tokens` int32 [R, T] and `other_lengths`
      int32 [R], with the worse description. An absent example has id −1, weight 0 and a padding
      token for a prompt.
    """
    made = _beside_tokens(examples, grid, shape)
    made = {name: values[:, 0] for name, values in made.items()}
    rows, _ = np.nonzero(grid != ABSENT)
    for description, name, lengths in (
        ("targets", "tokens", "lengths"),
        ("rejected", "other_tokens", "other_lengths"),
    ):
        if description in examples:
            joined = join(examples["inputs"], examples[description], shape)
            tokens = joined.tokens[:, : shape.max_length]
            made[name] = np.zeros((len(grid), shape.max_length), np.int32)
            made[name][rows, : tokens.shape[1]] = np.where(tokens == NOTHING, 0, tokens)
            made[lengths] = _laid_out(joined.lengths, grid, np.int32, 1)[:, 0]
    return made


def packed_rows(
    examples: Mapping[str, np.ndarray], grid: Int[np.ndarray, "R E"], shape: Shape
) -> Arrays:
    """Rows of up to E examples, one behind the other.

    Two examples of 3 and 2 tokens in a row of T = 6 and E = 3:

        segment_ids  1 1 1 2 2 0      starts   0 3 0
        positions    0 1 2 0 1 0      lengths  3 2 0

    Args:
      examples: k of them, no pairs.
      grid: example ids.
      shape: T and so on.

    Returns:
      `tokens`, `segment_ids` (1..E, 0 for padding) and `positions` (within the example) int32
      [R, T]; `starts`, `prompt_lengths`, `lengths` int32 [R, E]; `seen` bool [R, E, M]; `label` and
      `weight` float32 [R, E]; `example_id` int64 [R, E]. An absent example has id −1, weight 0,
      start 0, length 0 and prompt length 1.
    """
    made = _beside_tokens(examples, grid, shape)
    real = grid != ABSENT
    joined = join(examples["inputs"], examples["targets"], shape)
    lengths = _laid_out(joined.lengths, grid, np.int32, 0)
    starts = np.where(real, np.cumsum(lengths, axis=1) - lengths, 0)
    made |= {"starts": starts.astype(np.int32), "lengths": lengths}
    rows, slots = np.nonzero(real)
    example, place = np.nonzero(joined.tokens != NOTHING)
    where = rows[example], starts[rows, slots][example] + place
    for name, values in (
        ("tokens", joined.tokens[example, place]),
        ("segment_ids", slots[example] + 1),
        ("positions", place),
    ):
        made[name] = np.zeros((len(grid), shape.max_length), np.int32)
        made[name][where] = values
    return made


class Joined(NamedTuple):
    """Prompts and what follows them, `NOTHING` behind the end, and how many tokens that is."""

    tokens: Int[np.ndarray, "k W"]
    lengths: Int[np.ndarray, "k"]


def join(
    inputs: Int[np.ndarray, "k P"], description: Int[np.ndarray, "k D"], shape: Shape
) -> Joined:
    """Prompts, cut to the room there is, with descriptions behind them."""
    real = inputs != NOTHING
    too_many = np.maximum(real.sum(axis=1, keepdims=True) - shape.room, 0)
    column = np.arange(inputs.shape[1])[None, :]
    kept = real & ((column < shape.prefix_length) | (column >= shape.prefix_length + too_many))
    both = np.concatenate([np.where(kept, inputs, NOTHING), description], axis=1)
    real_first = np.argsort(both == NOTHING, axis=1, kind="stable")
    return Joined(
        np.take_along_axis(both, real_first, axis=1),
        np.sum(both != NOTHING, axis=1),
    )


def _beside_tokens(examples: Mapping[str, np.ndarray], grid: np.ndarray, shape: Shape) -> Arrays:
    example, column = np.nonzero(examples["seen"] != NOTHING)
    seen = np.zeros((len(examples["seen"]), shape.num_clusters), bool)
    seen[example, examples["seen"][example, column]] = True
    all_seen = np.zeros((*grid.shape, shape.num_clusters), bool)
    all_seen[grid != ABSENT] = seen
    prompt_lengths = np.minimum(np.sum(examples["inputs"] != NOTHING, axis=1), shape.room)
    return {
        "prompt_lengths": _laid_out(prompt_lengths, grid, np.int32, 1),
        "seen": all_seen,
        "label": _laid_out(examples["label"], grid, np.float32, 0),
        "weight": _laid_out(examples["weight"], grid, np.float32, 0),
        "example_id": grid.astype(np.int64),
    }


def _laid_out(values: np.ndarray, grid: np.ndarray, kind: type, absent: int) -> np.ndarray:
    laid_out = np.full(grid.shape, absent, kind)
    laid_out[grid != ABSENT] = values
    return laid_out
