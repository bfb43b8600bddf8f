"""How good every method's rankings and recommendations are on the held-out period.

All clusters are ranked, nothing is sampled. A method's recommendations are the first ten.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from recexplore.evaluation import metrics
from recexplore.evaluation.baselines import Rows
from recexplore.evaluation.offline import SUFFIXES
from recexplore.evaluation.statistics import bootstrap_ratio

KS = (5, 10, 20)
PLACES = 10  # clusters recommended: what has intervals is measured on them


class Scoreboard:
    """Collects what methods rank, and says in the end how good each was.

    For every method NAME, and once more with the suffix `_unseen` where all that the user has seen
    is left out:

        NAME/recall@k, NAME/ndcg@k   of the target, in the ranking of all clusters
        NAME/serendipity@10          a hit that no primitive has among its first ten
        NAME/engaged_pairs@10        of what a user was recommended at their first row, clusters
                                     that they moved into in the whole period; mean over users
        NAME/novelty@10              mean of -log2 of the recommended clusters' popularity
        NAME/coverage@10             share of all clusters that are recommended to anyone

    Those at 10 that are means have `_low` and `_high`, a 95 % interval with users resampled, all in
    the same resamples.

    Args:
      rows: the held-out transitions.
      popularity: each cluster's share of the training moves, above 0.
      primitives: "history" and "seen" (the keys of `SUFFIXES`) → scores of methods that need no
        model; what they recommend is expected of anyone.
    """

    def __init__(
        self,
        rows: Rows,
        popularity: Float[np.ndarray, "M"],
        primitives: Mapping[str, Sequence[Float[np.ndarray, "R M"]]],
    ):
        self._rows = rows
        self._masks = {"history": rows.history_mask, "seen": rows.known_mask}
        self._surprise = -np.log2(popularity)
        _, self._first, self._place = np.unique(rows.users, return_index=True, return_inverse=True)
        self._primitive_ranks = {
            kind: np.stack([self._ranks(kind, scores) for scores in primitives[kind]])
            for kind in SUFFIXES
        }
        self._plain: dict[str, float] = {}
        self._ratios: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def add_scores(self, kind: str, name: str, scores: Float[np.ndarray, "R M"]) -> None:
        """Takes in a method that scores every cluster.

        Args:
          kind: what is left out of the ranking, "history" or "seen".
          name: of the method.
          scores: higher is better; -inf for what it can't propose.
        """
        self._add_ranks(kind, name, self._ranks(kind, scores), KS)
        self._add_lists(kind, name, metrics.top_lists(scores, self._masks[kind], PLACES))

    def add_lists(self, kind: str, name: str, lists: Int[np.ndarray, "R k"]) -> None:
        """Takes in a method that only chooses.

        Args:
          kind: what was left out, "history" or "seen".
          name: of the method.
          lists: the clusters it chose, best first, -1 where fewer.
        """
        ranks = metrics.ranks_in_lists(lists, self._rows.targets)
        # A list of ten has no opinion on places 11 to 20; recall@20 would claim one.
        self._add_ranks(kind, name, ranks, tuple(k for k in KS if k <= lists.shape[1]))
        self._add_lists(kind, name, lists[:, :PLACES])

    def metrics(self) -> dict[str, float]:
        """All of them, by name; one that can't be told is left out."""
        found = dict(self._plain)
        names = list(self._ratios)
        if names:
            above, below = (np.stack(c, axis=1) for c in zip(*self._ratios.values(), strict=True))
            estimate = bootstrap_ratio(above, below)
            for suffix, values in zip(("", "_low", "_high"), estimate, strict=True):
                found |= {f"{n}{suffix}": float(v) for n, v in zip(names, values, strict=True)}
        return {name: value for name, value in found.items() if np.isfinite(value)}

    def _ranks(self, kind: str, scores: Float[np.ndarray, "R M"]) -> Float[np.ndarray, "R"]:
        return metrics.ranks(scores, self._rows.targets, self._masks[kind])

    def _add_ranks(self, kind, name, ranks: Float[np.ndarray, "R"], ks: tuple[int, ...]) -> None:
        for k in ks:
            for measure in (metrics.recall, metrics.ndcg):
                key = f"{name}/{measure.__name__}@{k}{SUFFIXES[kind]}"
                if k == PLACES:
                    self._add_mean(key, measure(ranks, k))
                else:
                    self._plain[key] = float(measure(ranks, k).mean())
        hits = metrics.serendipity(ranks, self._primitive_ranks[kind], PLACES)
        self._add_mean(f"{name}/serendipity@{PLACES}{SUFFIXES[kind]}", hits)

    def _add_lists(self, kind, name, lists: Int[np.ndarray, "R k"]) -> None:
        rows, suffix = self._rows, f"@{PLACES}{SUFFIXES[kind]}"
        self._plain[f"{name}/coverage{suffix}"] = metrics.coverage(lists, rows.num_clusters)
        # One list for each user: with a new one at every row, whatever varies most would win.
        first = self._first
        pairs = metrics.engaged_pairs(lists[first], rows.users[first], rows.users, rows.targets)
        self._ratios[f"{name}/engaged_pairs{suffix}"] = (pairs, np.ones(len(pairs)))
        there = lists >= 0
        surprise = np.where(there, self._surprise[lists], 0.0).sum(axis=1)
        self._add_mean(f"{name}/novelty{suffix}", surprise, there.sum(axis=1))

    def _add_mean(self, name: str, values, weights=None) -> None:
        """Remembers a mean over rows, each counting `weights` times, by user."""
        sums = [np.bincount(self._place, each) for each in (values, weights)]
        self._ratios[name] = (sums[0], sums[1])
