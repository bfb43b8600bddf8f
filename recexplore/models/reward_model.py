"""A language model with a head that judges a whole sequence: its score."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from recexplore.errors import InputError
from recexplore.models.networks import Config, language_model

HEADS = ("scalar", "bins", "ordinal")
_LEAST_GAP = 1e-4  # between thresholds, so that no bin's probability can become 0


class RewardModel(nn.Module):
    """Scores a sequence by its last token's hidden state; higher is better.

    The score is a logit: its sigmoid is the predicted label in 0..1. The heads differ in what they
    say of the label beside that, and so in what they can be trained for:

      scalar: nothing. score = w·h + c.
      bins: a probability for each of `num_bins` labels 0, 1/(num_bins − 1), …, 1, by a softmax of
        as many logits; the score is the logit of the label that they lead one to expect.
      ordinal: such probabilities too, but of labels known to have an order, by the cumulative
        link P(label > b) = σ(w·h − θ_b) with thresholds θ_0 < θ_1 < … (McCullagh 1980); the score,
        again the expected label's logit, rises with w·h.

    Attributes:
      config: sizes of the language model.
      head: one of `HEADS`.
      num_bins: labels that the heads bins and ordinal tell apart. (num_bins − 1) times
        `collective.collective_feedback.rounding` should be 1, so that every label has its own bin.
    """

    config: Config
    head: str = "scalar"
    num_bins: int = 21

    def __post_init__(self):
        if self.head not in HEADS:
            raise InputError(
                f"reward_model.RewardModel.head is {self.head!r}; it must be one of "
                f"{', '.join(HEADS)}."
            )
        if self.num_bins < 2:
            raise InputError(
                f"reward_model.RewardModel.num_bins is {self.num_bins!r}; it must be at least 2."
            )
        super().__post_init__()

    def setup(self):
        self.transformer = language_model(self.config)
        width = (self.num_bins,) if self.head == "bins" else ()
        axes = ("embed", None) if self.head == "bins" else ("embed",)
        initializer = nn.with_logical_partitioning(nn.initializers.zeros, axes)
        self._weights = self.param(
            "head", initializer, (self.config.model_dim, *width), jnp.float32
        )
        if self.head == "ordinal":  # a bias would only shift all thresholds
            self._raw_thresholds = self.param("thresholds", _even_thresholds, (self.num_bins - 1,))
        else:
            self._bias = self.param("bias", nn.initializers.zeros, width, jnp.float32)

    def __call__(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], deterministic: bool = True
    ) -> Float[Array, "B"]:
        """Scores right-padded sequences of `lengths` tokens; not with an encoder."""
        if self.config.has_encoder:
            raise ValueError("An encoder must know where a prompt ends: use `answer_states`.")
        hidden, _ = self.transformer.prefill(tokens, deterministic)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.score(last)

    def prefill(self, tokens, deterministic: bool = True):
        """`prefill` of the model's own language model."""
        return self.transformer.prefill(tokens, deterministic)

    def extend(self, *args, **kwargs):
        """`extend` of the model's own language model."""
        return self.transformer.extend(*args, **kwargs)

    def read_prefix(self, tokens, length=None):
        """`read_prefix` of the model's own language model."""
        return self.transformer.read_prefix(tokens, length)

    def read_prompts(self, prefix, tokens, lengths):
        """`read_prompts` of the model's own language model."""
        return self.transformer.read_prompts(prefix, tokens, lengths)

    def answer_states(self, *args, **kwargs):
        """`answer_states` of the model's own EncoderDecoder."""
        return self.transformer.answer_states(*args, **kwargs)

    def score(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
        """The score by hidden states of last tokens, in float32."""
        if self.head == "scalar":
            return self._project(hidden) + self._bias
        # logit(E) = log E − log(1 − E), where neither term can round to log 0.
        log_probabilities = self.bin_log_probabilities(hidden)
        labels = np.linspace(0, 1, self.num_bins, dtype=np.float32)
        labels = labels.reshape((1,) * (hidden.ndim - 1) + (-1,))
        above = jax.nn.logsumexp(log_probabilities, axis=-1, b=labels)
        return above - jax.nn.logsumexp(log_probabilities, axis=-1, b=1 - labels)

    def bin_log_probabilities(
        self, hidden: Float[Array, "*batch D"]
    ) -> Float[Array, "*batch num_bins"]:
        """log P(label b) for the labels 0, 1/(num_bins − 1), …, 1; of the heads bins and ordinal.

        For the ordinal head and its neighbouring thresholds θ < θ', with s = w·h,

            P(b) = σ(s − θ) − σ(s − θ') = σ(s − θ) σ(θ' − s) (1 − exp(θ − θ'))

        whose logarithm has three harmless terms; the first bin has no θ, the last no θ'.
        """
        projected = self._project(hidden)
        if self.head == "bins":
            bias = self._bias.reshape((1,) * (hidden.ndim - 1) + (-1,))
            return jax.nn.log_softmax(projected + bias)
        if self.head == "scalar":
            raise ValueError("The scalar head knows no bins.")
        gaps = self._gaps()
        thresholds = self.thresholds_in_order().reshape((1,) * (hidden.ndim - 1) + (-1,))
        distances = projected[..., None] - thresholds
        over_lower = _pad(jax.nn.log_sigmoid(distances), before=1)
        under_upper = _pad(jax.nn.log_sigmoid(-distances), after=1)
        between = jnp.pad(jnp.log(-jnp.expm1(-gaps)), 1)
        return over_lower + under_upper + between.reshape((1,) * (hidden.ndim - 1) + (-1,))

    def thresholds_in_order(self) -> Float[Array, "thresholds"]:
        """θ_0 < θ_1 < …, of the ordinal head."""
        rises = jnp.concatenate([jnp.zeros(1), jnp.cumsum(self._gaps())])
        return self._raw_thresholds[:1] + rises

    def _gaps(self) -> Float[Array, "gaps"]:
        return jax.nn.softplus(self._raw_thresholds[1:]) + _LEAST_GAP

    def _project(self, hidden: Array) -> Array:
        axes = "...d,db->...b" if self.head == "bins" else "...d,d->..."
        return jnp.einsum(axes, hidden.astype(jnp.float32), self._weights)


def _pad(x: Array, before: int = 0, after: int = 0) -> Array:
    """Zeros beside the last axis."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, after)])


def _even_thresholds(key: Array, shape: tuple[int, ...]) -> Float[Array, "thresholds"]:
    """Those that give all bins the same probability at w·h = 0: the first, then the increments
    before softplus."""
    del key
    shares = np.arange(1, shape[0] + 1) / (shape[0] + 1)
    even = np.log(shares / (1 - shares))
    return jnp.asarray(
        np.concatenate([even[:1], np.log(np.expm1(np.diff(even) - _LEAST_GAP))]), jnp.float32
    )
