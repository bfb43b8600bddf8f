"""The command `recexplore`: flags, gin, one verb a stage."""

import argparse
import errno
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path

import recexplore
from recexplore import checks, pipeline
from recexplore.configuration import Configuration
from recexplore.distributed import processes
from recexplore.errors import InputError, Preempted, SharedError, Unfinished
from recexplore.progress import Progress
from recexplore.workdir import Stage, WorkDirectory

_GIN_FLAG = re.compile(r"--gin\.([^=\s]+)=(.*)", re.DOTALL)
_QUICK = "quick.gin"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_EXIT_BAD_INPUT, _EXIT_PREEMPTED = 2, 143
_EXIT_NOT_READ = 141  # as of a process that SIGPIPE ended

_STAGES = {
    "ingest": "read an interaction log into recexplore's schema",
    "cluster": "group items into interest clusters, described in words",
    "aggregate": "find novel transitions and the collective feedback on them",
    "tokenize": "train the vocabulary and write training examples, and sequences of items",
    "train": "train the novelty, alignment and item models, or the one named by --model",
    "explore": "choose clusters for every history: the exploration table",
    "tune": "tune the novelty model on the alignment model's score, or the one named by --model",
    "experiment": "compare all arms on the simulated platform, where the truth is known",
    "loop": "explore by plan, log it and learn from it again, on the simulated platform",
    "evaluate": "measure models and baselines on the held-out period: metrics.json",
    "report": "one page with tables and figures: report.html",
    "run": "all stages in order",
}

_SERVE = "serve"  # no stage: it makes nothing, and takes flags of its own

_DESCRIPTION = """\
Finds each user's next novel interest: a novelty model proposes interest clusters, an alignment
model trained on collective feedback picks the best of n.

stages:
""" + "\n".join(f"  {name:<10} {what}" for name, what in _STAGES.items())
_DESCRIPTION += f"""

server:
  {_SERVE:<10} answer over HTTP from a work directory: see `recexplore serve --help`
"""

_EXAMPLES = """\
examples:
  recexplore run --workdir /tmp/demo --gin_file runs/demo.gin
  recexplore run --workdir W --gin_file runs/movielens_small.gin \\
      --gin.MOVIELENS_DIR="'/data/ml-latest-small'"
  recexplore train --model alignment --workdir W --gin_file runs/demo.gin \\
      --gin.clustering.cluster_items.num_clusters=100
  recexplore serve --workdir W
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    2: something given to it is wrong. 143: it was told to stop (SIGTERM) and has saved its work.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except Unfinished as error:
        return _say(str(error), status=0)
    except (Exception, KeyboardInterrupt) as error:
        status = _tell(error)
        if status is None and processes.is_alone():
            raise
        if not processes.is_alone() and not isinstance(error, (SharedError, Preempted)):
            if status is None:
                traceback.print_exc()
            processes.leave(status or 1)  # the others don't know, and would wait
        return status


def _tell(error: BaseException) -> int | None:
    """Says in words what has happened; returns the exit status, None if there are no words."""
    if isinstance(error, InputError):
        return _say(str(error))
    if isinstance(error, Preempted):
        return _say(f"{error} Run the same command again to go on.", _EXIT_PREEMPTED)
    if isinstance(error, KeyboardInterrupt):
        return _say("Interrupted. Run the same command again to go on.", status=130)
    if not isinstance(error, OSError):
        return None
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        return _EXIT_NOT_READ
    if error.errno in _DISK_FULL or "No space left on device" in str(error):
        place = f" while writing {error.filename}" if error.filename else ""
        return _say(
            f"The disk is full{place}. Nothing that was finished is lost: free some space and "
            "run the same command again."
        )
    if isinstance(error, PermissionError):
        return _say(f"No permission for {error.filename}: {error.strerror}.")
    return None


def _nobody_reads() -> bool:
    """Whether it is our output that broke: whoever read it has seen enough."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _run(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] == _SERVE:
        from recexplore import serve

        return serve.main(arguments[1:])
    flags = _parse(arguments)
    processes.take_share(flags.shard)
    configuration = Configuration(flags.gin_file, flags.gin_bindings, flags.gin_search_paths)
    stages = pipeline.stages(configuration)
    configuration.check_all_used(pipeline.roots(configuration, stages))
    chosen = _chosen(flags, stages)
    for stage in chosen:
        configuration.check_required(stage.selector, stage.model)
    checks.check_experiment(configuration, chosen)
    work = WorkDirectory(Path(flags.workdir), stages, configuration)
    if flags.dry_run:
        checks.check_pretrained(configuration, [s for s in chosen if work.status(s).reason])
        for stage in chosen:
            print(_describe(work, stage))
        return 0
    others = processes.find_others()
    if others is not None:
        told = others.get("num_processes", 1) > 1
        if any(stage.together for stage in chosen):
            told = processes.initialize()
        if told:
            _check_together(chosen)
    checks.check_pretrained(configuration, [s for s in chosen if work.status(s).reason])
    progress = Progress(silent=not processes.is_first())
    with work.locked(others_too=processes.is_one_of_many()):
        for stage in chosen:
            if processes.stop_wanted():
                raise Preempted(f"Told to stop before {stage.name}.")
            work.run(stage, progress, flags.overwrite)
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="recexplore",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("stage", choices=list(_STAGES), metavar="STAGE", help="see above")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where all artefacts go")
    parser.add_argument(
        "--gin_file",
        action="append",
        required=True,
        metavar="FILE",
        help="looked up in the current folder, then among the installed gin_configs; may be given "
        "several times, later ones win",
    )
    parser.add_argument(
        "--gin_search_paths", default="", metavar="DIRS", help="more folders for it, with commas"
    )
    parser.add_argument("--model", metavar="NAME", help="for train and tune: novelty, alignment, …")
    parser.add_argument(
        "--shard",
        type=_share,
        metavar="I/N",
        help="for explore: compute every Nth shard of the table, from the Ith on; N processes, "
        "wherever they run, do all, and the last makes the table",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"read {_QUICK} after the other files: a small experiment, in minutes",
    )
    parser.add_argument("--dry_run", action="store_true", help="say what would be done, and why")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="make stages again that were made with another configuration",
    )
    parser.add_argument("--version", action="version", version=recexplore.__version__)
    parser.add_argument_group("gin").add_argument(
        "--gin.NAME=VALUE",
        action="append",
        dest="gin_bindings",
        metavar="",
        help="bind NAME (module.function.argument, or a name in the gin file), after the files",
    )
    bindings = [match for argument in arguments if (match := _GIN_FLAG.fullmatch(argument))]
    flags = parser.parse_args([a for a in arguments if not _GIN_FLAG.fullmatch(a)])
    flags.gin_bindings = [f"{match[1]} = {match[2]}" for match in bindings]
    if flags.quick:
        flags.gin_file.append(_QUICK)
    flags.gin_search_paths = [path for path in flags.gin_search_paths.split(",") if path]
    if flags.model and flags.stage not in ("train", "tune"):
        parser.error(f"--model goes with train and tune, not with {flags.stage}")
    if flags.shard and flags.stage != "explore":
        parser.error(f"--shard goes with explore, not with {flags.stage}")
    return flags


def _share(text: str) -> tuple[int, int]:
    """I/N as numbers, I of 0..N-1."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no share: write I/N with I from 0 to N - 1, such as 0/4"
        )
    return int(match[1]), int(match[2])


def _chosen(flags: argparse.Namespace, stages: Sequence[Stage]) -> list[Stage]:
    chosen = [stage for stage in stages if flags.stage in ("run", stage.verb)]
    if flags.model:
        models = [stage.model for stage in chosen]
        chosen = [stage for stage in chosen if stage.model == flags.model]
        if not chosen:
            raise InputError(
                f"--model {flags.model}: this run has no such model. It has: {', '.join(models)}."
            )
    return chosen


def _check_together(chosen: Sequence[Stage]) -> None:
    for stage in chosen:
        if not stage.together:
            raise InputError(
                f"Several processes were started, but {stage.name} is for one. Run `recexplore "
                f"{stage.verb}` in a single process, without JAX_COORDINATOR_ADDRESS or srun; "
                "`recexplore train` and `recexplore explore` are for several."
            )


def _describe(work: WorkDirectory, stage: Stage) -> str:
    reads = ", ".join(stage.reads) or "the log"
    found = work.status(stage)
    status = found.reason or "up to date"
    if found.made_otherwise:
        status += " (refused without --overwrite)"
    return f"{stage.name}\n  reads:  {reads}\n  writes: {', '.join(stage.writes)}\n  {status}"


def _say(message: str, status: int = _EXIT_BAD_INPUT) -> int:
    paragraph = textwrap.fill(
        f"recexplore: {message}", 100, break_long_words=False, break_on_hyphens=False
    )
    print(paragraph, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
