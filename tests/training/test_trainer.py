"""Training learns, resumes bit for bit, and stops in words."""

import json
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recexplore.distributed import partitioning
from recexplore.errors import InputError
from recexplore.models import saved
from recexplore.models.transformer import Transformer, TransformerConfig
from recexplore.models.trie import build_trie
from recexplore.training import objectives, trainer

SEQUENCES = [[token, 1] for token in range(2, 6)]
TRIE = build_trie(SEQUENCES, 1, 8)
CONFIG = TransformerConfig(
    vocab_size=8,
    num_layers=2,
    model_dim=16,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    max_length=6,
    dropout_rate=0.1,
)
# clu and orbax bring warnings of their own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


class Copying:
    """Endless batches in which the answer is the prompt's last token; knows its position."""

    def __init__(self, poison_at=None):
        self._step, self._poison_at = 0, poison_at

    def __next__(self):
        random = np.random.default_rng(self._step)
        self._step += 1
        prompt = random.integers(2, 6, (16, 3))
        tokens = np.concatenate([prompt, prompt[:, -1:], np.ones((16, 1), int)], axis=1)
        weight = np.ones(16, np.float32)
        if self._step == self._poison_at:
            weight[:] = np.inf
        return {
            "tokens": tokens.astype(np.int32),
            "prompt_lengths": np.full(16, 3, np.int32),
            "lengths": np.full(16, 5, np.int32),
            "seen": np.zeros((16, 4), bool),
            "label": np.zeros(16, np.float32),
            "weight": weight,
            "example_id": np.arange(16) + 100,
        }

    def position(self):
        return np.array([self._step], np.uint8)

    def move_to(self, position):
        self._step = int(position[0])


def run(folder, steps=60, batches=None, learning_rate=1e-2, **options):
    return trainer.train(
        folder,
        Transformer(CONFIG),
        objectives.constrained_description_loss,
        TRIE,
        batches or Copying(),
        [next(Copying())],
        lambda *_, **__: None,
        optimization=trainer.Optimization(steps=steps, learning_rate=learning_rate),
        **{"evaluate_every": 20, "log_every": 10, **options},
    )


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(r["step"], k): r[k] for r in lines for k in ("loss", "validation_loss") if k in r}


def test_training_learns_and_the_best_parameters_can_be_loaded(tmp_path):
    result = run(tmp_path)
    assert result.best_validation < 0.3 < losses(tmp_path)[(10, "loss")]
    model = Transformer(CONFIG)
    params = saved.load_parameters(tmp_path, model)
    total, weight, _ = objectives.constrained_description_loss(
        model, params, jax.tree.map(jnp.asarray, TRIE), jax.tree.map(jnp.asarray, next(Copying()))
    )
    assert float(total / weight) == pytest.approx(result.best_validation, rel=1e-4)


class Killed(Exception):
    """Stands for kill -9: nothing after it runs."""


class KilledAt(Copying):
    def __init__(self, step):
        super().__init__()
        self._kill_at = step

    def __next__(self):
        if self._step == self._kill_at:
            raise Killed
        return super().__next__()


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", batches=KilledAt(37))
    resumed = run(tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert resumed == whole
    model = Transformer(CONFIG)
    first, second = (saved.load_parameters(tmp_path / n, model) for n in ("whole", "killed"))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_damaged_checkpoint_is_left_out_with_a_warning(tmp_path, caplog):
    with pytest.raises(Killed):
        run(tmp_path, batches=KilledAt(50))
    for file in (tmp_path / "checkpoints" / "40" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        run(tmp_path)
    assert "40 is damaged and left out" in caplog.text
    assert losses(tmp_path)[(60, "loss")] > 0


def test_trouble_of_the_machine_is_not_taken_for_a_damaged_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(Killed):
        run(tmp_path, batches=KilledAt(50))
    with monkeypatch.context() as patched:
        patched.setattr("orbax.checkpoint.CheckpointManager.restore", _too_many_open_files)
        with pytest.raises(OSError, match="Too many open files"):
            run(tmp_path)
    assert (tmp_path / "checkpoints" / "40").is_dir()


def _too_many_open_files(*_, **__):
    raise OSError(24, "Too many open files")


def test_a_folder_without_checkpoints_is_an_error(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="holds no checkpoint"):
        saved.load_parameters(tmp_path, Transformer(CONFIG))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    with pytest.raises(InputError, match="(?s)loss is nan at step 30.*begin with 100, 101"):
        run(tmp_path, batches=Copying(poison_at=30))
    assert losses(tmp_path)[(20, "validation_loss")] > 0
    saved.load_parameters(tmp_path, Transformer(CONFIG))


def test_sharded_parameters_train_like_whole_ones(tmp_path):
    data = run(tmp_path / "data", steps=20)
    mixed = run(
        tmp_path / "mixed",
        steps=20,
        make_mesh=lambda: partitioning.make_mesh(data=2, fsdp=2, tensor=2),
    )
    assert mixed.best_validation == pytest.approx(data.best_validation, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "Optimization.steps is 0"),
        ({"evaluate_every": 0}, "train.evaluate_every is 0"),
        ({"log_every": -1}, "train.log_every is -1"),
        (
            {"make_mesh": lambda: partitioning.make_mesh(data=1, fsdp=1, tensor=8)},
            r"key.*of shape \(2, 16, 2, 8\) can't be dealt out: axis 2 doesn't divide by 8",
        ),
        ({"learning_rate": -1.0}, "Optimization.learning_rate is -1.0"),
        (
            {"make_mesh": lambda: partitioning.make_mesh(data=3)},
            "make_mesh has data=3, fsdp=1, tensor=1.*8 devices",
        ),
        ({"rules": (("embed", "data"), ("embed", "fsdp"))}, "map the axis 'embed' twice"),
        ({"rules": (("embed", "model"),)}, "names the mesh axis 'model'"),
    ],
)
def test_impossible_settings_are_named_before_training(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path, **options)


def test_a_batch_must_divide_by_the_mesh():
    with pytest.raises(InputError, match="batch_size is 12; it must be a positive multiple of 8"):
        partitioning.check_batch_size(12, partitioning.make_mesh())


def test_rules_put_logical_axes_on_the_mesh():
    model, mesh = Transformer(CONFIG), partitioning.make_mesh(data=2, fsdp=2, tensor=2)
    abstract = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.ones((1, 2), jnp.int32), method="prefill")
    )
    found = partitioning.shardings_of(abstract, mesh, partitioning.DEFAULT_RULES)["params"]
    assert found["token_embedder"].spec == jax.P("tensor", "fsdp")
    assert found["layers"]["mlp"]["wo"].spec == jax.P(None, "tensor", "fsdp")
    shapes = nn.unbox(abstract)["params"]["token_embedder"].shape
    assert found["token_embedder"].shard_shape(shapes) == (4, 8)


def test_the_best_checkpoint_is_the_one_with_least_of_what_it_is_chosen_by(tmp_path):
    def distance_to_a_loss_of_one(model, params, trie, batch, dropout_key=None):
        total, weight, right = objectives.constrained_description_loss(model, params, trie, batch)
        return objectives.Sums(abs(total - weight), weight, right)

    result = run(tmp_path, choose_by=distance_to_a_loss_of_one, evaluate_every=5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = {r["step"]: r for r in lines if "validation_choice" in r}
    best = min(found, key=lambda step: found[step]["validation_choice"])
    assert result.best_step == best < 60  # the loss itself is least at the end
    assert result.best_validation == found[best]["validation_choice"]
    for row in found.values():
        assert row["validation_choice"] == pytest.approx(abs(row["validation_loss"] - 1), abs=1e-5)
