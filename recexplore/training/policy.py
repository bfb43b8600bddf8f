"""The novelty model as a policy: what it answers, and how probable its answers are to it.

An answer is *free*, any tokens up to the longest description's length, or *constrained* to the
descriptions of clusters that aren't left out, as when exploring. The first may be no description at
all, the second always is one.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from recexplore.inference.best_of_n import Batch
from recexplore.inference.context import Context, prefix_cache, read_prompts
from recexplore.inference.free_sampler import sample_freely
from recexplore.inference.sampler import sample
from recexplore.models.networks import LanguageModel
from recexplore.models.trie import Trie, exclude, which_sequence
from recexplore.training import description_losses

DECODINGS = ("free", "constrained")


class Answers(NamedTuple):
    """N answers to each of B prompts.

    Attributes:
      tokens: right-padded with 0; EOS is the last one of an answer that came to its end.
      lengths: how many tokens there are.
      clusters: whose description it is; -1 where it is none, or one of a cluster that is left out.
    """

    tokens: Int[Array, "B N T"]
    lengths: Int[Array, "B N"]
    clusters: Int[Array, "B N"]


@dataclasses.dataclass(frozen=True)
class Policy:
    """How a novelty model answers; its parameters come as arguments.

    Attributes:
      model: the network.
      decoding: one of `DECODINGS`.
      temperature: the logits are divided by it. The probabilities meant are those after that, the
        ones by which answers are drawn.
    """

    model: LanguageModel
    decoding: str
    temperature: float

    def draw(
        self,
        params: Any,
        prefix: Int[Array, "P"],
        trie: Trie,
        batch: Batch,
        keys: Key[Array, "B"],
        num_samples: int,
    ) -> Answers:
        """Draws N answers to every prompt, independently.

        Args:
          params: variables of the model.
          prefix: tokens that its prompts begin with.
          trie: the descriptions.
          batch: B histories.
          keys: a random key for each; its answers depend on nothing else of the batch.
          num_samples: N.
        """
        context = self._read(params, prefix, batch)
        if self.decoding == "constrained":
            excluded = exclude(trie, _left_out(batch))
            drawn = sample(
                self.model,
                params,
                trie,
                context,
                excluded,
                keys,
                num_samples,
                self.temperature,
                distinct=False,
            ).clusters
            tokens = jnp.take(trie.sequences, drawn, axis=0)
            return Answers(tokens, jnp.take(trie.lengths, drawn), drawn)
        written = sample_freely(
            self.model,
            params,
            context,
            keys,
            num_samples,
            self.temperature,
            trie.max_length,
            trie.eos_id,
        )
        found = which_sequence(trie, written.tokens)
        left_out = jnp.any(found[..., None] == _left_out(batch)[:, None, :], axis=-1)
        return Answers(*written, jnp.where(left_out, -1, found))

    def log_probabilities(
        self, params: Any, prefix: Int[Array, "P"], trie: Trie, batch: Batch, answers: Answers
    ) -> Float[Array, "B N"]:
        """Log-probability of each answer; gradients may be taken.

        Args:
          params: variables of the model.
          prefix: tokens that its prompts begin with.
          trie: the descriptions.
          batch: B histories.
          answers: to them.
        """
        before = self._before(params, self._read(params, prefix, batch), answers.tokens)
        if self.decoding == "constrained":
            return self._among_allowed(params, trie, batch, answers, before)
        logits = self.model.apply(params, before, method="logits") / self.temperature
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, answers.tokens)
        steps = jnp.arange(answers.tokens.shape[-1])[None, None]
        return -jnp.sum(jnp.where(steps < answers.lengths[..., None], losses, 0.0), axis=-1)

    def _read(self, params: Any, prefix: Int[Array, "P"], batch: Batch) -> Context:
        shared = prefix_cache(self.model, params, prefix)
        return read_prompts(self.model, params, shared, batch.novelty)

    def _before(
        self, params: Any, context: Context, tokens: Int[Array, "B N T"]
    ) -> Float[Array, "B N T D"]:
        """The hidden states before each token of the answers."""
        steps = jnp.arange(tokens.shape[-1] - 1)
        positions = context.lengths[:, None, None] + steps[None, None, :]
        hidden, _ = self.model.apply(
            params,
            tokens[..., :-1],
            jnp.broadcast_to(positions, (*tokens.shape[:-1], len(steps))),
            (steps[:, None] >= steps[None, :])[None, None],
            context.segments,
            context.masks_for(2),
            method="extend",
        )
        shape = (*tokens.shape[:2], 1, hidden.shape[-1])
        first = jnp.broadcast_to(context.last[:, None, None], shape)
        return jnp.concatenate([first, hidden], axis=2)

    def _among_allowed(
        self, params: Any, trie: Trie, batch: Batch, answers: Answers, before: Array
    ) -> Float[Array, "B N"]:
        def token_logits(hidden, tokens):
            logits = self.model.apply(params, hidden, tokens, method="token_logits")
            return logits / self.temperature

        shape = answers.clusters.shape
        excluded = jnp.repeat(_mask(_left_out(batch), trie.num_sequences), shape[1], axis=0)
        tokens = answers.tokens.reshape(-1, trie.max_length)
        choices = description_losses.choices_along(trie, excluded, tokens)
        steps = description_losses.losses_among_children(
            trie, choices, token_logits, before.reshape(-1, *before.shape[2:]), smoothing=0.0
        )
        return -jnp.sum(steps.losses, axis=1).reshape(shape)


def _left_out(batch: Batch) -> Int[Array, "B X"]:
    """The clusters that are no valid answers; -1 is none."""
    return jnp.concatenate([batch.history, batch.banned], axis=1)


def _mask(clusters: Int[Array, "B X"], count: int) -> Bool[Array, "B M"]:
    return jnp.any(clusters[:, :, None] == jnp.arange(count)[None, None], axis=1)
