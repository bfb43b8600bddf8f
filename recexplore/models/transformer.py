"""A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, gated MLP.

Parameter names and logical axes follow T5X: token_embedder, layers (scanned), decoder_norm; vocab,
embed, heads, kv, mlp, layers.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recexplore.errors import InputError
from recexplore.models.attention import Segment, attend, rotate


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


class Attention(nn.Module):
    """Rotary grouped-query attention to context segments and to the tokens themselves."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x, positions, context, masks):
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
        queries = rotate(jnp.einsum("...d,dhk->...hk", x, query), positions, c.rope_theta)
        keys = rotate(jnp.einsum("...d,dhk->...hk", x, key), positions, c.rope_theta)
        own = Segment(keys, jnp.einsum("...d,dhk->...hk", x, value))
        mixed = attend(queries, (*context, own), masks)
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
    """One layer: attention and MLP, each normalised before and added to the residual stream."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x, context, positions, masks, deterministic):
        drop = nn.Dropout(self.config.dropout_rate, deterministic=deterministic)
        with jax.named_scope("attention"):
            normal = RMSNorm(self.config, name="pre_attention_layer_norm")(x)
            mixed, own = Attention(self.config, name="self_attention")(
                normal, positions, context, masks
            )
            x = x + drop(mixed)
        with jax.named_scope("mlp"):
            normal = RMSNorm(self.config, name="pre_mlp_layer_norm")(x)
            x = x + drop(GatedMLP(self.config, name="mlp")(normal))
        return x, own


class Transformer(nn.Module):
    """The language model; `init` and `apply` with `__call__`, other methods by `method=`.

    Segments that go in and come out have a leading axis for the layers: [L, *leading, T, G,
    head_dim].
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
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
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
        positions = jnp.broadcast_to(_row(jnp.arange(length), tokens.ndim), tokens.shape)
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
    ) -> tuple[Float[Array, "*batch T D"], Segment]:
        """Hidden states of tokens that also look at segments computed before.

        Args:
          tokens: token ids.
          positions: their positions.
          own_mask: which of the new tokens each of them may look at; broadcasts to [*batch, T, T].
          context: earlier segments, [L, *leading, S, G, head_dim] with *leading a prefix of *batch.
          context_masks: for each a mask that broadcasts to [*batch, T, S].
          deterministic: no dropout.

        Returns:
          Normalised hidden states, and the new tokens' own segment.
        """
        masks = (*context_masks, own_mask)
        x = jnp.take(self.token_embedder, tokens, axis=0).astype(self.config.dtype)
        x = self.dropout(x, deterministic=deterministic)
        x, own = self.layers(x, context, positions, masks, deterministic)
        return self.decoder_norm(x), own

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Logits over the whole vocabulary, in float32."""
        table = self._output_table().astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)

    def token_logits(
        self, hidden: Float[Array, "*batch D"], tokens: Int[Array, "*batch C"]
    ) -> Float[Array, "*batch C"]:
        """Logits of C given tokens only, in float32; the rest of the vocabulary is not touched."""
        rows = jnp.take(self._output_table(), tokens, axis=0).astype(hidden.dtype)
        return jnp.einsum("...d,...cd->...c", hidden, rows, preferred_element_type=jnp.float32)

    def _output_table(self) -> Float[Array, "V D"]:
        return self.token_embedder if self.config.tied_embeddings else self.logits_dense


def _row(vector: Array, ndim: int) -> Array:
    return vector.reshape((1,) * (ndim - 1) + vector.shape)
