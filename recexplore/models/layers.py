"""What a transformer's layers are made of: norms, attention, the gated MLP, a block of them.

`config` is a recexplore.models.transformer.TransformerConfig; that file imports this one.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recexplore.models.attention import KeyValues, attend
from recexplore.models.rotary import Rotation, rotate

EVERYTHING = jnp.iinfo(jnp.int32).max  # the window of a layer that has none
ACTIVATIONS = {"silu": nn.silu, "gelu": functools.partial(nn.gelu, approximate=True)}


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019), computed in float32.

    What is kept is the scale less `norm_offset` (Gemma's is 1), so that it may start at zero.
    """

    config: Any
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        c = self.config
        ones = nn.initializers.constant(1.0 - c.norm_offset)
        boxed = nn.with_logical_partitioning(ones, (self.axis,))
        scale = self.param("scale", boxed, (x.shape[-1],), c.param_dtype).astype(jnp.float32)
        scale = (scale + c.norm_offset).reshape((1,) * (x.ndim - 1) + (-1,))
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide**2, axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + c.norm_epsilon) * scale).astype(x.dtype)


class Sight(NamedTuple):
    """What the new tokens may look at; the same in all layers but for their windows.

    Attributes:
      rotations: of the new tokens; if there are two, the second is that of layers with a window.
      masks: for every segment, and at last for the new tokens themselves, where they may look.
      distances: how far back that is, in the same shapes; None where no layer has a window.
    """

    rotations: tuple[Rotation, ...]
    masks: tuple[Bool[Array, "..."], ...]
    distances: tuple[Int[Array, "..."], ...] | None

    def at(self, places: Int[Array, "*batch R"]) -> "Sight":
        """What those of the new tokens may look at."""
        ndim = places.ndim + 1

        def pick(x):  # [*batch, T, S], with size-1 axes
            x = x.reshape((1,) * (ndim - x.ndim) + x.shape)
            return x if x.shape[-2] == 1 else take_tokens(x, places)

        distances = self.distances and tuple(map(pick, self.distances))
        rotations = jax.tree.map(lambda x: take_tokens(x, places), self.rotations)
        return Sight(rotations, tuple(map(pick, self.masks)), distances)

    def masks_within(self, window: Int[Array, ""]) -> tuple[Bool[Array, "..."], ...]:
        """The masks of a layer that looks `window` tokens back."""
        if self.distances is None:
            return self.masks
        return tuple(
            mask.reshape((1,) * (distance.ndim - mask.ndim) + mask.shape) & (distance < window)
            for mask, distance in zip(self.masks, self.distances, strict=True)
        )

    def rotation_within(self, window: Int[Array, ""]) -> Rotation:
        """The rotation of a layer that looks `window` tokens back."""
        if len(self.rotations) == 1:
            return self.rotations[0]
        return jax.tree.map(lambda a, b: jnp.where(window < EVERYTHING, b, a), *self.rotations)


class Attention(nn.Module):
    """Rotary grouped-query attention to context segments and to the tokens themselves.

    With `read_at`, only those of the tokens look; all of them can be looked at.
    """

    config: Any

    @nn.compact
    def __call__(self, x, context, sight, window, read_at=None):
        c = self.config
        embed = {"embed": c.model_dim}
        heads = {"heads": c.num_heads, "kv": c.head_dim}
        groups = {"heads": c.num_kv_heads, "kv": c.head_dim}
        reader, at = x, sight
        if read_at is not None:
            reader, at = take_tokens(x, read_at), sight.at(read_at)
        queries = _project(self, reader, "query", embed, heads, c.attention_bias)
        keys = _project(self, x, "key", embed, groups, c.attention_bias)
        values = _project(self, x, "value", embed, groups, c.attention_bias)
        if c.qk_norm:
            queries = RMSNorm(c, "kv", name="query_norm")(queries)
            keys = RMSNorm(c, "kv", name="key_norm")(keys)
        queries = rotate(queries, at.rotation_within(window))
        own = KeyValues(rotate(keys, sight.rotation_within(window)), values)
        masks = at.masks_within(window)
        mixed = attend(queries, (*context, own), masks, c.attention_softcap, c.attention_scale)
        return _project(self, mixed, "out", heads, embed), own


class GatedMLP(nn.Module):
    """Gated linear unit (Shazeer 2020)."""

    config: Any

    @nn.compact
    def __call__(self, x):
        c = self.config
        embed, hidden = {"embed": c.model_dim}, {"mlp": c.mlp_dim}
        gate = ACTIVATIONS[c.activation](_project(self, x, "wi_0", embed, hidden))
        return _project(self, gate * _project(self, x, "wi_1", embed, hidden), "wo", hidden, embed)


class Block(nn.Module):
    """One layer: attention and MLP, each normalised before and added to the residual stream.

    With `post_norms` they are normalised again before they are added. With `read_at`, what comes
    out are those of the tokens.
    """

    config: Any

    @nn.compact
    def __call__(self, x, context, window, sight, deterministic, read_at=None):
        c = self.config
        drop = nn.Dropout(c.dropout_rate, deterministic=deterministic)
        with jax.named_scope("attention"):
            normal = RMSNorm(c, name="pre_attention_layer_norm")(x)
            mixed, own = Attention(c, name="self_attention")(
                normal, context, sight, window, read_at
            )
            if c.post_norms:
                mixed = RMSNorm(c, name="post_attention_layer_norm")(mixed)
            x = x if read_at is None else take_tokens(x, read_at)
            x = x + drop(mixed)
        with jax.named_scope("mlp"):
            normal = RMSNorm(c, name="pre_mlp_layer_norm")(x)
            mixed = GatedMLP(c, name="mlp")(normal)
            if c.post_norms:
                mixed = RMSNorm(c, name="post_mlp_layer_norm")(mixed)
            x = x + drop(mixed)
        return x, own


def take_tokens(x: Array, places: Int[Array, "*batch R"]) -> Array:
    """[*batch, T, width] → [*batch, R, width]; size-1 axes of the batch are stretched."""
    x = jnp.broadcast_to(x, (*places.shape[:-1], *x.shape[-2:]))
    return jnp.take_along_axis(x, places[..., None], axis=-2)


def _project(
    module: nn.Module,
    x: Array,
    name: str,
    inputs: dict[str, int],
    outputs: dict[str, int],
    bias: bool = False,
) -> Array:
    """x times the kernel `name`, over the axes `inputs`: logical name → size, in order."""
    sizes, axes = (*inputs.values(), *outputs.values()), (*inputs, *outputs)
    spread = nn.initializers.normal(stddev=math.prod(inputs.values()) ** -0.5)
    y = jnp.tensordot(x, _parameter(module, name, sizes, axes, spread), axes=len(inputs))
    if bias:
        sizes = tuple(outputs.values())
        added = _parameter(module, f"{name}_bias", sizes, tuple(outputs), nn.initializers.zeros)
        y = y + added.reshape((1,) * (y.ndim - added.ndim) + added.shape)
    return y


def _parameter(module: nn.Module, name: str, sizes: tuple, axes: tuple, initializer: Any) -> Array:
    """A parameter with its logical axes, cast to the computation's dtype."""
    boxed = nn.with_logical_partitioning(initializer, axes)
    c = module.config
    return module.param(name, boxed, sizes, c.param_dtype).astype(c.dtype)
