"""Free sampling: n texts for every prompt, token by token over the whole vocabulary.

Nothing keeps them to the clusters' descriptions. Exploring never does this; it shows what a policy
would say if nothing held it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from recexplore.inference.context import Context
from recexplore.models.attention import Segment
from recexplore.models.networks import LanguageModel


class Written(NamedTuple):
    """N texts for each of B prompts.

    Attributes:
      tokens: right-padded with 0; EOS is the last one of a text that came to its end.
      lengths: how many tokens there are.
    """

    tokens: Int[Array, "B N T"]
    lengths: Int[Array, "B N"]


def sample_freely(
    model: LanguageModel,
    params: dict,
    context: Context,
    keys: Key[Array, "B"],
    num_samples: int,
    temperature: float,
    max_length: int,
    eos_id: int | Int[Array, ""],
) -> Written:
    """Draws n texts for every prompt, independently.

    Args:
      model: the novelty model.
      params: its variables.
      context: B prompts as the model has read them.
      keys: a random key for each prompt; its texts depend on nothing else of the batch.
      num_samples: N.
      temperature: the logits are divided by it before drawing.
      max_length: T, tokens after which a text is cut off; at least 2.
      eos_id: ends a text.
    """

    def draw(hidden: Float[Array, "B N D"], place) -> Int[Array, "B N"]:
        logits = model.apply(params, hidden, method="logits") / temperature
        at_place = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, place)
        return jax.vmap(jax.random.categorical)(at_place, logits)

    def read(tokens, place, own: Segment | None) -> tuple[Float[Array, "B N D"], Segment]:
        segments, masks = context.segments, context.masks_for(2)
        if own is not None:
            before = jnp.arange(own.positions.shape[-1]) < place
            segments, masks = (*segments, own), (*masks, before[None, None, None])
        hidden, added = model.apply(
            params,
            tokens[..., None],
            jnp.broadcast_to((context.lengths + place)[:, None, None], (*tokens.shape, 1)),
            jnp.ones((1, 1, 1, 1), bool),
            segments,
            masks,
            method="extend",
        )
        return hidden[..., 0, :], added

    def go_on(state, place):
        own, last, ended = state
        hidden, added = read(last, place, own)
        own = jax.tree.map(
            lambda all_, one, axis: jax.lax.dynamic_update_slice_in_dim(all_, one, place, axis),
            own,
            added,
            Segment(keys=3, values=3, positions=2),
        )
        token = jnp.where(ended, 0, draw(hidden, place + 1))
        return (own, token, ended | (token == eos_id)), (token, ~ended)

    shape = (*context.last.shape[:1], num_samples)
    start = jnp.broadcast_to(context.last[:, None], (*shape, context.last.shape[-1]))
    first = draw(start, 0)
    _, slot = jax.eval_shape(lambda: read(first, 0, None))
    room = Segment(
        *(jnp.zeros((*x.shape[:3], max_length - 1, *x.shape[4:]), x.dtype) for x in slot[:2]),
        jnp.zeros((*shape, max_length - 1), slot.positions.dtype),
    )
    places = jnp.arange(max_length - 1)
    _, (rest, real) = jax.lax.scan(go_on, (room, first, first == eos_id), places)
    tokens = jnp.concatenate([first[None], rest])
    return Written(jnp.moveaxis(tokens, 0, -1), 1 + jnp.sum(real, axis=0, dtype=jnp.int32))
