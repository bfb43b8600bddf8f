"""Choices that gin lines make for training, through the command line: rows, pairs, heads."""

import json
import shutil

import pytest

from recexplore import artifacts, cli
from recexplore.models import saved
from recexplore.tasks.example_files import ExampleFiles

RUN = """
from __gin__ import dynamic_registration
include 'runs/demo.gin'
from recexplore import pipeline
from recexplore.models import transformer
from recexplore.simulation import world
from recexplore.training import optimization
from recexplore.training import trainer

NUM_CLUSTERS = 12
pipeline.tokenize.longer_histories = {}
world.Settings.num_users = 150
world.Settings.num_items = 300
world.simulate_log.num_days = 6
pipeline.train.batch_size = 16
optimization.Optimization.steps = 40
optimization.Optimization.average_decay = 0.5
alignment/optimization.Optimization.steps = 20
items/optimization.Optimization.steps = 8
alignment/optimization.Optimization.learning_rate = 2e-3
trainer.train.evaluate_every = 20
alignment/trainer.train.evaluate_every = 10
alignment/transformer.TransformerConfig.model_dim = 64
"""
PAIRS = (
    "--gin.pipeline.tokenize.make_alignment_examples=@examples.pairwise_examples",
    "--gin.alignment/pipeline.train.objective=@objectives.bradley_terry_loss",
)
ORDINAL = (
    "--gin.reward_model.RewardModel.head='ordinal'",
    "--gin.alignment/pipeline.train.objective=@objectives.ordinal_loss",
)
PACKED = ("--gin.pipeline.train.pack=True", "--gin.pipeline.train.max_length=24")


class Run:
    """A work directory, its gin file and more gin lines."""

    def __init__(self, work, lines=()):
        self.work, self.lines = work, lines

    def __call__(self, stage, *flags):
        file = f"--gin_file={self.work.parent / 'run.gin'}"
        return cli.main([stage, "--workdir", str(self.work), file, *self.lines, *flags])

    def like(self, name, lines, *without):
        """Another, which has this one's artefacts but for some."""
        other = Run(self.work.with_name(name), lines)
        shutil.copytree(self.work, other.work, ignore=shutil.ignore_patterns(*without))
        return other

    def curve(self, model, name):
        """A figure's values over the steps."""
        path = self.work / "models" / model / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [row[name] for row in rows if name in row]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Examples for a run with a vocabulary of its own, one in each row."""
    folder = tmp_path_factory.mktemp("choices")
    (folder / "run.gin").write_text(RUN)
    run = Run(folder / "first")
    stages = ("ingest", "cluster", "aggregate", "tokenize")
    assert [run(stage) for stage in stages] == [0] * 4
    return run


@pytest.fixture(scope="module")
def unpacked(first):
    run = first.like("unpacked", ())
    assert run("train") == 0
    return run


def test_packed_rows_train_as_well(first, unpacked):
    """Rows of 24 tokens hold several of these examples; a step then sees more of them."""
    packed = first.like("packed", PACKED)
    assert packed("train") == 0
    for model in ("novelty", "alignment"):
        one, other = (run.curve(model, "validation_loss") for run in (unpacked, packed))
        assert other[-1] == pytest.approx(one[-1], rel=0.1)
    assert unpacked.curve("novelty", "validation_loss")[-1] > 0


def test_two_lines_make_the_alignment_model_learn_from_pairs(first):
    run = first.like("pairs", PAIRS, "examples", "vocabulary", "tokenize.json")
    assert run("tokenize") == 0
    assert ExampleFiles(run.work / "examples" / "alignment", "train").pairs
    assert run("train", "--model", "alignment") == 0
    choices = run.curve("alignment", "validation_choice")  # the share of misordered pairs
    assert len(choices) == 2 and all(0 <= share <= 1 for share in choices)
    accuracy = run.curve("alignment", "validation_accuracy")
    assert accuracy == pytest.approx([1 - share for share in choices], abs=1e-6)


def test_an_ordinal_head_is_trained_and_asked(unpacked):
    run = unpacked.like("ordinal", ORDINAL)
    assert run("train", "--model", "alignment", "--overwrite") == 0
    description = artifacts.read_json(run.work / "models/alignment/network.json")
    assert description["history_length"] == 2
    assert saved.rebuild(description).head == "ordinal"
    assert run("explore") == 0


def test_an_objective_that_the_head_cannot_have_is_refused(first, capsys):
    run = first.like("wrong_head", ORDINAL)
    assert run("train", "--model", "alignment", "--gin.reward_model.RewardModel.head='bins'") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "ordinal_loss needs a RewardModel with the head ordinal; this RewardModel has the" in said
    )
    assert not [*run.work.glob("models/*/checkpoints/[0-9]*")]
