"""A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, gated MLP.

By `TransformerConfig` it is one of the Llama 3, Qwen 2.5, Qwen 3, Gemma 2 or Gemma 3 (text) family,
or a small network of its own. Parameter names and logical axes follow T5X: token_embedder, layers
(scanned), decoder_norm; vocab, embed, heads, kv, mlp, layers.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from recexplore.errors import check_field
from recexplore.models import rotary
from recexplore.models.attention import Context, KeyValues, Segment, beside
from recexplore.models.layers import (
    ACTIVATIONS,
    EVERYTHING,
    PROJECTIONS,
    Block,
    OutputTable,
    RMSNorm,
    Sight,
    bring_table,
    constrain,
    read_last_layer_at,
)

DTYPES = ("float32", "bfloat16")
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


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
      activation: of the MLP's gate: "silu", or "gelu" (its tanh approximation; Gemma).
      norm_epsilon: added to the mean square.
      norm_offset: norms multiply by scale + norm_offset (Gemma: 1), which is 1 at the start.
      post_norms: a norm after attention and after the MLP too, before they are added (Gemma 2, 3).
      qk_norm: queries and keys are normalised over head_dim before rotation (Qwen 3, Gemma 3).
      scaled_embeddings: embeddings are multiplied by sqrt(model_dim) (Gemma).
      attention_bias: queries, keys and values have biases (Qwen 2.5).
      attention_scale: factor of the attention logits; 0 is head_dim ** -0.5.
      attention_windows: how far back the layers look, in tokens, themselves included, as a pattern
        that repeats from the first layer on; 0 is everything. (4096, 0) alternates.
      attention_softcap: bound of the attention logits (Gemma 2); 0 is none.
      logit_softcap: bound of the output logits; 0 is none.
      rope_theta: base of the rotary wavelengths.
      rope_local_theta: base in layers with an attention window, never scaled (Gemma 3); 0 is
        rope_theta, scaled or not, in all layers.
      rope_scaling: how wavelengths are stretched for long contexts: "none", "linear" (all of them
        by rope_factor) or "llama3" (the long ones; see `rotary.stretched`).
      rope_factor: by how much.
      rope_low_frequency_factor: for "llama3".
      rope_high_frequency_factor: for "llama3".
      rope_original_length: for "llama3": the context before, in tokens.
      tied_embeddings: the output layer is the embedding table; otherwise one of its own, which
        starts at zero.
      dropout_rate: on the embeddings and on what each block adds.
      dtype: of activations; parameters are cast to it where they are used.
      param_dtype: of the parameters; bfloat16 halves a frozen network.
      remat: what training computes again instead of keeping it, by layer: "none"; "full": all but
        the layer's input; "dots": all but matrix products; "dots_no_batch": all but the products
        with kernels, attention's own are computed again.
      lora_rank: r of low-rank adapters (LoRA), the collection "lora" beside "params"; 0 is none.
      lora_targets: the kernels that have them, of query, key, value, out, wi_0, wi_1, wo.
      lora_scale: factor of what they add (alpha / r elsewhere).
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
    activation: str = "silu"
    norm_epsilon: float = 1e-6
    norm_offset: float = 0.0
    post_norms: bool = False
    qk_norm: bool = False
    scaled_embeddings: bool = False
    attention_bias: bool = False
    attention_scale: float = 0.0
    attention_windows: Sequence[int] = (0,)
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    rope_theta: float = 10_000.0
    rope_local_theta: float = 0.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_low_frequency_factor: float = 1.0
    rope_high_frequency_factor: float = 4.0
    rope_original_length: int = 8192
    tied_embeddings: bool = True
    dropout_rate: float = 0.0
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    lora_rank: int = 0
    lora_targets: Sequence[str] = ("query", "value")
    lora_scale: float = 1.0
    scan_unroll: int = 1

    has_encoder: ClassVar[bool] = False

    def __post_init__(self):
        for field in ("attention_windows", "lora_targets"):  # gin and JSON may have lists
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for field in _FROM_ONE:
            check_field(self, getattr(self, field) >= 1, field, "must be at least 1")
        for field in _POSITIVE:
            check_field(self, getattr(self, field) > 0, field, "must be positive")
        for field in _NOT_NEGATIVE:
            check_field(self, getattr(self, field) >= 0, field, "must not be negative")
        for field, choices in _CHOICES.items():
            known = f"must be one of {', '.join(choices)}"
            check_field(self, getattr(self, field) in choices, field, known)
        check_field(
            self, self.num_heads % self.num_kv_heads == 0, "num_kv_heads", "must divide num_heads"
        )
        check_field(self, self.head_dim >= 2 and self.head_dim % 2 == 0, "head_dim", "must be even")
        windows, targets = self.attention_windows, self.lora_targets
        check_field(
            self,
            len(windows) >= 1 and min(windows) >= 0,
            "attention_windows",
            "must be sizes from 0 on",
        )
        check_field(
            self,
            len(targets) >= 1 and set(targets) <= set(PROJECTIONS),
            "lora_targets",
            f"must have at least one of {', '.join(PROJECTIONS)}, and nothing else",
        )
        check_field(
            self,
            self.rope_high_frequency_factor > self.rope_low_frequency_factor,
            "rope_high_frequency_factor",
            "must be above rope_low_frequency_factor",
        )
        check_field(self, 0.0 <= self.dropout_rate < 1.0, "dropout_rate", "must lie in [0, 1)")


_FROM_ONE = (
    *("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_dim"),
    *("max_length", "scan_unroll", "rope_original_length"),
)
_POSITIVE = (
    *("norm_epsilon", "rope_theta", "rope_factor", "rope_low_frequency_factor", "lora_scale"),
)
_NOT_NEGATIVE = (
    *("attention_scale", "attention_softcap", "logit_softcap", "rope_local_theta", "lora_rank"),
)
_CHOICES = {
    "activation": tuple(ACTIVATIONS),
    "rope_scaling": ("none", "linear", "llama3"),
    "dtype": DTYPES,
    "param_dtype": DTYPES,
    "remat": tuple(REMAT),
}


class Transformer(OutputTable):
    """The language model; `init` and `apply` with `__call__`, other methods by `method=`.

    `prefill` reads whole sequences; `extend` reads tokens that also look at segments read before.
    """

    config: TransformerConfig
    scan_layers = True  # as T5X asks: in parameters and segments the layers' axis comes first

    def setup(self):
        c = self.config
        initializer = nn.with_logical_partitioning(
            nn.initializers.normal(stddev=c.model_dim**-0.5), ("vocab", "embed")
        )
        self.token_embedder = self.param(
            "token_embedder", initializer, (c.vocab_size, c.model_dim), c.param_dtype
        )
        if not c.tied_embeddings:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab", "embed"))
            self.logits_dense = self.param(
                "logits_dense", zeros, (c.vocab_size, c.model_dim), c.param_dtype
            )
        block = Block
        if c.remat != "none":
            deterministic = 5  # among Block's arguments, itself included
            block = nn.remat(
                Block,
                policy=REMAT[c.remat],
                prevent_cse=c.scan_unroll >= c.num_layers,  # a loop keeps XLA from undoing it
                static_argnums=(deterministic,),
            )
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
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

    def read_prefix(self, tokens: Int[Array, "P"], length: Int[Array, ""] | None = None) -> Segment:
        """Keys and values of what all prompts begin with.

        Args:
          tokens: at least one.
          length: how many of them are real, where they are right-padded.

        Returns:
          The segment; its positions are -1 where the tokens are padding.
        """
        _, segment = self.prefill(tokens)
        if length is None:
            return segment
        real = jnp.arange(tokens.shape[0]) < length
        return segment._replace(positions=jnp.where(real, segment.positions, -1))

    def read_prompts(
        self, prefix: Segment, tokens: Int[Array, "B S"], lengths: Int[Array, "B"]
    ) -> Context:
        """Reads prompts after a prefix that was read before.

        Args:
          prefix: of `read_prefix`.
          tokens: of B prompts, right-padded.
          lengths: of the prompts, at least 1.
        """
        num_prompts, width = tokens.shape
        in_prefix = (prefix.positions >= 0)[None, None]
        prefix_length = jnp.sum(in_prefix)
        steps = jnp.arange(width)
        hidden, history = self.extend(
            tokens,
            jnp.broadcast_to(prefix_length + steps[None, :], (num_prompts, width)),
            (steps[:, None] >= steps[None, :])[None],
            (prefix,),
            (in_prefix,),
            read_at=(lengths - 1)[:, None],
        )
        in_history = steps[None, None, :] < lengths[:, None, None]
        whole = prefix_length + lengths
        return Context((prefix, history), (in_prefix, in_history), whole, hidden[:, 0])

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
        table = bring_table(self.token_embedder, self.config.dtype)
        x = jnp.take(table, tokens, axis=0).astype(self.config.dtype)
        if self.config.scaled_embeddings:
            x = x * jnp.asarray(self.config.model_dim**0.5, x.dtype)  # rounded, as Gemma's is
        x = constrain(x, "activation_batch", None, "activation_embed")
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
        variables = {name: tree["layers"] for name, tree in self.variables.items()}
        stacked = nn.unbox(variables), context, self._windows()

        def run(x, layer, read_at=None):
            variables, kept, window = jax.tree.map(lambda a: a[layer], stacked)
            return block.apply(variables, x, kept, window, sight, True, read_at)

        return read_last_layer_at(read_at, run, x, count, self.config.scan_unroll)

    def _logits(self, sum_of_products: str, hidden: Array, rows: Array) -> Array:
        rows = rows.astype(hidden.dtype)
        logits = jnp.einsum(sum_of_products, hidden, rows, preferred_element_type=jnp.float32)
        cap = self.config.logit_softcap
        return cap * jnp.tanh(logits / cap) if cap else logits

    def _windows(self) -> Int[Array, "L"]:
        """How far back each layer looks."""
        c = self.config
        pattern = [window or EVERYTHING for window in c.attention_windows]
        return jnp.resize(jnp.array(pattern, jnp.int32), (c.num_layers,))

    def _frequencies(self) -> tuple[np.ndarray, ...]:
        """Of the rotary embedding; if layers with a window have their own, those come second."""
        c = self.config
        plain = rotary.frequencies(c.head_dim, c.rope_theta)
        if c.rope_scaling == "linear":
            plain = plain / c.rope_factor
        elif c.rope_scaling == "llama3":
            plain = rotary.stretched(
                plain,
                c.rope_factor,
                c.rope_low_frequency_factor,
                c.rope_high_frequency_factor,
                c.rope_original_length,
            )
        if not c.rope_local_theta:
            return (plain,)
        return plain, rotary.frequencies(c.head_dim, c.rope_local_theta)

    def _sight(self, positions, masks, context) -> Sight:
        # Once for all layers: a loop over layers would compute cosines in each.
        rotations = tuple(rotary.rotation(positions, by) for by in self._frequencies())
        if not any(self.config.attention_windows):
            return Sight(rotations, masks, None)
        kept = [beside(segment.positions, positions.ndim) for segment in context]
        own = positions[..., None, :]
        distances = tuple(positions[..., :, None] - at for at in (*kept, own))
        return Sight(rotations, masks, distances)
