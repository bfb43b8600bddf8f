"""A run's programs: what is trained and what stays, the same on one device and on eight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from copying_task import CONFIG, TRIE, Copying, run, some_batch
from small_models import some_parameters

from recexplore.distributed import partitioning
from recexplore.errors import InputError
from recexplore.models import pretrained, saved
from recexplore.models.reward_model import RewardModel
from recexplore.models.transformer import Transformer
from recexplore.training import objectives
from recexplore.training.optimization import Optimization
from recexplore.training.program import Program

# clu and orbax bring warnings of their own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

PLAIN = dataclasses.replace(CONFIG, dropout_rate=0.0)
LORA = dataclasses.replace(PLAIN, lora_rank=2, lora_targets=("query", "wo"))
ONE, EIGHT, MIXED = (1, 1, 1), (8, 1, 1), (2, 2, 2)
LOSSES = {
    Transformer: objectives.constrained_description_loss,
    RewardModel: objectives.pointwise_loss,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pretrained transformer, as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("pretrained") / "model"
    pretrained.save(path, parameters(), PLAIN)
    return path


def parameters():
    """Of the pretrained transformer."""
    return jax.tree.map(np.asarray, some_parameters(Transformer(PLAIN), seed=3))


@functools.cache  # and so is what it compiles
def program(config=PLAIN, network=Transformer, sizes=ONE, objective=None, **optimization):
    """One that averages and clips nothing."""
    given = {"average_decay": 0.0, "warmup_share": 0.0, "clip_norm": 1e9}
    given |= {"steps": 20, "learning_rate": 1e-2}
    mesh = partitioning.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    loss = objective or LOSSES[network]
    return Program(network(config), loss, Optimization(**given | optimization), mesh)


def batches(count):
    """The copying task's, with labels and weights of all kinds, some of them 0."""
    data, random = Copying().training(np.arange(16)), np.random.default_rng(0)
    for _ in range(count):
        weight = random.choice([0.0, 0.5, 1.0, 7.0], 16).astype(np.float32)
        yield next(data) | {"label": random.random(16, np.float32), "weight": weight}


def stepped(program, state, frozen=None, count=3):
    """The state after some steps, and each step's figures."""
    trie, figures = jax.device_put(TRIE, program.everywhere), []
    for batch in batches(count):
        placed = partitioning.put_batch(batch, 16, program.mesh)
        state, metrics = program.step(state, frozen or {}, placed, trie)
        figures.append({name: float(value) for name, value in metrics.items()})
    return state, figures


TRIE_ON_DEVICE = jax.tree.map(jnp.asarray, TRIE)


def on_host(tree):
    return jax.tree.map(lambda x: np.array(x, copy=True), tree)


def paths(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path) for path, _ in found}


def assert_equal(ours, theirs):
    assert paths(ours) == paths(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@functools.partial(jax.jit, static_argnums=0)
def mean_loss(model, variables, batch, key=None):
    sums = LOSSES[type(model)](model, variables, TRIE_ON_DEVICE, batch, key)
    return sums.loss / sums.weight


@pytest.mark.parametrize(
    ("network", "prefix", "head"),
    [(Transformer, "", set()), (RewardModel, "transformer/", {"params/head", "params/bias"})],
)
def test_with_adapters_nothing_else_is_trained(folder, network, prefix, head):
    lora = program(LORA, network, sizes=MIXED)
    places = ("self_attention/query_a", "self_attention/query_b", "mlp/wo_a", "mlp/wo_b")
    adapters = {f"lora/{prefix}layers/{place}" for place in places}
    assert paths(lora.state.params) == adapters | head
    frozen = lora.read_frozen(folder)
    assert_equal(
        frozen["params"]["transformer"] if prefix else frozen["params"], parameters()["params"]
    )
    state = lora.initialize(0, folder)
    before = on_host(state.params)
    state, _ = stepped(lora, state, frozen)
    assert_equal(
        frozen["params"]["transformer"] if prefix else frozen["params"], parameters()["params"]
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        old = before
        for key in path:
            old = old[key.key]
        assert np.any(np.asarray(leaf) != old), path


def test_adapters_begin_where_the_pretrained_network_is(folder):
    lora = program(LORA, sizes=MIXED)
    _, (figures,) = stepped(lora, lora.initialize(5, folder), lora.read_frozen(folder), count=1)
    (batch,) = batches(1)
    training = jax.random.key(0)  # which it says; nothing is dropped
    expected = float(mean_loss(Transformer(PLAIN), parameters(), batch, training))
    assert figures["loss"] == pytest.approx(expected, rel=1e-5)


def test_without_a_folder_adapters_have_nothing_to_add_to(tmp_path):
    message = "lora_rank is 2, but there is no pretrained.*pipeline.train.pretrained"
    with pytest.raises(InputError, match=message):
        program(LORA).read_frozen(None)
    with pytest.raises(InputError, match=message):
        run(tmp_path, model=Transformer(LORA))


@pytest.mark.parametrize("sizes", [ONE, EIGHT, MIXED])
@pytest.mark.parametrize("network", [Transformer, RewardModel])
def test_fine_tuning_starts_from_exactly_the_pretrained_parameters(folder, sizes, network):
    full = program(network=network, sizes=sizes, average_decay=0.9)
    state = full.initialize(0, folder)
    assert full.read_frozen(folder) == {}
    for params in (state.params["params"], state.average["params"]):
        read = params["transformer"] if network is RewardModel else params
        assert_equal(read, parameters()["params"])
    if network is RewardModel:
        assert {*state.params["params"]} == {"transformer", "head", "bias"}
        assert not np.any(state.params["params"]["head"])
    assert jax.tree.map(lambda x: x.sharding, state.params) == full.state_shardings.params


@pytest.mark.parametrize("network", [Transformer, RewardModel])
def test_pretrained_parameters_train_on_eight_devices_as_on_one(folder, network):
    """Read parameters are handed over to the devices without a copy; no step may write to what
    another device still reads."""
    (alone, expected), (shared, found) = (
        stepped(made, made.initialize(0, folder))
        for made in (program(network=network), program(network=network, sizes=MIXED))
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for ours, theirs in zip(*map(jax.tree.leaves, (shared.params, alone.params)), strict=True):
        # AdamW makes a step of 0.01 out of the smallest gradient, and of what rounding does to it.
        np.testing.assert_allclose(on_host(ours), on_host(theirs), atol=1e-3)


def test_adapters_train_on_eight_devices_as_on_one(folder):
    figures = {}
    for sizes in (ONE, MIXED):
        lora = program(LORA, sizes=sizes)
        _, figures[sizes] = stepped(lora, lora.initialize(0, folder), lora.read_frozen(folder))
    for ours, alone in zip(figures[MIXED], figures[ONE], strict=True):
        assert ours == pytest.approx(alone, rel=1e-4)


def test_adapters_that_were_trained_are_loaded_around_their_transformer(tmp_path, folder):
    model = Transformer(LORA)
    result = run(tmp_path, model=model, steps=20, pretrained=folder)
    variables = saved.load_parameters(tmp_path, model, str(folder))
    assert_equal(on_host({"params": variables["params"]}), parameters())
    assert float(mean_loss(model, variables, some_batch())) == pytest.approx(
        result.best_validation, rel=1e-4
    )
    assert result.best_validation < mean_loss(Transformer(PLAIN), parameters(), some_batch())


def first_moments(state):
    """A tenth of the gradient, after a first step of AdamW that clipped nothing."""
    return on_host(state.optimizer[1][0].mu)


@pytest.mark.parametrize(("parts", "sizes"), [(1, ONE), (4, MIXED)])
def test_a_step_s_gradient_is_the_weighted_mean_of_the_examples_ones(folder, parts, sizes):
    """Whatever parts the batch is read in, and although their weights are unequal."""
    whole = program(sizes=sizes, microbatches=parts)
    state, (figures,) = stepped(whole, whole.initialize(0, folder), count=1)
    (batch,) = batches(1)
    losses, gradients = gradients_of_examples()
    share = batch["weight"] / np.sum(batch["weight"])
    mean = jax.tree.map(lambda each: np.tensordot(share, each, 1), gradients)
    found = jax.tree.map(lambda m: 10 * m, first_moments(state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, mean)
    assert figures["loss"] == pytest.approx(share @ losses, rel=1e-5)
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(mean)))
    assert figures["gradient_norm"] == pytest.approx(norm, rel=1e-4)


@functools.cache
def gradients_of_examples():
    """Each example's loss and gradient of the first batch, the example being a batch of its own."""
    (batch,) = batches(1)

    def loss(variables, example):
        one = {name: values[None] for name, values in example.items()} | {"weight": jnp.ones(1)}
        training = jax.random.key(0)
        return LOSSES[Transformer](
            Transformer(PLAIN), variables, TRIE_ON_DEVICE, one, training
        ).loss

    each = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))
    return on_host(each(parameters(), jax.tree.map(jnp.asarray, batch)))


def test_steps_are_traced_once_and_leave_everything_as_it_was_placed():
    config = dataclasses.replace(PLAIN, param_dtype="bfloat16")
    traced = []

    def noticed(*arguments):
        traced.append(arguments)
        return LOSSES[Transformer](*arguments)

    whole = program(config, sizes=MIXED, objective=noticed, average_decay=0.9, microbatches=2)
    state, _ = stepped(whole, whole.initialize(0), count=1)
    once = len(traced)
    state, _ = stepped(whole, state, count=4)
    assert len(traced) == once <= 2  # twice within one trace, where shapes are asked for first
    for ours, meant in zip(jax.tree.leaves(state), jax.tree.leaves(whole.state), strict=True):
        assert (ours.shape, ours.dtype) == (meant.shape, meant.dtype)
        assert ours.sharding.is_equivalent_to(meant.sharding, ours.ndim)


def test_the_average_is_wide_even_if_the_parameters_are_not():
    """With eight bits a mean of small steps would stand still."""
    state = program(dataclasses.replace(PLAIN, param_dtype="bfloat16"), average_decay=0.9).state
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.average)} == {"float32"}
