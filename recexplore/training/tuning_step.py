"""One step of tuning a policy on reward, and its evaluation: pure functions of arrays.

Drawing, scoring, gradient and update are one program; the host sees figures only.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from recexplore.inference.best_of_n import Batch
from recexplore.inference.context import prefix_cache, read_prompts
from recexplore.inference.scoring import score_texts
from recexplore.models.lora import join
from recexplore.models.reward_model import RewardModel
from recexplore.models.trie import Trie
from recexplore.training.policy import Answers, Policy
from recexplore.training.preferences import direct_preference_loss, policy_gradient_loss
from recexplore.training.train_step import State

METHODS = ("policy_gradient", "direct_preference")


class Given(NamedTuple):
    """What tuning reads and never changes.

    Attributes:
      frozen: the policy's variables that aren't trained, see `models.lora`.
      reference: the others, as they were before.
      alignment: variables of the alignment model.
      prefixes: the tokens that each model's prompts begin with.
      trie: the descriptions.
      prompts: all histories to tune on.
      kl_weight: β; an argument, so that one program serves all.
    """

    frozen: Any
    reference: Any
    alignment: Any
    prefixes: tuple[Int[Array, "P"], Int[Array, "Q"]]
    trie: Trie
    prompts: Batch
    kl_weight: Float[Array, ""]


class Judged(NamedTuple):
    """N answers to each of B prompts, and what is thought of them.

    Attributes:
      tokens: see `policy.Answers`.
      clusters: likewise.
      rewards: the alignment model's scores of the answers, valid or not.
      log_probabilities: log π.
      reference: log π₀.
    """

    tokens: Int[Array, "B N T"]
    clusters: Int[Array, "B N"]
    rewards: Float[Array, "B N"]
    log_probabilities: Float[Array, "B N"]
    reference: Float[Array, "B N"]


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What doesn't change from step to step and is no array.

    Attributes:
      policy: how the novelty model answers.
      alignment: the alignment model's network.
      optimizer: optax chain.
      method: one of `METHODS`: on the policy's own draws, or on pairs of the reference's.
      prompts_per_step: B.
      samples_per_prompt: N.
      on_batch: the sharding of a batch's rows.
    """

    policy: Policy
    alignment: RewardModel
    optimizer: optax.GradientTransformation
    method: str
    prompts_per_step: int
    samples_per_prompt: int
    on_batch: jax.sharding.Sharding

    def step(self, state: State, given: Given) -> tuple[State, dict[str, Float[Array, ""]]]:
        """Draws prompts and answers, and takes one step.

        Args:
          state: before.
          given: what stays the same.

        Returns:
          The state after it, and figures of the answers drawn: what `figures` has where they are
          the policy's own; else the loss and the share of pairs in the right order.
        """
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        for_prompts, for_answers = jax.random.split(key)
        total = given.prompts.history.shape[0]
        rows = jax.random.randint(for_prompts, (self.prompts_per_step,), 0, total)
        batch = jax.tree.map(lambda x: jnp.take(x, rows, axis=0), given.prompts)
        batch = jax.lax.with_sharding_constraint(batch, self.on_batch)
        keys = jax.random.split(for_answers, self.prompts_per_step)
        own = self.method == "policy_gradient"
        answers = self._draw(state.params if own else given.reference, given, batch, keys)
        rewards = self._rewards(given, batch, answers)
        reference = self._log_probabilities(given.reference, given, batch, answers)

        def loss(params):
            log_probabilities = self._log_probabilities(params, given, batch, answers)
            terms = (log_probabilities, reference, rewards, given.kl_weight)
            if own:
                return policy_gradient_loss(*terms), log_probabilities
            return direct_preference_loss(*terms)

        (value, beside), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        if own:
            judged = Judged(answers.tokens, answers.clusters, rewards, beside, reference)
            told = figures(judged, given.trie.num_sequences)
        else:
            told = {"loss": value, "accuracy": beside}
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        told["gradient_norm"] = optax.tree.norm(gradients)
        return State(state.step + 1, state.key, params, None, optimizer), told

    def judge(self, params: Any, given: Given, batch: Batch, keys: Key[Array, "B"]) -> Judged:
        """Draws answers and says what is thought of them, for evaluation.

        Args:
          params: the policy's trained variables.
          given: what stays the same.
          batch: B histories.
          keys: a random key for each.
        """
        answers = self._draw(params, given, batch, keys)
        return Judged(
            answers.tokens,
            answers.clusters,
            self._rewards(given, batch, answers),
            self._log_probabilities(params, given, batch, answers),
            self._log_probabilities(given.reference, given, batch, answers),
        )

    def _draw(self, params: Any, given: Given, batch: Batch, keys: Array) -> Answers:
        whole, prefix = join(params, given.frozen), given.prefixes[0]
        count = self.samples_per_prompt
        with jax.named_scope("draw"):
            return self.policy.draw(whole, prefix, given.trie, batch, keys, count)

    def _log_probabilities(self, params: Any, given: Given, batch: Batch, answers: Answers):
        whole, prefix = join(params, given.frozen), given.prefixes[0]
        with jax.named_scope("log_probabilities"):
            return self.policy.log_probabilities(whole, prefix, given.trie, batch, answers)

    def _rewards(self, given: Given, batch: Batch, answers: Answers) -> Float[Array, "B N"]:
        with jax.named_scope("score"):
            model, params = self.alignment, given.alignment
            prefix = prefix_cache(model, params, given.prefixes[1])
            context = read_prompts(model, params, prefix, batch.alignment)
            return score_texts(model, params, context, answers.tokens, answers.lengths)


def figures(judged: Judged, num_clusters: int) -> dict[str, Float[Array, ""]]:
    """What to know of a policy by its draws.

    Args:
      judged: the draws.
      num_clusters: M.

    Returns:
      reward: its mean. kl and entropy: estimates by the draws, in nats an answer, of KL(π, π₀) and
      of −E log π. valid: the share of answers that are descriptions and not left out. distinct: how
      many different clusters there are among those, over all prompts.
    """
    clusters = judged.clusters.reshape(-1)
    found = jnp.zeros(num_clusters + 1).at[clusters].set(1.0)[:num_clusters]  # -1 is the last
    return {
        "reward": jnp.mean(judged.rewards),
        "kl": jnp.mean(judged.log_probabilities - judged.reference),
        "entropy": -jnp.mean(judged.log_probabilities),
        "valid": jnp.mean(clusters >= 0, dtype=jnp.float32),
        "distinct": jnp.sum(found),
    }
