"""Operations counted off a program are those that its mathematics needs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from copying_task import CONFIG, TRIE, some_batch

from recexplore.distributed import partitioning
from recexplore.models.reward_model import RewardModel
from recexplore.models.saved import abstract_parameters
from recexplore.models.transformer import Transformer
from recexplore.training import objectives
from recexplore.training.flops import count_flops
from recexplore.training.optimization import Optimization
from recexplore.training.program import Program

A = jax.ShapeDtypeStruct((2, 3), "float32")
B = jax.ShapeDtypeStruct((3, 3), "float32")
AB = 2 * 2 * 3 * 3  # a multiplication and an addition for each of 2 × 3 × 3


@pytest.mark.parametrize(
    ("axes", "shapes", "expected"),
    [
        ("ij,jk->ik", [(2, 3), (3, 5)], 2 * 2 * 3 * 5),
        ("i,i->", [(7,), (7,)], 2 * 7),
        ("i,j->ij", [(2,), (3,)], 2 * 2 * 3),
        ("bij,bjk->bik", [(4, 2, 3), (4, 3, 5)], 4 * 2 * 2 * 3 * 5),
        ("btd,dhk->bthk", [(2, 3, 8), (8, 4, 5)], 2 * (2 * 3) * 8 * (4 * 5)),
        ("bthk,hkd->btd", [(2, 3, 4, 5), (4, 5, 8)], 2 * (2 * 3) * (4 * 5) * 8),
    ],
)
def test_a_product_of_matrices(axes, shapes, expected):
    arrays = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    assert count_flops(lambda a, b: jnp.einsum(axes, a, b), *arrays) == expected


def test_what_is_no_product_of_matrices_is_free():
    assert count_flops(lambda a, b: jnp.tanh(a).sum() + b[0] * 2, A, B) == 0


def repeated(a, b, times=7):
    return jax.lax.scan(lambda c, _: (c @ b, None), a, length=times)[0]


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (lambda a, b: a @ b @ b, 2),
        (repeated, 7),
        (lambda a, b: jax.lax.scan(lambda c, _: (repeated(c, b, 5), None), a, length=3)[0], 15),
        (lambda a, b: jax.lax.fori_loop(0, 4, lambda _, c: c @ b, a), 4),
        (lambda a, b: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ b, a), 1),
        (lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: a @ b @ b), 2),
        (lambda a, b: jax.lax.switch(1, [lambda: a, lambda: repeated(a, b), lambda: a @ b]), 7),
        (jax.jit(lambda a, b: jax.jit(repeated)(a, b) @ b), 8),
        (jax.checkpoint(lambda a, b: a @ b), 1),
        (jax.vmap(lambda row, b: row @ b, in_axes=(0, None)), 1),
        (lambda a, b: jax.nn.silu(a @ b) + jax.nn.relu(a @ b), 2),  # with rules of their own
    ],
)
def test_loops_count_as_they_run_and_of_branches_the_dearest(function, products):
    assert count_flops(function, A, B) == products * AB


def test_only_gradients_that_are_wanted_count():
    def loss(a, b):
        return (a @ b).sum()

    assert count_flops(jax.grad(loss, 0), A, B) == 2 * AB  # and the forward pass
    assert count_flops(jax.grad(loss, (0, 1)), A, B) == 3 * AB


BATCH, LENGTH = 16, 5  # of the copying task
TOKENS = jax.ShapeDtypeStruct((BATCH, LENGTH), "int32")
SIZES = dict(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=20, lora_rank=0)
GROUPED = dataclasses.replace(CONFIG, **SIZES)


def of_kernels(config, tokens):
    """2 · N · T for the kernels of all layers."""
    heads, groups = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    kernels = config.model_dim * (2 * heads + 2 * groups + 3 * config.mlp_dim)
    return 2 * config.num_layers * kernels * tokens


def of_attention(config, batch, length):
    """Queries by keys, weights by values; every token is compared with every one."""
    one = 2 * batch * config.num_heads * length**2 * config.head_dim
    return config.num_layers * 2 * one


@pytest.mark.parametrize("config", [CONFIG, GROUPED], ids=["plain", "grouped"])
@pytest.mark.parametrize("unroll", [1, 3])
def test_a_transformer_needs_two_for_every_parameter_and_token_and_its_attention(config, unroll):
    config = dataclasses.replace(config, scan_unroll=unroll)
    model = Transformer(config)
    parameters = abstract_parameters(model)
    forward = of_kernels(config, BATCH * LENGTH) + of_attention(config, BATCH, LENGTH)
    logits = 2 * config.vocab_size * config.model_dim * BATCH * LENGTH

    def loss(parameters, tokens):
        return jnp.mean(model.apply(parameters, tokens) ** 2)

    assert count_flops(model.apply, parameters, TOKENS) == forward + logits
    assert count_flops(jax.grad(loss), parameters, TOKENS) == 3 * (forward + logits)


def program(config, network=Transformer, objective=objectives.constrained_description_loss):
    mesh = partitioning.make_mesh(data=1, devices=jax.devices()[:1])
    return Program(network(config), objective, Optimization(10, 1e-2), mesh)


def whole_batch():
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in some_batch().items()}


def of_choices(config):
    """Logits of the tokens that the levels of the trie are about, after one place each."""
    symbols = sum(np.size(level.alphabet) for level in TRIE.levels)
    return 2 * BATCH * symbols * config.model_dim


def test_a_step_needs_three_times_its_forward_pass():
    forward = of_kernels(GROUPED, BATCH * LENGTH) + of_attention(GROUPED, BATCH, LENGTH)
    expected = 3 * (forward + of_choices(GROUPED))
    assert program(GROUPED).flops(whole_batch(), TRIE) == expected


@pytest.mark.parametrize("remat", ["full", "dots", "dots_no_batch"])
@pytest.mark.parametrize("unroll", [1, 3])
def test_what_is_computed_again_counts_once(remat, unroll):
    config = dataclasses.replace(GROUPED, remat=remat, scan_unroll=unroll)
    kept = program(GROUPED).flops(whole_batch(), TRIE)
    again = program(config)
    assert again.flops(whole_batch(), TRIE) == kept

    if remat == "full":  # the step itself does compute all layers again

        def loss(parameters, tokens):
            return jnp.mean(again.model.apply(parameters, tokens, method="prefill")[0] ** 2)

        forward = of_kernels(GROUPED, BATCH * LENGTH) + of_attention(GROUPED, BATCH, LENGTH)
        found = count_flops(jax.grad(loss), abstract_parameters(again.model), TOKENS)
        assert 3 * forward < found <= 4 * forward


def test_frozen_kernels_have_no_gradients_of_their_own():
    """Each of them is used forwards, and backwards for what comes before it: twice, not three
    times. Adapters are trained, and attention has no parameters."""
    targets = ("query", "out", "wi_0")
    config = dataclasses.replace(GROUPED, lora_rank=3, lora_targets=targets)
    heads = config.num_heads * config.head_dim
    widths = {
        "query": config.model_dim + heads,
        "out": heads + config.model_dim,
        "wi_0": config.model_dim + config.mlp_dim,
    }
    adapters = 2 * BATCH * LENGTH * config.num_layers * 3 * sum(widths.values())
    expected = (
        2 * of_kernels(config, BATCH * LENGTH)
        + 3 * of_attention(config, BATCH, LENGTH)
        + 3 * adapters
        + 2 * of_choices(config)
    )
    found = program(config).flops(whole_batch(), TRIE)
    assert found == expected < program(GROUPED).flops(whole_batch(), TRIE)


def test_a_reward_model_reads_the_sequence_and_judges_its_end():
    forward = of_kernels(GROUPED, BATCH * LENGTH) + of_attention(GROUPED, BATCH, LENGTH)
    head = 2 * BATCH * GROUPED.model_dim
    found = program(GROUPED, RewardModel, objectives.pointwise_loss)
    assert found.flops(whole_batch(), TRIE) == 3 * (forward + head)
