"""The command as a person meets it."""

import fcntl
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from recexplore import artifacts, cli
from recexplore.distributed import processes
from recexplore.interests.cluster_table import ClusterTable
from recexplore.planning import open_planner
from recexplore.serving.exploration_table import ExplorationTable
from recexplore.serving.planner import Budget, Event, Request, impressions

TINY = """
from __gin__ import dynamic_registration
include 'runs/demo.gin'
from recexplore.simulation import world
from recexplore.training import optimization
from recexplore.training import trainer
from recexplore import pipeline

NUM_CLUSTERS = 20
world.Settings.num_users = 150
world.Settings.num_items = 300
world.simulate_log.num_days = 6
pipeline.train.batch_size = 16
optimization.Optimization.steps = 20
alignment/optimization.Optimization.steps = 20
items/optimization.Optimization.steps = 8
trainer.train.evaluate_every = 10
trainer.train.log_every = 5
"""

TWO_DEVICES = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "recexplore.cli", *arguments],
        capture_output=True,
        text=True,
        env=TWO_DEVICES,
    )


def refused(capsys, *arguments):
    """Runs a command that must fail; returns its one paragraph."""
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1] and "recexplore: " in error and "Traceback" not in error
    return " ".join(error.split())


def test_help_names_every_stage_and_loads_nothing_heavy():
    code = (
        "import sys; from recexplore import cli\n"
        "try: cli.main(['--help'])\n"
        "finally: print(sorted({'jax', 'tensorflow', 'ibis', 'pandas'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("[]\n")
    for stage in ("ingest", "cluster", "aggregate", "tokenize", "train", "explore", "report"):
        assert f"  {stage}" in result.stdout


def test_output_that_nobody_reads_on_is_no_error(tmp_path):
    flags = ["--dry_run", "--gin_file", "runs/demo.gin", "--workdir", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "recexplore.cli", "run", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path, capsys):
    work = tmp_path / "W"
    assert (
        cli.main(["run", "--workdir", str(work), "--gin_file", "runs/demo.gin", "--dry_run"]) == 0
    )
    said = capsys.readouterr().out
    assert "train alignment" in said and "writes: report.html" in said
    assert said.count("not made yet") == 11
    assert not work.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gin_file", "runs/nowhere.gin"], "gin file runs/nowhere.gin was not found. Looked in"),
        (
            ["--gin_file", "runs/demo.gin", "--gin.clustering.cluster_items.num_cluster=3"],
            "clustering.cluster_items has no argument 'num_cluster'. Did you mean num_clusters?",
        ),
        (
            ["--gin_file", "runs/demo.gin", "--gin.NUM_CLUSTER=3"],
            "nothing uses the name NUM_CLUSTER. Did you mean NUM_CLUSTERS?",
        ),
        (
            ["--gin_file", "runs/movielens_small.gin"],
            "MOVIELENS_DIR must be set",
        ),
        (
            ["--gin_file", "runs/movielens_small.gin", "--gin.MOVIELENS_DIR=/data"],
            "can't be parsed",
        ),
        (
            ["--gin_file", "runs/movielens_small.gin", "--gin.MOVIELENS_DIR='/no/such'"],
            "/no/such is not a folder",
        ),
    ],
)
def test_mistakes_are_one_paragraph_and_status_2(tmp_path, capsys, flags, message):
    assert message in refused(capsys, "ingest", "--workdir", str(tmp_path / "W"), *flags)


def test_an_unknown_model_and_a_missing_input_are_named(tmp_path, capsys):
    flags = ["--workdir", str(tmp_path / "W"), "--gin_file", "runs/demo.gin"]
    assert "It has: novelty, alignment, items." in refused(
        capsys, "train", "--model", "nove", *flags
    )
    error = refused(capsys, "train", "--model", "novelty", *flags)
    assert "is not up to date (not made yet)" in error and "`recexplore run`" in error


def test_a_full_disk_is_said_in_words(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr("recexplore.artifacts.write_table", full)
    error = refused(capsys, "ingest", "--workdir", str(tmp_path), "--gin_file", "runs/demo.gin")
    assert (
        "The disk is full while writing" in error and "Nothing that was finished is lost" in error
    )


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """The whole job, small, once and undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.gin").write_text(TINY)
    flags = ["--workdir", str(folder / "W"), "--gin_file", str(folder / "tiny.gin")]
    result = command("run", *flags)
    assert result.returncode == 0, result.stderr
    return folder, flags, result


def test_the_whole_job_ends_in_metrics_and_a_report(tiny_run):
    folder, _, result = tiny_run
    metrics = json.loads((folder / "W" / "metrics.json").read_text())
    baselines = ("popularity", "markov", "pair_markov", "ease", "nearest", "random_novel")
    ours = ("novelty", "alignment_only", "exhaustive", "best_of_1", "best_of_20", "best_of_n")
    for name in (*baselines, *ours):
        for suffix in ("", "_unseen"):
            low, value, high = (
                metrics[f"{name}/recall@10{suffix}{e}"] for e in ("_low", "", "_high")
            )
            assert 0 <= low <= value <= high <= 1
            assert 0 <= metrics[f"{name}/serendipity@10{suffix}"] <= value
    for name in ("random_novel", "novelty_only", "best_of_5", "exhaustive"):
        assert metrics[f"{name}/off_policy_ess"] >= 0  # the platform logs propensities
    assert 0 <= metrics["random_novel/off_policy_snips"] <= 1
    assert metrics["explore/valid_fraction"] == metrics["explore/novel_fraction"] == 1.0
    assert metrics["explore/distinct_clusters"] > 1
    assert {"alignment/pairwise_accuracy", "target_mean/pairwise_accuracy"} <= set(metrics)
    assert "<svg" in (folder / "W" / "report.html").read_text()
    assert (
        "Total number of parameters"
        in (folder / "W" / "models" / "novelty" / "model-info.txt").read_text()
    )
    answers = (folder / "W" / "evaluation" / "inference_eval" / "best_of_n.jsonl").read_text()
    first = json.loads(answers.splitlines()[0])
    assert first["inputs"]["inputs_pretokenized"].startswith("interests: ") and first["prediction"]
    for artefact in ("interactions", "clusters", "feedback", "models/novelty", "exploration"):
        assert (folder / "W" / artefact / "config.gin").exists()
    clusters = ClusterTable.read(folder / "W" / "clusters")
    table = ExplorationTable.open(folder / "W" / "exploration", clusters.fingerprint)
    table.check()
    made_of = {"clusters", "vocabulary", "novelty", "alignment", "job", "back_off"}
    assert set(table.about.fingerprints) == made_of
    assert len(table) == metrics["explore/histories"]
    assert table.look_up([]).level == "popular"
    assert (folder / "W" / "metrics.config.gin").exists()


def test_what_was_made_plans_items_for_its_users(tiny_run):
    work = tiny_run[0] / "W"
    clusters = ClusterTable.read(work / "clusters")
    table = ExplorationTable.open(work / "exploration", clusters.fingerprint)
    planner = open_planner(work, table.look_up, Budget(num_clusters=3, temperature=0.5))
    log = artifacts.read_table(
        work / "interactions" / "interactions.parquet", artifacts.INTERACTIONS
    ).to_pandas()
    cluster_of = dict(zip(*map(list, clusters.item_clusters.to_pydict().values()), strict=True))
    requests = []
    for user, rows in list(log.sort_values("timestamp").groupby("user_id"))[:20]:
        met = zip(rows["item_id"], rows["timestamp"], rows["skipped"], strict=True)
        events = [Event(item, int(when), bool(skipped)) for item, when, skipped in met]
        requests.append(Request(user, events, events[-1].timestamp + 1))
    plans = planner.plan_all(requests)
    assert sum(map(len, plans)) > 20
    for request, plan in zip(requests, plans, strict=True):
        met = {event.item_id for event in request.events}
        known = {cluster_of[event.item_id] for event in request.events}
        for planned in plan:
            assert planned.item_id not in met and planned.cluster not in known
            assert cluster_of[planned.item_id] == planned.cluster
    assert impressions(requests, plans)["user_id"].to_pylist()[0] in log["user_id"].tolist()


def test_a_second_run_does_nothing_and_says_so(tiny_run):
    folder, flags, _ = tiny_run
    before = (folder / "W" / "metrics.json").stat().st_mtime_ns
    result = command("run", *flags)
    assert [line.endswith(": up to date") for line in result.stderr.splitlines()] == [True] * 11
    assert (folder / "W" / "metrics.json").stat().st_mtime_ns == before


def test_a_run_killed_at_any_moment_ends_with_the_same_metrics(tiny_run, tmp_path):
    folder, _, _ = tiny_run
    flags = ["--workdir", str(tmp_path / "W"), "--gin_file", str(folder / "tiny.gin")]
    kills = 0
    for stage in ("clusters", "examples", "models/novelty/checkpoints/10", "models/alignment"):
        process = subprocess.Popen(
            [sys.executable, "-m", "recexplore.cli", "run", *flags],
            stderr=subprocess.DEVNULL,
            env=TWO_DEVICES,
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if (tmp_path / "W" / stage).exists():
                process.kill()
                kills += 1
            time.sleep(0.02)
        process.wait()
    assert kills >= 4
    assert command("run", *flags).returncode == 0
    undisturbed = (folder / "W" / "metrics.json").read_bytes()
    assert (tmp_path / "W" / "metrics.json").read_bytes() == undisturbed


def test_another_configuration_is_refused_and_changes_nothing(tiny_run, capsys):
    folder, flags, _ = tiny_run
    error = refused(capsys, "run", *flags, "--gin.NUM_CLUSTERS=21")
    assert "num_clusters was 20, now 21" in error and "--overwrite" in error
    assert command("run", *flags).stderr.count("up to date") == 11


def test_two_processes_train_and_explore_as_one_command(tmp_path):
    (tmp_path / "tiny.gin").write_text(TINY)
    flags = ("--workdir", str(tmp_path / "W"), "--gin_file", str(tmp_path / "tiny.gin"))
    for stage in ("ingest", "cluster", "aggregate", "tokenize"):
        assert cli.main([stage, *flags]) == 0
    with open(tmp_path / "W" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for process in together("train", *flags):  # the first one alone can see that
            assert process.returncode == 2 and "is in use" in " ".join(process.stderr.split())
    first, second = together("train", *flags)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "train alignment: done" in first.stderr and "done" not in second.stderr
    assert command("train", *flags).stderr.count("up to date") == 3
    first, second = together("explore", *flags, "--gin.pipeline.explore.shard_size=1")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "version 1 of the table" in first.stderr and "table" not in second.stderr
    clusters = ClusterTable.read(tmp_path / "W" / "clusters")
    ExplorationTable.open(tmp_path / "W" / "exploration", clusters.fingerprint).check()
    assert not (tmp_path / "W" / "exploration_shards").exists()
    for process in together("evaluate", *flags):
        assert process.returncode == 2 and "evaluate is for one" in " ".join(process.stderr.split())


def together(*arguments):
    """Runs a command in two processes that find each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    others = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "recexplore.cli", *arguments],
            env=TWO_DEVICES | others | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    ended = [process.communicate(timeout=400) for process in running]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *outputs)
        for process, outputs in zip(running, ended, strict=True)
    ]


def test_a_command_that_was_told_to_stop_begins_no_further_stage(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(processes, "stop_wanted", lambda: True)
    (tmp_path / "tiny.gin").write_text(TINY)
    flags = ("--workdir", str(tmp_path / "W"), "--gin_file", str(tmp_path / "tiny.gin"))
    assert cli.main(["ingest", *flags]) == 143
    assert "Run the same command again" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "W" / "interactions").exists()
