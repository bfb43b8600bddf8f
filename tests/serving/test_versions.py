"""Versions: a reader has the old one or the new one, whatever happens to the writer."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from small_tables import CLUSTERS, FINGERPRINTS, build, small

from recexplore.errors import InputError
from recexplore.serving import versions
from recexplore.serving.exploration_table import ExplorationTable, TableReader


def write(folder, offset):
    return small(offset).write(folder)


def first_score(folder):
    return ExplorationTable.open(folder, CLUSTERS).look_up([0, 1]).scores[0]


def test_the_newest_version_is_current_until_another_one_is_chosen(tmp_path):
    assert [write(tmp_path, offset) for offset in (0.0, 1.0, 2.0)] == [1, 2, 3]
    assert first_score(tmp_path) == 2.5
    versions.switch(tmp_path, 1)
    assert first_score(tmp_path) == 0.5
    assert write(tmp_path, 3.0) == 4 and first_score(tmp_path) == 3.5


def test_old_versions_go_when_they_are_told_to(tmp_path):
    for _ in range(5):
        write(tmp_path, 0.0)
    assert versions.all_versions(tmp_path) == [1, 2, 3, 4, 5]
    versions.switch(tmp_path, 2)
    assert versions.remove_old(tmp_path, keep=3) == [1, 3]
    assert versions.all_versions(tmp_path) == [2, 4, 5]
    assert versions.remove_old(tmp_path, keep=1) == [4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".turn", "000002", "current"]
    assert first_score(tmp_path) == 0.5


def test_what_cannot_be_switched_to_is_named(tmp_path):
    with pytest.raises(InputError, match="has no exploration table: the file current is missing"):
        ExplorationTable.open(tmp_path, CLUSTERS)
    write(tmp_path, 0.0)
    with pytest.raises(InputError, match="has no version 7; it has 1"):
        versions.switch(tmp_path, 7)
    with pytest.raises(InputError, match="must be at least 1"):
        versions.remove_old(tmp_path, keep=0)
    (tmp_path / "current").write_text("latest")
    with pytest.raises(InputError, match="says 'latest', not which version is current"):
        ExplorationTable.open(tmp_path, CLUSTERS)


def test_a_reader_changes_version_when_it_reloads(tmp_path):
    write(tmp_path, 0.0)
    reader = TableReader(tmp_path, CLUSTERS)
    assert not reader.reload()
    write(tmp_path, 1.0)
    versions.remove_old(tmp_path, keep=1)
    assert reader.look_up([0, 1]).scores[0] == 0.5
    assert reader.reload() and reader.table.version == 2
    assert reader.look_up([0, 1]).scores[0] == 1.5


def test_a_version_that_cannot_be_served_leaves_the_old_one_answering(tmp_path):
    write(tmp_path, 0.0)
    reader = TableReader(tmp_path, CLUSTERS)
    other = build({}, num_clusters=3, fingerprints={**FINGERPRINTS, "clusters": "d"})
    other.write(tmp_path)
    with pytest.raises(InputError, match="made with other clusters"):
        reader.reload()
    assert reader.look_up([0, 1]).scores[0] == 0.5


def test_no_look_up_fails_while_versions_come_and_go(tmp_path):
    write(tmp_path, 0.0)
    shared = TableReader(tmp_path, CLUSTERS)
    done, problems, seen = threading.Event(), [], set()

    def look():
        while not done.is_set():
            try:
                for found in (shared.look_up([0, 1]), shared.look_up([5, 1])):
                    seen.add(found.scores[0])
                shared.reload()
                seen.add(first_score(tmp_path))  # a process that starts just now
            except Exception as error:
                problems.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for offset in range(1, 40):
        write(tmp_path, float(offset))
        versions.remove_old(tmp_path, keep=1)
    done.set()
    for thread in threads:
        thread.join()
    assert not problems
    assert 39.5 in {first_score(tmp_path), *seen} and len(seen) > 3
    assert versions.all_versions(tmp_path) == [40]


def killed_writer(folder, stop_in):
    """Starts a process that writes a version and hangs in `stop_in`; kills it there."""
    code = f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from recexplore.serving import table_files, versions
        from small_tables import small

        def hang(*arguments):
            print("there", flush=True)
            time.sleep(600)

        {stop_in} = hang
        small(1.0).write({str(folder)!r})
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "there\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize(
    "stop_in", ["table_files.digest", "table_files.artifacts.write_json", "versions._point"]
)
def test_a_writer_killed_at_any_moment_leaves_the_old_version_current(tmp_path, stop_in):
    write(tmp_path, 0.0)
    killed_writer(tmp_path, stop_in)
    assert first_score(tmp_path) == 0.5
    write(tmp_path, 2.0)
    assert first_score(tmp_path) == 2.5
    versions.remove_old(tmp_path, keep=1)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left[0] == ".turn" and left[2:] == ["current"] and len(left) == 3


def test_writers_wait_for_each_other(tmp_path):
    threads = [threading.Thread(target=write, args=(tmp_path, float(i))) for i in range(8)]
    for thread in threads:
        thread.start()
        time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert versions.all_versions(tmp_path) == list(range(1, 9))
    for version in range(1, 9):
        versions.switch(tmp_path, version)
        ExplorationTable.open(tmp_path, CLUSTERS).check()
