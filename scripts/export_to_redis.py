"""A work directory's exploration table → Redis, where readers switch to it.

python scripts/export_to_redis.py --workdir W
python scripts/export_to_redis.py --workdir W --url redis://cache:6379/0 --prefix videos --keep 3

The table is checked and written as a new version, which becomes the current one when it is whole;
older versions are removed only with --keep. What lies in Redis is described in
recexplore/serving/redis_export.py. Needs the extra [redis].
"""

import argparse
import sys
import textwrap
import time
from pathlib import Path

try:
    import redis
except ModuleNotFoundError:
    sys.exit("export_to_redis: redis isn't installed. Install the extra: pip install '.[redis]'")

from recexplore import pipeline
from recexplore.errors import InputError
from recexplore.interests.cluster_table import ClusterTable
from recexplore.serving import redis_export
from recexplore.serving.exploration_table import ExplorationTable


def main(arguments: list[str] | None = None) -> int:
    """Exports; returns the exit status, 2 where something given is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--url", default="redis://localhost:6379/0")
    parser.add_argument("--prefix", default=redis_export.PREFIX, help="of all keys")
    parser.add_argument("--keep", type=int, help="versions to keep; all if left out")
    flags = parser.parse_args(arguments)
    try:
        clusters = ClusterTable.read(flags.workdir / pipeline.CLUSTERS).fingerprint
        table = ExplorationTable.open(flags.workdir / pipeline.EXPLORATION, clusters)
        table.check()
        start = time.monotonic()
        with connect(flags.url) as client:
            version = redis_export.export(client, table, flags.prefix)
            removed = []
            if flags.keep is not None:
                removed = redis_export.remove_old(client, flags.keep, flags.prefix)
    except (InputError, redis.RedisError) as error:
        said = f"export_to_redis: {error}"
        whole = {"break_long_words": False, "break_on_hyphens": False}
        print(textwrap.fill(said, 100, **whole), file=sys.stderr)
        return 2
    print(
        f"{flags.prefix}: version {version}, {len(table):,} histories, in "
        f"{time.monotonic() - start:.0f} s; {len(removed)} older versions removed"
    )
    return 0


def connect(url: str) -> redis.Redis:
    """A client of the server that a URL names."""
    try:
        return redis.Redis.from_url(url)
    except ValueError as error:
        raise InputError(f"--url {url} is not a Redis URL ({error}).") from error


if __name__ == "__main__":
    sys.exit(main())
