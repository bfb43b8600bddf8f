"""What may fill the exploration slot: the arms of the experiment.

An arm is asked, for the users of a day, which cluster each is to explore, and told how it went. All
are given the same users, histories and allowed clusters; only the choice differs.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import scipy.special
from jaxtyping import Bool, Float, Int

from recexplore.evaluation import policies

ORACLE_SAMPLES = 20


class Opinions(NamedTuple):
    """What is thought of every cluster after each of H histories; rows by `history_code`.

    Attributes:
      log_p: log-probabilities of the novelty model.
      scores: of the alignment model, logits.
      tuned_log_p: of the novelty model tuned on the alignment model's reward; None: there is none.
      markov: estimated probability of each next cluster.
      truth: expected satisfaction, averaged over users who have the history.
      popularity: how many novel moves led into each cluster, the past fading if that helps.
      feedback: mean watch fraction of those.
    """

    log_p: Float[np.ndarray, "H M"]
    scores: Float[np.ndarray, "H M"]
    tuned_log_p: Float[np.ndarray, "H M"] | None
    markov: Float[np.ndarray, "H M"]
    truth: Float[np.ndarray, "H M"]
    popularity: Float[np.ndarray, "M"]
    feedback: Float[np.ndarray, "M"]


class Asked(NamedTuple):
    """The users of a day who get something to explore.

    Attributes:
      histories: their histories' codes.
      allowed: the clusters there are to choose from.
    """

    histories: Int[np.ndarray, "A"]
    allowed: Bool[np.ndarray, "A M"]

    def among_allowed(self, log_p: Float[np.ndarray, "H M"]) -> Float[np.ndarray, "A M"]:
        """The users' log-probabilities, renormalised over what is allowed."""
        logits = np.where(self.allowed, log_p[self.histories], -np.inf)
        return scipy.special.log_softmax(logits.astype(np.float64), axis=1)


Policy = Callable[[Asked], Float[np.ndarray, "A M"]]


@runtime_checkable
class Arm(Protocol):
    """One policy of the experiment."""

    def choose(self, asked: Asked, random: np.random.Generator) -> Int[np.ndarray, "A"]:
        """A cluster for each user; -1 for none."""

    def learn(
        self, asked: Asked, chosen: Int[np.ndarray, "A"], watch: Float[np.ndarray, "A"]
    ) -> None:
        """Takes in how the day went; `watch` is the watch fraction, nan where nothing was shown."""


class Fixed:
    """An arm that doesn't learn: a function from who is asked to a distribution over clusters."""

    def __init__(self, distribution: Policy):
        self.distribution = distribution

    def choose(self, asked: Asked, random: np.random.Generator) -> Int[np.ndarray, "A"]:
        return draw(self.distribution(asked), random)

    def learn(self, asked, chosen, watch) -> None:
        """Learns nothing."""


class Nothing:
    """The control: production fills the slot."""

    def choose(self, asked: Asked, random: np.random.Generator) -> Int[np.ndarray, "A"]:
        return np.full(len(asked.histories), -1)

    def learn(self, asked, chosen, watch) -> None:
        """Learns nothing."""


class ThompsonBandit:
    """A contextual bandit: linear Thompson sampling on features of history and cluster.

    Reward is modelled as x(h, c)·θ plus noise of variance σ²; with a normal prior the posterior is
    N(A⁻¹ b, σ² A⁻¹), A = λ I + Σ x xᵀ, b = Σ x r. Each user of a day gets a θ of their own, drawn
    from it, and the allowed cluster of highest x·θ; the posterior takes in the day's rewards at its
    end (Agrawal & Goyal 2013).

    Args:
      features: x of every history and cluster.
      ridge: λ.
    """

    def __init__(self, features: "Features", ridge: float = 10.0):
        self._features = features
        size = features.size
        self._precision = ridge * np.eye(size)
        self._moment = np.zeros(size)
        self._squares, self._count = 1.0, 1.0

    def learn_rewards(
        self,
        histories: Int[np.ndarray, "R"],
        clusters: Int[np.ndarray, "R"],
        rewards: Float[np.ndarray, "R"],
    ) -> None:
        """Takes in rewards of some (history, cluster), of a log for instance."""
        for start in range(0, len(rewards), 50_000):
            rows = slice(start, start + 50_000)
            x = self._features.of_pairs(histories[rows], clusters[rows]).astype(np.float64)
            self._precision += x.T @ x
            self._moment += x.T @ rewards[rows]
            residuals = rewards[rows] - x @ self._mean()
            self._squares += float((residuals**2).sum())
            self._count += len(residuals)

    def choose(self, asked: Asked, random: np.random.Generator) -> Int[np.ndarray, "A"]:
        noise = np.sqrt(self._squares / self._count)
        root = np.linalg.cholesky(self._precision)
        draws = random.standard_normal((len(asked.histories), len(root)))
        thetas = self._mean() + noise * np.linalg.solve(root.T, draws.T).T
        values = np.einsum("amf,af->am", self._features.of_all(asked.histories), thetas)
        return np.where(asked.allowed, values, -np.inf).argmax(axis=1)

    def learn(self, asked, chosen, watch) -> None:
        shown = np.isfinite(watch)
        self.learn_rewards(asked.histories[shown], chosen[shown], watch[shown])

    def _mean(self) -> Float[np.ndarray, "F"]:
        return np.linalg.solve(self._precision, self._moment)


class Features:
    """What the bandit sees of a cluster after a history.

    A constant; the cluster's popularity and mean feedback; the Markov model's log-probability; how
    near the cluster's centroid is to those of the history; the leading components of the cluster's
    centroid, and their products with the history's.

    Args:
      centroids: of the clusters.
      popularity: novel moves into each.
      feedback: mean feedback of those.
      markov: probability of each next cluster, by history code.
      history_length: K.
      components: of the centroids.
    """

    def __init__(
        self,
        centroids: Float[np.ndarray, "M E"],
        popularity: Float[np.ndarray, "M"],
        feedback: Float[np.ndarray, "M"],
        markov: Float[np.ndarray, "H M"],
        history_length: int,
        components: int = 8,
    ):
        self._length, self._count = history_length, len(centroids)
        unit = centroids / np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-9)
        self._near = unit @ unit.T
        centred = centroids - centroids.mean(axis=0)
        u, s, _ = np.linalg.svd(centred, full_matrices=False)
        self._parts = standardised(u[:, :components] * s[:components])
        alone = [np.ones(self._count), standardised(np.log1p(popularity)), standardised(feedback)]
        self._alone = np.stack(alone, axis=1)
        real = markov.sum(axis=1) > 0  # rows of histories that can be
        logs = np.log(np.maximum(markov, 1e-12))
        self._markov = (logs - logs[real].mean()) / max(logs[real].std(), 1e-9)

    @property
    def size(self) -> int:
        """F."""
        return self._alone.shape[1] + 2 + 2 * self._parts.shape[1]

    def of_all(self, histories: Int[np.ndarray, "A"]) -> Float[np.ndarray, "A M F"]:
        """Of all clusters after each history."""
        count = len(histories)
        shape = (count, self._count)
        near, context = self._of_histories(histories)
        return np.concatenate(
            [
                np.broadcast_to(self._alone, (*shape, self._alone.shape[1])),
                self._markov[histories][..., None],
                near[..., None],
                np.broadcast_to(self._parts, (*shape, self._parts.shape[1])),
                self._parts[None] * context[:, None],
            ],
            axis=2,
        )

    def of_pairs(
        self, histories: Int[np.ndarray, "R"], clusters: Int[np.ndarray, "R"]
    ) -> Float[np.ndarray, "R F"]:
        """Of one cluster after each history."""
        rows = np.arange(len(histories))
        near, context = self._of_histories(histories)
        return np.concatenate(
            [
                self._alone[clusters],
                self._markov[histories, clusters][:, None],
                near[rows, clusters][:, None],
                self._parts[clusters],
                self._parts[clusters] * context,
            ],
            axis=1,
        )

    def _of_histories(self, histories: Int[np.ndarray, "A"]) -> tuple[np.ndarray, np.ndarray]:
        """Mean nearness of each cluster to the history [A M], mean components of it [A P]."""
        places = self._count ** np.arange(self._length)
        clusters = histories[:, None] // places % self._count
        return self._near[clusters].mean(axis=1), self._parts[clusters].mean(axis=1)


def standardised(values: np.ndarray) -> np.ndarray:
    """With mean 0 and variance 1 over the first axis."""
    return (values - values.mean(axis=0)) / np.maximum(values.std(axis=0), 1e-9)


def random_novel(asked: Asked) -> Float[np.ndarray, "A M"]:
    """Every allowed cluster alike."""
    return policies.uniform(asked.allowed)


def model_policies(
    log_p: Float[np.ndarray, "H M"],
    scores: Float[np.ndarray, "H M"],
    *,
    sample_counts: Sequence[int],
    relevance_weight: float,
) -> dict[str, Policy]:
    """What the two models may choose together or alone, and chance, by name.

    Args:
      log_p: log-probabilities of the novelty model after each history.
      scores: of the alignment model, logits.
      sample_counts: n of best of n.
      relevance_weight: β of the policy that scores every cluster by log p + β s.
    """

    def score(asked: Asked) -> np.ndarray:
        return scores[asked.histories]

    def best_of(n: int) -> Policy:
        return lambda asked: policies.best_of_n(asked.among_allowed(log_p), score(asked), n)

    return {
        "random_novel": random_novel,
        "novelty_only": lambda asked: np.exp(asked.among_allowed(log_p)),
        **{f"best_of_{n}": best_of(n) for n in sample_counts},
        "alignment_only": lambda asked: policies.greedy(score(asked), asked.allowed),
        "exhaustive": lambda asked: policies.mixed(
            asked.among_allowed(log_p), score(asked), relevance_weight
        ),
    }


def make_arms(
    opinions: Opinions,
    bandit: ThompsonBandit,
    *,
    sample_counts: Sequence[int],
    relevance_weight: float,
) -> dict[str, Arm]:
    """All arms, the control first.

    Args:
      opinions: of models, baselines and the truth.
      bandit: having learnt from the log.
      sample_counts: n of best-of-n.
      relevance_weight: β of the arm that scores every cluster by log p + β s.
    """

    fixed: dict[str, Policy] = {
        "popular_novel": lambda asked: policies.greedy(
            np.tile(opinions.popularity, (len(asked.histories), 1)), asked.allowed
        ),
        "markov": lambda asked: policies.greedy(opinions.markov[asked.histories], asked.allowed),
        **model_policies(
            opinions.log_p,
            opinions.scores,
            sample_counts=sample_counts,
            relevance_weight=relevance_weight,
        ),
        "oracle": lambda asked: policies.best_of_n(
            asked.among_allowed(opinions.log_p), opinions.truth[asked.histories], ORACLE_SAMPLES
        ),
    }
    if opinions.tuned_log_p is not None:
        fixed["policy_gradient"] = lambda asked: np.exp(asked.among_allowed(opinions.tuned_log_p))
    arms: dict[str, Arm] = {name: Fixed(distribution) for name, distribution in fixed.items()}
    order = ["control", "random_novel", "popular_novel", "markov", "bandit"]
    arms |= {"control": Nothing(), "bandit": bandit}
    return {name: arms[name] for name in [*order, *(n for n in fixed if n not in order)]}


def draw(probabilities: Float[np.ndarray, "A M"], random: np.random.Generator) -> np.ndarray:
    """One cluster from each row."""
    cumulative = np.cumsum(probabilities, axis=1)
    picks = random.random(len(probabilities))[:, None] * cumulative[:, -1:]
    return np.minimum((cumulative <= picks).sum(axis=1), probabilities.shape[1] - 1)
