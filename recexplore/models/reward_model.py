"""A transformer with a scalar head: the score of a whole sequence."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recexplore.models.transformer import Transformer, TransformerConfig


class RewardModel(nn.Module):
    """Scores a sequence by its last token's hidden state; higher is better.

    The score is a logit: its sigmoid is the predicted label in 0..1.
    """

    config: TransformerConfig

    def setup(self):
        self.transformer = Transformer(self.config)
        initializer = nn.with_logical_partitioning(nn.initializers.zeros, ("embed",))
        self.head = self.param("head", initializer, (self.config.model_dim,), jnp.float32)
        self.bias = self.param("bias", nn.initializers.zeros, (), jnp.float32)

    def __call__(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], deterministic: bool = True
    ) -> Float[Array, "B"]:
        """Scores right-padded sequences of `lengths` tokens."""
        hidden, _ = self.transformer.prefill(tokens, deterministic)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.score(last)

    def prefill(self, tokens, deterministic: bool = True):
        """`Transformer.prefill` of the model's own transformer."""
        return self.transformer.prefill(tokens, deterministic)

    def extend(self, *args, **kwargs):
        """`Transformer.extend` of the model's own transformer."""
        return self.transformer.extend(*args, **kwargs)

    def score(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
        """The scalar head on hidden states of last tokens, in float32."""
        return jnp.einsum("...d,d->...", hidden.astype(jnp.float32), self.head) + self.bias
