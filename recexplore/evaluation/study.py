"""Best of n under a known truth: what n, temperature and hedges buy, and what limits it.

Everything here is an expectation over a policy's choices at some visits. Most of it is exact: no
draw is involved, so that curves have no noise but that of which users are asked.
"""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.special
from jaxtyping import Float, Int

from recexplore.errors import InputError
from recexplore.evaluation import policies

SAMPLE_COUNTS = (1, 2, 5, 10, 20, 50, 100)
TEMPERATURES = (0.5, 1.0, 2.0)
HEADLINE = 20  # the n that claims are made about
KEPT = (1, 2, 5, 10, 20)
STRENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
_DRAWS = 200  # for what has no closed form

Row = dict[str, float | int | str]


class Visits(NamedTuple):
    """R moments at which a user is to explore one of M clusters.

    Attributes:
      users: who.
      log_p: the novelty model's log-probabilities, renormalised over what is allowed.
      scores: the alignment model's.
      satisfaction: the truth of this very user.
      believed: the truth of the history, averaged over other users who have it: the most that can
        be known of someone by their history.
      recent: the last L clusters, oldest first, of which the history are the last; -1 where there
        is less.
    """

    users: Int[np.ndarray, "R"]
    log_p: Float[np.ndarray, "R M"]
    scores: Float[np.ndarray, "R M"]
    satisfaction: Float[np.ndarray, "R M"]
    believed: Float[np.ndarray, "R M"]
    recent: Int[np.ndarray, "R L"]

    def write(self, file: Path) -> None:
        """Writes an .npz file; what is a fraction, in float32."""
        columns = {
            name: values.astype(np.float32) if values.dtype.kind == "f" else values
            for name, values in self._asdict().items()
        }
        np.savez_compressed(file, **columns)

    @classmethod
    def read(cls, file: Path) -> "Visits":
        """Reads what `write` wrote.

        Raises:
          InputError: it isn't there, or isn't that.
        """
        try:
            with file.open("rb") as stream, np.load(stream) as columns:
                found = {name: columns[name] for name in cls._fields}
        except (OSError, EOFError, TypeError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{file} holds no visits of an experiment ({error}). Run `recexplore experiment`."
            ) from error
        return cls(*(v.astype(np.float64) if v.dtype.kind == "f" else v for v in found.values()))

    def value(self, policy: Float[np.ndarray, "R M"]) -> Float[np.ndarray, "R"]:
        """True satisfaction to be expected of a policy at each visit."""
        return policies.expected(policy, self.satisfaction)

    @property
    def mask(self):
        """What is allowed."""
        return np.isfinite(self.log_p)


def describe(visits: Visits, policy: Float[np.ndarray, "R M"]) -> Row:
    """A policy's proxy score, true satisfaction, novelty, diversity, and distance from p."""
    return {
        "score": float(policies.expected(policy, scipy.special.expit(visits.scores)).mean()),
        "satisfaction": float(visits.value(policy).mean()),
        "novelty": float(policies.novelty(policy, visits.log_p).mean()),
        "effective_clusters": policies.effective_number(policy, np.ones(len(policy))),
        "divergence": float(policies.divergence(policy, np.exp(visits.log_p)).mean()),
    }


def scaling(visits: Visits, temperatures: Sequence[float] = TEMPERATURES) -> list[Row]:
    """Best of n against n and temperature, beside best of n by the truth of histories and what the
    theory of a normal proxy expects."""
    correlation, spread = policies.agreement(visits.log_p, visits.scores, visits.satisfaction)
    single = float(visits.value(np.exp(visits.log_p)).mean())
    rows = []
    for temperature in temperatures:
        for n in SAMPLE_COUNTS:
            chosen = policies.best_of_n(visits.log_p, visits.scores, n, temperature)
            oracle = policies.best_of_n(visits.log_p, visits.believed, n, temperature)
            row = {"n": n, "temperature": temperature, **describe(visits, chosen)}
            row["oracle_satisfaction"] = float(visits.value(oracle).mean())
            if temperature == 1.0:
                gain = policies.gain_by_theory(correlation, spread, n)
                row["theory_satisfaction"] = single + float(np.mean(gain))
                row["divergence_bound"] = policies.best_of_n_bound(n)
            rows.append(row)
    return rows


def gap_closed(visits: Visits, n: int = HEADLINE, seed: int = 0) -> Row:
    """How much of the way from one draw to best of n by the truth of histories the alignment model
    goes, and what each part's oracle would add.

        share = (best of n by score − one draw) / (best of n by truth − one draw)

    Swapped one at a time for what could not be better: the alignment model for the truth of the
    history (`alignment_oracle`: the end of the gap); the novelty model for one that proposes the n
    truly best clusters (`policy_oracle`); the number of draws for all there are (`count_oracle`);
    the history for the user (`user_oracle`: truth of the very user, best of n).
    """
    p, truth = visits.log_p, visits.believed
    ranks = np.argsort(np.argsort(np.where(visits.mask, -truth, np.inf), axis=1), axis=1)
    alike = np.where(visits.mask, 0.0, -np.inf)
    found = {
        "one_draw": np.exp(p),
        "best_of_n": policies.best_of_n(p, visits.scores, n),
        "alignment_oracle": policies.best_of_n(p, truth, n),
        "policy_oracle": policies.greedy(visits.scores, (ranks < n) & visits.mask),
        "count_oracle": policies.greedy(visits.scores, visits.mask),
        "all_oracle": policies.greedy(truth, visits.mask),
        "user_oracle": policies.best_of_n(p, visits.satisfaction, n),
        "uniform_proposals": policies.best_of_n(alike, visits.scores, n),
    }
    values = {name: visits.value(policy) for name, policy in found.items()}
    below, ours, above = values["one_draw"], values["best_of_n"], values["alignment_oracle"]
    share = (ours - below).mean() / (above - below).mean()
    low, high = _ratio_interval(ours - below, above - below, visits.users, seed)
    row = {f"satisfaction_{name}": float(value.mean()) for name, value in values.items()}
    return {"share": float(share), "share_low": low, "share_high": high, **row}


def _ratio_interval(top, bottom, users, seed: int) -> tuple[float, float]:
    """95 % interval of a ratio of means, users resampled with all their visits."""
    _, place = np.unique(users, return_inverse=True)
    sums = np.stack([np.bincount(place, top), np.bincount(place, bottom)])
    random = np.random.default_rng(seed)
    picks = random.multinomial(sums.shape[1], np.full(sums.shape[1], 1 / sums.shape[1]), size=300)
    ratios = (picks @ sums[0]) / (picks @ sums[1])
    return tuple(float(q) for q in np.quantile(ratios, [0.025, 0.975]))


def kept_of_drawn(visits: Visits, sample_counts: Sequence[int] = (5, 10, 20, 50)) -> list[Row]:
    """Mean true satisfaction of the k best of n draws: with k = n scoring gains nothing."""
    return [
        {
            "n": n,
            "k": k,
            "satisfaction": float(
                policies.top_k_expectation(
                    visits.log_p, visits.scores, visits.satisfaction, n, k, _DRAWS, distinct=True
                ).mean()
            ),
        }
        for n in sample_counts
        for k in KEPT
        if k <= n
    ]


def samplers(visits: Visits, sample_counts: Sequence[int] = (2, 5, 10, 20)) -> list[Row]:
    """Independent against distinct draws at equal n."""
    rows = []
    for n in sample_counts:
        for name, policy in (
            ("independent", policies.best_of_n(visits.log_p, visits.scores, n)),
            ("distinct", policies.best_of_distinct(visits.log_p, visits.scores, n, _DRAWS)),
        ):
            rows.append({"n": n, "sampler": name, **describe(visits, policy)})
    return rows


def hedges(
    visits: Visits,
    ensemble: Float[np.ndarray, "E R M"],
    strength: float | None,
    n: int = HEADLINE,
) -> list[Row]:
    """What may be done against trusting the proxy too far, at the same n.

    Args:
      visits: whom to ask.
      ensemble: scores of several alignment models, the first of them the one in use.
      strength: of soft selection, chosen on held-out feedback; None: it couldn't be.
      n: draws.
    """
    made: dict[str, Callable[[], np.ndarray]] = {
        "plain": lambda: policies.best_of_n(visits.log_p, visits.scores, n),
        "soft": lambda: policies.soft_selection(visits.log_p, visits.scores, n, strength),
        "ensemble mean": lambda: policies.best_of_n(visits.log_p, ensemble.mean(axis=0), n),
        "ensemble worst case": lambda: policies.best_of_n(
            visits.log_p, policies.worst_case(ensemble), n
        ),
        "ensemble less spread": lambda: policies.best_of_n(
            visits.log_p, policies.penalised(ensemble, 1.0), n
        ),
    }
    if len(ensemble) < 2:
        made = {name: make for name, make in made.items() if "ensemble" not in name}
    if strength is None:
        del made["soft"]
    return [{"hedge": name, **describe(visits, make())} for name, make in made.items()]


def strengths(visits: Visits, n: int = HEADLINE) -> list[Row]:
    """Soft best of n by its strength, from none to plain best of n."""
    rows = []
    for strength in STRENGTHS:
        policy = policies.soft_selection(visits.log_p, visits.scores, n, strength)
        rows.append({"strength": strength, **describe(visits, policy)})
    return rows


def everything(
    visits: Visits,
    strength: float | None,
    progress: Callable[..., None],
    ensemble: Sequence[np.ndarray] = (),
) -> dict[str, Any]:
    """All parts of the study by name, as JSON has them.

    Args:
      visits: whom to ask.
      strength: of soft selection, chosen on held-out feedback.
      progress: called as progress(parts done, all).
      ensemble: scores of further alignment models.
    """
    parts: dict[str, Callable[[], Any]] = {
        "scaling": lambda: scaling(visits),
        "gap": lambda: gap_closed(visits),
        "kept": lambda: kept_of_drawn(visits),
        "samplers": lambda: samplers(visits),
        "strengths": lambda: strengths(visits),
        "hedges": lambda: hedges(visits, np.stack([visits.scores, *ensemble]), strength),
    }
    found = {}
    for done, (name, make) in enumerate(parts.items()):
        found[name] = make()
        progress(done + 1, len(parts))
    return found
