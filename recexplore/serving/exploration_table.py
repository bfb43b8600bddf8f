"""The exploration table: every history's answer, computed beforehand."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from recexplore import artifacts
from recexplore.errors import InputError

_REMEDY = "Run `recexplore explore` again."


class Exploration(NamedTuple):
    """The clusters chosen for one history, best first, with both models' opinions.

    Attributes:
      clusters: cluster ids.
      scores: the alignment model's.
      log_probabilities: the novelty model's.
      propensities: with which probability each was chosen among the proposals, given those before
        it; 1 where the choice was not randomised.
    """

    clusters: list[int]
    scores: list[float]
    log_probabilities: list[float]
    propensities: list[float]


class ExplorationTable:
    """History → exploration.

    Args:
      table: EXPLORATION_TABLE.
      source: what error messages call it.

    Raises:
      InputError: a row has a null or a value that is no number, its lists are of different
        lengths, it names a cluster twice or a negative one, or its history was there before.
    """

    def __init__(self, table: pa.Table, source: str | Path = "The exploration table"):
        columns = [table[name].to_pylist() for name in artifacts.EXPLORATION_TABLE.names]
        self._rows: dict[tuple[int, ...], Exploration] = {}
        for row, (history, *answer) in enumerate(zip(*columns, strict=True)):
            problem = _problem(history, *answer)
            if problem is None and tuple(history) in self._rows:
                problem = "the history stands there twice"
            if problem is not None:
                raise InputError(f"{source}: row {row}, history {history}: {problem}. {_REMEDY}")
            self._rows[tuple(history)] = Exploration(*answer)
        self._table = table

    @classmethod
    def build(
        cls,
        histories: Sequence[Sequence[int]],
        clusters: Int[np.ndarray, "B k"],
        scores: Float[np.ndarray, "B k"],
        log_probabilities: Float[np.ndarray, "B k"],
        propensities: Float[np.ndarray, "B k"],
    ) -> "ExplorationTable":
        """From the arrays of the compiled step; -1 marks places that weren't filled."""
        filled = [row >= 0 for row in clusters]

        def lists(values):
            return [row[kept].tolist() for row, kept in zip(values, filled, strict=True)]

        answers = (clusters, scores, log_probabilities, propensities)
        columns = [list(map(list, histories)), *map(lists, answers)]
        table = pa.table(dict(zip(artifacts.EXPLORATION_TABLE.names, columns, strict=True)))
        return cls(table.cast(artifacts.EXPLORATION_TABLE))

    @classmethod
    def read(cls, path: Path) -> "ExplorationTable":
        """Reads a table.

        Raises:
          InputError: the file is missing, damaged, or not an exploration table.
        """
        return cls(artifacts.read_table(path, artifacts.EXPLORATION_TABLE), path)

    def write(self, path: Path) -> None:
        """Writes the table as Parquet, atomically."""
        artifacts.write_table(path, self._table, artifacts.EXPLORATION_TABLE)

    def look_up(self, history: Sequence[int]) -> Exploration | None:
        """The exploration of a history, oldest cluster first; None if it isn't in the table."""
        return self._rows.get(tuple(history))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], Exploration]]:
        return iter(self._rows.items())


def _problem(history, clusters, scores, log_probabilities, propensities) -> str | None:
    """What is wrong with a row, if anything is."""
    answer = (clusters, scores, log_probabilities, propensities)
    if any(each is None or None in each for each in (history, *answer)):
        return "a value is null"
    if len(set(map(len, answer))) != 1:
        return (
            f"lists of different lengths: {len(clusters)} clusters, {len(scores)} scores, "
            f"{len(log_probabilities)} log_probabilities, {len(propensities)} propensities"
        )
    if len(set(clusters)) != len(clusters) or min((*history, *clusters), default=0) < 0:
        return f"clusters {clusters} must be distinct and, like the history, not negative"
    if not all(map(np.isfinite, (*scores, *log_probabilities, *propensities))):
        return "scores, log_probabilities and propensities must be finite"
    return None
