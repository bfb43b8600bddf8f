"""The experiment as a person runs it, on a platform small enough for a test."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from recexplore import cli, pipeline
from recexplore.configuration import Configuration
from recexplore.errors import InputError
from recexplore.evaluation.experiment_page import ARMS

TINY = """
from __gin__ import dynamic_registration
include 'runs/experiment.gin'
include 'quick.gin'
from recexplore import experiments
from recexplore import pipeline
from recexplore.evaluation import experiment
from recexplore.simulation import world
from recexplore.training import optimization
from recexplore.training import policy_gradient
from recexplore.training import trainer

NUM_USERS = 1500
NUM_CLUSTERS = 20
TUNED = {'policy_gradient': {'decoding': 'constrained'}}
LOG_DAYS = 6
EXPERIMENT_DAYS = 3
world.Settings.num_items = 300
pipeline.aggregate.burn_in_days = 1
pipeline.train.batch_size = 16
optimization.Optimization.steps = 20
alignment/optimization.Optimization.steps = 20
items/optimization.Optimization.steps = 8
trainer.train.evaluate_every = 10
policy_gradient.PolicyGradient.steps = 4
policy_gradient.PolicyGradient.evaluate_every = 2
policy_gradient.PolicyGradient.prompts_per_step = 8
experiments.tune.evaluated = 16
experiments.experiment.truth_users = 1500
experiments.experiment.num_visits = 200
experiments.experiment.randomised_days = 3
experiment.Experiment.bootstrap_samples = 100
"""
SCRIPTS = Path(__file__).parent.parent / "scripts"
METRICS = (
    "positive_playback_rate",
    "completion_rate",
    "ueuc",
    "novel_share",
    "distinct_clusters",
    "daily_active_users",
    "interests_gained",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    (folder / "tiny.gin").write_text(TINY)
    flags = ["--workdir", str(folder / "W"), "--gin_file", str(folder / "tiny.gin")]
    assert cli.main(["run", *flags]) == 0
    return folder / "W", flags


def test_every_arm_s_metrics_are_there_with_their_intervals(made):
    metrics = json.loads((made[0] / "metrics.json").read_text())
    for arm in ARMS:
        for metric in METRICS:
            value, low, high = (
                metrics[f"experiment/{arm}/{metric}{end}"] for end in ("", "_low", "_high")
            )
            assert low <= value <= high, (arm, metric)
            if arm != "control":
                assert f"experiment/{arm}/{metric}_change_low" in metrics
    assert metrics["suppressed/random_novel/explored_share"] == pytest.approx(
        0.59 * metrics["experiment/random_novel/explored_share"], abs=0.12
    )
    for name in ("ueuc", "ueuc_adjusted"):
        assert 0 <= metrics[f"same_treatment/{name}"] <= 0.2
    assert "study/share" in metrics


def test_the_study_is_whole(made):
    study = json.loads((made[0] / "experiment" / "study.json").read_text())
    assert {row["n"] for row in study["scaling"]} >= {1, 2, 5, 10, 20, 50}
    one = next(row for row in study["scaling"] if row["n"] == 1 and row["temperature"] == 1)
    assert one["divergence"] == pytest.approx(0, abs=1e-9)
    for row in study["scaling"]:
        if row["temperature"] == 1:
            assert row["divergence"] <= row["divergence_bound"] + 1e-9
    all_kept = {row["n"]: row["satisfaction"] for row in study["kept"] if row["k"] == row["n"]}
    best = {row["n"]: row["satisfaction"] for row in study["kept"] if row["k"] == 1}
    assert set(best) == {5, 10, 20, 50} and set(all_kept) == {5, 10, 20}
    assert [row["step"] for row in study["tuning"]["policy_gradient"]] == [0, 2, 4]
    assert all(row["valid"] == 1 for row in study["tuning"]["policy_gradient"])
    assert {row["arm"] for row in study["off_policy"]} >= {"random_novel", "best_of_20"}


def test_the_report_begins_with_the_experiment(made):
    page = (made[0] / "report.html").read_text()
    assert page.index("Best of 20 against") < page.index("The experiment: every arm")
    assert page.index("The experiment: every arm") < page.index("<h2>Data</h2>")
    for words in ARMS.values():
        assert words in page
    assert page.count(", chosen</td>") == 12


def test_alignment_models_that_differ_by_gin_lines_are_compared(
    made, tmp_path, monkeypatch, capsys
):
    work, flags = made
    monkeypatch.syspath_prepend(str(SCRIPTS))
    compare = importlib.import_module("compare_alignment")
    variants = ["as it is", "labels shrunk", "history of one"]
    only = [f"--only={name}" for name in variants]
    arguments = ["--workdir", str(work), "--out", str(tmp_path), *flags[2:], *only]
    monkeypatch.setattr(sys, "argv", ["compare_alignment.py", *arguments])
    compare.main()
    said = capsys.readouterr().out
    assert all(f"| {name} |" in said for name in variants)
    found = json.loads((tmp_path / "comparison.json").read_text())["variants"]
    study = json.loads((work / "experiment" / "study.json").read_text())
    assert found["as it is"]["best"] == pytest.approx(
        study["gap"]["satisfaction_best_of_n"], rel=1e-4
    )
    assert len({row["best"] for row in found.values()}) == 3


def test_a_second_run_does_nothing(made, capsys):
    assert cli.main(["run", *made[1], "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert said.count("up to date") == said.count("writes:")


def test_another_platform_than_the_log_s_is_refused(made, capsys):
    flags = [*made[1], "--overwrite", "--gin.experiments.experiment.log_days=5"]
    assert cli.main(["experiment", *flags]) == 2
    error = capsys.readouterr().err
    assert "The log has" in error and "experiments.experiment.log_days" in error


def test_long_histories_are_refused(made, capsys):
    flags = [*made[1], "--overwrite", "--gin.experiments.experiment.history_length=3"]
    assert cli.main(["experiment", *flags]) == 2
    assert "history_length is 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override, message",
    [
        ("TUNED = {'a b': {}}", "maps 'a b'"),
        ("TUNED = {'a': 3}", "maps 'a' to 3"),
        ("experiments.experiment.tuned = {'a': {}}", "differ"),
    ],
)
def test_tuned_models_that_make_no_sense_are_refused(override, message):
    configuration = Configuration(["runs/experiment.gin"], [override])
    with pytest.raises(InputError, match=message):
        pipeline.stages(configuration)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("TUNED=['a']", "It must map names to dictionaries"),
        ("TUNED={'novelty': {}}", "'novelty', which is taken"),
        ("TUNED={'a': {'decodng': 'free'}}", "'a' decodng, which is no field"),
        ("experiment.Experiment.sample_counts=[0]", "must list whole numbers from 1 on"),
        ("experiment.Experiment.num_days=0", "must be at least 1"),
        ("experiments.experiment.randomised_days=-1", "randomised_days is -1; it must be at least"),
        ("experiments.experiment.suppression=1.5", "experiments.experiment.suppression is 1.5"),
        ("policy_gradient.PolicyGradient.steps=0", "PolicyGradient.steps"),
        ("world.Settings.num_users=0", "world.Settings.num_users is 0"),
    ],
)
def test_what_an_experiment_cannot_do_is_refused_before_anything(line, words, tmp_path, capsys):
    flags = ["--workdir", str(tmp_path / "W"), "--gin_file", "runs/experiment.gin"]
    assert cli.main(["run", *flags, "--quick", f"--gin.{line}"]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "W" / "interactions").exists()


def test_an_experiment_may_tune_nothing(tmp_path, capsys):
    flags = ["--workdir", str(tmp_path / "W"), "--gin_file", "runs/experiment.gin"]
    assert cli.main(["run", *flags, "--gin.TUNED={}", "--dry_run"]) == 0
    assert "tune" not in capsys.readouterr().out
