"""What the trie of allowed outputs costs: time to build, memory on the host and on the device.

python scripts/benchmark_trie.py
python scripts/benchmark_trie.py --counts 1000 20000
"""

import argparse
import time
import tracemalloc

import jax
import numpy as np

from recexplore.models.trie import build_trie

EOS_ID = 1
FIRST_WORD = 2
SHORTEST, LONGEST = 3, 8
ZIPF = 1.3


def main() -> None:
    """Prints a markdown table, a row for each number of descriptions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 20_000, 1_000_000])
    parser.add_argument("--vocab_size", type=int, default=32_000)
    flags = parser.parse_args()
    print("| descriptions | tokens | build, s | host peak, MiB | on the device, MiB |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    for count in flags.counts:
        print(measure(count, flags.vocab_size), flush=True)


def random_descriptions(count: int, vocab_size: int) -> list[list[int]]:
    """Different descriptions of 3 to 8 words, whose frequencies follow Zipf's law, and EOS."""
    random = np.random.default_rng(count)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        lengths = random.integers(SHORTEST, LONGEST + 1, count)
        ranks = random.zipf(ZIPF, (count, LONGEST)) % (vocab_size - FIRST_WORD)
        for words, length in zip((FIRST_WORD + ranks).tolist(), lengths.tolist(), strict=True):
            found.setdefault((*words[:length], EOS_ID))
    return [list(description) for description in found][:count]


def measure(count: int, vocab_size: int) -> str:
    """One row of the table. Memory is traced in a second build, as tracing takes time."""
    descriptions = random_descriptions(count, vocab_size)
    start = time.perf_counter()
    trie = build_trie(descriptions, EOS_ID, vocab_size)
    seconds = time.perf_counter() - start
    tracemalloc.start()
    build_trie(descriptions, EOS_ID, vocab_size)
    host = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    device = sum(array.nbytes for array in jax.tree.leaves(jax.device_put(trie)))
    cells = [f"{count:,}", f"{sum(map(len, descriptions)):,}", f"{seconds:.3g}"]
    cells += [f"{host / 2**20:.1f}", f"{device / 2**20:.2f}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
