"""The exploration table: what was computed is what is looked up."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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
        np.array([[0.75, 1.0], [1.0, 0.0]]),
    )


def test_a_written_table_answers_as_before(tmp_path):
    table().write(tmp_path / "t.parquet")
    read = ExplorationTable.read(tmp_path / "t.parquet")
    assert read.look_up([0, 1]) == ([2, 3], [0.5, 0.25], [-1.0, -2.0], [0.75, 1.0])
    assert read.look_up([1, 0]) == ([4], [1.5], [-0.5], [1.0])
    assert read.look_up([2, 0]) is None and len(read) == 2


def test_its_metrics_count_what_it_shows():
    found = exploration_metrics(table(), 5)
    assert found["explore/valid_fraction"] == found["explore/novel_fraction"] == 1.0
    assert found["explore/distinct_clusters"] == 3.0
    assert found["explore/mean_chosen"] == 1.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"history": [[0, 1], [0, 1]]}, r"row 1, history \[0, 1\]: the history stands there twice"),
        ({"scores": [[0.1], []]}, "row 1.*lists of different lengths"),
        ({"clusters": [[2], [None]]}, "row 1.*a value is null"),
        ({"clusters": [[2], [-3]]}, "row 1.*not negative"),
        ({"scores": [[float("nan")], [0.2]]}, "row 0.*must be finite"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, changes, message):
    rows = {"history": [[0, 1], [1, 0]], "clusters": [[2], [3]]}
    rows |= {"scores": [[0.1], [0.2]], "log_probabilities": [[0.1], [0.2]]}
    rows |= {"propensities": [[1.0], [1.0]]}
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({**rows, **changes}).cast(artifacts.EXPLORATION_TABLE), path)
    with pytest.raises(InputError, match=message):
        ExplorationTable.read(path)
