"""The exploration table: what was computed is what is looked up."""

import numpy as np
import pyarrow as pa
import pytest

from recexplore import artifacts
from recexplore.errors import InputError
from recexplore.evaluation.offline import exploration_metrics
from recexplore.serving.exploration_table import ExplorationTable


def table():
    return ExplorationTable.build(
        [[0, 1], [1, 0]],
        np.array([[2, 3], [4, -1]]),
        np.array([[0.5, 0.25], [1.5, -np.inf]]),
        np.array([[-1.0, -2.0], [-0.5, -np.inf]]),
    )


def test_a_written_table_answers_as_before(tmp_path):
    table().write(tmp_path / "t.parquet")
    read = ExplorationTable.read(tmp_path / "t.parquet")
    assert read.look_up([0, 1]) == ([2, 3], [0.5, 0.25], [-1.0, -2.0])
    assert read.look_up([1, 0]) == ([4], [1.5], [-0.5])
    assert read.look_up([2, 0]) is None and len(read) == 2


def test_its_metrics_count_what_it_shows():
    found = exploration_metrics(table(), 5)
    assert found["explore/valid_fraction"] == found["explore/novel_fraction"] == 1.0
    assert found["explore/distinct_clusters"] == 3.0
    assert found["explore/mean_chosen"] == 1.5


def test_damaged_tables_are_refused(tmp_path):
    rows = {"history": [[0, 1], [0, 1]], "clusters": [[2], [3]]}
    rows |= {"scores": [[0.1], [0.2]], "log_probabilities": [[0.1], [0.2]]}
    twice = pa.table(rows)
    artifacts.write_table(tmp_path / "t.parquet", twice, artifacts.EXPLORATION_TABLE)
    with pytest.raises(InputError, match=r"history \[0, 1\] twice"):
        ExplorationTable.read(tmp_path / "t.parquet")
    ragged = pa.table({**rows, "history": [[0, 1], [1, 0]], "scores": [[0.1], []]})
    artifacts.write_table(tmp_path / "t.parquet", ragged, artifacts.EXPLORATION_TABLE)
    with pytest.raises(InputError, match="lists of different lengths"):
        ExplorationTable.read(tmp_path / "t.parquet")
