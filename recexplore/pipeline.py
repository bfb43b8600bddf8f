"""The system, stage by stage: what each reads, does and writes.

    interactions → clusters → feedback → vocabulary, examples → models → exploration → report
                   clusters → item sequences → item recommender → report

A stage is a function (work directory, progress, …) → nothing: it reads artefacts that earlier
stages left in the work directory and writes its own. What may be chosen about it comes as further
arguments, bound by gin. Modules are imported inside the stages, so that asking for help or finding
that nothing is left to do costs no JAX or TensorFlow.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recexplore import artifacts, checks, closed_loop, experiments, items
from recexplore.errors import InputError
from recexplore.progress import Progress
from recexplore.workdir import Stage

if TYPE_CHECKING:
    from recexplore.configuration import Configuration

INTERACTIONS = "interactions"
CLUSTERS = "clusters"
FEEDBACK = "feedback"
VOCABULARY = "vocabulary"
EXAMPLES = "examples"
EXPLORATION = "exploration"
SHARDS = "exploration_shards"  # of the table in the making
EVALUATION = "evaluation"
METRICS = "metrics.json"
REPORT = "report.html"
NOVELTY = "novelty"  # the novelty model that fills the exploration table
ALIGNMENT = "alignment"
MAX_LENGTHS = "max_lengths.json"  # of each model's examples, in tokens
_PERIODS = "periods.json"  # when testing begins, in seconds; how long a cluster stays known
_HISTORIES = "history_lengths.json"  # of each model's examples, in clusters


def model_folder(name: str) -> str:
    """Where a model's checkpoints and curves lie, relative to the work directory."""
    return f"models/{name}"


def stages(configuration: "Configuration") -> list[Stage]:
    """The stages of a run, in order; which novelty models there are is up to the configuration."""
    histories = checks.novelty_histories(configuration, NOVELTY, (ALIGNMENT, items.ITEMS))
    models = [*histories, ALIGNMENT]
    trained = tuple(model_folder(name) for name in models)
    recommender = model_folder(items.ITEMS)
    explorers = (model_folder(NOVELTY), model_folder(ALIGNMENT))
    experimented = [*_experiment(configuration, [*models, items.ITEMS]), *_loop(configuration)]
    proofs = tuple(path for stage in experimented for path in stage.writes)
    rows = (INTERACTIONS, CLUSTERS, FEEDBACK)
    tokens = (VOCABULARY, EXAMPLES)
    return [
        Stage("ingest", ingest, (), (INTERACTIONS,)),
        Stage("cluster", cluster, (INTERACTIONS,), (CLUSTERS,)),
        Stage("aggregate", aggregate, (INTERACTIONS, CLUSTERS), (FEEDBACK,)),
        Stage("tokenize", tokenize, (CLUSTERS, FEEDBACK), (VOCABULARY, EXAMPLES)),
        Stage(
            "tokenize",
            items.tokenize,
            (INTERACTIONS, CLUSTERS),
            (items.SEQUENCES,),
            model=items.ITEMS,
        ),
        *(
            Stage(
                "train",
                train,
                (CLUSTERS, *tokens),
                (folder,),
                model=name,
                resumes=True,
                together=True,
            )
            for name, folder in zip(models, trained, strict=True)
        ),
        Stage(
            "train",
            items.train,
            (items.SEQUENCES,),
            (recommender,),
            model=items.ITEMS,
            resumes=True,
            together=True,
        ),
        Stage(
            "explore",
            explore,
            (CLUSTERS, FEEDBACK, VOCABULARY, *explorers),
            (EXPLORATION,),
            together=True,
        ),
        *experimented,
        Stage(
            "evaluate",
            evaluate,
            (*rows, VOCABULARY, *trained, items.SEQUENCES, recommender, EXPLORATION, *proofs),
            (EVALUATION, METRICS),
        ),
        Stage(
            "report",
            report,
            (*rows, *trained, EXPLORATION, *proofs, EVALUATION, METRICS),
            (REPORT,),
        ),
    ]


def _experiment(configuration: "Configuration", models: Sequence[str]) -> list[Stage]:
    """The stages of an experiment, where one is configured."""
    if not configuration.value(f"{evaluate.__module__}.evaluate", "experiment", default=False):
        return []
    tuned = checks.tuned_models(configuration, models)
    pair = (model_folder(NOVELTY), model_folder(ALIGNMENT))
    reads = (CLUSTERS, FEEDBACK, VOCABULARY, *pair)
    made = tuple(model_folder(name) for name in tuned)
    tuning = [
        Stage("tune", experiments.tune, reads, (folder,), model=name, resumes=True)
        for name, folder in zip(tuned, made, strict=True)
    ]
    reads = (INTERACTIONS, *reads, *made)
    return [*tuning, Stage("experiment", experiments.experiment, reads, (experiments.EXPERIMENT,))]


def _loop(configuration: "Configuration") -> list[Stage]:
    """The stage that explores, logs and learns for some rounds, where it is configured."""
    if not configuration.value(f"{evaluate.__module__}.evaluate", "loop", default=False):
        return []
    reads = (INTERACTIONS, CLUSTERS, model_folder(items.ITEMS), EXPLORATION)
    run = closed_loop.closed_loop
    return [Stage("loop", run, reads, (closed_loop.CLOSED_LOOP,), resumes=True)]


def roots(configuration: "Configuration", stages: Sequence[Stage]) -> list[tuple[str, str]]:
    """Where bindings may be used: the stages, and tuning where an experiment tunes nothing.

    Args:
      configuration: of the run.
      stages: its own.

    Returns:
      Selectors with their gin scopes.
    """
    found = [(stage.selector, stage.model) for stage in stages]
    if any(stage.function is experiments.experiment for stage in stages):
        found.append((f"{experiments.__name__}.tune", ""))
    return found


def ingest(work: Path, progress: Progress, *, read_log: Callable[[], Any]) -> None:
    """Any log → one schema: interactions.parquet and items.parquet, with what was dropped counted.

    Args:
      work: the work directory.
      progress: where to say what is going on.
      read_log: a reader of recexplore.interactions or recexplore.simulation.
    """
    from recexplore.interactions import schema

    log = schema.check_log(read_log())
    with artifacts.new_folder(work / INTERACTIONS) as folder:
        interactions = log.interactions.order_by("user_id", "timestamp", "item_id").to_pyarrow()
        items = log.items.order_by("item_id").to_pyarrow()
        artifacts.write_table(folder / "interactions.parquet", interactions, artifacts.INTERACTIONS)
        artifacts.write_table(folder / "items.parquet", items, artifacts.ITEMS)
        counts = {
            "interactions": interactions.num_rows,
            "items": items.num_rows,
            "users": len(interactions["user_id"].unique()),
            **{f"dropped: {reason}": count for reason, count in log.dropped.items()},
        }
        artifacts.write_json(folder / "counts.json", counts)
    _say_counts(progress, counts)


def cluster(
    work: Path,
    progress: Progress,
    *,
    split_times: Callable[..., Any],
    embed_items: Callable[..., Any],
    cluster_items: Callable[..., Any],
    describe_clusters: Callable[..., list[str]],
) -> None:
    """Items → interest clusters in words, from the training period's interactions.

    Args:
      work: the work directory.
      progress: where to say what is going on.
      split_times: of recexplore.feedback.transitions.
      embed_items: of recexplore.interests.embeddings.
      cluster_items: of recexplore.interests.clustering.
      describe_clusters: of recexplore.interests.descriptions.
    """
    import ibis
    import pyarrow.compute as pc

    from recexplore.interests.cluster_table import ClusterTable

    interactions, items = _read_log(work)
    cut = split_times(ibis.memtable(interactions)).validation
    before = interactions.filter(pc.less(interactions["timestamp"], cut))
    embeddings = embed_items(items, before)
    clustering = cluster_items(embeddings)
    titles, texts = items["title"].to_pylist(), items["text"].to_pylist()
    descriptions = describe_clusters(
        [f"{title} {text}" for title, text in zip(titles, texts, strict=True)], clustering.labels
    )
    table = ClusterTable.build(items, before, embeddings, clustering, descriptions)
    with artifacts.new_folder(work / CLUSTERS) as folder:
        table.write(folder)
    shown = ", ".join(descriptions[:: max(1, len(descriptions) // 5)][:5])
    progress.say(f"  {table.num_clusters} clusters, such as: {shown}")


def aggregate(
    work: Path,
    progress: Progress,
    *,
    split_times: Callable[..., Any],
    collective_feedback: Callable[..., Any],
    history_length: int,
    max_history: int,
    look_back_days: int | float | None = None,
    burn_in_days: int | float = 0,
) -> None:
    """The log and its clusters → novel transitions, collective feedback, histories.

    Args:
      work: the work directory.
      progress: where to say what is going on.
      split_times: of recexplore.feedback.transitions.
      collective_feedback: of recexplore.feedback.collective.
      history_length: K of collective feedback and of the exploration table.
      max_history: longest history that any model is to see.
      look_back_days: how long a user knows a cluster; None: for ever.
      burn_in_days: first days of the log that tell what users know and give no transitions.
    """
    import ibis
    import pyarrow.compute as pc

    from recexplore.feedback import transitions
    from recexplore.interests.cluster_table import ClusterTable

    interactions = ibis.memtable(_read_log(work)[0])
    item_clusters = ibis.memtable(ClusterTable.read(work / CLUSTERS).item_clusters)
    splits = split_times(interactions)
    moves = transitions.novel_transitions(
        interactions,
        item_clusters,
        splits,
        max_history=max(max_history, history_length),
        look_back_days=look_back_days,
        burn_in_days=burn_in_days,
    )
    table = moves.order_by("timestamp", "user_id", "next_cluster").to_pyarrow()
    collective = collective_feedback(ibis.memtable(table), history_length=history_length)
    histories = transitions.histories_in_log(
        interactions, item_clusters, history_length=history_length, look_back_days=look_back_days
    )
    left_out = collective.dropped | transitions.count_left_out(
        interactions,
        item_clusters,
        num_transitions=table.num_rows,
        look_back_days=look_back_days,
        burn_in_days=burn_in_days,
    )
    per_split = {
        f"{split} transitions": pc.sum(pc.equal(table["split"], split)).as_py() or 0
        for split in ("train", "validation", "test")
    }
    counts = {
        **per_split,
        "shrinkage": collective.shrinkage,
        "reward of label 0": collective.low,
        "reward of label 1": collective.high,
        "validation from": _date(splits.validation),
        "test from": _date(splits.test),
        **{f"left out: {reason}": count for reason, count in left_out.items()},
    }
    with artifacts.new_folder(work / FEEDBACK) as folder:
        artifacts.write_table(folder / "transitions.parquet", table, artifacts.TRANSITIONS)
        artifacts.write_table(folder / "collective.parquet", collective.table, artifacts.COLLECTIVE)
        artifacts.write_table(
            folder / "histories.parquet",
            histories.order_by("history").to_pyarrow(),
            artifacts.HISTORIES,
        )
        artifacts.write_json(folder / "counts.json", counts)
        known = {"test": splits.test, "look_back_days": look_back_days}
        artifacts.write_json(folder / _PERIODS, known)
    _say_counts(progress, counts)


def tokenize(
    work: Path,
    progress: Progress,
    *,
    train_vocabulary: Callable[..., None],
    diversify: Callable[..., Any],
    make_alignment_examples: Callable[..., Any],
    novelty_histories: Mapping[str, int],
    history_length: int,
    seen_excluded: Sequence[str] = (),
    longer_histories: Mapping[str, int] | None = None,
    half_life: float | None = None,
    seed: int = 0,
) -> None:
    """Rows → vocabulary and training examples, for each model its own.

    Args:
      work: the work directory.
      progress: where to say what is going on.
      train_vocabulary: of recexplore.tasks.vocabulary; or its pretrained_vocabulary.
      diversify: of recexplore.tasks.examples.
      make_alignment_examples: `alignment_examples` of recexplore.tasks.examples, or, to train on
        pairs, `pairwise_examples`.
      novelty_histories: novelty model → how many clusters of history it reads.
      history_length: K of the alignment model.
      seen_excluded: novelty models that will be asked with all clusters excluded that the user has
        seen. The others are asked for a history alone, as the exploration table is.
      longer_histories: novelty model → it is trained on longer histories too, up to this many
        clusters; see `examples.novelty_examples`.
      half_life: training examples of the novelty models weigh less the older they are: half at this
        share of all examples back; None: all the same.
      seed: of the longer histories' lengths.
    """
    from recexplore.interests.cluster_table import ClusterTable
    from recexplore.tasks import examples, prompts, seqio_tasks
    from recexplore.tasks.vocabulary import Vocabulary

    descriptions = ClusterTable.read(work / CLUSTERS).descriptions
    transitions, collective = _feedback(work)
    corpus = examples.some_prompts(transitions, descriptions, history_length)
    with artifacts.new_folder(work / VOCABULARY) as folder:
        train_vocabulary(folder, corpus, descriptions)
        vocabulary = Vocabulary(folder)
    longer_histories = longer_histories or {}
    longest = {name: longer_histories.get(name, k) for name, k in novelty_histories.items()}
    longest[ALIGNMENT] = history_length
    lengths = {
        model: examples.longest_example(
            vocabulary,
            prompts.alignment_prompt if model == ALIGNMENT else prompts.novelty_prompt,
            descriptions,
            length,
        )
        for model, length in longest.items()
    }
    with artifacts.new_folder(work / EXAMPLES) as folder:
        artifacts.write_json(folder / MAX_LENGTHS, lengths)
        artifacts.write_json(folder / _HISTORIES, longest)
        for split in ("train", "validation"):
            rows, fades = examples.engaged(transitions, split), None
            engaged = rows.num_rows
            if split == "train":
                rows, fades = diversify(rows), half_life
            for model, length in novelty_histories.items():
                made = examples.novelty_examples(
                    rows,
                    descriptions,
                    length,
                    exclude_seen=model in seen_excluded,
                    half_life=fades,
                    longer=longer_histories.get(model) if split == "train" else None,
                    seed=seed,
                )
                seqio_tasks.write_examples(made, folder / model, split, vocabulary)
            capped = engaged - rows.num_rows
            progress.say(
                f"  novelty: {rows.num_rows:,} {split} examples of moves that were not skipped"
                f"{f', {capped:,} left out to diversify them' if capped else ''}"
            )
            made = make_alignment_examples(collective, split, descriptions)
            seqio_tasks.write_examples(made, folder / ALIGNMENT, split, vocabulary)
            progress.say(f"  alignment: {len(made):,} {split} examples")


def train(
    work: Path,
    progress: Progress,
    name: str,
    *,
    make_network: Callable[[Any], Any],
    make_config: Callable[..., Any],
    objective: Callable[..., Any],
    run: Callable[..., Any],
    batch_size: int,
    max_length: int | None = None,
    pretrained: str | None = None,
    pack: bool = False,
    examples_per_row: int = 8,
    seed: int = 0,
) -> None:
    """Examples → a trained model; an interrupted run goes on from its last checkpoint.

    Args:
      work: the work directory.
      progress: where to say what is going on.
      name: of the model.
      make_network: Transformer, EncoderDecoder, or RewardModel around either.
      make_config: TransformerConfig, or EncoderDecoderConfig for T5; all but its vocab_size and
        max_length bound.
      objective: of recexplore.training.objectives.
      run: recexplore.training.trainer.train.
      batch_size: rows a step, of all processes together.
      max_length: tokens of a row; None: as many as prompt and description can have. A prompt that
        doesn't fit loses its oldest tokens.
      pretrained: folder of the language model to start from, as Hugging Face has it; None: from
        nothing.
      pack: several examples a row; not for an EncoderDecoder.
      examples_per_row: at most, when packed.
      seed: of the order of examples, of initialisation and of dropout.
    """
    from recexplore.distributed import processes
    from recexplore.explorer import NETWORK, description_trie
    from recexplore.interests.cluster_table import ClusterTable
    from recexplore.models import saved
    from recexplore.models.config_file import check_config, embedding_rows
    from recexplore.tasks import seqio_tasks
    from recexplore.tasks.vocabulary import Vocabulary, check_embedding

    vocabulary = Vocabulary(work / VOCABULARY)
    descriptions = ClusterTable.read(work / CLUSTERS).descriptions
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(
            f"pipeline.train.batch_size is {batch_size!r}; it must be a whole number from 1 on."
        )
    longest = artifacts.read_json(work / EXAMPLES / MAX_LENGTHS)[name]
    history_length = artifacts.read_json(work / EXAMPLES / _HISTORIES)[name]
    max_length = max_length or longest
    if max_length < longest:
        progress.say(
            f"  pipeline.train.max_length is {max_length}: prompts that need more, up to {longest} "
            "tokens with their description, lose their oldest tokens"
        )
    rows = embedding_rows(pretrained) if pretrained else vocabulary.embedding_rows
    config = make_config(vocab_size=rows, max_length=max_length)
    if pack and config.has_encoder:
        raise InputError(
            f"pipeline.train.pack is True, but {type(config).__name__} is of networks with an "
            "encoder, which reads one prompt a row. Bind pipeline.train.pack = False."
        )
    if pretrained:
        check_embedding(vocabulary, rows, pretrained)
        check_config(pretrained, config)
    folder, examples = work / model_folder(name), work / EXAMPLES / name
    trie = description_trie(vocabulary, descriptions)
    data = seqio_tasks.Data(
        seqio_tasks.make_task(name, examples, vocabulary),
        examples,
        seed=seed,
        batch_size=batch_size,
        max_length=max_length,
        longest_description=trie.max_length,
        prefix_length=len(vocabulary.prefix),
        num_clusters=len(descriptions),
        pack=pack,
        examples_per_row=examples_per_row,
    )
    network = make_network(config)
    if processes.is_first():
        artifacts.write_json(folder / NETWORK, saved.describe(network, pretrained, history_length))
    with progress.bar(f"train {name}") as update:
        result = run(
            folder,
            network,
            objective,
            trie,
            data,
            update,
            pretrained=Path(pretrained) if pretrained else None,
            seed=seed,
        )
    progress.say(
        f"  {result.steps} steps; the best on validation, after {result.best_step}, has "
        f"{result.best_validation:.4f}"
    )


def explore(
    work: Path,
    progress: Progress,
    *,
    settings: Any,
    batch_size: int = 64,
    shard_size: int = 16,
    histories: str = "log",
    banned: Any = (),
    seed: int = 0,
) -> None:
    """Histories → the exploration table: the k best of n clusters for each.

    Args:
      work: the work directory.
      progress: where to say what is going on.
      settings: a recexplore.inference.selection.BestOfN.
      batch_size: histories a call of the compiled step, at most.
      shard_size: batches that are written together; who is killed has lost no more.
      histories: "log": those in the log; "pairs": every ordered pair of clusters (K = 2 only); or
        the path of a Parquet file with a column "history" of lists of cluster ids, oldest first,
        and maybe one "count", how often users stand there.
      banned: clusters that nobody gets: unsafe, out of stock.
      seed: of the draws.
    """
    import shutil

    from recexplore import precompute
    from recexplore.distributed import processes
    from recexplore.explorer import load_explorer
    from recexplore.serving import arrow_files, versions
    from recexplore.serving.back_off import popular_clusters
    from recexplore.serving.exploration_table import ExplorationTable

    explorer, models = load_explorer(work, (NOVELTY, ALIGNMENT), batch_size)
    precompute.check_banned(banned, explorer.num_clusters)
    asked, counts = precompute.histories_asked(work, explorer.num_clusters, histories)
    fingerprints = precompute.fingerprints(work, models)
    job = precompute.plan(
        asked,
        banned=banned,
        settings=settings,
        seed=seed,
        batch_size=batch_size,
        shard_size=shard_size,
        made_from=fingerprints,
    )
    popular = popular_clusters(*_feedback(work), explorer.num_clusters, banned)
    fingerprints |= {"job": job.manifest.digest, "back_off": arrow_files.digest([counts, *popular])}
    shards = work / SHARDS / job.manifest.digest[:16]
    if not precompute.made_by_others(work / EXPLORATION, fingerprints):
        precompute.compute(job, shards, explorer, (models[NOVELTY], models[ALIGNMENT]), progress)
    processes.meet()
    if not processes.is_first():
        return
    with artifacts.locked(work):  # several processes may be the last
        if not precompute.made_by_others(work / EXPLORATION, fingerprints):
            found = precompute.collect(job, shards)
            table = ExplorationTable.build(
                asked,
                *found.answers[1:],
                counts=counts,
                popular=popular,
                num_clusters=explorer.num_clusters,
                fingerprints=fingerprints,
            )
            version = table.write(work / EXPLORATION)
            versions.remove_old(work / EXPLORATION, keep=1)
            progress.say(
                f"  {len(asked):,} histories, version {version} of the table; for each on average "
                f"{found.num_distinct.mean():.1f} different clusters proposed, of "
                f"{found.num_allowed.mean():.1f} that could be"
            )
        shutil.rmtree(work / SHARDS, ignore_errors=True)


def _feedback(work: Path) -> tuple[Any, Any]:
    folder = work / FEEDBACK
    return (
        artifacts.read_table(folder / "transitions.parquet", artifacts.TRANSITIONS),
        artifacts.read_table(folder / "collective.parquet", artifacts.COLLECTIVE),
    )


def evaluate(
    work: Path,
    progress: Progress,
    *,
    novelty_histories: Mapping[str, int],
    history_length: int,
    settings: Any,
    proposal_counts: Sequence[int] = (1, 2, 5, 10, 20, 50),
    relevance_weight: float = 1.0,
    off_policy_users: int | None = 2000,
    item_users: int | None = 2000,
    inference_rows: int = 1000,
    batch_size: int = 64,
    experiment: bool = False,
    loop: bool = False,
    seed: int = 0,
) -> None:
    """Models, baselines and the exploration table, measured on the held-out period.

    Args:
      work: the work directory.
      progress: where to say what is going on.
      novelty_histories: novelty model → how many clusters of history it reads.
      history_length: K of the alignment model.
      settings: a BestOfN for the held-out histories, its k at least 10.
      proposal_counts: the n of the scaling curve and of best_of_1, …; those above the n of
        `settings` are left out.
      relevance_weight: β of the method `exhaustive`, which ranks by log p + β · score.
      off_policy_users: whose impressions tell what policies would be worth, where propensities are
        logged; a sample of that many, or None for all users.
      item_users: whose next items tell how good the item recommender is, likewise.
      inference_rows: answers to held-out histories that are written down in words, at most.
      batch_size: histories a call of a compiled step.
      experiment: the run has an experiment, whose figures go into metrics.json as well.
      loop: the run closes the loop, likewise.
      seed: of the proposals, and of the random order.
    """
    import pyarrow.compute as pc

    from recexplore import held_out
    from recexplore.evaluation import offline
    from recexplore.explorer import load_explorer
    from recexplore.interests.cluster_table import ClusterTable
    from recexplore.serving.exploration_table import ExplorationTable

    checks.check_evaluation(settings, off_policy_users=off_policy_users, item_users=item_users)
    explorer, models = load_explorer(work, [*novelty_histories, ALIGNMENT], batch_size)
    size = explorer.num_clusters
    clusters = ClusterTable.read(work / CLUSTERS)
    table = ExplorationTable.open(work / EXPLORATION, clusters.fingerprint)
    table.check()
    transitions, collective = _feedback(work)
    train, validation, rows = (
        offline.rows_of(transitions, split, size) for split in ("train", "validation", "test")
    )
    test = collective.filter(pc.equal(collective["split"], "test"))
    histories = [history[-history_length:] for history in rows.histories]
    scores, which = held_out.score_distinct(
        explorer, models[ALIGNMENT], [*histories, *test["history"].to_pylist()], progress
    )
    own = scores[which[len(histories) :], test["next_cluster"].to_numpy()]
    alignment, bins = offline.alignment_metrics(collective, own, size)

    board = held_out.board_with_baselines(train, validation, rows, clusters.centroids, seed)
    held_out.add_models(
        board,
        explorer,
        models,
        rows,
        scores[which[: len(histories)]],
        progress,
        novelty_histories=novelty_histories,
        explores=NOVELTY,
        relevance_weight=relevance_weight,
    )
    scaling, answers = held_out.add_best_of_n(
        board,
        explorer,
        (models[NOVELTY], models[ALIGNMENT]),
        rows,
        progress,
        history_length=history_length,
        settings=settings,
        proposal_counts=proposal_counts,
        seed=seed,
    )
    metrics = {
        **board.metrics(),
        **alignment,
        **offline.exploration_metrics(table, size),
    }
    impressions = _logged_impressions(
        work,
        progress,
        clusters,
        history_length=history_length,
        num_users=off_policy_users,
        seed=seed,
    )
    if impressions is not None:
        metrics |= held_out.off_policy_metrics(
            explorer,
            (models[NOVELTY], models[ALIGNMENT]),
            impressions,
            transitions,
            progress,
            relevance_weight=relevance_weight,
            seed=seed,
        )
    metrics |= items.held_out_metrics(work, progress, users=item_users, seed=seed)
    if experiment:
        metrics |= artifacts.read_json(work / experiments.EXPERIMENT / experiments.METRICS)
    if loop:
        metrics |= artifacts.read_json(work / closed_loop.CLOSED_LOOP / closed_loop.METRICS)
    with artifacts.new_folder(work / EVALUATION) as folder:
        artifacts.write_json(folder / "scaling.json", {**scaling, "k": settings.num_chosen})
        artifacts.write_json(folder / "calibration.json", bins.tolist())
        said = held_out.inferences(
            rows, answers, clusters.descriptions, history_length, inference_rows
        )
        artifacts.write_lines(folder / "inference_eval" / "best_of_n.jsonl", said)
    artifacts.write_json(work / METRICS, metrics)
    for name in (*novelty_histories, "best_of_n", "popularity", "markov", "pair_markov", "ease"):
        progress.say(
            f"  {name}: recall@10 {metrics[f'{name}/recall@10']:.4f}, all seen left out "
            f"{metrics[f'{name}/recall@10_unseen']:.4f}"
        )
    for name in (items.ITEMS, "items_popularity", "items_cooccurrence"):
        if (key := f"{name}/ndcg@10") in metrics:
            progress.say(f"  {name}: NDCG@10 within the cluster {metrics[key]:.4f}")
    for name in (ALIGNMENT, "target_mean", "target_mean_shrunk"):
        if (key := f"{name}/pairwise_accuracy") in metrics:
            progress.say(f"  {name}: pairwise accuracy {metrics[key]:.4f}")


def _logged_impressions(work: Path, progress: Progress, clusters: Any, **options: Any):
    """The held-out period's impressions; None, with a line why, where they can't be used."""
    from recexplore.evaluation import logged

    path, interactions = work / FEEDBACK / _PERIODS, _read_log(work)[0]
    start = 0
    if path.exists():  # an older version's feedback lacks it
        known = artifacts.read_json(path)
        start = known["test"]
    if not logged.has_propensities(interactions, start):
        progress.say("  no off-policy values: the log has impressions without a propensity above 0")
        return None
    if not path.exists():
        progress.say("  no off-policy values: run `recexplore aggregate --overwrite` for them")
        return None
    try:
        return logged.read_impressions(
            interactions,
            clusters.item_clusters,
            clusters.num_clusters,
            start=start,
            look_back_days=known["look_back_days"],
            **options,
        )
    except InputError as error:  # all else can be evaluated
        progress.say(f"  no off-policy values: {error}")
        return None


def report(
    work: Path,
    progress: Progress,
    *,
    novelty_histories: Mapping[str, int],
    examples: int = 12,
    experiment: bool = False,
) -> None:
    """metrics.json and all that lies beside it → one page, report.html.

    Args:
      work: the work directory.
      progress: where to say what is going on.
      novelty_histories: novelty model → how many clusters of history it reads.
      examples: explorations shown in words.
      experiment: the run has an experiment, which the page begins with.
    """
    from recexplore.evaluation import page

    page.write(
        work,
        model_folders={n: work / model_folder(n) for n in (*novelty_histories, ALIGNMENT)},
        novelty_histories=novelty_histories,
        num_examples=examples,
        experiment=work / experiments.EXPERIMENT if experiment else None,
    )
    progress.say(f"  {work / REPORT}")


def _read_log(work: Path):
    folder = work / INTERACTIONS
    return (
        artifacts.read_table(folder / "interactions.parquet", artifacts.INTERACTIONS),
        artifacts.read_table(folder / "items.parquet", artifacts.ITEMS),
    )


def _say_counts(progress: Progress, counts: Mapping[str, int | float | str]) -> None:
    """One line; what there is none of is only in counts.json."""
    shown = {k: v if isinstance(v, str) else f"{v:,.4g}" for k, v in counts.items() if v}
    shown |= {k: f"{v:,}" for k, v in counts.items() if isinstance(v, int) and v}
    progress.say("  " + ", ".join(f"{name}: {value}" for name, value in shown.items()))


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
