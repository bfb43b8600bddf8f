"""T5X's checkpoints: read from layouts made by hand, written as T5X wants them, without T5X."""

import glob
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import linen as nn
from flax import serialization, traverse_util
from t5x_layout import arrays_in, write_first_orbax, write_legacy, write_orbax

from recexplore.adapters import name_difference, t5x_checkpoints
from recexplore.errors import InputError
from recexplore.models.reward_model import RewardModel
from recexplore.models.saved import fresh_variables
from recexplore.models.transformer import Transformer, TransformerConfig
from recexplore.training.optimization import Optimization

CONFIG = TransformerConfig(
    vocab_size=8,
    num_layers=2,
    model_dim=4,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    mlp_dim=6,
    max_length=16,
)
FORMS = {"orbax": write_orbax, "first orbax": write_first_orbax, "legacy": write_legacy}
NETWORKS = {"novelty": Transformer(CONFIG), "alignment": RewardModel(CONFIG, head="ordinal")}
OPTIMIZATION = Optimization(steps=10, learning_rate=0.1)


def variables_of(model, seed=0):
    return nn.unbox(fresh_variables(model, jax.random.key(seed)))


def trained(model, steps=3):
    """Variables and optimizer state after some steps by made-up gradients."""
    params, rule = variables_of(model), OPTIMIZATION.transformation()
    state = rule.init(params)
    for step in range(steps):
        gradients = jax.tree.map(lambda p, s=step: jnp.sin(p + s), params)
        updates, state = rule.update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params, state


def as_t5x_has_it(params, state, step):
    """By the letter: an optax chain's links by number, empty ones and "params" left out."""
    adam = state[1][0]
    states = {
        "1": {
            "0": {
                "count": adam.count,
                "mu": serialization.to_state_dict(adam.mu["params"]),
                "nu": serialization.to_state_dict(adam.nu["params"]),
            },
            "2": {"count": state[1][2].count},
        }
    }
    state = {"step": jnp.int32(step), "param_states": states}
    return jax.tree.map(np.asarray, {"target": params["params"], "state": state})


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_both_forms_are_read_as_they_were_written(form, name, tmp_path):
    model = NETWORKS[name]
    params, state = trained(model)
    tree = as_t5x_has_it(params, state, 3)
    folder = FORMS[form](tmp_path, 3, tree)
    assert_same(t5x_checkpoints.read(folder), tree)
    assert_same(t5x_checkpoints.read_parameters(folder, model), jax.tree.map(np.asarray, params))
    abstract = jax.eval_shape(OPTIMIZATION.transformation().init, params)
    assert_same(t5x_checkpoints.read_optimizer(folder, abstract), jax.tree.map(np.asarray, state))
    assert t5x_checkpoints.read_step(folder) == 3


def test_any_model_comes_out_as_a_plain_dictionary(tmp_path):
    tree = {
        "target": {"encoder": {"layers_0": {"wi": np.arange(6, dtype=np.float32).reshape(2, 3)}}},
        "state": {"step": np.asarray(7, np.int32)},
    }
    assert_same(
        t5x_checkpoints.read(write_orbax(tmp_path / "a", 7, tree), ("target",)),
        {"target": tree["target"]},
    )
    for driver in ("file", "gfile", "gcs"):
        assert_same(t5x_checkpoints.read(write_legacy(tmp_path / driver, 7, tree, driver)), tree)


def test_half_precision_comes_back_in_the_networks_own(tmp_path):
    model = NETWORKS["novelty"]
    params = variables_of(model)
    rounded = jax.tree.map(lambda p: np.asarray(p, jnp.bfloat16), params)
    target = jax.tree.map(lambda p: p.astype(np.float32), rounded)["params"]
    folder = t5x_checkpoints.write(tmp_path, 1, rounded)
    assert {str(array["dtype"]) for array in arrays_in(folder / "state").values()} == {
        "bfloat16",
        "<i4",
    }
    assert_same(t5x_checkpoints.read_parameters(folder, model)["params"], target)


def test_the_bits_of_bfloat16_that_old_checkpoints_have_are_read_as_such(tmp_path):
    values = np.array([[1.5, -2.0], [0.25, 3e38]], jnp.bfloat16)
    tree = {"target": {"w": values.view(np.uint16)}}
    found = t5x_checkpoints.read(write_legacy(tmp_path, 1, tree))
    assert_same(found, {"target": {"w": values}})


def test_a_part_is_read_alone(tmp_path):
    params, state = trained(NETWORKS["novelty"])
    for write in FORMS.values():
        folder = write(tmp_path / write.__name__, 3, as_t5x_has_it(params, state, 3))
        step = np.asarray(3, np.int32)
        assert_same(t5x_checkpoints.read(folder, ["state/step"]), {"state": {"step": step}})
        with pytest.raises(InputError, match="has no 'state/st'; it has state, target"):
            t5x_checkpoints.read(folder, ["state/st"])


def test_the_latest_of_several_checkpoints_is_read(tmp_path):
    for step in (2, 10, 9):
        tree = {"target": {"w": np.full(2, step)}, "state": {"step": np.asarray(step)}}
        write_orbax(tmp_path, step, tree)
    assert t5x_checkpoints.read_step(tmp_path) == 10
    assert t5x_checkpoints.find(tmp_path / "checkpoint_9").name == "checkpoint_9"


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_written_has_t5x_s_names_and_version_of_zarr(name, tmp_path):
    model = NETWORKS[name]
    params, state = trained(model)
    tree = as_t5x_has_it(params, state, 3)
    folder = t5x_checkpoints.write(tmp_path, 3, params, state)
    assert folder == tmp_path / "checkpoint_3"
    arrays = arrays_in(folder / "state")
    flat = traverse_util.flatten_dict(tree, sep=".")
    assert {name: tuple(array["shape"]) for name, array in arrays.items()} == {
        name: value.shape for name, value in flat.items()
    }
    assert {array["zarr_format"] for array in arrays.values()} == {2}
    assert_same(t5x_checkpoints.read(folder), tree)


def test_a_checkpoint_is_not_written_over(tmp_path):
    params = variables_of(NETWORKS["novelty"])
    t5x_checkpoints.write(tmp_path, 3, params)
    with pytest.raises(InputError, match="has a checkpoint_3 already"):
        t5x_checkpoints.write(tmp_path, 3, params)


def test_adapters_are_not_written(tmp_path):
    with pytest.raises(InputError, match="the model has lora too. Merge"):
        t5x_checkpoints.write(tmp_path, 3, {"params": {}, "lora": {}})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: None, r"is no T5X checkpoint and holds none. Name a folder checkpoint_<s"),
        (
            lambda folder: write_orbax(folder, 1, {"params": {"w": np.zeros(2)}}),
            r"has no 'target'; it has params\.",
        ),
        (
            lambda folder: write_legacy(folder, 1, {"w": np.zeros(2)}),
            r"has no 'target'; it has w\.",
        ),
        (
            lambda folder: (
                (folder / "checkpoint_1").mkdir()
                or (folder / "checkpoint_1" / "checkpoint").write_bytes(b"\xc1")
            ),
            "can't be read: ",
        ),
    ],
)
def test_what_is_no_checkpoint_is_refused(spoil, message, tmp_path):
    spoil(tmp_path)
    with pytest.raises(InputError, match=message):
        t5x_checkpoints.read_parameters(tmp_path, NETWORKS["novelty"])


class Bucket:
    """gs://bucket, whose files lie in a folder here."""

    def __init__(self, folder):
        self.folder = str(folder)

    def here(self, path):
        return os.fspath(path).replace("gs://bucket", self.folder)

    def exists(self, path):
        return os.path.exists(self.here(path))

    def isdir(self, path):
        return os.path.isdir(self.here(path))

    def glob(self, path):
        return [p.replace(self.folder, "gs://bucket") for p in glob.glob(self.here(path))]


def test_a_checkpoint_in_a_bucket_is_found_where_it_is(tmp_path, monkeypatch):
    for step in (3, 20):
        write_orbax(tmp_path / "models", step, {"target": {"w": np.zeros(2)}})
    monkeypatch.setattr(type(epath.Path("gs://bucket")), "_backend", Bucket(tmp_path))
    for given, found in (("models", "checkpoint_20"), ("models/checkpoint_3", "checkpoint_3")):
        path = t5x_checkpoints.find(f"gs://bucket/{given}")
        assert os.fspath(path) == f"gs://bucket/models/{found}"
    with pytest.raises(InputError, match="^gs://bucket/nothing is no T5X checkpoint"):
        t5x_checkpoints.find("gs://bucket/nothing")


def test_a_damaged_legacy_array_is_named(tmp_path):
    params, state = trained(NETWORKS["novelty"])
    folder = write_legacy(tmp_path, 1, as_t5x_has_it(params, state, 1))
    (folder / "target.token_embedder" / ".zarray").unlink()
    with pytest.raises(InputError, match="can't be read: .*token_embedder"):
        t5x_checkpoints.read_parameters(folder, NETWORKS["novelty"])


def test_a_transformer_is_found_inside_a_reward_model_by_the_mapping_that_the_error_suggests(
    tmp_path,
):
    whole, part = NETWORKS["alignment"], NETWORKS["novelty"]
    params = variables_of(whole)
    folder = t5x_checkpoints.write(tmp_path, 1, params)
    with pytest.raises(InputError) as refused:
        t5x_checkpoints.read_parameters(folder, part)
    said = str(refused.value)
    assert "Expected and not found: decoder_norm/scale [4], layers/mlp/wi_0 [2, 4, 6]" in said
    assert "Found and not expected: head [4], thresholds [20], transformer/decoder_norm" in said
    assert r"Perhaps this mapping is meant: [('(.*)', 'transformer/\\1')]" in said
    read = t5x_checkpoints.read_parameters(folder, part, [("(.*)", r"transformer/\1")])
    assert_same(read["params"], jax.tree.map(np.asarray, params["params"]["transformer"]))


def test_a_mapping_that_misses_names_is_met_with_what_was_found(tmp_path):
    part = NETWORKS["novelty"]
    folder = t5x_checkpoints.write(tmp_path, 1, variables_of(NETWORKS["alignment"]))
    rules = [("layers/(.*)", r"transformer/layers/\1")]
    with pytest.raises(InputError) as refused:
        t5x_checkpoints.read_parameters(folder, part, rules)
    said = str(refused.value)
    assert "Expected and not found: decoder_norm/scale [4], token_embedder [8, 4]." in said
    assert "transformer/decoder_norm/scale [4], transformer/token_embedder [8, 4]." in said
    assert r"('(.*)', 'transformer/\\1')" in said


def test_other_shapes_and_names_are_listed(tmp_path):
    model = NETWORKS["novelty"]
    target = jax.tree.map(np.asarray, variables_of(model)["params"])
    target["token_embedder"] = np.zeros((9, 4), np.float32)
    target["layers"]["mlp"]["w_o"] = target["layers"]["mlp"].pop("wo")
    folder = write_orbax(tmp_path, 1, {"target": target})
    with pytest.raises(InputError) as refused:
        t5x_checkpoints.read_parameters(folder, model)
    said = str(refused.value)
    assert "Expected and not found: layers/mlp/wo [2, 6, 4]." in said
    assert "Found and not expected: layers/mlp/w_o [2, 6, 4]." in said
    assert "token_embedder has the shape (9, 4), but (8, 4) is expected" in said
    assert "[('layers/mlp/wo', 'layers/mlp/w_o')]" in said


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("(", "a")], r"pattern '\(' is none"),
        ([("nothing/.*", "a")], "pattern 'nothing/.*' matches no parameter of the model"),
        ([("(.*)", r"a/\2")], r"pattern '\(\.\*\)' can't be replaced by 'a/\\\\2': invalid group"),
    ],
)
def test_a_mapping_that_means_nothing_is_refused(rules, message, tmp_path):
    model = NETWORKS["novelty"]
    folder = t5x_checkpoints.write(tmp_path, 1, variables_of(model))
    with pytest.raises(InputError, match=message):
        t5x_checkpoints.read_parameters(folder, model, rules)


def test_another_optimizer_s_state_is_refused(tmp_path):
    model = NETWORKS["novelty"]
    params, state = trained(model)
    folder = t5x_checkpoints.write(tmp_path, 3, params, state)
    other = Optimization(steps=10, learning_rate=0.1, optimizer="adafactor").transformation()
    with pytest.raises(InputError, match="optimizer state of the T5X .*0/v_col/.* alone.$"):
        t5x_checkpoints.read_optimizer(folder, jax.eval_shape(other.init, params))
    bare = t5x_checkpoints.write(tmp_path / "bare", 3, params)
    with pytest.raises(InputError, match="has no optimizer state"):
        t5x_checkpoints.read_optimizer(bare, jax.eval_shape(other.init, params))


def test_long_differences_are_cut():
    many = {f"w{i:02d}": np.zeros(i) for i in range(20)}
    with pytest.raises(InputError, match=r"w11 \[11\], and 8 more\."):
        name_difference.check("It", many, {}, {})


def test_neither_t5x_nor_tensorflow_is_imported():
    code = "import sys; import recexplore.adapters.t5x_checkpoints; print(sorted(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "'orbax" in found.stdout
    assert not {"'t5x'", "'tensorflow'", "'seqio'"} & set(found.stdout.strip("[]\n").split(", "))
