"""Logical axes find their place on the mesh, batches their devices, and mistakes their words."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from recexplore.distributed import partitioning
from recexplore.errors import InputError
from recexplore.models.saved import abstract_parameters
from recexplore.models.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=8,
    num_layers=2,
    model_dim=16,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    max_length=6,
)


def boxed(config=CONFIG):
    """Its parameters' shapes with their logical axes."""
    one = jnp.ones((1, 2), jnp.int32)
    return jax.eval_shape(lambda: Transformer(config).init(jax.random.key(0), one))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (8, 1, 1)),
        ({"data": 1, "fsdp": -1}, (1, 8, 1)),
        ({"fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 2, "fsdp": 1, "tensor": -1}, (2, 1, 4)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": -1, "fsdp": 8}, (1, 8, 1)),
    ],
)
def test_one_size_may_be_what_is_left(sizes, expected):
    mesh = partitioning.make_mesh(**sizes)
    assert tuple(mesh.shape[name] for name in ("data", "fsdp", "tensor")) == expected
    assert {*mesh.devices.flat} == {*jax.devices()}


def test_a_mesh_may_be_of_some_devices():
    some = jax.devices()[2:6]
    assert {*partitioning.make_mesh(tensor=2, devices=some).devices.flat} == {*some}


@pytest.mark.parametrize(
    ("sizes", "shown"),
    [
        ({"data": 3}, "data=3, fsdp=1, tensor=1"),
        ({"data": 16}, "data=16, fsdp=1, tensor=1"),
        ({"data": -1, "fsdp": 3}, "data=-1, fsdp=3, tensor=1"),  # 8 isn't a multiple of 3
        ({"data": -1, "fsdp": -1}, "data=-1, fsdp=-1, tensor=1"),
        ({"data": 0}, "data=0, fsdp=1, tensor=1"),
        ({"data": -1, "fsdp": 0}, "data=-1, fsdp=0, tensor=1"),
        ({"data": -2, "fsdp": -4}, "data=-2, fsdp=-4, tensor=1"),  # although the product is 8
    ],
)
def test_impossible_sizes_are_shown(sizes, shown):
    with pytest.raises(InputError, match=f"{shown}, which don't multiply to the 8 devices"):
        partitioning.make_mesh(**sizes)


def test_rules_put_logical_axes_on_the_mesh():
    mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
    abstract = boxed()
    found = partitioning.shardings_of(abstract, mesh, partitioning.DEFAULT_RULES)["params"]
    assert found["token_embedder"].spec == jax.P("tensor", "fsdp")
    assert found["layers"]["mlp"]["wo"].spec == jax.P(None, "tensor", "fsdp")
    shape = nn.unbox(abstract)["params"]["token_embedder"].shape
    assert found["token_embedder"].shard_shape(shape) == (4, 8)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("embed", "data"), ("embed", "fsdp")), "map the axis 'embed' twice"),
        ((("embed", "model"),), r"\('embed', 'model'\).*names the mesh axis 'model'.*data, fsdp"),
        ((("batch", ("data", "pod")),), "names the mesh axis 'pod'"),
        ((("emebd", "fsdp"),), "a rule for 'emebd', which no array has.*vocab, embed"),
        (
            (("embed", "tensor"), ("mlp", "tensor")),
            r"send both 'embed' and 'mlp' of .*'wi_0'.* to the mesh axis 'tensor'",
        ),
    ],
)
def test_wrong_rules_are_named(rules, message):
    with pytest.raises(InputError, match=message):
        partitioning.shardings_of(boxed(), partitioning.make_mesh(), rules)


def test_the_default_rules_are_sound():
    partitioning.check_rules(partitioning.DEFAULT_RULES)


def test_a_parameter_that_cannot_be_dealt_out_is_named_with_its_axis():
    mesh = partitioning.make_mesh(data=1, tensor=8)
    shardings = partitioning.shardings_of(boxed(), mesh, partitioning.DEFAULT_RULES)
    message = r"'key'.*of shape \(2, 16, 2, 8\).*axis 2 doesn't divide by 8, the mesh's tensor"
    with pytest.raises(InputError, match=message):
        partitioning.check_shapes(abstract_parameters(Transformer(CONFIG)), shardings)


def test_what_does_not_fit_its_sharding_is_replicated():
    mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
    on = lambda *axes: jax.NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    shapes = {"whole": (4, 6), "odd": (4, 5), "sum": (4,), "number": ()}
    abstract = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    wanted = dict.fromkeys(shapes, on("fsdp", "tensor"))
    found = partitioning.replicate_misfits(abstract, wanted)
    assert found == dict.fromkeys(shapes, on()) | {"whole": on("fsdp", "tensor")}


def test_a_batch_must_divide_by_the_mesh():
    mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
    partitioning.check_batch_size(12, mesh)
    partitioning.check_batch_size(24, mesh, microbatches=3)
    with pytest.raises(InputError, match="train.batch_size is 10; .* multiple of 4: 4, the mesh"):
        partitioning.check_batch_size(10, mesh)
    with pytest.raises(InputError, match="aot.batch_size is 0; .* multiple of 12"):
        partitioning.check_batch_size(0, mesh, microbatches=3, name="aot.batch_size")
    with pytest.raises(InputError, match="multiple of 8: 4, .* data × fsdp, times 2 microbatches"):
        partitioning.check_batch_size(12, mesh, microbatches=2)


@given(
    shares=st.sampled_from([(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)]),
    times=st.integers(1, 3),
    width=st.integers(1, 3),
)
@settings(deadline=None, max_examples=20)
def test_a_batch_comes_back_as_it_was_dealt_out(shares, times, width):
    mesh = partitioning.make_mesh(*shares)
    size = shares[0] * shares[1] * times
    rows = partitioning.local_rows(size, mesh)
    np.testing.assert_array_equal(rows, np.arange(size))  # one process has all of them
    whole = {
        "tokens": np.arange(size * width, dtype=np.int32).reshape(size, width),
        "weight": np.arange(size, dtype=np.float32),
    }
    local = {name: values[rows] for name, values in whole.items()}
    with jax.transfer_guard("disallow"):
        placed = partitioning.put_batch(local, size, mesh)
    for name, values in whole.items():
        np.testing.assert_array_equal(placed[name], values)
        assert placed[name].dtype == values.dtype
        assert placed[name].sharding == partitioning.batch_sharding(mesh)
        for shard in placed[name].addressable_shards:
            assert len(shard.data) == times
            np.testing.assert_array_equal(shard.data, values[shard.index])
