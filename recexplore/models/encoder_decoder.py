"""An encoder–decoder of the T5 family: T5 1.1, Flan-T5, mT5, and the original T5.

The encoder reads a prompt in both directions, the decoder writes what follows it. RMSNorm, relative
position biases instead of rotations, attention logits that aren't scaled, a gated MLP (a plain one
in the original T5). Parameter names and logical axes follow T5X: token_embedder, encoder, decoder,
logits_dense; vocab, embed, heads, kv, mlp, layers, relpos_buckets.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recexplore.errors import check_field
from recexplore.models.attention import Context, Segment
from recexplore.models.encoder_decoder_layers import PLAIN, Decoder, Encoder
from recexplore.models.layers import OutputTable, bring_table, constrain
from recexplore.models.transformer import DTYPES, REMAT

_GATED = ("gelu", "silu")


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """Sizes of an encoder–decoder; a model's size is a gin file that binds these.

    Attributes:
      vocab_size: V, rows of the embedding table.
      num_encoder_layers: of the encoder.
      num_decoder_layers: of the decoder.
      model_dim: D, width of the residual stream.
      num_heads: H.
      head_dim: width of a head.
      mlp_dim: width of the MLP's hidden layer.
      max_length: longest prompt and description together, in tokens.
      activation: of the MLP's gate: "gelu" (its tanh approximation; T5 1.1, mT5) or "silu"; or
        "relu", the original T5's, whose MLP has no gate.
      norm_epsilon: added to the mean square.
      num_buckets: of relative positions; even.
      max_distance: in tokens, from which on all positions share a bucket.
      bias_by_layer: every layer has relative position biases of its own (T5X's scalable_t5); else
        those of the encoder share one table, and those of the decoder another.
      tied_embeddings: the output layer is the embedding table, and hidden states are multiplied by
        model_dim ** -0.5 before it (the original T5); otherwise one of its own, which starts at
        zero.
      start_id: the token that the decoder begins with: padding, in all published models.
      end_id: the token that the encoder reads after a prompt, EOS in all published models; -1:
        none.
      dropout_rate: on the embeddings and on what each part of a layer adds.
      dtype: of activations; parameters are cast to it where they are used.
      param_dtype: of the parameters.
      remat: what training computes again instead of keeping it; see
        `transformer.TransformerConfig`.
      scan_unroll: layers compiled side by side; more run faster and compile longer.
    """

    vocab_size: int
    num_encoder_layers: int
    num_decoder_layers: int
    model_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    max_length: int
    activation: str = "gelu"
    norm_epsilon: float = 1e-6
    num_buckets: int = 32
    max_distance: int = 128
    bias_by_layer: bool = False
    tied_embeddings: bool = False
    start_id: int = 0
    end_id: int = 1
    dropout_rate: float = 0.0
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1

    has_encoder: ClassVar[bool] = True
    norm_offset: ClassVar[float] = 0.0  # what parts of layers ask any network's configuration
    lora_rank: ClassVar[int] = 0

    def __post_init__(self):
        for field in _FROM_ONE:
            check_field(self, getattr(self, field) >= 1, field, "must be at least 1")
        for field, choices in _CHOICES.items():
            known = f"must be one of {', '.join(choices)}"
            check_field(self, getattr(self, field) in choices, field, known)
        check_field(self, self.norm_epsilon > 0, "norm_epsilon", "must be positive")
        even = self.num_buckets >= 4 and self.num_buckets % 2 == 0
        check_field(self, even, "num_buckets", "must be even, and at least 4")
        far = self.max_distance > self.num_buckets // 2
        check_field(self, far, "max_distance", "must be above num_buckets / 2")
        for field, least in (("start_id", 0), ("end_id", -1)):
            ok = least <= getattr(self, field) < self.vocab_size
            check_field(self, ok, field, f"must lie in [{least}, vocab_size)")
        check_field(self, 0.0 <= self.dropout_rate < 1.0, "dropout_rate", "must lie in [0, 1)")


_FROM_ONE = (
    *("vocab_size", "num_encoder_layers", "num_decoder_layers", "model_dim", "num_heads"),
    *("head_dim", "mlp_dim", "max_length", "scan_unroll"),
)
_CHOICES = {
    "activation": (*_GATED, PLAIN),
    "dtype": DTYPES,
    "param_dtype": DTYPES,
    "remat": tuple(REMAT),
}


class Prefix(NamedTuple):
    """What all prompts begin with. An encoder looks both ways, so it is read with every prompt.

    Attributes:
      tokens: of it.
      positions: 0, 1, …; -1 where they are padding.
    """

    tokens: Int[Array, "P"]
    positions: Int[Array, "P"]


class EncoderDecoder(OutputTable):
    """The language model; `init` by `method="prefill"`, `apply` with the methods below.

    `encode` reads prompts; `extend` reads tokens that follow them, one prompt's any number of times
    side by side.
    """

    config: EncoderDecoderConfig

    def setup(self):
        c = self.config
        axes = ("vocab", "embed")
        # Embeddings aren't scaled; as output layer, hidden states are.
        initializer = nn.with_logical_partitioning(nn.initializers.normal(stddev=1.0), axes)
        shape = (c.vocab_size, c.model_dim)
        self.token_embedder = self.param("token_embedder", initializer, shape, c.param_dtype)
        if not c.tied_embeddings:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, axes)
            self.logits_dense = self.param("logits_dense", zeros, shape, c.param_dtype)
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.dropout = nn.Dropout(c.dropout_rate)

    def __call__(
        self,
        prompts: Int[Array, "B S"],
        lengths: Int[Array, "B"],
        tokens: Int[Array, "B T"],
        deterministic: bool = True,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token after each of the decoder's, of which the first is `start_id`.

        Args:
          prompts: what the encoder reads, right-padded.
          lengths: of the prompts, without what `end_id` adds.
          tokens: what the decoder reads.
          deterministic: no dropout.
        """
        encoded, real = self._encode_prompts(prompts, lengths, deterministic)
        hidden = self._decode(encoded, real, tokens, deterministic)
        return self.logits(hidden)

    def prefill(
        self, tokens: Int[Array, "*batch T"], deterministic: bool = True
    ) -> tuple[Float[Array, "*batch T D"], tuple[Segment, Segment]]:
        """The encoder's hidden states of whole prompts, and what continuations look at: the encoded
        prompt, for the decoder's layers, and the token that begins an answer."""
        positions, real = jnp.arange(tokens.shape[-1]), jnp.ones(tokens.shape, bool)
        positions = positions.reshape((1,) * (tokens.ndim - 1) + positions.shape)
        hidden = self._hidden_of_prompts(tokens, positions, real, deterministic)
        encoded = self._segment(hidden, positions, tokens.shape)
        _, start = self._start(encoded, real, deterministic)
        return hidden, (encoded, start)

    def read_prefix(self, tokens: Int[Array, "P"], length: Int[Array, ""] | None = None) -> Prefix:
        """What all prompts begin with, as `read_prompts` takes it.

        Args:
          tokens: at least one.
          length: how many of them are real, where they are right-padded.
        """
        steps = jnp.arange(tokens.shape[0])
        return Prefix(tokens, steps if length is None else jnp.where(steps < length, steps, -1))

    def read_prompts(
        self, prefix: Prefix, tokens: Int[Array, "B S"], lengths: Int[Array, "B"]
    ) -> Context:
        """Reads prompts, what they begin with and all, and begins the answers.

        Args:
          prefix: of `read_prefix`.
          tokens: of B prompts without it, right-padded.
          lengths: of the prompts, at least 1.
        """
        count = len(lengths)
        begun = jnp.broadcast_to((prefix.positions >= 0)[None], (count, prefix.tokens.shape[0]))
        tokens, real = self._ended(tokens, lengths)
        steps = jnp.sum(prefix.positions >= 0) + jnp.arange(tokens.shape[1])
        beginning = jnp.broadcast_to(prefix.tokens[None], begun.shape)
        real = jnp.concatenate([begun, real], axis=1)
        encoded = self.encode(
            jnp.concatenate([beginning, tokens], axis=1),
            jnp.concatenate([prefix.positions, steps])[None],
            real,
        )
        last, start = self._start(encoded, real, deterministic=True)
        masks = real[:, None], jnp.ones((1, 1, 1), bool)
        return Context((encoded, start), masks, jnp.ones_like(lengths), last[:, 0])

    def answer_states(
        self,
        tokens: Int[Array, "B T"],
        prompt_lengths: Int[Array, "B"],
        num_steps: int,
        deterministic: bool = True,
    ) -> Float[Array, "B places D"]:
        """Hidden states before the first token of an answer, and after each of so many.

        Args:
          tokens: prompts, and right behind them their answers.
          prompt_lengths: where the answers begin.
          num_steps: how many of their tokens are read.
          deterministic: no dropout.
        """
        encoded, real = self._encode_prompts(tokens, prompt_lengths, deterministic)
        places = prompt_lengths[:, None] - 1 + jnp.arange(num_steps + 1)[None, :]
        answers = jnp.take_along_axis(tokens, jnp.minimum(places, tokens.shape[1] - 1), axis=1)
        answers = answers.at[:, 0].set(self.config.start_id)
        return self._decode(encoded, real, answers, deterministic)

    def encode(
        self,
        tokens: Int[Array, "*batch S"],
        positions: Int[Array, "..."],
        real: Bool[Array, "*batch S"],
        deterministic: bool = True,
    ) -> Segment:
        """Keys and values of whole prompts for the decoder's layers.

        Args:
          tokens: token ids.
          positions: their positions, which broadcast to [*batch, S].
          real: which of them aren't padding; the others are looked at by nobody, if whoever
            attends to the segment masks them too.
          deterministic: no dropout.
        """
        hidden = self._hidden_of_prompts(tokens, positions, real, deterministic)
        return self._segment(hidden, positions, tokens.shape)

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
        """The decoder's hidden states of tokens that also look at what was read before.

        Args:
          tokens: token ids.
          positions: their positions; the token that begins an answer has 0.
          own_mask: which of the new tokens each of them may look at; broadcasts to [*batch, T, T].
          context: first the encoded prompt, which the decoder's second attention looks at, then
            what the decoder has read; the leading shape of each is a prefix of *batch.
          context_masks: for each a mask that broadcasts to [*batch, T, S].
          deterministic: no dropout.
          read_at: places of the tokens whose hidden states are wanted; None for all of them. The
            last layer spends nothing on the others but for their keys and values.

        Returns:
          Normalised hidden states, and the new tokens' own segment.
        """
        if read_at is not None and not deterministic:
            raise ValueError("read_at is for inference; it has no dropout.")
        x = self._embed(tokens, deterministic)
        hidden, own = self.decoder(
            x, positions, own_mask, context, context_masks, deterministic, read_at
        )
        return hidden, Segment(own.keys, own.values, positions)

    def _logits(self, sum_of_products: str, hidden: Array, rows: Array) -> Array:
        if self.config.tied_embeddings:
            hidden = hidden * jnp.asarray(self.config.model_dim**-0.5, hidden.dtype)
        rows = rows.astype(hidden.dtype)
        return jnp.einsum(sum_of_products, hidden, rows, preferred_element_type=jnp.float32)

    def _embed(self, tokens: Int[Array, "*batch T"], deterministic: bool) -> Array:
        table = bring_table(self.token_embedder, self.config.dtype)
        x = jnp.take(table, tokens, axis=0).astype(self.config.dtype)
        x = constrain(x, "activation_batch", None, "activation_embed")
        return self.dropout(x, deterministic=deterministic)

    def _hidden_of_prompts(self, tokens, positions, real, deterministic) -> Array:
        x = self._embed(tokens, deterministic)
        return self.encoder(x, positions, real, deterministic)

    def _segment(self, hidden: Array, positions: Array, shape: tuple[int, ...]) -> Segment:
        kept = self.decoder.read(hidden)
        return Segment(kept.keys, kept.values, jnp.broadcast_to(positions, shape))

    def _ended(
        self, tokens: Int[Array, "B S"], lengths: Int[Array, "B"]
    ) -> tuple[Int[Array, "B S1"], Bool[Array, "B S1"]]:
        """Prompts with the token behind them that ends what the encoder reads, and what is real."""
        end, steps = self.config.end_id, jnp.arange(tokens.shape[1] + 1)[None, :]
        if end < 0:
            return tokens, steps[:, :-1] < lengths[:, None]
        tokens = jnp.pad(tokens, ((0, 0), (0, 1)))
        return jnp.where(steps == lengths[:, None], end, tokens), steps <= lengths[:, None]

    def _encode_prompts(
        self, tokens: Int[Array, "B S"], lengths: Int[Array, "B"], deterministic: bool
    ) -> tuple[Segment, Bool[Array, "B S1"]]:
        tokens, real = self._ended(tokens, lengths)
        positions = jnp.arange(tokens.shape[1])[None]
        return self.encode(tokens, positions, real, deterministic), real

    def _decode(
        self,
        encoded: Segment,
        real: Bool[Array, "*batch S"],
        tokens: Int[Array, "*batch T"],
        deterministic: bool,
    ) -> Float[Array, "*batch T D"]:
        """Hidden states of whole answers under a causal mask."""
        return self._extend_from_start(encoded, real, tokens, deterministic)[0]

    def _start(
        self, encoded: Segment, real: Bool[Array, "*batch S"], deterministic: bool
    ) -> tuple[Float[Array, "*batch one D"], Segment]:
        """The hidden state and the segment of the token that begins an answer."""
        tokens = jnp.full((*real.shape[:-1], 1), self.config.start_id)
        return self._extend_from_start(encoded, real, tokens, deterministic)

    def _extend_from_start(self, encoded, real, tokens, deterministic):
        length = tokens.shape[-1]
        row = jnp.arange(length).reshape((1,) * (tokens.ndim - 1) + (length,))
        return self.extend(
            tokens,
            jnp.broadcast_to(row, tokens.shape),
            jnp.tril(jnp.ones((length, length), bool)),
            (encoded,),
            (real[..., None, :],),
            deterministic,
        )
