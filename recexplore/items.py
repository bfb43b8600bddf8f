"""The stages of the item recommender: which item of a cluster a user is shown.

    interactions, clusters → item sequences → models/items

Like the other stages of `pipeline`, they go from artefacts to artefacts, and what is heavy is
imported inside them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recexplore import artifacts
from recexplore.errors import InputError
from recexplore.progress import Progress

if TYPE_CHECKING:
    from recexplore.serving.item_recommender import ItemRecommender

ITEMS = "items"  # the model's name
SEQUENCES = "sequences"
_CATALOGUE = "catalogue.parquet"
_SETTINGS = "settings.json"


def tokenize(
    work: Path,
    progress: Progress,
    name: str,
    *,
    split_times: Callable[..., Any],
    max_items: int = 20,
    context: int = 10,
    half_life: float | None = None,
    seed: int = 0,
) -> None:
    """The log → users' items in order, cut into windows, and the catalogue of items.

    Args:
      work: the work directory.
      progress: where to say what is going on.
      name: of the model.
      split_times: of recexplore.feedback.transitions; nothing of a later period is learnt from.
      max_items: T, items that a prediction reads at most.
      context: items that a window has in common with the one before it; fewer make fewer windows,
        more let each prediction read more.
      half_life: what is popular lately, where an engagement counts half at this share of the
        training period's engagements back; None: as in the whole period.
      seed: of the order of what a user met at the same time.
    """
    import ibis

    from recexplore.feedback.engagements import popularity, read_engagements
    from recexplore.interests.cluster_table import ClusterTable
    from recexplore.tasks import item_sequences, item_tasks

    if not 1 <= context <= max_items:
        raise InputError(
            f"items.tokenize.context is {context}; it must be in 1..{max_items}, "
            "items.tokenize.max_items."
        )
    clusters = ClusterTable.read(work / "clusters")
    items = clusters.item_clusters
    log = artifacts.read_table(
        work / "interactions" / "interactions.parquet", artifacts.INTERACTIONS
    )
    splits = split_times(ibis.memtable(log))
    met = read_engagements(log, items["item_id"], seed)
    sizes = {"max_items": max_items, "context": context}
    windows = {
        "train": item_sequences.train_windows(met, until=splits.validation, **sizes),
        "validation": item_sequences.held_out_windows(
            met, start=splits.validation, until=splits.test, **sizes
        ),
    }
    train = met.before(splits.validation)
    shares = {
        "popularity": _shares(popularity(train, items.num_rows)),
        "recent_popularity": _shares(popularity(train, items.num_rows, half_life)),
    }
    with artifacts.new_folder(work / SEQUENCES) as folder:
        for split, made in windows.items():
            item_tasks.write_windows(made, folder, split)
            predicted = sum(len(window.items) - window.context for window in made)
            progress.say(
                f"  {name}: {predicted:,} {split} engagements with items in {len(made):,} windows"
            )
        catalogue = items
        for column, values in shares.items():
            catalogue = catalogue.append_column(column, [values])
        artifacts.write_table(folder / _CATALOGUE, catalogue, artifacts.ITEM_CATALOGUE)
        artifacts.write_json(
            folder / _SETTINGS,
            {
                "max_items": max_items,
                "validation": splits.validation,
                "test": splits.test,
                "clusters": clusters.fingerprint,
                "seed": seed,
            },
        )


def _shares(counts: Any) -> Any:
    """Of all engagements and one more with each item, so that none is impossible."""
    return (counts + 1) / (counts + 1).sum()


def train(
    work: Path,
    progress: Progress,
    name: str,
    *,
    make_network: Callable[[Any], Any],
    make_config: Callable[..., Any],
    make_catalogue: Callable[..., Any],
    objective: Callable[..., Any],
    run: Callable[..., Any],
    batch_size: int,
    seed: int = 0,
) -> None:
    """Item sequences → a trained item recommender; an interrupted run goes on.

    Args:
      work: the work directory.
      progress: where to say what is going on.
      name: of the model.
      make_network: sequential_recommender.SequentialRecommender.
      make_config: sequential_recommender.recommender_config.
      make_catalogue: item_objectives.make_catalogue.
      objective: of recexplore.training.item_objectives.
      run: recexplore.training.trainer.train.
      batch_size: windows a step, of all processes together.
      seed: of the order of windows, of initialisation, of dropout and of negatives.
    """
    from recexplore.distributed import processes
    from recexplore.models import saved
    from recexplore.serving import item_recommender
    from recexplore.tasks import item_tasks

    folder, sequences = work / "models" / name, work / SEQUENCES
    settings = artifacts.read_json(sequences / _SETTINGS)
    catalogue = artifacts.read_table(sequences / _CATALOGUE, artifacts.ITEM_CATALOGUE)
    sizes = {"max_items": settings["max_items"], "num_items": catalogue.num_rows}
    network = make_network(make_config(**sizes))
    data = item_tasks.ItemData(
        item_tasks.make_task(name, sequences, catalogue.num_rows),
        sequences,
        seed=seed,
        batch_size=batch_size,
        **sizes,
    )
    if processes.is_first():
        described = saved.describe(network) | {"clusters": settings["clusters"]}
        item_recommender.write_description(folder, described, catalogue)
    columns = ("cluster_id", "popularity", "recent_popularity")
    numbers = (catalogue[column].to_numpy() for column in columns)
    with progress.bar(f"train {name}") as update:
        result = run(folder, network, objective, make_catalogue(*numbers), data, update, seed=seed)
    progress.say(
        f"  {result.steps} steps; the best on validation, after {result.best_step}, has "
        f"{result.best_validation:.4f}"
    )


def open_recommender(work: Path, name: str = ITEMS) -> "ItemRecommender":
    """The trained item recommender of a work directory, for its clusters.

    Args:
      work: the work directory.
      name: of the model.

    Raises:
      InputError: it hasn't been trained, or for other clusters.
    """
    from recexplore.interests.cluster_table import ClusterTable
    from recexplore.serving.item_recommender import ItemRecommender

    clusters = ClusterTable.read(work / "clusters")
    return ItemRecommender.open(work / "models" / name, clusters.fingerprint, clusters.num_clusters)


def held_out_metrics(
    work: Path, progress: Progress, name: str = ITEMS, *, users: int | None = None, seed: int = 0
) -> dict[str, float]:
    """How well the next items of the held-out period are found within their clusters.

    Args:
      work: the work directory.
      progress: where to say what is going on.
      name: of the model.
      users: a sample of so many users; None: all.
      seed: of the sample.

    Returns:
      See `item_ranking.ranking_metrics`, of the model and both baselines; nothing where nobody
      engages with anything in the period.
    """
    from recexplore.evaluation import item_ranking
    from recexplore.feedback.engagements import read_engagements

    settings = artifacts.read_json(work / SEQUENCES / _SETTINGS)
    catalogue = artifacts.read_table(work / SEQUENCES / _CATALOGUE, artifacts.ITEM_CATALOGUE)
    clusters = catalogue["cluster_id"].to_numpy()
    log = artifacts.read_table(
        work / "interactions" / "interactions.parquet", artifacts.INTERACTIONS
    )
    met = read_engagements(log, catalogue["item_id"], settings["seed"])
    validation, rows = (
        item_ranking.next_items(met, clusters, start=start, until=until, users=users, seed=seed)
        for start, until in (
            (settings["validation"], settings["test"]),
            (settings["test"], None),
        )
    )
    if not len(rows.targets):
        progress.say(f"  {name}: nobody engages with a new item in the held-out period")
        return {}
    baselines = item_ranking.fit_baselines(met.before(settings["validation"]), validation, clusters)
    found = {n: item_ranking.ranks(rows, clusters, scores) for n, scores in baselines.items()}
    recommender, most = open_recommender(work, name), max(item_ranking.KS)

    def recommend(some: item_ranking.NextItems) -> Any:
        contexts, met = ([each.tolist() for each in lists] for lists in (some.contexts, some.met))
        return recommender.recommend(contexts, some.clusters[:, None], most, met).items[:, 0]

    with progress.bar(f"evaluate {name}") as update:
        found[name] = item_ranking.ranks_in_clusters(rows, recommend, update)
    return item_ranking.ranking_metrics(rows.users, found)
