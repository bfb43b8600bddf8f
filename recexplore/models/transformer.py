"""A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, gated MLP.

Parameter names and logical axes follow T5X: token_embedder, layers (scanned), decoder_norm; vocab,
embed, heads, kv, mlp, layers.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recexplore.errors import InputError
from recexplore.models.attention import KeyValues, Segment, attend, rotate


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a transformer; a model's size is a gin file that binds these.

    Attributes:
      vocab_size: V, as the vocabulary has it.
      num_layers: L.
      model_dim: D, width of the residual stream.
      num_heads: H, query heads.
      num_kv_heads: G, key/value heads; divides H.
      head_dim: width of a head, even.
      mlp_dim: width of the gated MLP's hidden layer.
      max_length: longest sequence, prompt and description together.
      rope_theta: base of the rotary wavelengths.
      attention_windows: how far back the layers look, in tokens, themselves included, as a pattern
        that repeats from the first layer on; 0 is everything. (4096, 0) alternates.
      attention_softcap: bound of the attention logits (Gemma 2); 0 is none.
      logit_softcap: bound of the output logits; 0 is none.
      tied_embeddings: the output layer is the embedding table; otherwise one of its own, which
        starts at zero.
      dropout_rate: on the embeddings and on what each block adds.
      dtype: of activations; parameters are float32.
      scan_unroll: layers compiled side by side; more run faster and compile longer.
    """

    vocab_size: int
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_length: int
    rope_theta: float = 10_000.0
    attention_windows: tuple[int, ...] = (0,)
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    tied_embeddings: bool = True
    dropout_rate: float = 0.0
    dtype: str = "float32"
    scan_unroll: int = 1

    def __post_init__(self):
        for field in ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads"):
            self._check(getattr(self, field) >= 1, field, "must be at least 1")
        self._check(
            self.num_heads % self.num_kv_heads == 0, "num_kv_heads", "must divide num_heads"
        )
        self._check(self.head_dim >= 2 and self.head_dim % 2 == 0, "head_dim", "must be even")
        self._check(self.mlp_dim >= 1, "mlp_dim", "must be at least 1")
        self._check(self.scan_unroll >= 1, "scan_unroll", "must be at least 1")
        self._check(self.max_length >= 1, "max_length", "must be at least 1")
        windows = tuple(self.attention_windows)  # gin and JSON have lists
        object.__setattr__(self, "attention_windows", windows)
        self._check(
            len(windows) >= 1 and min(windows) >= 0, "attention_windows", "must be sizes from 0 on"
        )
        self._check(self.attention_softcap >= 0, "attention_softcap", "must not be negative")
        self._check(self.logit_softcap >= 0, "logit_softcap", "must not be negative")
        self._check(0.0 <= self.dropout_rate < 1.0, "dropout_rate", "must lie in [0, 1)")
        known = ("float32", "bfloat16")
        self._check(self.dtype in known, "dtype", f"must be one of {', '.join(known)}")

    def _check(self, ok: bool, field: str, rule: str) -> None:
        if not ok:
            raise InputError(
                f"transformer.TransformerConfig.{field} is {getattr(self, field)!r}; it {rule}."
            )


def _parameter(module: nn.Module, name: str, shape: tuple, axes: tuple, fan_in: int) -> Array:
    """A kernel in float32 with its logical axes, cast to the computation's dtype."""
    initializer = nn.initializers.normal(stddev=fan_in**-0.5)
    boxed = nn.with_logical_partitioning(initializer, axes)
    return module.param(name, boxed, shape, jnp.float32).astype(module.config.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019), computed in float32."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        initializer = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        scale = self.param("scale", initializer, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)
        return (normal * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Sight(NamedTuple):
    """What the new tokens may look at; the same in all layers but for their windows.

    Attributes:
      positions: of the new tokens.
      masks: for every segment, and at last for the new tokens themselves, where they may look.
      distances: how far back that is, in the same shapes; None where no layer has a window.
    """

    positions: Int[Array, "*batch T"]
    masks: tuple[Bool[Array, "..."], ...]
    distances: tuple[Int[Array, "..."], ...] | None

    def at(self, places: Int[Array, "*batch R"]) -> "Sight":
        """What those of the new tokens may look at."""
        ndim = places.ndim + 1

        def pick(x):  # [*batch, T, S], with size-1 axes
            x = x.reshape((1,) * (ndim - x.ndim) + x.shape)
            return x if x.shape[-2] == 1 else _take_tokens(x, places)

        distances = self.distances and tuple(map(pick, self.distances))
        positions = jnp.take_along_axis(self.positions, places, axis=-1)
        return Sight(positions, tuple(map(pick, self.masks)), distances)

    def masks_within(self, window: Int[Array, ""]) -> tuple[Bool[Array, "..."], ...]:
        """The masks of a layer that looks `window` tokens back."""
        if self.distances is None:
            return self.masks
        return tuple(
            mask.reshape((1,) * (distance.ndim - mask.ndim) + mask.shape) & (distance < window)
            for mask, distance in zip(self.masks, self.distances, strict=True)
        )


class Attention(nn.Module):
    """Rotary grouped-query attention to context segments and to the tokens themselves.

    With `read_at`, only those of the tokens look; all of them can be looked at.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, x, context, sight, window, read_at=None):
        c = self.config
        heads, groups = (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)
        query = _parameter(
            self, "query", (c.model_dim, *heads), ("embed", "heads", "kv"), c.model_dim
        )
        key = _parameter(self, "key", (c.model_dim, *groups), ("embed", "heads", "kv"), c.model_dim)
        value = _parameter(
            self, "value", (c.model_dim, *groups), ("embed", "heads", "kv"), c.model_dim
        )
        out_fan_in = c.num_heads * c.head_dim
        out = _parameter(self, "out", (*heads, c.model_dim), ("heads", "kv", "embed"), out_fan_in)
        keys = rotate(jnp.einsum("...d,dhk->...hk", x, key), sight.positions, c.rope_theta)
        own = KeyValues(keys, jnp.einsum("...d,dhk->...hk", x, value))
        if read_at is not None:
            x, sight = _take_tokens(x, read_at), sight.at(read_at)
        queries = rotate(jnp.einsum("...d,dhk->...hk", x, query), sight.positions, c.rope_theta)
        mixed = attend(queries, (*context, own), sight.masks_within(window), c.attention_softcap)
        return jnp.einsum("...hk,hkd->...d", mixed, out), own


class GatedMLP(nn.Module):
    """SiLU-gated linear unit (Shazeer 2020)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        gate = _parameter(self, "wi_0", (c.model_dim, c.mlp_dim), ("embed", "mlp"), c.model_dim)
        up = _parameter(self, "wi_1", (c.model_dim, c.mlp_dim), ("embed", "mlp"), c.model_dim)
        down = _parameter(self, "wo", (c.mlp_dim, c.model_dim), ("mlp", "embed"), c.mlp_dim)
        return (nn.silu(x @ gate) * (x @ up)) @ down


class Block(nn.Module):
    """One layer: attention and MLP, each normalised before and added to the residual stream.

    With `read_at`, what comes out are those of the tokens.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, x, context, window, sight, deterministic, read_at=None):
        drop = nn.Dropout(self.config.dropout_rate, deterministic=deterministic)
        with jax.named_scope("attention"):
            normal = RMSNorm(self.config, name="pre_attention_layer_norm")(x)
            mixed, own = Attention(self.config, name="self_attention")(
                normal, context, sight, window, read_at
            )
            x = x if read_at is None else _take_tokens(x, read_at)
            x = x + drop(mixed)
        with jax.named_scope("mlp"):
            normal = RMSNorm(self.config, name="pre_mlp_layer_norm")(x)
            x = x + drop(GatedMLP(self.config, name="mlp")(normal))
        return x, own


class Transformer(nn.Module):
    """The language model; `init` and `apply` with `__call__`, other methods by `method=`.

    `prefill` reads whole sequences; `extend` reads tokens that also look at segments read before.
    """

    config: TransformerConfig

    def setup(self):
        c = self.config
        initializer = nn.with_logical_partitioning(
            nn.initializers.normal(stddev=c.model_dim**-0.5), ("vocab", "embed")
        )
        self.token_embedder = self.param(
            "token_embedder", initializer, (c.vocab_size, c.model_dim), jnp.float32
        )
        if not c.tied_embeddings:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab", "embed"))
            self.logits_dense = self.param(
                "logits_dense", zeros, (c.vocab_size, c.model_dim), jnp.float32
            )
        scanned = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),
            out_axes=0,
            length=c.num_layers,
            unroll=min(c.scan_unroll, c.num_layers),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        self.layers = scanned(c)
        self.decoder_norm = RMSNorm(c)
        self.dropout = nn.Dropout(c.dropout_rate)

    def __call__(
        self, tokens: Int[Array, "*batch T"], deterministic: bool = True
    ) -> Float[Array, "*batch T V"]:
        """Logits of the next token at every position; pads must come after the real tokens."""
        hidden, _ = self.prefill(tokens, deterministic)
        return self.logits(hidden)

    def prefill(
        self, tokens: Int[Array, "*batch T"], deterministic: bool = True
    ) -> tuple[Float[Array, "*batch T D"], Segment]:
        """Hidden states of whole sequences under a causal mask, and their keys and values.

        Tokens are right-padded; a pad is looked at by pads only. Whoever attends to the returned
        segment masks the pads.
        """
        length = tokens.shape[-1]
        row = jnp.arange(length).reshape((1,) * (tokens.ndim - 1) + (length,))
        positions = jnp.broadcast_to(row, tokens.shape)
        causal = jnp.tril(jnp.ones((length, length), bool))
        return self.extend(tokens, positions, causal, (), (), deterministic)

    def extend(
        self,
        tokens: Int[Array, "*batch T"],
        positions: Int[Array, "*batch T"],
        own_mask: Bool[Array, "..."],
        context: tuple[Segment, ...],
        context_masks: tuple[Bool[Array, "..."], ...],
        deterministic: bool = True,
        read_at: Int[Array, "*batch R"] | None = None,
    ) -> tuple[Float[Array, "*batch R D"], Segment]:
        """Hidden states of tokens that also look at segments computed before.

        Args:
          tokens: token ids.
          positions: their positions.
          own_mask: which of the new tokens each of them may look at; broadcasts to [*batch, T, T].
          context: earlier segments; the leading shape of each is a prefix of *batch.
          context_masks: for each a mask that broadcasts to [*batch, T, S].
          deterministic: no dropout.
          read_at: places of the tokens whose hidden states are wanted; None for all of them. The
            last layer spends nothing on the others but for their keys and values.

        Returns:
          Normalised hidden states, and the new tokens' own segment.
        """
        sight = self._sight(positions, (*context_masks, own_mask), context)
        kept = tuple(KeyValues(segment.keys, segment.values) for segment in context)
        x = jnp.take(self.token_embedder, tokens, axis=0).astype(self.config.dtype)
        x = self.dropout(x, deterministic=deterministic)
        if read_at is not None and not deterministic:
            raise ValueError("read_at is for inference; it has no dropout.")
        if read_at is None:
            x, own = self.layers(x, kept, self._windows(), sight, deterministic)
        else:
            x, own = self._layers_read_at(x, kept, sight, read_at)
        return self.decoder_norm(x), Segment(own.keys, own.values, positions)

    def _layers_read_at(self, x, context, sight, read_at) -> tuple[Array, KeyValues]:
        """`self.layers`, the last of which comes after the others; without dropout."""
        block, count = Block(self.config, parent=None), self.config.num_layers
        stacked = nn.unbox(self.variables["params"]["layers"]), context, self._windows()

        def run(x, layer, read_at=None):
            params, kept, window = jax.tree.map(lambda a: a[layer], stacked)
            return block.apply({"params": params}, x, kept, window, sight, True, read_at)

        unroll = min(self.config.scan_unroll, max(count - 1, 1))
        x, first = jax.lax.scan(run, x, jnp.arange(count - 1), unroll=unroll)
        x, last = run(x, count - 1, read_at)
        return x, jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), first, last)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Logits over the whole vocabulary, in float32."""
        return self._logits("...d,vd->...v", hidden, self._output_table())

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

    def _logits(self, sum_of_products: str, hidden: Array, rows: Array) -> Array:
        rows = rows.astype(hidden.dtype)
        logits = jnp.einsum(sum_of_products, hidden, rows, preferred_element_type=jnp.float32)
        cap = self.config.logit_softcap
        return cap * jnp.tanh(logits / cap) if cap else logits

    def _output_table(self) -> Float[Array, "V D"]:
        return self.token_embedder if self.config.tied_embeddings else self.logits_dense

    def _windows(self) -> Int[Array, "L"]:
        """How far back each layer looks."""
        c = self.config
        pattern = [window or jnp.iinfo(jnp.int32).max for window in c.attention_windows]
        return jnp.resize(jnp.array(pattern, jnp.int32), (c.num_layers,))

    def _sight(self, positions, masks, context) -> Sight:
        if not any(self.config.attention_windows):
            return Sight(positions, masks, None)
        kept = [_beside(segment.positions, positions.ndim) for segment in context]
        own = positions[..., None, :]
        distances = tuple(positions[..., :, None] - at for at in (*kept, own))
        return Sight(positions, masks, distances)


def _take_tokens(x: Array, places: Int[Array, "*batch R"]) -> Array:
    """[*batch, T, width] → [*batch, R, width]; size-1 axes of the batch are stretched."""
    x = jnp.broadcast_to(x, (*places.shape[:-1], *x.shape[-2:]))
    return jnp.take_along_axis(x, places[..., None], axis=-2)


def _beside(positions: Int[Array, "*leading S"], ndim: int) -> Int[Array, "..."]:
    """[*leading, S] → [*leading, 1 …, 1, S], to be subtracted from [*batch, T, 1]."""
    *leading, length = positions.shape
    return positions.reshape(*leading, *(1,) * (ndim - len(leading)), length)
