"""Models from T5X in a work directory, and ours for T5X; without T5X."""

import contextlib
import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recexplore import artifacts, cli, pipeline
from recexplore.adapters import t5x_checkpoints, t5x_trained
from recexplore.configuration import Configuration
from recexplore.distributed.checkpoints import Checkpoints
from recexplore.errors import InputError
from recexplore.models import pretrained, saved
from recexplore.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from recexplore.models.reward_model import RewardModel
from recexplore.models.saved import fresh_variables
from recexplore.models.t5_names import from_t5x
from recexplore.models.transformer import Transformer, TransformerConfig
from recexplore.models.trie import build_trie, trie_fingerprint
from recexplore.training import objectives
from recexplore.training.optimization import Optimization
from recexplore.training.trainer import TrainResult

GIN = Path(__file__).parent.parent.parent / "gin_configs"
CONFIG = TransformerConfig(
    vocab_size=8,
    num_layers=2,
    model_dim=4,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    mlp_dim=6,
    max_length=8,
)
TRIE = jax.device_put(build_trie([[3, 1], [4, 5, 1], [4, 1]], 1, 8))


def variables_of(model, seed=0):
    params = nn.unbox(fresh_variables(model, jax.random.key(seed)))
    return jax.tree.map(lambda p: p + 0.1, params)  # a fresh head is zero


class Validation:
    """Two batches of two examples."""

    batch_size = 2

    def training(self, rows):
        raise AssertionError("nothing is trained")

    def validation(self, rows):
        assert rows.tolist() == [0, 1]
        return [
            {
                "tokens": np.array([[2, 7, 3, 1, 0], [2, 4, 5, 1, 0]], np.int32),
                "prompt_lengths": np.array([2, 1], np.int32),
                "lengths": np.array([4, 4], np.int32),
                "seen": np.zeros((2, 3), bool),
                "label": np.array([0.2, 0.8], np.float32),
                "weight": np.array([1.0, weight], np.float32),
            }
            for weight in (0.5, 2.0)
        ]


def nothing(*_, **__):
    pass


def by_hand(objective, model, params):
    sums = [
        objective(model, params, TRIE, jax.tree.map(jnp.asarray, batch))
        for batch in Validation().validation(np.arange(2))
    ]
    return float(sum(s.loss for s in sums)) / float(sum(s.weight for s in sums))


@pytest.mark.parametrize(
    ("model", "objective", "measure"),
    [
        (Transformer(CONFIG), objectives.constrained_description_loss, None),
        (RewardModel(CONFIG), objectives.pointwise_loss, objectives.misordered_pairs),
    ],
)
def test_a_checkpoint_of_t5x_s_becomes_a_trained_model(model, objective, measure, tmp_path):
    params = variables_of(model)
    checkpoint = t5x_checkpoints.write(tmp_path / "T", 70, params)
    result = t5x_trained.take_or_train(
        tmp_path / "M",
        model,
        objective,
        TRIE,
        Validation(),
        nothing,
        train=nothing,
        checkpoint=str(checkpoint),
        measure=measure,
    )
    told = by_hand(measure or objective, model, params)
    assert (result.steps, result.best_step) == (70, 70)
    assert result.best_validation == pytest.approx(told, rel=1e-5)
    loaded = saved.load_parameters(tmp_path / "M", model)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


def take(tmp_path, checkpoint, model=None):
    return t5x_trained.take_or_train(
        tmp_path / "M",
        model or Transformer(CONFIG),
        objectives.constrained_description_loss,
        TRIE,
        Validation(),
        nothing,
        train=nothing,
        checkpoint=str(checkpoint),
    )


def test_a_checkpoint_with_values_that_are_no_numbers_is_refused(tmp_path):
    params = variables_of(Transformer(CONFIG))
    params["params"]["layers"]["mlp"]["wo"] = jnp.full((2, 6, 4), jnp.nan)
    checkpoint = t5x_checkpoints.write(tmp_path / "T", 70, params)
    with pytest.raises(InputError, match="checkpoint_70 has values in layers/mlp/wo that are not"):
        take(tmp_path, checkpoint)
    assert not (tmp_path / "M").exists()


def test_a_checkpoint_for_other_clusters_is_refused(tmp_path):
    params, place = variables_of(Transformer(CONFIG)), {"epoch": 0, "at": 3}
    own = {**place, "clusters": trie_fingerprint(TRIE)}
    assert take(tmp_path, t5x_checkpoints.write(tmp_path / "T", 70, params, None, own)).steps == 70
    other = trie_fingerprint(build_trie([[3, 1], [4, 5, 1], [4, 6, 1]], 1, 8))
    place = {**place, "clusters": other}
    checkpoint = t5x_checkpoints.write(tmp_path / "other", 70, params, None, place)
    with pytest.raises(InputError, match="other/checkpoint_70 was trained on other clusters"):
        take(tmp_path, checkpoint)


def test_what_a_run_would_take_is_looked_for_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = ["--gin_file", "runs/demo.gin", "--gin_file", "t5x/trained.gin"]
    command = ["run", "--workdir", "W", *files, "--gin.ALIGNMENT_CHECKPOINT='nowhere'"]
    for more in ([], ["--dry_run"]):
        assert cli.main([*command, *more]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "nowhere is no T5X checkpoint and holds none" in said
    assert not Path("W/interactions").exists()


def test_without_a_checkpoint_it_is_trained(tmp_path):
    asked = {}

    def train(*arguments, **options):
        asked.update(options, arguments=arguments)
        return TrainResult(3, 2, 0.5)

    model, objective = Transformer(CONFIG), objectives.constrained_description_loss
    arguments = (tmp_path, model, objective, TRIE, Validation(), nothing)
    options = {"train": train, "pretrained": Path("gemma"), "seed": 4}
    assert t5x_trained.take_or_train(*arguments, **options) == TrainResult(3, 2, 0.5)
    assert asked == {"arguments": arguments, "pretrained": Path("gemma"), "seed": 4}


def test_a_pretrained_model_and_a_checkpoint_are_one_too_many(tmp_path):
    model = Transformer(CONFIG)
    with pytest.raises(InputError, match="names another model. Bind one of them to None"):
        t5x_trained.take_or_train(
            tmp_path,
            model,
            objectives.constrained_description_loss,
            TRIE,
            Validation(),
            nothing,
            train=nothing,
            checkpoint="T",
            pretrained=Path("gemma"),
        )


@pytest.mark.parametrize(
    "values",
    [[], ["NOVELTY_CHECKPOINT = 'T/novelty'", "ALIGNMENT_CHECKPOINT = 'T/alignment'"]],
)
def test_the_gin_file_goes_with_a_run(values):
    run = Configuration(["runs/demo.gin", "t5x/trained.gin"], values, [str(GIN)])
    stages = pipeline.stages(run)
    run.check_all_used([(stage.selector, stage.model) for stage in stages])
    for stage in stages:
        run.check_required(stage.selector, stage.model)
    for model in ("novelty", "alignment"):
        bound = run.reachable_from("recexplore.pipeline.train", model)
        name = "recexplore.adapters.t5x_trained.take_or_train"
        assert bound["recexplore.pipeline.train.run"] == f"@{name}"
        found = bound[f"{model}/{name}.checkpoint"]
        assert found == (f"'T/{model}'" if values else "None")


@pytest.fixture
def trained(tmp_path):
    """The folder of a model that our trainer saved after ten and after twenty steps."""
    model, rule = Transformer(CONFIG), Optimization(20, 0.1).transformation()
    folder = tmp_path / "novelty"
    folder.mkdir()
    artifacts.write_json(folder / saved.NETWORK, saved.describe(model))
    states = {}
    checkpoints = Checkpoints(folder / saved.CHECKPOINTS, keep_last=2)
    for step, value in ((10, 1.0), (20, 2.0)):
        params = variables_of(model, step)
        state = {"params": params, "average": jax.tree.map(lambda p: p * 0.5, params)}
        state["optimizer"] = jax.tree.map(lambda x, s=step: x + s, rule.init(params))
        checkpoints.save(step, {"step": jnp.int32(step), **state}, {"epoch": 0, "at": step}, value)
        states[step] = state
    checkpoints.close()
    return folder, model, states


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_best_average_is_given_to_be_used(trained, tmp_path):
    folder, model, states = trained
    written = t5x_trained.give(folder, tmp_path / "T")
    assert written.name == "checkpoint_10"
    assert_equal(t5x_checkpoints.read_parameters(written, model), states[10]["average"])
    assert "param_states" not in t5x_checkpoints.read(written)["state"]


def test_adapters_are_given_merged(tmp_path):
    config = dataclasses.replace(CONFIG, lora_rank=2, lora_scale=0.5)
    model, base = Transformer(config), variables_of(Transformer(CONFIG), 3)
    variables = base | {"lora": variables_of(model, 4)["lora"]}
    pretrained.save(tmp_path / "base", base, CONFIG)
    folder = tmp_path / "novelty"
    folder.mkdir()
    described = saved.describe(model, pretrained=str(tmp_path / "base"))
    artifacts.write_json(folder / saved.NETWORK, described)
    with contextlib.closing(Checkpoints(folder / saved.CHECKPOINTS)) as checkpoints:
        checkpoints.save(7, {"params": {"lora": variables["lora"]}}, {}, 0.0)
    written = t5x_trained.give(folder, tmp_path / "T")
    found = jax.device_put(t5x_checkpoints.read_parameters(written, Transformer(CONFIG)))
    tokens = jnp.arange(8)[None]
    np.testing.assert_allclose(
        Transformer(CONFIG).apply(found, tokens), model.apply(variables, tokens), atol=1e-5
    )
    with pytest.raises(InputError, match="has adapters, .* without --to_train"):
        t5x_trained.give(folder, tmp_path / "T", to_train=True)


def test_the_latest_state_and_place_are_given_to_train_on(trained, tmp_path, monkeypatch):
    folder, model, states = trained
    monkeypatch.chdir(tmp_path)  # as in the command line of docs/t5x.md
    written = t5x_trained.give(Path(folder.name), Path("T"), to_train=True)
    assert written.name == "checkpoint_20" and t5x_checkpoints.read_step(written) == 20
    assert_equal(t5x_checkpoints.read_parameters(written, model), states[20]["params"])
    abstract = jax.eval_shape(lambda: states[20]["optimizer"])
    assert_equal(t5x_checkpoints.read_optimizer(written, abstract), states[20]["optimizer"])
    assert artifacts.read_json(Path(written, "dataset/train_ds-000-of-001")) == {
        "epoch": 0,
        "at": 20,
    }


@pytest.mark.parametrize("lost", ["state/_METADATA", "position/metadata"])
def test_a_damaged_checkpoint_is_not_given_to_train_on(trained, tmp_path, lost):
    folder, _, _ = trained
    (folder / saved.CHECKPOINTS / "20" / lost).unlink()
    with pytest.raises(InputError, match="checkpoints/20 has no state of AdamW to go on from"):
        t5x_trained.give(folder, tmp_path / "T", to_train=True)


def test_what_was_taken_has_nothing_to_train_on(tmp_path):
    model = Transformer(CONFIG)
    take(tmp_path, t5x_checkpoints.write(tmp_path / "T", 70, variables_of(model)))
    artifacts.write_json(tmp_path / "M" / saved.NETWORK, saved.describe(model))
    with pytest.raises(InputError, match="has parameters alone: .* or export without --to_train"):
        t5x_trained.give(tmp_path / "M", tmp_path / "again", to_train=True)
    assert not (tmp_path / "again").exists()
    assert t5x_trained.give(tmp_path / "M", tmp_path / "again").name == "checkpoint_70"


ENCODER_DECODER = EncoderDecoderConfig(
    vocab_size=8,
    num_encoder_layers=1,
    num_decoder_layers=2,
    model_dim=4,
    num_heads=2,
    head_dim=2,
    mlp_dim=6,
    max_length=8,
)


def saved_model(folder, model):
    """A model's folder, with one checkpoint of random parameters."""
    folder.mkdir()
    artifacts.write_json(folder / saved.NETWORK, saved.describe(model))
    params = variables_of(model)
    with contextlib.closing(Checkpoints(folder / saved.CHECKPOINTS)) as checkpoints:
        checkpoints.save(7, {"params": params}, {}, 0.0)
    return params


def test_an_encoder_decoder_goes_out_as_t5x_s_t5(tmp_path):
    params = saved_model(tmp_path / "t5", EncoderDecoder(ENCODER_DECODER))
    written = t5x_trained.give(tmp_path / "t5", tmp_path / "T")
    tree = t5x_checkpoints.read(written, ["target"])["target"]
    assert tree["decoder"]["layers_1"]["mlp"]["wi_0"]["kernel"].shape == (4, 6)
    read = from_t5x(tree, ENCODER_DECODER)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    with pytest.raises(InputError, match="has an encoder, .* without --to_train"):
        t5x_trained.give(tmp_path / "t5", tmp_path / "T2", to_train=True)


def test_what_t5x_has_nothing_like_is_not_given(tmp_path):
    saved_model(tmp_path / "scores", RewardModel(ENCODER_DECODER))
    with pytest.raises(InputError, match="scores is a RewardModel of EncoderDecoderConfig; for it"):
        t5x_trained.give(tmp_path / "scores", tmp_path / "T")


def test_a_model_that_is_not_there_is_not_given(tmp_path):
    with pytest.raises(InputError, match="holds no trained model. Run `recexplore train` first"):
        t5x_trained.give(tmp_path / "W/models/novelty", tmp_path / "T")
