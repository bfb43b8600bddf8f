"""An exploration table in the making: killed, divided, damaged, and the same in the end."""

import dataclasses
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recexplore import artifacts, cli, precompute
from recexplore.distributed import processes
from recexplore.errors import InputError
from recexplore.inference.selection import BestOfN
from recexplore.interests.cluster_table import ClusterTable
from recexplore.serving.exploration import Answers
from recexplore.serving.exploration_table import ExplorationTable
from recexplore.serving.shards import MANIFEST, Shard, Shards

TINY = """
from __gin__ import dynamic_registration
include 'runs/demo.gin'
from recexplore.inference import selection
from recexplore.simulation import world
from recexplore.training import optimization
from recexplore.training import trainer
from recexplore import pipeline

NUM_CLUSTERS = 20
world.Settings.num_users = 100
world.Settings.num_items = 300
world.simulate_log.num_days = 6
pipeline.train.batch_size = 16
optimization.Optimization.steps = 4
alignment/optimization.Optimization.steps = 4
trainer.train.evaluate_every = 4
trainer.train.log_every = 2
pipeline.explore.histories = 'pairs'
pipeline.explore.batch_size = 8
pipeline.explore.shard_size = 2
"""
CLUSTERS, NUM_SHARDS = 20, 24  # 19 histories begin alike: batches of 8, 8; 60 are left over

# orbax brings warnings of its own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setattr(processes, "_share", None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work directory in which only the table is missing."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.gin").write_text(TINY)
    flags = ["--workdir", str(folder / "W"), "--gin_file", str(folder / "tiny.gin")]
    for stage in ("ingest", "cluster", "aggregate", "tokenize", "train"):
        assert cli.main([stage, *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def undisturbed(trained, tmp_path_factory):
    """The bytes of a table that was made in one go."""
    work = tmp_path_factory.mktemp("undisturbed") / "W"
    shutil.copytree(trained / "W", work)
    assert cli.main(explore(trained, work)) == 0
    return table_bytes(work)


@pytest.fixture
def work(trained, tmp_path):
    shutil.copytree(trained / "W", tmp_path / "W")
    return tmp_path / "W"


def explore(trained, work, *more):
    return ["explore", "--workdir", str(work), "--gin_file", str(trained / "tiny.gin"), *more]


def table_bytes(work):
    version = work / "exploration" / "000001"
    files = sorted(version.iterdir())
    assert [file.name for file in files] == ["popular.arrow", "table.arrow", "table.json"]
    assert not (work / "exploration_shards").exists()
    return [file.read_bytes() for file in files]


def shards_of(work):
    return sorted((work / "exploration_shards").glob("*/shard-*.arrow"))


def words(text):
    return " ".join(text.split())


def killed_when(condition, arguments):
    process = subprocess.Popen([sys.executable, "-m", "recexplore.cli", *arguments])
    deadline = time.monotonic() + 240
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    killed = process.poll() is None
    process.kill()
    process.wait()
    return killed


def test_killed_again_and_again_it_ends_with_the_same_bytes(trained, work, undisturbed, capfd):
    kept = 0
    for _ in range(2):
        wanted = kept + 5
        assert killed_when(lambda n=wanted: len(shards_of(work)) >= n, explore(trained, work))
        kept = len(shards_of(work))
    assert not (work / "exploration").exists()
    times = {path: path.stat().st_mtime_ns for path in shards_of(work)}
    assert killed_when(lambda: len(shards_of(work)) > kept, explore(trained, work))
    assert all(path.stat().st_mtime_ns == when for path, when in times.items())
    assert cli.main(explore(trained, work)) == 0
    assert f"of {NUM_SHARDS} shards are there already" in words(capfd.readouterr().err)
    assert table_bytes(work) == undisturbed


def test_a_damaged_shard_is_computed_again(trained, work, undisturbed, capfd, monkeypatch):
    stop_after(monkeypatch, shards=6)
    assert cli.main(explore(trained, work)) == 143
    assert "shards are there. Run the same command again" in words(capfd.readouterr().err)
    monkeypatch.undo()
    first, second, third = shards_of(work)[:3]
    os.truncate(first, first.stat().st_size // 2)
    data = bytearray(second.read_bytes())
    place = data.find(np.float32(1).tobytes() * 5)  # propensities
    data[place + 2] ^= 1
    second.write_bytes(data)
    shutil.copy(shards_of(work)[4], third)
    assert cli.main(explore(trained, work)) == 0
    said = words(capfd.readouterr().err)
    assert f"{first} can't be read as Arrow" in said
    assert f"{second} isn't what was written: its digest differs" in said
    assert f"{third} has the answers to other histories" in said
    assert said.count("computes it again, and keeps the others") == 3
    assert table_bytes(work) == undisturbed


def stop_after(monkeypatch, shards):
    """As SIGTERM would, once so many shards were written."""
    written, write = [], Shards.write

    def counted(self, number, shard):
        write(self, number, shard)
        written.append(number)

    monkeypatch.setattr(Shards, "write", counted)
    monkeypatch.setattr(processes, "stop_wanted", lambda: len(written) >= shards)


def test_workers_that_know_nothing_of_each_other_make_one_table(trained, work, undisturbed, capfd):
    for share in ("0/3", "2/3", "0/3"):  # one of them twice
        assert cli.main(explore(trained, work, "--shard", share)) == 0
        assert "Whoever finishes the last of them makes the table" in words(capfd.readouterr().err)
    assert len(shards_of(work)) == 16 and not (work / "exploration").exists()
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "recexplore.cli", *explore(trained, work, "--shard", "1/3")]
        )
        for _ in range(2)  # at the same time, with the same number
    ]
    assert [process.wait() for process in running] == [0, 0]
    assert table_bytes(work) == undisturbed
    assert cli.main(explore(trained, work, "--shard", "1/3")) == 0  # one comes late
    assert "explore: up to date" in capfd.readouterr().err
    assert table_bytes(work) == undisturbed


def test_workers_with_different_settings_are_told(trained, work, capfd):
    assert cli.main(explore(trained, work, "--shard", "0/2")) == 0
    assert "another job" not in capfd.readouterr().err
    sizes = "--gin.pipeline.explore.batch_size=7"
    assert cli.main(explore(trained, work, "--shard", "1/2", sizes)) == 0
    said = words(capfd.readouterr().err)
    assert "belongs to another job: " in said and "settings.batch_size was 8, now 7" in said


def test_a_worker_whose_table_was_made_meanwhile_leaves_it_alone(
    trained, work, undisturbed, monkeypatch
):
    write = Shards.write

    def others_finish(self, number, shard):
        monkeypatch.setattr(Shards, "write", write)
        monkeypatch.setattr(processes, "_share", None)
        assert cli.main(explore(trained, work, "--shard", "1/2")) == 0
        assert cli.main(explore(trained, work, "--shard", "0/2")) == 0
        monkeypatch.setattr(processes, "_share", (0, 2))
        write(self, number, shard)

    monkeypatch.setattr(Shards, "write", others_finish)
    assert cli.main(explore(trained, work, "--shard", "0/2")) == 0
    assert table_bytes(work) == undisturbed


def test_a_full_disk_loses_nothing_that_was_finished(trained, tmp_path, undisturbed, capfd):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(file.stat().st_size for file in (trained / "W").rglob("*") if file.is_file())
    blocks = sum(-(-file.stat().st_size // 4096) for file in (trained / "W").rglob("*"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={(blocks + 120) * 4096}", "tmpfs", str(disk)]
    made = subprocess.run(mount, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no small disk can be made here to be filled ({made.stderr.strip()})")
    try:
        shutil.copytree(trained / "W", disk / "W")
        assert size < blocks * 4096
        free = os.statvfs(disk)
        (disk / "ballast").write_bytes(bytes((free.f_bavail - 14) * free.f_bsize))
        assert cli.main(explore(trained, disk / "W")) == 2
        said = words(capfd.readouterr().err)
        assert "The disk is full" in said and "free some space" in said
        kept = {path: path.stat().st_mtime_ns for path in shards_of(disk / "W")}
        assert kept and not list((disk / "W").glob("exploration_shards/*/.*.tmp"))
        (disk / "ballast").unlink()
        assert cli.main(explore(trained, disk / "W")) == 0
        assert f"{len(kept)} of {NUM_SHARDS} shards are there" in words(capfd.readouterr().err)
        assert table_bytes(disk / "W") == undisturbed
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_histories_may_come_from_a_file(trained, work, tmp_path):
    path = tmp_path / "histories.parquet"
    asked = [[3, 4], [5], [4, 3], [7, 8, 9]]
    pq.write_table(pa.table({"history": asked, "count": [1, 2, 3, 4]}), path)
    flag = f"--gin.pipeline.explore.histories='{path}'"
    assert cli.main(explore(trained, work, flag)) == 0
    clusters = ClusterTable.read(work / "clusters")
    table = ExplorationTable.open(work / "exploration", clusters.fingerprint)
    assert sorted(history for history, _ in table) == sorted(map(tuple, asked))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"other": [1]}, "no column 'history' of lists of whole numbers"),
        ({"history": ["a"]}, "no column 'history' of lists of whole numbers"),
        ({"history": [[1, 2], [2, 20]]}, r"row 1 is \[2, 20\]. .* each once, of 0..19"),
        ({"history": [[1, 1]]}, r"row 0 is \[1, 1\]"),
        ({"history": [[1], []]}, r"row 1 is \[\]"),
        ({"history": [[1, None]]}, "row 0 is"),
        ({"history": [[1, 2], [3], [1, 2]]}, r"\[1, 2\] stands twice \(row 2\)"),
        ({"history": [[1]], "count": [-1]}, "'count' must hold whole numbers from 0 on"),
        ({"history": [], "count": []}, "no column 'history' of lists of whole numbers"),
        ({"history": [[1]], "count": [0.5]}, "'count' must hold whole numbers from 0 on"),
    ],
)
def test_files_that_are_no_histories_are_refused(tmp_path, columns, message):
    path = tmp_path / "histories.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(InputError, match=message):
        precompute.read_histories(str(path), CLUSTERS)
    with pytest.raises(InputError, match="there is no such file"):
        precompute.read_histories(str(tmp_path / "missing.parquet"), CLUSTERS)
    path.write_text("no Parquet")
    with pytest.raises(InputError, match="can't be read as Parquet.*'log', 'pairs', or the path"):
        precompute.read_histories(str(path), CLUSTERS)


@pytest.mark.parametrize("banned", [3, "3", [1, 2.0], [True], [-1], (0, CLUSTERS)])
def test_what_bans_no_cluster_is_refused(banned):
    with pytest.raises(InputError, match=rf"pipeline.explore.banned is .* of 0..{CLUSTERS - 1}"):
        precompute.check_banned(banned, CLUSTERS)


def job(**changes):
    defaults = dict(
        banned=[3],
        settings=BestOfN(num_samples=4, num_chosen=2),
        seed=0,
        batch_size=4,
        shard_size=2,
        made_from={"clusters": "c", "vocabulary": "v", "novelty": "n", "alignment": "a"},
    )
    return precompute.plan([[a, b] for a in range(4) for b in range(4)], **defaults | changes)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"made_from": {"clusters": "c", "novelty": "m"}}, "made_from.alignment was a, now None"),
        ({"settings": BestOfN(num_samples=5, num_chosen=2)}, "settings.num_samples was 4, now 5"),
        ({"banned": [3, 5]}, r"settings.banned was \[3\], now \[3, 5\]"),
        ({"seed": 1}, "settings.seed was 0, now 1"),
        ({"batch_size": 3}, "settings.batch_size was 4, now 3"),
    ],
)
def test_shards_of_another_job_are_refused(tmp_path, changes, difference):
    Shards(tmp_path, job().manifest)
    Shards(tmp_path, job().manifest)
    other = job(**changes).manifest
    assert other.digest != job().manifest.digest
    with pytest.raises(InputError, match=f"{difference}. Remove the folder to begin anew"):
        Shards(tmp_path, other)


def test_a_manifest_that_is_none_is_refused(tmp_path):
    artifacts.write_json(tmp_path / MANIFEST, [1])
    with pytest.raises(InputError, match="is not what recexplore writes"):
        Shards(tmp_path, job().manifest)


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"shard_size": 0}])
def test_sizes_must_be_positive(changes):
    (name,) = changes
    with pytest.raises(InputError, match=f"pipeline.explore.{name} is 0; it must be at least 1"):
        job(**changes)


def test_what_is_written_is_read_back_in_the_order_of_the_histories(tmp_path):
    planned = job()
    shards = Shards(tmp_path, planned.manifest)
    random = np.random.default_rng(0)
    for number, batches in enumerate(planned.shards):
        rows = np.concatenate(batches)
        answers = Answers(
            planned.histories[rows],
            rows[:, None].astype(np.int32) + np.array([[0, 100]], np.int32),
            *random.random((3, len(rows), 2), np.float32),
        )
        shards.write(number, Shard(answers, rows.astype(np.int32), -rows.astype(np.int32)))
        assert shards.missing() == list(range(number + 1, len(planned.shards)))
        assert shards.is_there(number, planned.histories[rows])
    found = precompute.collect(planned, tmp_path)
    np.testing.assert_array_equal(found.answers.histories, planned.histories)
    np.testing.assert_array_equal(found.answers.clusters[:, 0], np.arange(16))
    np.testing.assert_array_equal(found.num_allowed, -np.arange(16))
    assert dataclasses.asdict(planned.manifest)["num_shards"] == 2
