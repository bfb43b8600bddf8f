"""`recexplore serve`: what lies in a work directory, answered over HTTP.

It needs no gin file, since it makes nothing: it opens the exploration table, the clusters, the
items' titles and, where there is one, the item model, and hands them to `serving/server.py`.
"""

import argparse
import gc
import ipaddress
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from recexplore import artifacts
from recexplore.errors import InputError
from recexplore.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from recexplore.interests.cluster_table import ClusterTable
    from recexplore.serving.exploration_table import TableReader
    from recexplore.serving.planner_queue import Plan
    from recexplore.serving.server import Names

TOKEN_VARIABLE = "RECEXPLORE_TOKEN"
_TITLES = pa.schema([artifacts.ITEMS.field("item_id"), artifacts.ITEMS.field("title")])
_BUDGET = (
    ("explorations", int, 1, 1000, 5, "clusters of a plan, an item each"),
    ("cap", int, 1, 1000, 20, "items that a user is shown to explore within a day, at most"),
    ("share", float, 1e-6, 1.0, 1.0, "part of the plans that explore"),
    ("cool_down_days", float, 0.0, 1e6, 7.0, "for so long a skipped cluster rests"),
    ("temperature", float, 0.0, 1e6, 0.0, "of the draw among clusters by score; 0: the best"),
    ("item_temperature", float, 0.0, 1e6, 0.0, "of the draw among a cluster's items"),
)
_EXAMPLES = 3  # items that stand for a cluster
_MIN_TOKEN = 16

_DESCRIPTION = f"""\
Serves a work directory over HTTP: explorations, items, a page to look at them. A new version of the
exploration table is served as soon as it is there. A token is read from {TOKEN_VARIABLE}, or from
the file named by --token_file; without one only this computer may ask.
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status once the server has ended.

    Raises:
      InputError: something in the work directory or the flags is wrong, or the extra is missing.
    """
    flags = _parse(arguments)
    token = read_token(flags.token_file, os.environ)
    _check_open(flags.host, token, flags.allow_anyone)
    try:
        from recexplore.serving import connections, server
        from recexplore.serving.guard import Limits
        from recexplore.serving.planner_queue import PlannerQueue
    except ModuleNotFoundError as error:
        raise InputError(
            f"`recexplore serve` needs {error.name}, which isn't installed. Install the extra: "
            "pip install 'recexplore[serve]', or `pip install -e '.[serve]'` in a checkout."
        ) from error
    from recexplore.interests.cluster_table import ClusterTable
    from recexplore.serving.exploration_table import TableReader

    work = Path(flags.workdir)
    with connections.listen(flags.host, flags.port) as listening:  # before what takes long
        clusters = ClusterTable.read(work / "clusters")
        reader = TableReader(work / "exploration", clusters.fingerprint)
        app = server.create_app(
            reader,
            read_names(work, clusters),
            PlannerQueue(_planner(work, reader, flags), seconds=flags.timeout),
            limits=Limits(requests=flags.max_requests),
            token=token,
            local_names=token is None and not flags.allow_anyone,
            reload_seconds=flags.reload_every,
        )
        most = connections.most_connections()
        gc.collect()
        gc.freeze()  # or now and then a request would wait for a walk through all titles

        def started() -> None:
            host, port = listening.getsockname()[:2]
            place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            Progress().say(
                f"Version {reader.table.version} of {work / 'exploration'} answers at "
                f"http://{place}/ {'with the token' if token else 'without a token'}, up to "
                f"{most:,} connections."
            )

        try:
            connections.run(app, listening, connections=most, started=started)
        except KeyboardInterrupt:  # uvicorn has finished its requests, and says how it was ended
            return 130
    return 0


def _planner(
    work: Path, reader: "TableReader", flags: argparse.Namespace
) -> "Callable[[], Plan] | None":
    """Loads what plans items; None where the work directory has nothing to plan them with."""
    from recexplore.serving.planner import Budget, Event

    budget = Budget(
        num_clusters=flags.explorations,
        share=flags.share,
        cap=flags.cap,
        cool_down_days=flags.cool_down_days,
        temperature=flags.temperature,
        item_temperature=flags.item_temperature,
    )
    if not (work / "models" / "items").is_dir():
        return None

    def load() -> "Plan":
        from recexplore.planning import open_planner  # JAX

        planner = open_planner(work, reader.look_up, budget)
        return lambda user, events, now: planner.plan(user, [Event(*e) for e in events], now)

    return load


def read_token(file: str | None, environment: Mapping[str, str]) -> str | None:
    """The token that requests must carry, if there is one.

    Args:
      file: that holds it and nothing else; it goes before the environment.
      environment: with `RECEXPLORE_TOKEN`, perhaps.

    Raises:
      InputError: the file can't be read, or what it says is too short or no header's value.
    """
    if file is not None:
        try:
            token, source = Path(file).read_text(encoding="utf-8").strip(), file
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--token_file {file} can't be read ({error}).") from error
    elif TOKEN_VARIABLE in environment:
        token, source = environment[TOKEN_VARIABLE].strip(), f"The variable {TOKEN_VARIABLE}"
    else:
        return None
    if len(token) < _MIN_TOKEN or not all("!" <= character <= "~" for character in token):
        raise InputError(
            f"{source} holds no token: it must be at least {_MIN_TOKEN} printable ASCII characters "
            "without spaces. `openssl rand -hex 32` makes one."
        )
    return token


def read_names(work: Path, clusters: "ClusterTable") -> "Names":
    """What clusters and items are called."""
    from recexplore.serving.server import Names

    items = artifacts.read_table(work / "interactions" / "items.parquet", _TITLES)
    titles = dict(zip(items["item_id"].to_pylist(), items["title"].to_pylist(), strict=True))
    labels = clusters.item_clusters["cluster_id"].to_numpy()
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(clusters.num_clusters + 1))
    known = clusters.item_clusters["item_id"]
    examples = [
        [known[place].as_py() for place in order[start : min(start + _EXAMPLES, stop)].tolist()]
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    ]
    return Names(clusters.descriptions, titles, examples)


def _check_open(host: str, token: str | None, allow_anyone: bool) -> None:
    if token is not None or allow_anyone or _is_this_computer(host):
        return
    raise InputError(
        f"--host {host} lets others ask, and no token is set. Set {TOKEN_VARIABLE} or "
        "--token_file, or say --allow_anyone."
    )


def _is_this_computer(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="recexplore serve",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="of a run; only read")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument(
        "--port", type=_number(int, 0, 65535), default=8000, help="0: any (%(default)s)"
    )
    parser.add_argument("--token_file", metavar="FILE", help="holds the token that requests carry")
    parser.add_argument(
        "--allow_anyone", action="store_true", help="other computers may ask without a token"
    )
    parser.add_argument(
        "--reload_every",
        type=_number(float, 0.05, 1e6),
        default=2.0,
        metavar="SECONDS",
        help="between two looks for a new version; SIGHUP looks at once (%(default)s)",
    )
    parser.add_argument(
        "--max_requests",
        type=_number(int, 1, 1 << 20),
        default=1000,
        metavar="N",
        help="answered at once; further ones get 503 (%(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=_number(float, 0.01, 1e6),
        default=5.0,
        metavar="SECONDS",
        help="for /v1/recommend; then 504 (%(default)s)",
    )
    planning = parser.add_argument_group("planning, for /v1/recommend; see planner.Budget")
    for name, kind, low, high, default, words in _BUDGET:
        planning.add_argument(
            f"--{name}",
            type=_number(kind, low, high),
            default=default,
            metavar="N" if kind is int else "X",
            help=f"{words} (%(default)s)",
        )
    return parser.parse_args(arguments)


def _number(kind: type, low: int | float, high: int | float):
    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is no number in {low:g}..{high:g}")
        return value

    return read
