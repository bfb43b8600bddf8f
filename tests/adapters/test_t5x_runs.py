"""`t5x.train` and `t5x.infer` on a small simulated platform, beside our own commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from needs_t5x import import_t5x

import_t5x()

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
from tensorboard.backend.event_processing import event_accumulator  # noqa: E402
from tensorboard.util import tensor_util  # noqa: E402

from recexplore import artifacts  # noqa: E402
from recexplore.adapters import t5x_checkpoints  # noqa: E402
from recexplore.interests.cluster_table import ClusterTable  # noqa: E402
from recexplore.models import saved  # noqa: E402
from recexplore.tasks import order  # noqa: E402
from recexplore.tasks.vocabulary import Vocabulary  # noqa: E402
from recexplore.training.optimization import Optimization  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
GIN = Path(__file__).parent.parent.parent / "gin_configs"
STEPS = 12
SMALL = f"""
from __gin__ import dynamic_registration
include 'runs/demo.gin'
from recexplore import pipeline
from recexplore.models import transformer
from recexplore.simulation import world
from recexplore.training import optimization
from recexplore.training import trainer

NUM_CLUSTERS = 20
world.Settings.num_users = 150
world.Settings.num_items = 300
world.simulate_log.num_days = 6
pipeline.train.batch_size = 16
transformer.TransformerConfig.dropout_rate = 0.0
alignment/transformer.TransformerConfig.dropout_rate = 0.0
optimization.Optimization.steps = {STEPS}
alignment/optimization.Optimization.steps = {STEPS}
trainer.train.evaluate_every = {STEPS}
trainer.train.log_every = 1
"""


class Platform:
    """A folder with a work directory W, made by our own commands, and what T5X makes of it."""

    def __init__(self, folder):
        self.folder, self.work = folder, folder / "W"
        (folder / "small.gin").write_text(SMALL)

    def ours(self, *stages):
        flags = ["--workdir", "W", "--gin_file", "small.gin"]
        code = f"import recexplore.cli as c; [c.main([*s, *{flags}]) and exit(1) for s in {stages}]"
        self._run("-c", code)

    def t5x(self, module, *files, **macros):
        named = [f"--gin_file={name}" for name in ("small.gin", *files)]
        values = {"WORKDIR": "W", **macros}
        bound = [f"--gin.{name}={value!r}" for name, value in values.items()]
        self._run("-m", f"t5x.{module}", f"--gin_search_paths={GIN},.", *named, *bound)

    def train(self, model, **macros):
        often = dict(EVAL_PERIOD=6, CHECKPOINT_PERIOD=6, STATS_PERIOD=1)
        steps = dict(TRAIN_STEPS=STEPS, SCHEDULE_STEPS=STEPS, BATCH_SIZE=16)
        self.t5x("train", f"t5x/{model}.gin", **often, **steps | macros)

    def infer(self, model, checkpoint, output, **macros):
        files = (f"t5x/{model}_model.gin", "t5x/infer.gin")
        places = dict(CHECKPOINT_PATH=str(checkpoint), INFER_OUTPUT_DIR=str(self.folder / output))
        self.t5x("infer", *files, **places, **macros)
        (lines,) = (self.folder / output).glob("recexplore_*.jsonl-00000-of-00001")
        return [json.loads(line) for line in lines.read_text().splitlines()]

    def network(self, model):
        return saved.rebuild(artifacts.read_json(self.work / "models" / model / "network.json"))

    def _run(self, *arguments):
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        made = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=environment,
        )
        assert made.returncode == 0, made.stderr[-4000:]


@pytest.fixture(scope="module")
def platform(tmp_path_factory):
    made = Platform(tmp_path_factory.mktemp("t5x"))
    trained = [["train", "--model", model] for model in ("novelty", "alignment")]
    made.ours(["ingest"], ["cluster"], ["aggregate"], ["tokenize"], *trained)
    return made


def our_figures(folder, name):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def t5x_figures(folder, name):
    found = {}
    for path in sorted(folder.glob("events*")):
        events = event_accumulator.EventAccumulator(str(path), {"tensors": 0}).Reload()
        if name in events.Tags()["tensors"]:
            for event in events.Tensors(name):
                found[event.step] = float(tensor_util.make_ndarray(event.tensor_proto))
    return found


@pytest.fixture(scope="module")
def trained(platform):
    """Both models trained under T5X from the parameters that our trainer starts from; the novelty
    model's run is stopped half way and goes on."""
    for model in ("novelty", "alignment"):
        network = platform.network(model)
        params = nn.unbox(saved.fresh_variables(network, jax.random.key(0)))
        rule = Optimization(steps=STEPS, learning_rate=1.0).transformation()
        first = order.SingleRows(order.ExampleOrder(1, None), repeat=True).start
        start = t5x_checkpoints.write(
            platform.folder / "C" / model, 0, params, rule.init(params), first
        )
        folder = platform.folder / "T" / model
        places = dict(INITIAL_CHECKPOINT_PATH=str(start), MODEL_DIR=str(folder))
        if model == "novelty":
            platform.train(model, **places, TRAIN_STEPS=STEPS // 2)
            assert (folder / f"checkpoint_{STEPS // 2}").is_dir()
        platform.train(model, **places)
    return platform


@pytest.mark.parametrize("model", ["novelty", "alignment"])
def test_training_under_t5x_is_our_trainer_s(trained, model):
    """Every step's loss, of a run that was stopped on the way as well."""
    ours, theirs = trained.work / "models" / model, trained.folder / "T" / model
    losses = our_figures(ours, "loss")
    found = t5x_figures(theirs / "train", "loss")
    assert sorted(losses) == sorted(found) == list(range(1, STEPS + 1))
    for step, loss in losses.items():
        assert found[step] == pytest.approx(loss, rel=1e-4 if step > 1 else 1e-5)
    rates = our_figures(ours, "learning_rate")
    for step, rate in t5x_figures(theirs / "train", "learning_rate").items():
        assert rate == pytest.approx(rates[step], rel=1e-5, abs=1e-12)
    assert {"accuracy", "timing/steps_per_second"} <= _tags(theirs / "train")
    assert {"loss", "accuracy"} <= _tags(theirs / f"training_eval/recexplore_{model}")
    said = (theirs / "model-info.txt").read_text()
    assert "shape (layers=1, embed=" in said and "param_states/1/0/mu/" in said
    assert "WORKDIR = 'W'" in (theirs / "config.gin").read_text()


def _tags(folder):
    found = set()
    for path in folder.glob("events*"):
        events = event_accumulator.EventAccumulator(str(path), {"tensors": 0}).Reload()
        found |= set(events.Tags()["tensors"])
    return found


@pytest.mark.parametrize("model", ["novelty", "alignment"])
def test_what_t5x_trained_is_what_we_trained(trained, model):
    network = trained.network(model)
    place = t5x_checkpoints.read_position(trained.folder / "T" / model)
    assert len(place["clusters"]) == 64 and place["at"] > 0
    theirs = t5x_checkpoints.read_parameters(trained.folder / "T" / model, network)
    start = t5x_checkpoints.read_parameters(trained.folder / "C" / model, network)
    moved = sum(float(np.abs(a - b).sum()) for a, b in _pairs(theirs, start))
    ours = _our_last_parameters(trained.work / "models" / model, network)
    apart = sum(float(np.abs(a - b).sum()) for a, b in _pairs(theirs, ours))
    assert apart < 0.02 * moved
    rule = Optimization(steps=STEPS, learning_rate=1.0).transformation()
    state = t5x_checkpoints.read_optimizer(
        trained.folder / "T" / model, jax.eval_shape(rule.init, theirs)
    )
    assert int(state[1][0].count) == int(state[1][2].count) == STEPS


def _pairs(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


def _our_last_parameters(folder, network):
    """Those after the last step, not their moving average."""
    found = t5x_checkpoints.read_orbax(folder / "checkpoints" / str(STEPS) / "state", ("params",))
    return {"params": found["params"]["params"]}


def test_scores_under_t5x_are_ours_and_survive_the_way_there_and_back(trained):
    network = trained.network("alignment")
    checkpoint = trained.folder / "T" / "alignment" / f"checkpoint_{STEPS}"
    lines = trained.infer("alignment", checkpoint, "scores")
    params = t5x_checkpoints.read_parameters(checkpoint, network)
    vocabulary = Vocabulary(trained.work / "vocabulary")
    score = jax.jit(network.apply)
    scores = []
    for line in lines:
        texts = line["inputs"]
        tokens = vocabulary.encode_prompt(texts["inputs_pretokenized"])
        tokens = tokens + vocabulary.encode_description(texts["targets_pretokenized"])
        row = np.zeros((1, network.config.max_length), np.int32)
        row[0, : len(tokens)] = tokens
        scores.append(float(score(params, row, np.array([len(tokens)]))[0]))
    assert len({round(value, 4) for value in scores}) > 5
    np.testing.assert_allclose([line["score"] for line in lines], scores, atol=2e-6)
    again = t5x_checkpoints.write(trained.folder / "again", STEPS, params)
    assert trained.infer("alignment", again, "scores_again") == lines


def test_t5x_draws_descriptions_of_clusters(trained):
    checkpoint = trained.folder / "T" / "novelty" / f"checkpoint_{STEPS}"
    lines = trained.infer("novelty", checkpoint, "draws", MODE="predict_with_aux")
    descriptions = ClusterTable.read(trained.work / "clusters").descriptions
    assert len(lines) > 10
    for line in lines:
        assert line["prediction"] in descriptions
        history = line["inputs"]["inputs_pretokenized"].split(":")[1].split(";")[:-1]
        assert line["prediction"] not in [text.strip() for text in history]
        assert line["aux"]["scores"] < 0
