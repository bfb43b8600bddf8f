"""What choices about feedback and training are worth: alignment models that differ by gin lines.

python scripts/compare_alignment.py --workdir W --out V
python scripts/compare_alignment.py --workdir W --out V --only "as it is" --only pairs
python scripts/compare_alignment.py --workdir W --out V --gin.NAME=VALUE  # for all variants

W holds a finished `recexplore run --gin_file runs/experiment.gin` with the same --gin_file,
--quick and gin lines, but for those on feedback, examples and the alignment model. Each variant is
learnt in a folder of its own in V from W's log and clusters and judged at the experiment's visits:
best of 20 draws of W's novelty model, chosen by the variant's scores, against the truth. Variants
that are there already are not made again.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recexplore import artifacts, cli, experiments
from recexplore.errors import InputError
from recexplore.evaluation import policies, study
from recexplore.explorer import load_explorer

_PAIRS = "@recexplore.tasks.examples.pairwise_examples"
_BRADLEY_TERRY = "@recexplore.training.objectives.bradley_terry_loss"
_WEIGHTING = "recexplore.tasks.examples.alignment_examples.count_weighting"
_FEEDBACK = "recexplore.feedback.collective.collective_feedback"
_SEED = "alignment/recexplore.pipeline.train.seed"
BASE = "as it is"
SEEDS = ("another seed", "a third seed")
VARIANTS: dict[str, Sequence[str]] = {
    BASE: (),
    "labels shrunk": (f"{_FEEDBACK}.shrinkage=None",),
    "moves of one user left out": (f"{_FEEDBACK}.min_count=2",),
    "moves weigh as the root of users": (f"{_WEIGHTING}='sqrt'",),
    "moves weigh alike": (f"{_WEIGHTING}='none'",),
    "weighed by propensity": (f"{_FEEDBACK}.min_propensity=2.5e-5",),
    "pairs": (
        f"recexplore.pipeline.tokenize.make_alignment_examples={_PAIRS}",
        f"alignment/recexplore.pipeline.train.objective={_BRADLEY_TERRY}",
    ),
    "history of one": ("HISTORY_LENGTH=1",),
    "history of three": ("HISTORY_LENGTH=3",),
    SEEDS[0]: (f"{_SEED}=101",),
    SEEDS[1]: (f"{_SEED}=102",),
}
_TAKEN = ("interactions", "clusters", "feedback", "vocabulary", "examples")
_STAGES = ("ingest", "cluster", "aggregate", "tokenize")
_COLUMNS = {
    "share": "gap closed",
    "best": "best of 20",
    "all": "best of all",
    "agreement": "agreement",
    "seconds": "training, s",
}


def main() -> None:
    """Prints markdown tables as they come, and writes them into V/comparison.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=Path, metavar="W")
    parser.add_argument("--out", required=True, type=Path, metavar="V")
    parser.add_argument("--gin_file", action="append", metavar="FILE")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", action="append", choices=list(VARIANTS), metavar="VARIANT")
    flags, shared = parser.parse_known_args()
    if unknown := [argument for argument in shared if not argument.startswith("--gin.")]:
        parser.error(f"unknown: {' '.join(unknown)}")
    settings = [f"--gin_file={file}" for file in flags.gin_file or ["runs/experiment.gin"]]
    settings += ["--quick"] * flags.quick + shared
    if not flags.workdir.is_dir():
        parser.error(f"There is no folder {flags.workdir}.")
    try:
        visits = study.Visits.read(flags.workdir / experiments.EXPERIMENT / experiments.VISITS)
    except InputError as error:
        sys.exit(f"compare_alignment: {error}")
    rows, scores = {}, {}
    print(f"| variant | {' | '.join(_COLUMNS.values())} |\n|{' --- |' * (len(_COLUMNS) + 1)}")
    for name in flags.only or VARIANTS:
        folder = flags.out / name.replace(" ", "_")
        learn(flags.workdir, folder, [*settings, *(f"--gin.{line}" for line in VARIANTS[name])])
        scores[name] = score(folder, visits)
        rows[name] = judge(visits._replace(scores=scores[name]), folder)
        print(f"| {name} | {' | '.join(shown(rows[name], key) for key in _COLUMNS)} |", flush=True)
    found = {"variants": rows}
    if {BASE, *SEEDS} <= set(scores):
        together = np.stack([scores[name] for name in (BASE, *SEEDS)])
        found["hedges"] = study.hedges(visits._replace(scores=scores[BASE]), together, None)
        print("\n| chosen by | score | true satisfaction | clusters, effectively |")
        print("| --- | --- | --- | --- |")
        for row in found["hedges"]:
            figures = (f"{row[key]:.4f}" for key in ("score", "satisfaction", "effective_clusters"))
            print(f"| {row['hedge']} | {' | '.join(figures)} |")
    artifacts.write_json(flags.out / "comparison.json", found)


def learn(source: Path, folder: Path, settings: Sequence[str]) -> None:
    """Makes a variant's alignment model, from as much of `source` as is the same for it."""
    if not folder.exists():
        with artifacts.new_folder(folder) as fresh:
            for name in _TAKEN:
                shutil.copytree(source / name, fresh / name, copy_function=_link)
            (fresh / "stages").mkdir()
            for name in _STAGES:
                _link(source / "stages" / f"{name}.json", fresh / "stages" / f"{name}.json")
    for stage in (["aggregate"], ["tokenize"], ["train", "--model=alignment"]):
        status = cli.main([*stage, f"--workdir={folder}", "--overwrite", *settings])
        if status:
            sys.exit(status)


def score(folder: Path, visits: study.Visits) -> np.ndarray:
    """The variant's scores of all clusters at the visits."""
    explorer, models = load_explorer(folder, ["alignment"], 64)
    histories = [[cluster for cluster in row if cluster >= 0] for row in visits.recent.tolist()]
    return explorer.scores(models["alignment"], histories).astype(np.float64)


def judge(visits: study.Visits, folder: Path) -> dict[str, Any]:
    """A variant's row of the table."""
    gap = study.gap_closed(visits)
    agreement, _ = policies.agreement(visits.log_p, visits.scores, visits.satisfaction)
    made = artifacts.read_json(folder / "stages" / "train_alignment.json")
    return {
        **{f"share{end}": gap[f"share{end}"] for end in ("", "_low", "_high")},
        "best": gap["satisfaction_best_of_n"],
        "all": gap["satisfaction_count_oracle"],
        "agreement": float(np.mean(agreement)),
        "seconds": made["seconds"],
    }


def shown(row: dict[str, Any], key: str) -> str:
    """A cell."""
    if key == "share":
        return f"{row['share']:.1%} ({row['share_low']:.1%} to {row['share_high']:.1%})"
    return f"{row[key]:.0f}" if key == "seconds" else f"{row[key]:.4f}"


def _link(source: str | Path, target: str | Path) -> None:
    """A hard link, where the file system has them: artefacts are replaced, never written to."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


if __name__ == "__main__":
    main()
