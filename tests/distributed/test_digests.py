"""What was written is told from what lies there, whoever wrote it and however many look."""

import json
import zlib

import pytest

from recexplore.distributed import digests

FILES = {
    "position/default": b"{}",
    "state/manifest.ocdbt": b"manifest",
    "state/ocdbt.process_0/d/0": bytes(range(256)) * 20,
    "state/ocdbt.process_0/d/1": b"",
    "state/ocdbt.process_1/d/0": b"one" * 1000,
    "state/ocdbt.process_10/d/0": b"ten" * 999,
}
WRITERS = (0, 1, 10)


@pytest.fixture
def checkpoint(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for process in WRITERS:
        digests.write(tmp_path, process)
    return tmp_path


def found(folder, processes):
    return [text for i in range(processes) if (text := digests.find_damage(folder, i, processes))]


def test_each_process_writes_down_its_own_files(checkpoint):
    told = {}
    for process in WRITERS:
        mine = json.loads((checkpoint / f"digests.process_{process}.json").read_text())
        assert not told.keys() & mine.keys()
        told |= mine
    assert told == {name: [len(data), zlib.crc32(data)] for name, data in FILES.items()}
    digests.write(checkpoint, 0)  # again: digests are no files of the checkpoint
    assert found(checkpoint, 1) == []


@pytest.mark.parametrize("processes", [1, 2, 3, 11])
@pytest.mark.parametrize("name", [name for name, content in FILES.items() if content])
def test_damage_is_found_by_one_of_however_many(name, processes, checkpoint):
    assert found(checkpoint, processes) == []
    path, content = checkpoint / name, FILES[name]
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert found(checkpoint, processes) == [f"{name} isn't what was written"]
    path.write_bytes(content[:-1])
    counts = f"{len(content) - 1:,} bytes, not {len(content):,}"
    assert found(checkpoint, processes) == [f"{name} has {counts}"]
    path.unlink()
    assert found(checkpoint, processes) == [f"{name} is missing"]


def test_what_another_process_is_writing_down_is_no_file_of_the_checkpoint(checkpoint):
    (checkpoint / "digests.process_1.json").rename(checkpoint / "digests.process_1.tmp")
    digests.write(checkpoint, 0)
    (checkpoint / "digests.process_1.tmp").rename(checkpoint / "digests.process_1.json")
    assert digests.find_damage(checkpoint) == ""


def test_some_files_can_be_looked_at_alone(checkpoint):
    (checkpoint / "state/manifest.ocdbt").unlink()
    assert digests.find_damage(checkpoint, under="position/") == ""
    assert digests.find_damage(checkpoint, under="state/m") == "state/manifest.ocdbt is missing"


def test_digests_themselves_can_be_damaged_or_missing(checkpoint):
    path = checkpoint / "digests.process_1.json"
    path.write_text(path.read_text()[:-3])
    assert digests.find_damage(checkpoint) == "digests.process_1.json can't be read"
    path.unlink()
    (checkpoint / "state/ocdbt.process_1/d/0").write_bytes(b"")
    assert digests.find_damage(checkpoint) == ""  # nobody has told what was there
