"""A server in a process of its own: `recexplore serve`, or one with a slow planner.

Run as a script it is the second: WORK, and options of `connections.run` as JSON.
"""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple


class Served(NamedTuple):
    """A running server."""

    address: str
    port: int
    process: subprocess.Popen


class _Planned(NamedTuple):
    item_id: str
    cluster: int
    propensity: float
    score: float
    log_probability: float
    level: str


@contextlib.contextmanager
def serving(work, *flags, options=None, environment=None):
    """Starts a server on a free port and gives it; it must end by SIGTERM within a minute."""
    command = [sys.executable, "-m", "recexplore.cli", "serve", "--workdir", str(work), *flags]
    command += ["--port", "0"]
    if options is not None:
        command = [sys.executable, __file__, str(work), json.dumps(options)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        said = process.stderr.readline()
        found = re.search(r"http://[^/]*:(\d+)", said)
        assert found, said + process.stderr.read()
        yield Served(found[0], int(found[1]), process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()
            process.stderr.close()
            process.wait()


def _main(work, options):
    from recexplore import serve
    from recexplore.interests.cluster_table import ClusterTable
    from recexplore.serving import connections, server
    from recexplore.serving.exploration_table import TableReader
    from recexplore.serving.planner_queue import PlannerQueue

    def plan(user_id, events, now):
        if user_id == "slow":
            print("asked", file=sys.stderr, flush=True)
            time.sleep(1.5)
        return [
            _Planned(item, number % 6, 0.5, 0.25, -1.0, "history")
            for number, (item, *_) in enumerate(events)
        ]

    clusters = ClusterTable.read(work / "clusters")
    reader = TableReader(work / "exploration", clusters.fingerprint)
    names = serve.read_names(work, clusters)
    app = server.create_app(reader, names, PlannerQueue(lambda: plan, seconds=30.0))
    listening = connections.listen("127.0.0.1", 0)
    most = connections.most_connections()

    def started():
        print(f"http://127.0.0.1:{listening.getsockname()[1]}", file=sys.stderr, flush=True)

    connections.run(app, listening, started=started, **{"connections": most, **options})


if __name__ == "__main__":
    _main(Path(sys.argv[1]), json.loads(sys.argv[2]))
