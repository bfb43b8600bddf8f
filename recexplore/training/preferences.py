"""What a policy is tuned by: the reward of its own answers, or which of two answers is preferred.

With π the policy, π₀ the reference it started from, r the reward and β the KL weight, both pursue

    max over π of  E[r] − β KL(π, π₀),  which  π ∝ π₀ exp(r / β)  attains.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def leave_one_out(returns: Float[Array, "B N"]) -> Float[Array, "B N"]:
    """Each return less the mean of the prompt's others (RLOO; Kool et al. 2019, Ahmadian et al.
    2024), a baseline that leaves the gradient unbiased.

    >>> leave_one_out([[1., 2., 6.]])
    [[-3., -1.5, 4.5]]
    """
    count = returns.shape[1]
    return (returns - jnp.mean(returns, axis=1, keepdims=True)) * (count / (count - 1))


def policy_gradient_loss(
    log_probabilities: Float[Array, "B N"],
    reference: Float[Array, "B N"],
    rewards: Float[Array, "B N"],
    kl_weight: float | Float[Array, ""],
) -> Float[Array, ""]:
    """Its gradient is an unbiased estimate of minus that of E[r] − β KL(π, π₀).

    The returns r − β (log π − log π₀) are taken as they are: the gradient runs through the
    log-probability that the advantage multiplies alone.

    Args:
      log_probabilities: log π of the policy's own draws.
      reference: their log π₀.
      rewards: r.
      kl_weight: β.
    """
    returns = jax.lax.stop_gradient(rewards - kl_weight * (log_probabilities - reference))
    return -jnp.mean(leave_one_out(returns) * log_probabilities)


def direct_preference_loss(
    log_probabilities: Float[Array, "B N"],
    reference: Float[Array, "B N"],
    rewards: Float[Array, "B N"],
    kl_weight: float | Float[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """DPO (Rafailov et al. 2023, equation 7) on pairs of answers, the better-rewarded preferred:

        loss = − log σ(β [(log π(y) − log π₀(y)) − (log π(y') − log π₀(y'))])

    Answer i of a prompt is paired with answer i + N / 2. Those that are rewarded alike, such as the
    same answer twice, say nothing and make no pair.

    Args:
      log_probabilities: log π of the answers, which may be anyone's.
      reference: their log π₀.
      rewards: r, by which the preferred one is told.
      kl_weight: β.

    Returns:
      The mean over the pairs, and the share of them in the right order; 0 where there is no pair.
    """
    half = rewards.shape[1] // 2
    better = jnp.sign(rewards[:, :half] - rewards[:, half:])
    ratios = log_probabilities - reference
    margins = better * kl_weight * (ratios[:, :half] - ratios[:, half:])
    pairs = jnp.maximum(jnp.sum(better != 0), 1)
    loss = jnp.sum(jnp.where(better != 0, -jax.nn.log_sigmoid(margins), 0.0)) / pairs
    return loss, jnp.sum((better != 0) & (margins > 0)) / pairs
