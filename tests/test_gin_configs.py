"""Every gin file that comes with recexplore is sound: names exist, networks can be built."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from recexplore import pipeline
from recexplore.configuration import Configuration
from recexplore.errors import InputError
from recexplore.models.transformer import Transformer, TransformerConfig

FOLDER = Path(__file__).parent.parent / "gin_configs"
RUNS = {
    "runs/demo.gin": [],
    "runs/movielens_small.gin": ["MOVIELENS_DIR = '/data'"],
    "runs/log.gin": ["INTERACTIONS = 'a.csv'", "ITEMS = 'b.csv'"],
}
SIZES = {"models/micro.gin": 5e5, "models/tiny.gin": 2e6, "models/small.gin": 20e6}


def test_every_file_is_covered_here():
    files = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.gin")}
    data = {name for name in files if name.startswith("data/")}
    assert files == {*RUNS, *SIZES, *data, "pipeline.gin", "models/pretrained_tokenizer.gin"}


@pytest.mark.parametrize("name", RUNS)
def test_every_run_is_complete_and_every_binding_used(name):
    files = [name, "data/csv.gin"] if name == "runs/log.gin" else [name]
    configuration = Configuration(files, RUNS[name])
    stages = pipeline.stages(configuration)
    configuration.check_all_used([(stage.selector, stage.model) for stage in stages])
    for stage in stages:
        configuration.check_required(stage.selector, stage.model)


def test_a_pretrained_tokenizer_goes_with_any_run():
    tokenize = "recexplore.pipeline.tokenize"
    files = ["runs/demo.gin", "models/pretrained_tokenizer.gin"]
    configuration = Configuration(files, ["PRETRAINED = '/models/gemma'"])
    configuration.check_all_used(
        [(stage.selector, stage.model) for stage in pipeline.stages(configuration)]
    )
    configuration.check_required(tokenize)
    bound = configuration.reachable_from(tokenize)
    name = "recexplore.tasks.vocabulary.pretrained_vocabulary"
    assert bound[f"{tokenize}.train_vocabulary"] == f"@{name}"
    assert bound[f"{name}.pretrained"] == "'/models/gemma'"
    with pytest.raises(InputError, match="PRETRAINED must be set"):
        Configuration(files).check_required(tokenize)


@pytest.mark.parametrize("name", ["parquet", "movielens_tfds"])
def test_data_files_go_with_any_run(name):
    values = ["INTERACTIONS = 'a'", "ITEMS = 'b'"] if name == "parquet" else []
    configuration = Configuration(["runs/log.gin", f"data/{name}.gin"], values)
    configuration.check_required("recexplore.pipeline.ingest")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("HISTORY_LENGTH = 0", "history of 0 clusters"),
        ("NOVELTY_HISTORIES = {'novelty': 7}", "Set HISTORY_LENGTH"),
        ("NOVELTY_HISTORIES = {'novelty': 2, 'k11': 11}", r"MAX_HISTORY\) keeps 10"),
        ("NOVELTY_HISTORIES = {'novelty': 2, 'alignment': 2}", "'alignment' is taken"),
        ("NOVELTY_HISTORIES = {'novelty': 2, 'a-b': 2}", "names a model 'a-b'"),
        ("NOVELTY_HISTORIES = {'other': 2}", "one of them must be 'novelty'"),
        ("pipeline.tokenize.seen_excluded = ('k30',)", "seen_excluded names k30"),
        ("pipeline.tokenize.longer_histories = {'k': 9}", "longer_histories names k"),
        ("pipeline.tokenize.longer_histories = {'novelty': 2}", "its history has 2 already"),
        ("MAX_HISTORY = 5", r"'novelty' a history of 10 clusters.*keeps 5"),
    ],
)
def test_histories_that_do_not_go_together_are_refused(override, message):
    with pytest.raises(InputError, match=message):
        pipeline.stages(Configuration(["runs/demo.gin"], [override]))


@pytest.mark.parametrize("name", SIZES)
def test_every_size_builds_and_is_as_big_as_it_says(name):
    configuration = Configuration(["runs/demo.gin", name])
    bindings = configuration.reachable_from("recexplore.pipeline.train", "novelty")
    prefix = "recexplore.models.transformer.TransformerConfig."
    sizes = {
        name.removeprefix(prefix): ast.literal_eval(value)
        for name, value in bindings.items()
        if name.startswith(prefix)
    }
    model = Transformer(TransformerConfig(vocab_size=1024, max_length=64, **sizes))
    abstract = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.ones((1, 2), jnp.int32), method="prefill")
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert SIZES[name] / 6 < count < SIZES[name]
