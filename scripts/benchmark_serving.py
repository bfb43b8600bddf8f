"""How many explorations a second the HTTP server answers, and how long they take.

`recexplore serve` runs as it would, on a table of histories drawn at random. wrk (Debian package
`wrk`) asks POST /v1/explore over connections that stay open, on the same cores.

    explore          every connection sends its next question when it has its answer
    explore, paced   it waits before it does, any time up to twice PACE milliseconds: some 1,500
                     questions a second of 32 connections
    floor            as the first, of an ASGI application on the same uvicorn that reads the body
                     and answers with as many bytes, always the same ones

They take turns; figures are medians of the rounds.

python scripts/benchmark_serving.py
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from benchmark_table import questions, random_table

from recexplore import artifacts
from recexplore.interests.cluster_table import ClusterTable
from recexplore.serving.exploration_table import ExplorationTable

BODIES = 2_000
PACE = 19  # milliseconds on average
WARM_UP_SECONDS = 2
TICKS = os.sysconf("SC_CLK_TCK")

ASK = """
local bodies = {}
for line in io.lines("%s") do bodies[#bodies + 1] = line end
local headers = {["Content-Type"] = "application/json"}
local place = 0
request = function()
  place = place %% #bodies + 1
  return wrk.format("POST", "/v1/explore", headers, bodies[place])
end
done = function(summary, latency, requests)
  io.write(string.format(
    '{"requests": %%d, "microseconds": %%d, "wrong": %%d, "p50": %%f, "p99": %%f, "p99.9": %%f}\\n',
    summary.requests, summary.duration,
    summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.write
      + summary.errors.timeout,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000, latency:percentile(99.9) / 1000))
end
"""

PACED = """
delay = function() return math.random(0, 2 * %d) end
"""


def main() -> None:
    """Prints a markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--histories", type=int, default=100_000)
    parser.add_argument("--clusters", type=int, default=2_000)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5, help="of a round")
    parser.add_argument("--floor", type=int, metavar="BYTES", help="only serve the floor")
    flags = parser.parse_args()
    if flags.floor:
        serve_floor(flags.floor)
        return
    if shutil.which("wrk") is None:
        sys.exit("The load comes from wrk, which isn't installed: apt-get install wrk")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        bodies = make_work(work, flags.histories, flags.clusters)
        (work / "bodies").write_text("\n".join(bodies) + "\n")
        script, paced = work / "ask.lua", work / "paced.lua"
        script.write_text(ASK % (work / "bodies"))
        paced.write_text(ASK % (work / "bodies") + PACED % PACE)
        command = [sys.executable, "-m", "recexplore.cli", "serve", "--workdir", folder]
        with server([*command, "--port", "0"]) as (ours, address):
            size = len(answer(address, bodies[0]))
            with server([sys.executable, __file__, "--floor", str(size)]) as (floor, other):
                sides = {
                    "explore": (ours, address, script),
                    "explore, paced": (ours, address, paced),
                    "floor": (floor, other, script),
                }
                print(report(flags, measure(flags, sides), size))


def make_work(work: Path, num_histories: int, num_clusters: int) -> list[str]:
    """Writes a work directory; returns questions, nine in ten about histories of the table."""
    clusters = ClusterTable(
        pa.table(
            {
                "cluster_id": np.arange(num_clusters, dtype=np.int32),
                "description": [f"area {c // 40}, topic {c}" for c in range(num_clusters)],
                "path": [[0]] * num_clusters,
                "num_items": np.ones(num_clusters, np.int32),
                "num_interactions": np.ones(num_clusters, np.int64),
                "centroid": [[float(c)] for c in range(num_clusters)],
            }
        ),
        pa.table(
            {
                "item_id": [f"item {c}" for c in range(num_clusters)],
                "cluster_id": np.arange(num_clusters, dtype=np.int32),
            }
        ),
    )
    clusters.write(work / "clusters")
    items = clusters.item_clusters.select(["item_id"])
    for name in ("title", "text"):
        items = items.append_column(name, items["item_id"])
    items = items.append_column("embedding", pa.nulls(num_clusters, pa.list_(pa.float32())))
    artifacts.write_table(work / "interactions" / "items.parquet", items, artifacts.ITEMS)
    random_table(num_histories, num_clusters, clusters.fingerprint).write(work / "exploration")
    table = ExplorationTable.open(work / "exploration", clusters.fingerprint)
    known, strange, _ = questions(table, BODIES).values()
    mixed = [strange[i] if i % 10 == 0 else known[i] for i in range(BODIES)]
    return [json.dumps({"history": history, "banned": [3, 4]}) for history in mixed]


@contextlib.contextmanager
def server(command: list[str]) -> Iterator[tuple[int, str]]:
    """Starts a server that prints its address; gives its process id and the address."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        said = process.stderr.readline()
        found = re.search(r"http://\S+?:\d+", said)
        if not found:
            sys.exit(said + process.stderr.read())
        yield process.pid, found[0]
    finally:
        process.terminate()
        process.wait()


def answer(address: str, body: str) -> bytes:
    """Asks once."""
    command = ["curl", "-sS", "--fail", "-d", body, f"{address}/v1/explore"]
    return subprocess.check_output(command)


def measure(flags, sides) -> dict[str, list[dict[str, float]]]:
    """Rounds in turns."""
    found = {name: [] for name in sides}
    for seconds in [WARM_UP_SECONDS, *[flags.seconds] * flags.rounds]:
        for name, (process, address, script) in sides.items():
            found[name].append(one_round(process, address, script, flags.connections, seconds))
    return {name: rounds[1:] for name, rounds in found.items()}


def one_round(
    process: int, address: str, script: Path, connections: int, seconds: int
) -> dict[str, float]:
    """What wrk says, and who used how much of a core."""
    before, start = cpu_seconds(process), time.perf_counter()
    command = ["wrk", "-t", "1", "-c", str(connections), "-d", f"{seconds}s", "-s", str(script)]
    children = os.times().children_user + os.times().children_system
    said = subprocess.check_output([*command, address], text=True)
    taken = time.perf_counter() - start
    found = json.loads(said.splitlines()[-1])
    if found["wrong"]:
        sys.exit(f"{found['wrong']} questions failed.\n{said}")
    found["server"] = (cpu_seconds(process) - before) / taken
    found["wrk"] = (os.times().children_user + os.times().children_system - children) / taken
    found["rate"] = found["requests"] / found["microseconds"] * 1e6
    return found


def cpu_seconds(process: int) -> float:
    """That a process has used so far, all of its threads."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def report(flags, rounds: dict[str, list[dict[str, float]]], size: int) -> str:
    """A markdown table, and the ratio to the floor."""
    columns = {
        "rate": ("requests a second", "{:,.0f}"),
        "p50": ("p50, ms", "{:.1f}"),
        "p99": ("p99, ms", "{:.1f}"),
        "p99.9": ("p99.9, ms", "{:.1f}"),
        "server": ("cores, server", "{:.2f}"),
        "wrk": ("cores, wrk", "{:.2f}"),
    }
    lines = [
        f"{flags.histories:,} histories of {flags.clusters:,} clusters, {flags.connections} "
        f"connections, answers of {size} bytes, {flags.rounds} rounds of {flags.seconds} s; load "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        "",
        "| | " + " | ".join(title for title, _ in columns.values()) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for name, found in rounds.items():
        middle = {key: statistics.median(each[key] for each in found) for key in columns}
        cells = [form.format(middle[key]) for key, (_, form) in columns.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    ratios = [
        one["rate"] / other["rate"]
        for one, other in zip(rounds["explore"], rounds["floor"], strict=True)
    ]
    lines += ["", f"explore / floor: {statistics.median(ratios):.2f}, median of the rounds"]
    for key, what in (("rate", "requests a second"), ("p99", "ms at p99")):
        values = [each[key] for each in rounds["explore"]]
        lines.append(f"explore, by rounds: {min(values):,.0f} to {max(values):,.0f} {what}")
    return "\n".join(lines)


def serve_floor(size: int) -> None:
    """As little as can be done with a request under uvicorn."""
    import uvicorn

    from recexplore.serving import connections

    body = b" " * size
    headers = [(b"content-type", b"application/json"), (b"content-length", str(size).encode())]

    async def app(scope, receive, send):
        if scope["type"] == "http":
            await receive()
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    listening = connections.listen("127.0.0.1", 0)
    print(f"http://127.0.0.1:{listening.getsockname()[1]}", file=sys.stderr, flush=True)
    config = uvicorn.Config(
        app, http="httptools", lifespan="off", log_level="warning", access_log=False
    )
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
