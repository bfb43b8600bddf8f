"""How fast are all pairs of clusters explored? Grouped and streamed, beside one batch at a time.

    one at a time   random histories; every prompt is read whole, instruction and all; a batch is
                    prepared, run and fetched before the next
    shared prefix   the same, but what all prompts begin with is read once and for all
    grouped         `grouping.deal` and `bulk.stream`: histories with the same first cluster go
                    together, what they begin with is read once; nothing waits for a result

All three run the same compiled step, `best_of_n.explore_step`, on the same weights, in turns. With
--all every pair is explored, grouped, and the process's memory is watched.

    python scripts/benchmark_bulk.py
    python scripts/benchmark_bulk.py --all
"""

import argparse
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import benchmark_pair as pairs
import jax
import numpy as np

from recexplore.inference.best_of_n import Batch, BestOfN
from recexplore.inference.bulk import stream
from recexplore.inference.context import Prompts
from recexplore.inference.grouping import deal, share
from recexplore.inference.launch import Model, Ready, pad_columns
from recexplore.models.trie import build_trie

SEPARATOR, ASK_NOVELTY, ASK_ALIGNMENT, FIRST_WORD = 2, 3, 4, 8


def main() -> None:
    """Measures and prints."""
    flags = parse_flags()
    bench = Bench(flags)
    if flags.all:
        bench.explore_all()
    else:
        bench.compare()


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--all", action="store_true", help="every pair, once, with its memory")
    add("--num_clusters", type=int, default=240, help="M")
    add("--samples", type=int, default=16, help="n, distinct")
    add("--chosen", type=int, default=5, help="k")
    add("--batch", type=int, default=64, help="histories a call, at most")
    add("--prefix", type=int, default=64, help="P, tokens of the instruction")
    add("--length", type=int, default=8, help="T, tokens of a description, EOS included")
    add("--vocab_size", type=int, default=4096, help="V")
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=1e9, help="for --all: stop after so long")
    add("--groups", type=int, default=2, help="first clusters a round")
    return parser.parse_args()


class Bench:
    """Models, clusters, histories, and the ways to explore them."""

    def __init__(self, flags: argparse.Namespace):
        self._flags = flags
        self._random = np.random.default_rng(0)
        words = self._random.integers(FIRST_WORD, flags.vocab_size, flags.prefix)
        self._prefix = words.tolist()
        shape = "hierarchy" if flags.length >= 4 else "words"
        self._descriptions = self._describe(shape)
        longest = flags.prefix + 2 * flags.length + 1 + flags.length
        config = pairs.preset("small", flags.vocab_size, longest, "float32")
        pair = pairs.random_pair(config, seed=0)
        models = (
            Model(pair.novelty_model, pair.novelty_params),
            Model(pair.alignment_model, pair.alignment_params),
        )
        trie = build_trie(self._descriptions, pairs.EOS_ID, flags.vocab_size)
        self._ready = Ready(*models, (self._prefix, self._prefix), trie)
        self._alone = Ready(*models, (self._prefix[:1], self._prefix[:1]), trie)
        self._settings = BestOfN(flags.samples, flags.chosen, "distinct")
        self._key = jax.random.key(0)
        count = flags.num_clusters
        pairs_ = [[a, b] for a in range(count) for b in range(count) if a != b]
        self._histories = np.array(pairs_, np.int32)

    def _describe(self, shape: str) -> list[list[int]]:
        flags = self._flags
        if shape == "hierarchy":
            found = pairs.cluster_descriptions(
                shape, flags.num_clusters, flags.length, flags.vocab_size - FIRST_WORD
            )
            lift = FIRST_WORD - pairs.EOS_ID - 1
            return [[*(t + lift for t in row[:-1]), pairs.EOS_ID] for row in found]
        return [[FIRST_WORD + i, pairs.EOS_ID] for i in range(flags.num_clusters)]

    def _batch(self, histories: np.ndarray, before: Sequence[int] = ()) -> Batch:
        """Prompts after `before` in numpy, as an explorer writes them."""
        listed = [
            [*before, *itertools.chain(*([*self._descriptions[c][:-1], SEPARATOR] for c in row))]
            for row in histories.tolist()
        ]
        both = []
        for ask in (ASK_NOVELTY, ASK_ALIGNMENT):
            tokens = np.array([[*row, ask] for row in listed], np.int32)
            both.append(Prompts(tokens, np.full(len(tokens), tokens.shape[1], np.int32)))
        return Batch(*both, histories, np.full((len(histories), 0), -1, np.int32))

    def one_at_a_time(self, histories: np.ndarray, shared: bool) -> None:
        ready, before = (self._ready, ()) if shared else (self._alone, self._prefix[1:])
        for start in range(0, len(histories), self._flags.batch):
            some = histories[start : start + self._flags.batch]
            index = np.minimum(np.arange(self._flags.batch), len(some) - 1)
            batch = pad_columns(self._batch(some[index], before))
            jax.device_get(ready.launch(batch, self._key, self._settings))

    def grouped(self, histories: np.ndarray, take: Callable = lambda *_: None):
        latest: list = [None, None]

        def prepared() -> Iterator:
            for rows in deal(histories, self._flags.batch):
                yield share(self._batch(histories[rows]), self._prefix, self._flags.batch)

        def launch(grouped):
            said = [prompt.tokens.tobytes() for prompt in grouped.beginnings]
            if latest[0] != said:
                latest[:] = said, self._ready.read(grouped.beginnings)
            return self._ready.launch(grouped.batch, self._key, self._settings, latest[1])

        return stream(prepared(), launch, take)

    def explore_all(self) -> None:
        """Every pair, until the time is up, and how the memory goes meanwhile."""
        flags, start = self._flags, time.monotonic()
        memory: list[tuple[float, float]] = []
        done = 0

        def watch() -> None:
            while not over.wait(1.0):
                memory.append((time.monotonic() - start, _resident()))

        def take(grouped, found) -> None:
            nonlocal done
            done += grouped.rows
            if len(found.clusters) and time.monotonic() - start > flags.seconds:
                raise TimeoutError

        over = threading.Event()
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            times = self.grouped(self._histories, take)
            print(f"the device was busy {times.utilisation:.1%} of the time; {times}")
        except TimeoutError:
            pass
        finally:
            over.set()
            watcher.join()
        took = time.monotonic() - start
        later = [size for when, size in memory if when >= min(60.0, took / 2)]
        print(
            f"{done:,} of {len(self._histories):,} histories in {took:.0f} s; resident memory "
            f"after a minute {later[0]:.0f} MiB, then {min(later):.0f} to {max(later):.0f}, at the "
            f"end {later[-1]:.0f}"
        )

    def compare(self) -> None:
        flags = self._flags
        each = flags.num_clusters - 1
        ways = {
            "one at a time": lambda rows, random: self.one_at_a_time(random, shared=False),
            "shared prefix": lambda rows, random: self.one_at_a_time(random, shared=True),
            "grouped": lambda rows, random: self.grouped(rows),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for round_ in range(flags.rounds + 1):  # the first compiles
            start = self._random.integers(0, flags.num_clusters - flags.groups + 1) * each
            rows = self._histories[start : start + flags.groups * each]
            random = self._random.permutation(self._histories)[: len(rows)]
            for name, way in ways.items():
                began = time.monotonic()
                way(rows, random)
                if round_:
                    seconds[name].append(time.monotonic() - began)
        print(
            f"{len(rows):,} histories a round, {flags.rounds} rounds, n = {flags.samples}, "
            f"P = {flags.prefix}, T = {flags.length}, batches of {flags.batch}"
        )
        slowest = np.array(seconds["one at a time"])
        for name, took in seconds.items():
            ratio = np.median(slowest / np.array(took))
            print(f"{name:14} {len(rows) / np.median(took):8.1f} histories a second  {ratio:5.2f}x")


def _resident() -> float:
    """MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
