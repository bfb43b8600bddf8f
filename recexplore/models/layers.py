"""What a transformer's layers are made of: norms, attention, the gated MLP, a block of them.

`config` is a recexplore.models.transformer.TransformerConfig; that file imports this one.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recexplore.models.attention import KeyValues, attend
from recexplore.models.rotary import Rotation, rotate

EVERYTHING = jnp.iinfo(jnp.int32).max  # the window of a layer that has none
PROJECTIONS = ("query", "key", "value", "out", "wi_0", "wi_1", "wo")
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
        queries = project(self, reader, "query", embed, heads, c.attention_bias)
        keys = project(self, x, "key", embed, groups, c.attention_bias)
        values = project(self, x, "value", embed, groups, c.attention_bias)
        if c.qk_norm:
            queries = RMSNorm(c, "kv", name="query_norm")(queries)
            keys = RMSNorm(c, "kv", name="key_norm")(keys)
        queries = rotate(queries, at.rotation_within(window))
        keys = rotate(keys, sight.rotation_within(window))
        places = ("activation_batch", None, "activation_heads", None)
        queries = constrain(queries, *places)
        own = KeyValues(constrain(keys, *places), constrain(values, *places))
        masks = at.masks_within(window)
        mixed = attend(queries, (*context, own), masks, c.attention_softcap, c.attention_scale)
        mixed = constrain(mixed, *places)
        return project(self, mixed, "out", heads, embed), own


class GatedMLP(nn.Module):
    """Gated linear unit (Shazeer 2020)."""

    config: Any

    @nn.compact
    def __call__(self, x):
        c = self.config
        embed, hidden = {"embed": c.model_dim}, {"mlp": c.mlp_dim}
        gate = ACTIVATIONS[c.activation](project(self, x, "wi_0", embed, hidden))
        gated = gate * project(self, x, "wi_1", embed, hidden)
        gated = constrain(gated, "activation_batch", None, "activation_mlp")
        return project(self, gated, "wo", hidden, embed)


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
        return constrain(x, "activation_batch", None, "activation_embed"), own


class OutputTable(nn.Module):
    """Logits by the rows of a network's output table, of the whole vocabulary or of some tokens.

    A network that is one has a `config`, `token_embedder`, `logits_dense` unless its
    embeddings are tied, and `_logits`, the product of hidden states and rows.
    """

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Logits over the whole vocabulary, in float32."""
        table = bring_table(self._output_table(), self.config.dtype)
        logits = self._logits("...d,vd->...v", hidden, table)
        return constrain(logits, "activation_batch", None, "activation_vocab")

    def token_logits(
        self, hidden: Float[Array, "*batch D"], tokens: Int[Array, "U"]
    ) -> Float[Array, "*batch U"]:
        """Logits of U given tokens only, in float32; the rest of the vocabulary is not touched."""
        rows = jnp.take(self._output_table(), tokens, axis=0)
        return self._logits("...d,ud->...u", hidden, rows)

    def paired_logits(
        self, hidden: Float[Array, "*batch U D"], tokens: Int[Array, "U"]
    ) -> Float[Array, "*batch U"]:
        """The logit of one token each after U hidden states, in float32."""
        rows = jnp.take(self._output_table(), tokens, axis=0)
        return self._logits("...ud,ud->...u", hidden, rows)

    def _output_table(self) -> Float[Array, "V D"]:
        return self.token_embedder if self.config.tied_embeddings else self.logits_dense


def read_last_layer_at(
    read_at: Int[Array, "*batch R"],
    run: Callable[..., tuple[Array, KeyValues]],
    x: Float[Array, "*batch T D"],
    num_layers: int,
    unroll: int,
) -> tuple[Float[Array, "*batch R D"], KeyValues]:
    """Runs x through all layers, of which the last gives some tokens' hidden states alone.

    Args:
      read_at: places of those tokens.
      run: run(x, layer, read_at=None): one layer; hidden states, keys and values.
      x: of all tokens.
      num_layers: L.
      unroll: layers compiled side by side.

    Returns:
      Hidden states of the tokens, keys and values of all tokens in every layer.
    """
    before = num_layers - 1
    x, first = jax.lax.scan(run, x, jnp.arange(before), unroll=min(unroll, max(before, 1)))
    x, last = run(x, before, read_at)
    return x, jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), first, last)


def constrain(x: Array, *axes: str | None) -> Array:
    """Says where the axes of an activation belong on the mesh, by the logical rules in force.

    Nothing happens without `nn.logical_axis_rules` or without `jax.set_mesh`, to an array that has
    other axes than those named (inference has continuations beside the batch), and along an axis
    that can't be dealt out evenly.
    """
    rules, mesh = nn.get_logical_axis_rules(), jax.sharding.get_abstract_mesh()
    if not rules or mesh.empty or x.ndim != len(axes):
        return x
    spec = []
    for size, names in zip(x.shape, nn.logical_to_mesh_axes(axes, rules), strict=True):
        named = (names,) if isinstance(names, str) else names or ()
        even = size % math.prod(mesh.shape[name] for name in named) == 0
        spec.append(names if even else None)
    return jax.lax.with_sharding_constraint(x, jax.P(*spec))


def bring_table(table: Float[Array, "V D"], dtype: str) -> Float[Array, "V D"]:
    """An embedding table whose rows every device needs whole; its shares of the vocabulary stay.

    It is cast where it lies, before devices send it to each other. Without rules in force it comes
    back as it is: who takes a few rows of it casts those.
    """
    if not nn.get_logical_axis_rules() or jax.sharding.get_abstract_mesh().empty:
        return table
    table = constrain(table.astype(dtype), "vocab", "embed")
    return constrain(table, "activation_vocab", "activation_embed")


def take_tokens(x: Array, places: Int[Array, "*batch R"]) -> Array:
    """[*batch, T, width] → [*batch, R, width]; size-1 axes of the batch are stretched."""
    x = jnp.broadcast_to(x, (*places.shape[:-1], *x.shape[-2:]))
    return jnp.take_along_axis(x, places[..., None], axis=-2)


def project(
    module: nn.Module,
    x: Array,
    name: str,
    inputs: dict[str, int],
    outputs: dict[str, int],
    bias: bool = False,
    spread: float = 1.0,
) -> Array:
    """x times the kernel `name`, over the axes `inputs`: logical name → size, in order.

    It starts at random with the standard deviation `spread` over the root of the inputs' number.

    With LoRA (Hu et al. 2022) it is x W + scale · (x A) B; A and B are never multiplied together,
    so that a step costs no product of the kernel's size more.

    Args:
      module: has the kernel.
      x: [*batch, *inputs].
      name: of the kernel.
      inputs: axes that are summed over.
      outputs: axes of the result.
      bias: whether something is added.
      spread: see above.
    """
    c, zeros = module.config, nn.initializers.zeros
    narrow = nn.initializers.normal(stddev=math.prod(inputs.values()) ** -0.5)
    kernel = nn.initializers.normal(stddev=spread * math.prod(inputs.values()) ** -0.5)
    y = product(x, parameter(module, name, inputs | outputs, kernel), len(inputs))
    if bias:
        added = parameter(module, f"{name}_bias", outputs, zeros)
        y = y + added.reshape((1,) * (y.ndim - added.ndim) + added.shape)
    if c.lora_rank and name in c.lora_targets:
        rank = {"lora_rank": c.lora_rank}
        low = product(x, _adapter(module, f"{name}_a", inputs | rank, narrow), len(inputs))
        high = product(low, _adapter(module, f"{name}_b", rank | outputs, zeros), 1)
        y = y + c.lora_scale * high
    return y


def product(x: Array, kernel: Array, axes: int) -> Array:
    """jnp.tensordot(x, kernel, axes) as one product of two matrices.

    XLA's gradient of a product with several batch axes takes half as long again on a CPU.

    Args:
      x: [*batch, *inputs].
      kernel: [*inputs, *outputs].
      axes: how many axes the inputs have.
    """
    *batch, inputs = *x.shape[: x.ndim - axes], math.prod(kernel.shape[:axes])
    outputs = kernel.shape[axes:]
    y = x.reshape(-1, inputs) @ kernel.reshape(inputs, -1)
    return y.reshape(*batch, *outputs)


def parameter(module: nn.Module, name: str, axes: dict[str, int], initializer: Any) -> Array:
    """A parameter with its logical axes, cast to the computation's dtype.

    It is cast where it lies: what devices then send each other is half as much in bfloat16, and so
    are their gradients.

    Args:
      module: has it.
      name: of it.
      axes: logical name → size, in order.
      initializer: what it starts as.
    """
    boxed = nn.with_logical_partitioning(initializer, tuple(axes))
    c = module.config
    value = module.param(name, boxed, tuple(axes.values()), c.param_dtype)
    return constrain(value.astype(c.dtype), *axes)


def _adapter(module: nn.Module, name: str, axes: dict[str, int], initializer: Any) -> Array:
    """The same in the collection "lora", kept in float32 because it is always trained."""
    boxed = nn.with_logical_partitioning(initializer, tuple(axes))

    def start():
        return boxed(module.make_rng("params"), tuple(axes.values()), jnp.float32)

    return module.variable("lora", name, start).value.astype(module.config.dtype)
