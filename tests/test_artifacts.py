"""Nothing half-written is ever read."""

import pyarrow as pa
import pytest

from recexplore import artifacts
from recexplore.errors import InputError

SCHEMA = pa.schema([pa.field("a", pa.int32(), nullable=False), pa.field("b", pa.string())])


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "x.json"
    artifacts.write_json(path, {"old": 1})
    with pytest.raises(RuntimeError):
        with artifacts.new_file(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert artifacts.read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    for text in ("old", "new"):
        with artifacts.new_folder(tmp_path / "f") as folder:
            (folder / "x").write_text(text)
    with pytest.raises(RuntimeError):
        with artifacts.new_folder(tmp_path / "f") as folder:
            (folder / "x").write_text("half")
            raise RuntimeError
    assert (tmp_path / "f" / "x").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / ".f.12345678.tmp").mkdir()
    (tmp_path / ".x.json.12345678.tmp").write_text("half")
    (tmp_path / "x.json").write_text("{}")
    artifacts.remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_tables_are_cast_on_the_way_in_and_checked_on_the_way_out(tmp_path):
    path = tmp_path / "t.parquet"
    artifacts.write_table(path, pa.table({"b": ["x"], "a": [1], "c": [0]}), SCHEMA)
    assert artifacts.read_table(path, SCHEMA).to_pylist() == [{"a": 1, "b": "x"}]
    other = pa.schema([pa.field("a", pa.int64())])
    with pytest.raises(InputError, match=r"column a \(expected int64, found int32\)"):
        artifacts.read_table(path, other)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [1]}, r"column\(s\) b missing"),
        ({"a": ["x"], "b": ["y"]}, "doesn't fit its schema"),
        ({"a": [None], "b": ["y"]}, "null"),
    ],
)
def test_tables_that_do_not_fit_are_not_written(tmp_path, columns, message):
    with pytest.raises(InputError, match=message):
        artifacts.write_table(tmp_path / "t.parquet", pa.table(columns), SCHEMA)
    assert not (tmp_path / "t.parquet").exists()


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(InputError, match="t.parquet is missing"):
        artifacts.read_table(tmp_path / "t.parquet", SCHEMA)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="can't be read as Parquet"):
        artifacts.read_table(tmp_path / "t.parquet", SCHEMA)
    (tmp_path / "j.json").write_text('{"a":')
    with pytest.raises(InputError, match="not valid JSON"):
        artifacts.read_json(tmp_path / "j.json")
