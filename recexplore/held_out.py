"""What models and baselines make of the held-out period: the parts of the stage `evaluate`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from recexplore.evaluation import logged, offline
from recexplore.evaluation.arms import model_policies
from recexplore.evaluation.baselines import Baseline, Rows, fit_all, nearest
from recexplore.evaluation.offline import SUFFIXES
from recexplore.evaluation.scoreboard import Scoreboard
from recexplore.explorer import Explorer, History
from recexplore.feedback.collective import target_mean
from recexplore.inference.best_of_n import Exploration
from recexplore.inference.launch import Model
from recexplore.progress import Progress
from recexplore.tasks.prompts import novelty_prompt

_RANDOM_ORDER = 7  # what chance is for
_VALUED_COUNTS = (5, 20)  # n of best of n that are valued on logged propensities


def score_distinct(
    explorer: Explorer, alignment: Model, histories: Sequence[History], progress: Progress
) -> tuple[Float[np.ndarray, "H M"], Int[np.ndarray, "R"]]:
    """The alignment score of every cluster, asked once for each different history.

    Args:
      explorer: asks the model.
      alignment: the model.
      histories: R histories, oldest first.
      progress: where to say what is going on.

    Returns:
      Scores of H different histories, and which of them each of the R is.
    """
    place: dict[tuple[int, ...], int] = {}
    which = np.array([place.setdefault(tuple(h), len(place)) for h in histories], np.int64)
    with progress.bar("evaluate alignment") as update:
        return explorer.scores(alignment, list(place), update), which


def board_with_baselines(
    train: Rows,
    validation: Rows,
    rows: Rows,
    centroids: Float[np.ndarray, "M E"],
    seed: int,
) -> Scoreboard:
    """A scoreboard that holds what needs no model: baselines, the nearest, a random order.

    Args:
      train: to fit on.
      validation: to choose the baselines' constants on.
      rows: the held-out transitions.
      centroids: of the clusters.
      seed: of the random order.
    """
    fitted = fit_all(train, validation)
    close = nearest(centroids)
    primitives = {k: [fitted[k]["popularity"](rows), close(rows)] for k in SUFFIXES}
    board = Scoreboard(rows, offline.popularity_shares(train), primitives)
    random = np.random.default_rng([seed, _RANDOM_ORDER])
    for kind in SUFFIXES:
        methods: dict[str, Baseline] = {**fitted[kind], "nearest": close}
        for name, baseline in methods.items():
            board.add_scores(kind, name, baseline(rows))
        board.add_scores(kind, "random_novel", random.random(rows.seen.shape))
    return board


def add_models(
    board: Scoreboard,
    explorer: Explorer,
    models: Mapping[str, Model],
    rows: Rows,
    scores: Float[np.ndarray, "R M"],
    progress: Progress,
    *,
    novelty_histories: Mapping[str, int],
    explores: str,
    relevance_weight: float,
) -> None:
    """Adds what ranks all clusters: novelty models, the alignment model, both together.

    Args:
      board: to add to.
      explorer: asks the models.
      models: by name.
      rows: the held-out transitions.
      scores: the alignment model's, after each row's history.
      progress: where to say what is going on.
      novelty_histories: novelty model → how many clusters of history it reads.
      explores: name of the novelty model that `exhaustive` goes by.
      relevance_weight: β of `exhaustive`, which ranks by log p + β · score.
    """
    excluded = offline.exclusions(rows)
    for name, length in novelty_histories.items():
        with progress.bar(f"evaluate {name}") as update:
            histories = [history[-length:] for history in rows.histories]
            exact = explorer.log_probabilities(models[name], histories, excluded, update)
        for place, kind in enumerate(SUFFIXES):
            board.add_scores(kind, name, exact[:, place])
            if name == explores:
                mixed = exact[:, place] + relevance_weight * scores
                board.add_scores(kind, "exhaustive", mixed)
    for kind in SUFFIXES:
        board.add_scores(kind, "alignment_only", scores)


def add_best_of_n(
    board: Scoreboard,
    explorer: Explorer,
    pair: tuple[Model, Model],
    rows: Rows,
    progress: Progress,
    *,
    history_length: int,
    settings: Any,
    proposal_counts: Sequence[int],
    seed: int,
) -> tuple[dict[str, list[float]], Exploration]:
    """Adds what proposes and chooses: best of n, and of the first few of the same n draws.

    Args:
      board: to add to.
      explorer: asks the models.
      pair: the novelty and the alignment model.
      rows: the held-out transitions.
      progress: where to say what is going on.
      history_length: K.
      settings: a BestOfN.
      proposal_counts: the n of `best_of_1`, …, each the first n of the draws by score alone, and
        of the scaling curve; what exceeds the n of `settings` is left out.
      seed: of the proposals.

    Returns:
      See `offline.scaling`; and what best of n answers, the histories alone left out.
    """
    excluded = offline.exclusions(rows)
    histories = [history[-history_length:] for history in rows.histories]
    counts = tuple(n for n in proposal_counts if n <= settings.num_samples)
    answers = {}
    for place, kind in enumerate(SUFFIXES):
        with progress.bar("evaluate best of n") as update:
            found = explorer.explore(
                *pair,
                histories,
                [np.flatnonzero(row).tolist() for row in excluded[:, place]],
                settings,
                seed,
                update,
            )
        draws, answers[kind] = found.draws.clusters, found
        board.add_lists(kind, "best_of_n", found.clusters)
        likeliest = offline.choose(draws, found.draws.log_probabilities, settings.num_chosen)
        board.add_lists(kind, "novelty_sampled", likeliest)
        for n in counts:
            chosen = offline.choose(draws[:, :n], found.draw_scores[:, :n], settings.num_chosen)
            board.add_lists(kind, f"best_of_{n}", chosen)
    found = answers["history"]
    scaling = offline.scaling(
        found.draws.clusters, found.draw_scores, rows.targets, counts, settings.num_chosen
    )
    return scaling, found


def inferences(
    rows: Rows, found: Exploration, descriptions: Sequence[str], history_length: int, count: int
) -> Iterator[dict[str, Any]]:
    """The first answers of best of n in words, as T5X's and SeqIO's inference files have them.

    Args:
      rows: the held-out transitions.
      found: what best of n answers to them.
      descriptions: of all clusters.
      history_length: K.
      count: answers, at most.
    """
    for row in range(min(count, len(rows.histories))):
        history = [descriptions[cluster] for cluster in rows.histories[row][-history_length:]]
        filled = found.clusters[row] >= 0
        named = [descriptions[cluster] for cluster in found.clusters[row][filled]]
        yield {
            "inputs": {
                "inputs_pretokenized": novelty_prompt(history),
                "targets_pretokenized": descriptions[rows.targets[row]],
            },
            "prediction": named[0] if named else "",
            "aux": {
                "predictions": named,
                "scores": found.scores[row][filled].tolist(),
                "log_probabilities": found.log_probabilities[row][filled].tolist(),
            },
        }


def off_policy_metrics(
    explorer: Explorer,
    pair: tuple[Model, Model],
    impressions: logged.Impressions,
    transitions: pa.Table,
    progress: Progress,
    *,
    relevance_weight: float,
    seed: int,
) -> dict[str, float]:
    """What the experiment's arms would be worth, from what the log's own policy showed.

    Args:
      explorer: asks the models, once for each different history.
      pair: the novelty and the alignment model.
      impressions: of the held-out period.
      transitions: TRANSITIONS, whose training rows give the doubly robust estimate's model: the
        mean watch fraction of each cluster where it was new.
      progress: where to say what is going on.
      relevance_weight: β of `exhaustive`.
      seed: of the resamples.

    Returns:
      See `logged.value_metrics`, of every policy.
    """
    novelty, alignment = pair
    histories = impressions.histories
    excluded = np.zeros((len(histories), 1, explorer.num_clusters), bool)
    for row, history in zip(excluded[:, 0], histories, strict=True):
        row[history] = True
    with progress.bar("evaluate on logged propensities") as update:
        log_p = explorer.log_probabilities(novelty, histories, excluded, update)[:, 0]
    scores, _ = score_distinct(explorer, alignment, histories, progress)
    train = transitions.filter(pc.equal(transitions["split"], "train"))
    feedback = target_mean(
        train["next_cluster"].to_numpy(),
        train["watch_fraction"].to_numpy().astype(np.float64),
        np.ones(train.num_rows),
        explorer.num_clusters,
    )
    metrics: dict[str, float] = {}
    policies = model_policies(
        log_p, scores, sample_counts=_VALUED_COUNTS, relevance_weight=relevance_weight
    )
    for name, policy in policies.items():
        metrics |= logged.value_metrics(
            name, logged.value(impressions, policy, feedback, seed=seed)
        )
    return metrics
