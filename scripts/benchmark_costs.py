"""What a decision must cost, in operations and bytes, and the machine's measured rates."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recexplore.models.transformer import TransformerConfig

_REPEATS = 10
_ROWS = (1024, 4096)
_SQUARE = 2048
_STREAMED_BYTES = 2**29


class Work(NamedTuple):
    """The sizes that a method's work depends on.

    Attributes:
      batch: B prompts.
      num_samples: n continuations of each.
      prefix: P tokens that all prompts share.
      history: S tokens of each prompt behind them.
      length: T tokens of a description, EOS included.
      frontiers: for each step behind the prompt, at how many nodes of the trie a prompt's
        continuations stand, at most, while there is still a choice.
      scored: descriptions scored for all prompts together; those drawn twice count once.
    """

    batch: int
    num_samples: int
    prefix: int
    history: int
    length: int
    frontiers: tuple[int, ...]
    scored: int


class Pass(NamedTuple):
    """One run of a network over some tokens.

    Attributes:
      tokens: how many it reads.
      seen: how many tokens each of them attends to, itself included, on average.
      kept: how many other tokens' keys and values it must fetch.
      outputs: at how many of its tokens the whole vocabulary's logits are computed.
    """

    tokens: int
    seen: float
    kept: int = 0
    outputs: int = 0


def generate_passes(work: Work) -> list[Pass]:
    """`generate` with n return sequences, then a reward pass over the whole sequences."""
    rows, prompt = _rows(work), work.prefix + work.history
    whole = prompt + work.length
    decode = [
        Pass(rows, prompt + step, rows * (prompt + step - 1), rows)
        for step in range(1, work.length)
    ]
    prefill = Pass(rows * prompt, (prompt + 1) / 2, outputs=rows)
    return [prefill, *decode, Pass(rows * whole, (whole + 1) / 2)]


def reuse_passes(work: Work) -> list[Pass]:
    """The prompt once for each model, T - 1 steps, one pass over the descriptions."""
    rows, prompt = _rows(work), work.prefix + work.history
    decode = [
        Pass(rows, prompt + step, rows * (prompt + step - 1), rows)
        for step in range(1, work.length)
    ]
    score = Pass(rows * work.length, prompt + (work.length + 1) / 2, rows * prompt)
    return [_history(work, work.batch), *decode, _history(work, 0), score]


def recexplore_passes(work: Work) -> list[Pass]:
    """Steps only where descriptions part, a node read once for all that stand there.

    Logits of children alone are some thousandths of the rest and left out.
    """
    prompt, shared = work.prefix + work.history, work.prefix + work.batch * work.history
    decode, read = [], 0
    for depth, nodes in enumerate(work.frontiers, start=1):
        decode.append(Pass(work.batch * nodes, prompt + depth, shared + read))
        read += work.batch * nodes
    score = Pass(work.scored * work.length, prompt + (work.length + 1) / 2, shared)
    return [_history(work, 0), *decode, _history(work, 0), score]


def _rows(work: Work) -> int:
    return work.batch * work.num_samples


def _history(work: Work, outputs: int) -> Pass:
    seen = work.prefix + (work.history + 1) / 2
    return Pass(work.batch * work.history, seen, work.prefix, outputs)


def flops(config: TransformerConfig, passes: list[Pass]) -> float:
    """Floating-point operations of the passes; a multiplication and its addition are two."""
    return sum(_flops(config, one) for one in passes)


def _flops(c: TransformerConfig, one: Pass) -> float:
    matrices = 2 * c.num_layers * _layer_weights(c)
    attention = 4 * c.num_layers * c.num_heads * c.head_dim * one.seen
    return one.tokens * (matrices + attention) + one.outputs * 2 * c.model_dim * c.vocab_size


def _bytes(c: TransformerConfig, one: Pass) -> float:
    """Weights and kept keys and values, each fetched once; activations stay where they are."""
    keys_and_values = 2 * c.num_layers * c.num_kv_heads * c.head_dim * one.kept
    table = c.model_dim * c.vocab_size if one.outputs else 0
    numbers = c.num_layers * _layer_weights(c) + keys_and_values + table
    return numbers * jnp.dtype(c.dtype).itemsize


def _layer_weights(c: TransformerConfig) -> int:
    """Numbers in a layer's matrices: queries and output, keys and values, gate, up and down."""
    attention = 2 * c.num_heads + 2 * c.num_kv_heads
    return c.model_dim * (attention * c.head_dim + 3 * c.mlp_dim)


class Bound(NamedTuple):
    """The least time that the passes can take, and what sets it for most of that time."""

    seconds: float
    binds: str


def bound(
    config: TransformerConfig, passes: list[Pass], flops_rate: float, bytes_rate: float
) -> Bound:
    """Each pass takes as long as its arithmetic or its memory traffic, whichever is longer."""
    times = [(_flops(config, p) / flops_rate, _bytes(config, p) / bytes_rate) for p in passes]
    by_memory = sum(max(pair) for pair in times if pair[1] > pair[0])
    total = sum(max(pair) for pair in times)
    return Bound(total, "memory" if by_memory > total / 2 else "arithmetic")


def jax_matmul_rate(config: TransformerConfig) -> float:
    """The best of JAX's matrix products of the network's kind, in operations a second."""
    product = jax.jit(lambda left, right: left @ right)

    def run(left, right):
        product(left, right).block_until_ready()

    def make(shape):
        return jax.random.normal(jax.random.key(0), shape, config.dtype)

    return matmul_rate(config, make, run)


def matmul_rate(config: TransformerConfig, make: Callable, run: Callable) -> float:
    """The best rate over the MLP's two shapes, at some numbers of rows, and a large square.

    Args:
      config: of the network.
      make: shape → random matrix.
      run: computes the product of two matrices and waits for it.
    """
    inner = [(config.model_dim, config.mlp_dim), (config.mlp_dim, config.model_dim)]
    shapes = [(rows, *pair) for rows in _ROWS for pair in inner] + [(_SQUARE,) * 3]
    rates = []
    for rows, width, out in shapes:
        left, right = make((rows, width)), make((width, out))
        rates.append(2 * rows * width * out / _best_seconds(lambda a=left, b=right: run(a, b)))
    return max(rates)


def memory_rate() -> float:
    """Bytes a second that can be read and written on the device, by a pass over a large array."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = add(jnp.zeros(_STREAMED_BYTES // 4, jnp.float32))

    def run():
        nonlocal array
        array = add(array).block_until_ready()

    return 2 * _STREAMED_BYTES / _best_seconds(run)


def _best_seconds(run: Callable[[], None]) -> float:
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.min(times))
