"""Schedules and optimizers are what their formulas say, worked again in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from copying_task import CONFIG
from hypothesis import given, settings
from hypothesis import strategies as st

from recexplore.distributed import partitioning
from recexplore.errors import InputError
from recexplore.models.reward_model import RewardModel
from recexplore.models.saved import abstract_parameters
from recexplore.models.transformer import Transformer
from recexplore.training import objectives
from recexplore.training.optimization import Optimization
from recexplore.training.program import Program

WIDE = dataclasses.replace(
    CONFIG, vocab_size=256, model_dim=128, mlp_dim=384, num_heads=2, num_kv_heads=2, head_dim=8
)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (5, 0.01), (10, 0.02), (10 + 30, 0.015), (10 + 45, 0.01), (100, 0.0), (200, 0.0)],
)
def test_the_learning_rate_rises_in_a_line_and_falls_along_a_cosine(step, expected):
    """After a third of the way down, 0.02 · (1 + cos 60°) / 2."""
    schedule = Optimization(steps=100, learning_rate=0.02, warmup_share=0.1).schedule()
    assert schedule(step) == pytest.approx(expected, abs=1e-8)


@settings(deadline=None)  # the first call compiles
@given(steps=st.integers(1, 1000), share=st.floats(0, 0.999))
def test_the_learning_rate_stays_between_zero_and_its_peak(steps, share):
    schedule = Optimization(steps, 0.5, warmup_share=share).schedule()
    for step in {0, steps // 2, steps - 1}:
        assert 0 <= schedule(step) <= 0.5 + 1e-6
    assert schedule(steps - 1) > 0 or steps == 1 + int(steps * share)


def some_tree():
    """Parameters and two steps' gradients, the first of which are large."""
    random = np.random.default_rng(0)
    shapes = {
        "kernel": (3, 4),
        "head": (4,),
        "scale": (3,),
        "bias": (2,),
        "query_bias": (2, 2),
        "thresholds": (3,),
    }
    params, first, second = (
        {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(3)
    )
    return params, ({name: 10 * g for name, g in first.items()}, second)


def taken(optimization, params, steps):
    """Parameters after each step, and optax's state."""
    rule = optimization.transformation()
    params = jax.tree.map(jnp.asarray, {"params": params})
    state, found = rule.init(params), []
    for gradients in steps:
        gradients = jax.tree.map(jnp.asarray, {"params": gradients})
        updates, state = rule.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        found.append(params["params"])
    return found, state


def clipped(gradients, norm):
    whole = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in gradients.values()))
    return {name: g * min(1, norm / whole) for name, g in gradients.items()}


def adamw(params, steps, rates, decays, decay, norm):
    """Loshchilov & Hutter 2019, with β = (0.9, 0.999) and ε = 1e-8."""
    first = {name: 0.0 for name in params}
    second = dict(first)
    for t, (gradients, rate) in enumerate(zip(steps, rates, strict=True), 1):
        for name, g in clipped(gradients, norm).items():
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            moved = first[name] / (1 - 0.9**t) / (np.sqrt(second[name] / (1 - 0.999**t)) + 1e-8)
            moved = moved + decay * params[name] * (name in decays)
            params = params | {name: params[name] - rate * moved}
        yield params


def test_two_steps_of_adamw_by_hand():
    """Of twelve gradients only the first step's are longer than the clipping norm, so that both the
    clipping and what it leaves alone show in the second step."""
    params, steps = some_tree()
    optimization = Optimization(
        4, 0.01, warmup_share=0.0, weight_decay=0.2, clip_norm=7.0, average_decay=0.0
    )
    rates = [0.01, 0.01 * (1 + np.cos(np.pi / 4)) / 2]
    found, _ = taken(optimization, params, steps)
    expected = adamw(params, steps, rates, {"kernel", "head"}, 0.2, 7.0)
    norms = [np.sqrt(sum(np.sum(g**2) for g in step.values())) for step in steps]
    assert norms[0] > 7 > norms[1]
    for ours, by_hand in zip(found, expected, strict=True):
        for name in params:
            np.testing.assert_allclose(ours[name], by_hand[name], rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_weight_decay_shrinks_matrices_alone(optimizer):
    """Without gradients nothing else moves."""
    params, _ = some_tree()
    none = jax.tree.map(np.zeros_like, params)
    optimization = Optimization(10, 0.1, optimizer, warmup_share=0.0, weight_decay=0.5)
    (found,), _ = taken(optimization, params, [none])
    for name, before in params.items():
        factor = 0.95 if name in ("kernel", "head") else 1.0
        np.testing.assert_allclose(found[name], factor * before, rtol=1e-6, err_msg=name)


def test_which_parameters_of_the_networks_do_not_decay():
    config = dataclasses.replace(
        CONFIG, attention_bias=True, qk_norm=True, post_norms=True, lora_rank=2
    )
    kept = set()
    rule = Optimization(10, 1.0, warmup_share=0.0, weight_decay=0.5).transformation()

    @jax.jit
    def without_gradients(params):
        return rule.update(jax.tree.map(jnp.zeros_like, params), rule.init(params), params)[0]

    for head in ("scalar", "ordinal"):
        variables = abstract_parameters(RewardModel(config, head))
        updates = without_gradients(jax.tree.map(lambda x: np.ones(x.shape, x.dtype), variables))
        for path, update in jax.tree_util.tree_leaves_with_path(updates):
            if not np.any(update):
                kept.add("/".join(key.key for key in path[-2:]))
    norms = ("pre_attention", "pre_mlp", "post_attention", "post_mlp")
    assert kept == {
        *(f"{name}_layer_norm/scale" for name in norms),
        *("query_norm/scale", "key_norm/scale", "decoder_norm/scale"),
        *(f"self_attention/{name}_bias" for name in ("query", "key", "value")),
        *("params/bias", "params/thresholds"),
    }


def test_two_steps_of_adafactor_by_hand():
    """Shazeer & Stern 2018: statistics of rows and columns alone, whose product over their mean
    stands for every element's; the update's root mean square is at most 1."""
    random = np.random.default_rng(1)
    weights = random.normal(size=(130, 200)).astype(np.float32)
    narrow = random.normal(size=(100, 200)).astype(np.float32)  # too narrow to be factored
    steps = [
        {"wide": random.normal(size=(130, 200)), "narrow": random.normal(size=(100, 200))}
        for _ in range(2)
    ]
    steps = [{name: g.astype(np.float32) for name, g in step.items()} for step in steps]
    steps[1] = {name: 3 * g for name, g in steps[1].items()}
    optimization = Optimization(
        10, 0.1, "adafactor", warmup_share=0.0, weight_decay=0.2, clip_norm=100.0
    )
    params = {"wide": weights, "narrow": narrow}
    found, state = taken(optimization, params, steps)
    rows, columns, each = np.zeros(130), np.zeros(200), np.zeros((100, 200))
    for t, gradients in enumerate(steps):
        memory, rate = 1 - (t + 1) ** -0.8, 0.1 * (1 + np.cos(np.pi * t / 10)) / 2
        gradients = clipped(gradients, 100.0)
        rows = memory * rows + (1 - memory) * np.mean(gradients["wide"] ** 2, axis=1)
        columns = memory * columns + (1 - memory) * np.mean(gradients["wide"] ** 2, axis=0)
        each = memory * each + (1 - memory) * gradients["narrow"] ** 2
        squares = {"wide": np.outer(rows, columns) / np.mean(rows), "narrow": each}
        for name, g in gradients.items():
            move = g / np.sqrt(squares[name])
            move = move / max(1, np.sqrt(np.mean(move**2)))
            params = params | {name: params[name] - rate * (move + 0.2 * params[name])}
            np.testing.assert_allclose(found[t][name], params[name], rtol=1e-4, atol=1e-5)
    statistics = next(part for part in state[1] if hasattr(part, "v_row"))
    kept = {statistics.v_row["params"]["wide"].shape: statistics.v_row["params"]["wide"]}
    kept |= {statistics.v_col["params"]["wide"].shape: statistics.v_col["params"]["wide"]}
    np.testing.assert_allclose(kept[(130,)], rows, rtol=1e-5)
    np.testing.assert_allclose(kept[(200,)], columns, rtol=1e-5)


def sharded(optimizer):
    mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
    optimization = Optimization(10, 0.1, optimizer, average_decay=0.0)
    loss = objectives.constrained_description_loss
    return Program(Transformer(WIDE), loss, optimization, mesh)


def test_adafactor_keeps_far_less_than_adamw():
    def size(optimizer):
        program = sharded(optimizer)
        kept = sum(x.size for x in jax.tree.leaves(program.state.optimizer))
        return kept / sum(x.size for x in jax.tree.leaves(program.state.params))

    assert size("adamw") == pytest.approx(2, abs=1e-4)
    assert size("adafactor") < 0.1  # what isn't factored: attention's kernels, which have 8 a head


def test_adafactor_s_statistics_are_dealt_out_where_they_can_be():
    """Sums over rows or columns have another shape than their parameter; those that keep the
    parameter's own shape are dealt out as it is."""
    program = sharded("adafactor")
    params = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(program.state.params)
    }
    checked = {"whole": 0, "sums": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(program.state.optimizer):
        owner = [name for name in params if jax.tree_util.keystr(path).endswith(name)]
        leaf.sharding.shard_shape(leaf.shape)  # raises where it can't be dealt out
        if owner and leaf.shape == params[owner[0]].shape:
            assert leaf.sharding.is_equivalent_to(params[owner[0]].sharding, leaf.ndim)
            checked["whole"] += 1
        else:
            assert leaf.sharding.is_fully_replicated
            checked["sums"] += 1
    assert checked["whole"] >= 7 and checked["sums"] >= 8
    for leaf in jax.tree.leaves(program.initialize(0).optimizer):  # and so they are made
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("steps", 0, "is 0, which is out of range .a whole number from 1 on"),
        ("microbatches", 0, "is 0"),
        ("learning_rate", 0.0, "is 0.0"),
        ("warmup_share", 1.0, "is 1.0"),
        ("weight_decay", -0.1, "is -0.1"),
        ("clip_norm", 0.0, "is 0.0"),
        ("average_decay", 1.0, "is 1.0"),
        ("optimizer", "sgd", "is 'sgd'; it must be one of adamw, adafactor"),
    ],
)
def test_what_makes_no_sense_is_named(name, value, words):
    with pytest.raises(InputError, match=rf"optimization\.Optimization\.{name} {words}"):
        Optimization(**{"steps": 10, "learning_rate": 0.1} | {name: value})
