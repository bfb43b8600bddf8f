"""Reading a batch: one example in each row, or several packed into it.

An unpacked batch has `tokens` [B, T], right-padded, and `prompt_lengths`, `lengths` [B]. A packed
one has `segment_ids` besides, which says of every token whose it is (0: padding), and `positions`,
which begin anew with every example; `starts`, `prompt_lengths` and `lengths` are [B, E], and a
length of 0 says that there is no such example:

    tokens       7 5 2 3 1 3 6 1 0 0
    segment_ids  1 1 1 1 1 2 2 2 0 0     starts 0 5   prompt_lengths 2 1   lengths 5 3
    positions    0 1 2 3 4 0 1 2 0 0

A token looks at earlier tokens of its own example only, so that an example is read as if it were
alone. What belongs to one example comes out of here with a single leading axis, whichever the
batch was: "examples" is B, or B · E.

A network with an encoder reads the prompts with it and the descriptions with its decoder; it takes
one example a row.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from recexplore.errors import InputError
from recexplore.models.trie import Trie

Batch = dict[str, Array]


def is_packed(batch: Batch) -> bool:
    """Whether several examples share a row."""
    return "segment_ids" in batch


def read(
    model: nn.Module, params: dict, batch: Batch, dropout_key: Key[Array, ""] | None = None
) -> Float[Array, "B T D"]:
    """The model's hidden states of a batch's tokens; without a key there is no dropout.

    Args:
      model: a network with `prefill` and `extend`, as Transformer and RewardModel have them.
      params: its variables.
      batch: packed or not.
      dropout_key: for dropout.
    """
    deterministic = dropout_key is None
    rngs = None if deterministic else {"dropout": dropout_key}
    tokens = batch["tokens"]
    if not is_packed(batch):
        hidden, _ = model.apply(params, tokens, deterministic, method="prefill", rngs=rngs)
        return hidden
    segments = batch["segment_ids"]
    together = segments[:, :, None] == segments[:, None, :]
    causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
    hidden, _ = model.apply(
        params,
        tokens,
        batch["positions"],
        together & causal[None],
        (),
        (),
        deterministic,
        method="extend",
        rngs=rngs,
    )
    return hidden


def before_descriptions(
    model: nn.Module,
    params: dict,
    trie: Trie,
    batch: Batch,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "examples steps D"]:
    """The hidden states before each token that a description can have.

    Args:
      model: a network as `read` takes it, or one with an encoder.
      params: its variables.
      trie: of all descriptions; it says how long they are.
      batch: packed or not.
      dropout_key: for dropout.
    """
    if has_encoder(model):
        return _answer_states(model, params, batch, trie.max_length - 1, dropout_key)
    hidden = read(model, params, batch, dropout_key)
    steps = jnp.arange(trie.max_length)[None, None, :]
    places = (starts(batch) + prompt_lengths(batch))[..., None] + steps
    return at_places(hidden, places - 1)


def last_states(
    model: nn.Module,
    params: dict,
    trie: Trie | None,
    batch: Batch,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "examples D"]:
    """The hidden state of each example's last token.

    Args:
      model: a network as `read` takes it, or one with an encoder.
      params: its variables.
      trie: of all descriptions; asked for by networks with an encoder alone.
      batch: packed or not.
      dropout_key: for dropout.
    """
    if has_encoder(model):
        states = _answer_states(model, params, batch, trie.max_length, dropout_key)
        at = batch["lengths"] - batch["prompt_lengths"]
        return at_places(states, at[:, None, None])[:, 0]
    hidden = read(model, params, batch, dropout_key)
    ends = (starts(batch) + lengths(batch))[..., None]
    return at_places(hidden, ends - 1)[:, 0]


def has_encoder(model: Any) -> bool:
    """Whether a network reads prompts with an encoder."""
    return getattr(getattr(model, "config", None), "has_encoder", False)


def _answer_states(
    model: nn.Module, params: dict, batch: Batch, num_steps: int, dropout_key
) -> Float[Array, "B places D"]:
    """Hidden states before the descriptions and after each of so many tokens of them."""
    if is_packed(batch):
        raise InputError(
            f"A {type(model).__name__} with an encoder reads one example a row, but the rows are "
            "packed. Bind pipeline.train.pack = False for this model."
        )
    deterministic = dropout_key is None
    return model.apply(
        params,
        batch["tokens"],
        batch["prompt_lengths"],
        num_steps,
        deterministic,
        method="answer_states",
        rngs=None if deterministic else {"dropout": dropout_key},
    )


def starts(batch: Batch) -> Int[Array, "B E"]:
    """Where in its row each example begins."""
    return batch["starts"] if is_packed(batch) else jnp.zeros_like(batch["lengths"])[:, None]


def lengths(batch: Batch) -> Int[Array, "B E"]:
    """Tokens of each example, prompt and description together."""
    return batch["lengths"] if is_packed(batch) else batch["lengths"][:, None]


def prompt_lengths(batch: Batch) -> Int[Array, "B E"]:
    """Tokens of each example's prompt."""
    return batch["prompt_lengths"] if is_packed(batch) else batch["prompt_lengths"][:, None]


def weights(batch: Batch, power: float = 1.0) -> Float[Array, "examples"]:
    """Each example's weight ** `power`; 0 stays 0, and so does what isn't there."""
    present = (lengths(batch) > 0).reshape(-1)
    weight = jnp.where(present, batch["weight"].reshape(-1), 0.0)
    return jnp.where(weight > 0, jnp.where(weight > 0, weight, 1.0) ** power, 0.0)


def at_places(
    x: Array,
    places: Int[Array, "B E R"],
) -> Array:
    """What `x` [B, T, …] has at R places of the row for each example: [examples, R, …].

    Places outside of the row give what is at its ends.
    """
    rows, _, wanted = places.shape
    flat = jnp.clip(places, 0, x.shape[1] - 1).reshape(rows, -1)
    found = jnp.take_along_axis(x, flat.reshape(*flat.shape, *(1,) * (x.ndim - 2)), axis=1)
    return found.reshape(-1, wanted, *x.shape[2:])
