"""Every gin file that comes with recexplore is sound: names exist, networks can be built."""

import ast
from pathlib import Path

import jax
import pytest

from recexplore import pipeline
from recexplore.configuration import Configuration
from recexplore.errors import InputError
from recexplore.models.encoder_decoder import EncoderDecoderConfig
from recexplore.models.networks import language_model
from recexplore.models.saved import abstract_parameters
from recexplore.models.transformer import Transformer, TransformerConfig

FOLDER = Path(__file__).parent.parent / "gin_configs"
RUNS = {
    "runs/demo.gin": [],
    "runs/closed_loop.gin": [],
    "runs/experiment.gin": [],
    "runs/movielens_small.gin": ["MOVIELENS_DIR = '/data'"],
    "runs/log.gin": ["INTERACTIONS = 'a.csv'", "ITEMS = 'b.csv'"],
    "runs/log_t5.gin": ["INTERACTIONS = 'a.csv'", "ITEMS = 'b.csv'"],
}
SIZES = {"models/micro.gin": 5e5, "models/tiny.gin": 2e6, "models/small.gin": 20e6}
PUBLISHED = {  # parameters, as transformers counts them
    "models/llama3_2_1b.gin": 1_235_814_400,
    "models/qwen3_0_6b.gin": 596_049_920,
    "models/gemma2_2b.gin": 2_614_341_888,
    "models/gemma2_9b.gin": 9_241_705_984,
    "models/gemma3_1b.gin": 999_885_952,
}


ENCODER_DECODERS = {
    "models/flan_t5_small.gin": (32_128, 76_961_152),
    "models/flan_t5_base.gin": (32_128, 247_577_856),
    "models/mt5_small.gin": (250_112, 300_176_768),
}


def test_every_file_is_covered_here():
    files = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.gin")}
    data = {name for name in files if name.startswith("data/")}
    t5x = {name for name in files if name.startswith("t5x/")}  # tests/adapters/ has them
    others = {
        "pipeline.gin",
        "ahead.gin",
        "experiment.gin",
        "quick.gin",
        "models/pretrained.gin",
        "models/lora.gin",
    }
    assert files == {*RUNS, *SIZES, *PUBLISHED, *ENCODER_DECODERS, *data, *t5x, *others}


@pytest.mark.parametrize("name", RUNS)
def test_every_run_is_complete_and_every_binding_used(name):
    files = [name, "data/csv.gin"] if name.startswith("runs/log") else [name]
    configuration = Configuration(files, RUNS[name])
    stages = pipeline.stages(configuration)
    configuration.check_all_used([(stage.selector, stage.model) for stage in stages])
    for stage in stages:
        configuration.check_required(stage.selector, stage.model)


def test_a_pretrained_model_and_its_tokenizer_go_with_any_run():
    tokenize, train = "recexplore.pipeline.tokenize", "recexplore.pipeline.train"
    files = ["runs/demo.gin", "models/pretrained.gin"]
    configuration = Configuration(files, ["PRETRAINED = '/models/gemma'"])
    configuration.check_all_used(
        [(stage.selector, stage.model) for stage in pipeline.stages(configuration)]
    )
    configuration.check_required(tokenize)
    for model in ("novelty", "alignment"):
        configuration.check_required(train, model)
        bound = configuration.reachable_from(train, model)
        assert bound[f"{train}.pretrained"] == "'/models/gemma'"
    bound = configuration.reachable_from(tokenize)
    name = "recexplore.tasks.vocabulary.pretrained_vocabulary"
    assert bound[f"{tokenize}.train_vocabulary"] == f"@{name}"
    assert bound[f"{name}.pretrained"] == "'/models/gemma'"
    with pytest.raises(InputError, match="PRETRAINED must be set"):
        Configuration(files).check_required(tokenize)


@pytest.mark.parametrize("name", PUBLISHED)
def test_adapters_go_with_any_published_network(name):
    plain = config_of(["runs/log.gin", name], "novelty", max_length=64)
    config = config_of(["runs/log.gin", name, "models/lora.gin"], "novelty", max_length=64)
    assert config.lora_rank == 16 and config.param_dtype == "bfloat16"
    variables = abstract_parameters(Transformer(config))
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == count_parameters(plain)
    # Of each kernel [inputs, outputs] there are r (inputs + outputs).
    heads, groups = plain.num_heads * plain.head_dim, plain.num_kv_heads * plain.head_dim
    widths = 4 * plain.model_dim + 2 * heads + 2 * groups
    adapters = sum(x.size for x in jax.tree.leaves(variables["lora"]))
    assert adapters == plain.num_layers * 16 * widths


@pytest.mark.parametrize("name", [*SIZES, *PUBLISHED])
@pytest.mark.parametrize("more", [[], ["models/lora.gin"]])
def test_any_network_can_be_compiled_ahead(name, more):
    """Every binding is used, but for those of the alignment model's own network and training."""
    configuration = Configuration(["ahead.gin", name, *more])
    of_alignment = [
        ("recexplore.models.transformer.TransformerConfig", "alignment"),
        ("recexplore.training.optimization.Optimization", "alignment"),
    ]
    programs = [
        ("recexplore.aot.training_step", "train"),
        ("recexplore.aot.explore_pair", "explore"),
    ]
    configuration.check_all_used([*programs, *of_alignment])
    for selector, scope in programs:
        configuration.check_required(selector, scope)
        bound = configuration.reachable_from(selector, scope)
        assert "recexplore.models.transformer.TransformerConfig.vocab_size" in bound


@pytest.mark.parametrize("model", ["novelty", "alignment"])
def test_adapters_learn_faster_than_whole_pretrained_models(model):
    files = ["runs/log.gin", "data/simulated.gin", "models/gemma2_2b.gin", "models/pretrained.gin"]
    rates = []
    for more in ([], ["models/lora.gin"]):
        run = Configuration([*files, *more], ["PRETRAINED = '/models/gemma'"])
        run.check_all_used([(stage.selector, stage.model) for stage in pipeline.stages(run)])
        bound = run.reachable_from("recexplore.pipeline.train", model)
        name = "recexplore.training.optimization.Optimization.learning_rate"
        rates.append(float(bound.get(f"{model}/{name}", bound[name])))
    assert 1e-6 < rates[0] < rates[1] < 1e-3


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


def config_of(files, model, kind=TransformerConfig, **sizes):
    """What pipeline.train makes of the files, but for what it passes itself."""
    configuration = Configuration(files)
    bindings = configuration.reachable_from("recexplore.pipeline.train", model)
    prefix = f"{kind.__module__}.{kind.__name__}."
    bound = {
        name.removeprefix(prefix): ast.literal_eval(value)
        for name, value in bindings.items()
        if name.startswith(prefix)
    }
    return kind(**sizes | bound)


def count_parameters(config):
    abstract = abstract_parameters(language_model(config))
    return sum(leaf.size for leaf in jax.tree.leaves(abstract))


@pytest.mark.parametrize("name", SIZES)
def test_every_size_builds_and_is_as_big_as_it_says(name):
    config = config_of(["runs/demo.gin", name], "novelty", vocab_size=1024, max_length=64)
    assert SIZES[name] / 6 < count_parameters(config) < SIZES[name]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("model", ["novelty", "alignment"])
def test_published_networks_have_their_published_size(name, model):
    config = config_of(["runs/log.gin", name], model, max_length=64)
    assert count_parameters(config) == PUBLISHED[name]
    assert config == config_of(["pipeline.gin", name], model, max_length=64)  # nothing is left over


@pytest.mark.parametrize("name", ENCODER_DECODERS)
@pytest.mark.parametrize("model", ["novelty", "alignment"])
def test_published_encoder_decoders_have_their_published_size(name, model):
    rows, parameters = ENCODER_DECODERS[name]
    sizes = dict(kind=EncoderDecoderConfig, vocab_size=rows, max_length=64)
    config = config_of(["runs/log_t5.gin", name], model, **sizes)
    assert count_parameters(config) == parameters
    assert config == config_of(["pipeline.gin", name], model, **sizes)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_every_binding_of_a_run_with_encoder_decoders_is_used(name):
    files = ["runs/log_t5.gin", "data/simulated.gin", name, "models/pretrained.gin"]
    run = Configuration(files, ["PRETRAINED = '/models/t5'"])
    stages = [(stage.selector, stage.model) for stage in pipeline.stages(run)]
    run.check_all_used(stages)
    adapted = Configuration([*files, "models/lora.gin"], ["PRETRAINED = '/models/t5'"])
    with pytest.raises(InputError, match="lora_.* is bound but no stage of this run uses it"):
        adapted.check_all_used(stages)
