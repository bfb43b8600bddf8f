"""The system, stage by stage: what each reads, does and writes.

    interactions → clusters → feedback → vocabulary, examples → models → exploration → metrics, report

A stage is a function (work directory, progress, …) → nothing: it reads artefacts that earlier stages
left in the work directory and writes its own. What may be chosen about it comes as further
arguments, bound by gin. Modules are imported inside the stages, so that asking for help or finding
that nothing is left to do costs no JAX or TensorFlow.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recexplore import artifacts
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
EVALUATION = "evaluation"
METRICS = "metrics.json"
REPORT = "report.html"
NOVELTY = "novelty"  # the novelty model that fills the exploration table
ALIGNMENT = "alignment"


def model_folder(name: str) -> str:
    """Where a model's checkpoints and curves lie, relative to the work directory."""
    return f"models/{name}"


def stages(configuration: "Configuration") -> list[Stage]:
    """The stages of a run, in order; which novelty models there are is up to the configuration."""
    histories = configuration.value(
        f"{tokenize.__module__}.tokenize", "novelty_histories", default={NOVELTY: 2}
    )
    if not isinstance(histories, dict) or NOVELTY not in histories:
        raise InputError(
            "pipeline.tokenize.novelty_histories must map model names to history lengths, and one "
            f"of them must be {NOVELTY!r}; it is {histories!r}."
        )
    models = [*histories, ALIGNMENT]
    trained = tuple(model_folder(name) for name in models)
    explorers = (model_folder(NOVELTY), model_folder(ALIGNMENT))
    rows = (INTERACTIONS, CLUSTERS, FEEDBACK)
    return [
        Stage("ingest", ingest, (), (INTERACTIONS,)),
        Stage("cluster", cluster, (INTERACTIONS,), (CLUSTERS,)),
        Stage("aggregate", aggregate, (INTERACTIONS, CLUSTERS), (FEEDBACK,)),
        Stage("tokenize", tokenize, (CLUSTERS, FEEDBACK), (VOCABULARY, EXAMPLES)),
        *(
            Stage("train", train, (VOCABULARY, EXAMPLES), (folder,), model=name, resumes=True)
            for name, folder in zip(models, trained, strict=True)
        ),
        Stage("explore", explore, (CLUSTERS, FEEDBACK, VOCABULARY, *explorers), (EXPLORATION,)),
        Stage(
            "evaluate",
            evaluate,
            (CLUSTERS, FEEDBACK, VOCABULARY, *trained, EXPLORATION),
            (EVALUATION, METRICS),
        ),
        Stage(
            "report", report, (*rows, *trained, EXPLORATION, EVALUATION, METRICS), (REPORT,)
        ),
    ]


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
        artifacts.write_table(
            folder / "interactions.parquet", interactions, artifacts.INTERACTIONS
        )
        artifacts.write_table(folder / "items.parquet", items, artifacts.ITEMS)
        counts = {
            "interactions": interactions.num_rows,
            "items": items.num_rows,
            "users": len(interactions["user_id"].unique()),
            **{f"dropped: {reason}": count for reason, count in log.dropped.items()},
        }
        artifacts.write_json(folder / "counts.json", counts)
    _say_counts(progress, counts)
