"""How fast is best of n, and what memory does it take? recexplore's compiled step beside T5X's way,
on the same weights. Needs t5x (docs/t5x.md).

    t5x, any tokens   `predict_batch_with_aux` with num_decodes = n, then `score_batch` of a second
                      model over the n whole sequences, in one compiled program
    t5x, clusters     the same, drawing descriptions of clusters alone
    independent       recexplore: n independent draws
    distinct          recexplore: n draws without replacement

Each gives the best of n for B prompts and descriptions of T tokens. Both sides run the same linen
modules: T5X's through recexplore.adapters.t5x. Memory is what the compiler says a call needs
besides its arguments and results (temp_size_in_bytes of memory_analysis), at a longer prompt;
nothing is run for it.

    python scripts/benchmark_t5x.py
    python scripts/benchmark_t5x.py --samples 4 --memory_samples 1 4 --rounds 3
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_pair as pairs
import jax
import jax.numpy as jnp
import numpy as np
import seqio
from benchmark_best_of_n import interleaved, keep_freed_memory

from recexplore.adapters import t5x as t5x_models
from recexplore.inference.best_of_n import Batch, BestOfN, Prefixes, explore_step
from recexplore.inference.context import Prompts, prefix_cache
from recexplore.training import objectives

TOLERANCE = 1e-4
DRAWS_ALONE = "t5x, draws alone"  # of the memory, for who scores few sequences at once
T5X = {"t5x, any tokens": {"logit_callback_fn": None}, "t5x, clusters": {}}
OURS = ("independent", "distinct")


class Cell(NamedTuple):
    """What is measured together: n samples, prompts of some tokens, how many of them all share."""

    samples: int
    prompt: int
    shared: int


class Program(NamedTuple):
    """A compiled step and what to call it with, but for the key that comes last."""

    step: Any
    arguments: tuple
    static: dict

    def run(self, round_number: int) -> Any:
        key = jax.random.key(round_number)
        return jax.block_until_ready(self.step(*self.arguments, key, **self.static))

    def temporary_bytes(self) -> int:
        lowered = self.step.lower(*self.arguments, jax.random.key(0), **self.static)
        return lowered.compile().memory_analysis().temp_size_in_bytes


def main() -> None:
    """Measures times, then memory, and prints both tables."""
    flags = parse_flags()
    keep_freed_memory()
    longest = max(flags.prompt, flags.memory_prompt) + flags.length
    pair = pairs.random_pair(pairs.preset("small", flags.vocab_size, longest, "float32"), seed=0)
    count = sum(leaf.size for leaf in jax.tree.leaves(pair.novelty_params))
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {count / 1e6:.1f} M parameters")
    print(f"largest difference of scores and log-probabilities: {agreement(flags, pair):.1e}")
    cells = [Cell(n, flags.prompt, s) for n in flags.samples for s in flags.shared]
    seconds = {cell: times(flags, pair, cell) for cell in cells}
    print("\n".join(time_table(flags, seconds)), flush=True)
    cells = [Cell(n, flags.memory_prompt, flags.shared[0]) for n in flags.memory_samples]
    memory = {cell: temporary_bytes(flags, pair, cell) for cell in cells}
    print("\n".join(memory_table(flags, memory)))
    if flags.output:
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        found = {
            "flags": vars(flags) | {"output": str(flags.output)},
            "seconds": [cell._asdict() | {"of": rounds} for cell, rounds in seconds.items()],
            "temporary bytes": [cell._asdict() | {"of": sizes} for cell, sizes in memory.items()],
        }
        flags.output.write_text(json.dumps(found, indent=2))


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--batch", type=int, default=8, help="B")
    add("--samples", type=int, nargs="+", default=[16, 64], help="n of the times")
    add("--prompt", type=int, default=96, help="tokens, of the times")
    add("--shared", type=int, nargs="+", default=[1, 48], help="first tokens alike in all prompts")
    add("--memory_samples", type=int, nargs="+", default=[1, 16, 64], help="n of the memory")
    add("--memory_prompt", type=int, default=512, help="tokens, of the memory")
    add("--length", type=int, default=8, help="T, at least 4")
    add("--num_clusters", type=int, default=1000, help="M")
    add("--vocab_size", type=int, default=4096, help="V")
    add("--rounds", type=int, default=3, help="of the times, at least 3")
    add("--output", type=Path, help="JSON of what was measured")
    flags = parser.parse_args()
    shortest = min(flags.prompt, flags.memory_prompt)
    if not 1 <= min(flags.shared) <= max(flags.shared) < shortest:
        parser.error(f"--shared must be between 1 and {shortest - 1}: prompts end apart")
    return flags


def inputs_for(flags: argparse.Namespace, pair: pairs.Pair, cell: Cell) -> pairs.Inputs:
    """Prompts that share their first tokens: one in recexplore's own prompts of any histories; as
    many as the oldest cluster has in those that bulk inference puts together."""
    return pairs.random_inputs(
        flags.batch,
        cell.shared,
        cell.prompt - cell.shared,
        flags.num_clusters,
        pair.config.vocab_size,
    )


def trie_of(flags: argparse.Namespace, pair: pairs.Pair) -> Any:
    vocab_size = pair.config.vocab_size
    descriptions = pairs.cluster_descriptions(
        "hierarchy", flags.num_clusters, flags.length, vocab_size
    )
    return pairs.build_trie(descriptions, pairs.EOS_ID, vocab_size)


def programs(
    flags: argparse.Namespace, pair: pairs.Pair, cell: Cell
) -> Iterator[tuple[str, Program]]:
    """All methods by name."""
    inputs, trie = inputs_for(flags, pair, cell), trie_of(flags, pair)
    for name, decoding in T5X.items():
        yield name, t5x_program(flags, pair, inputs, trie, cell.samples, decoding)
    for sampler in OURS:
        yield sampler, our_program(pair, inputs, trie, cell.samples, sampler)


def t5x_batch(flags, inputs: pairs.Inputs, trie: Any) -> dict[str, np.ndarray]:
    """Prompts with room for a description, as T5X's models get them."""
    batch, history = inputs.histories.shape
    shared = np.broadcast_to(inputs.prefix, (batch, len(inputs.prefix)))
    prompt = shared.shape[1] + history
    tokens = np.zeros((batch, prompt + flags.length), np.int32)
    tokens[:, :prompt] = np.concatenate([shared, inputs.histories], axis=1)
    seen = np.zeros((batch, trie.num_sequences), bool)
    seen[np.arange(batch)[:, None], inputs.clusters] = True
    return {
        "tokens": tokens,
        "prompt_lengths": np.full(batch, prompt, np.int32),
        "lengths": np.full(batch, prompt + flags.length, np.int32),
        "seen": seen,
        "label": np.zeros(batch, np.float32),
        "weight": np.ones(batch, np.float32),
    }


def novelty_of(pair: pairs.Pair, trie: Any) -> t5x_models.NoveltyModel:
    return t5x_models.NoveltyModel(
        pair.novelty_model, *_said_of(pair, trie), objectives.constrained_description_loss
    )


def _said_of(pair: pairs.Pair, trie: Any) -> tuple:
    """Vocabularies, descriptions and no optimizer."""
    words = seqio.PassThroughVocabulary(pair.config.vocab_size, eos_id=pairs.EOS_ID)
    return words, words, trie, None


def draw_options(flags: argparse.Namespace, decoding: dict) -> dict:
    """T5X's decoder parameters: from the whole distribution, at temperature 1."""
    steps = {"max_decode_steps": flags.length}
    return {"topk": 0, "rescale_log_probs": False, **steps, **decoding}


def draw(model: t5x_models.NoveltyModel, params, batch, key, samples: int, options: dict):
    """T5X's draws [B, n, …] and their log-probabilities."""
    return model.predict_batch_with_aux(
        params,
        batch,
        jax.random.key_data(key),
        return_all_decodes=True,
        num_decodes=samples,
        decoder_params=dict(options),
    )


def t5x_program(flags, pair, inputs, trie, samples: int, decoding: dict) -> Program:
    """T5X's best of n: draws, the n whole sequences, their scores, the best of each prompt."""
    novelty, options = novelty_of(pair, trie), draw_options(flags, decoding)
    alignment = t5x_models.AlignmentModel(
        pair.alignment_model, *_said_of(pair, trie), objectives.pointwise_loss
    )

    @jax.jit
    def step(novelty_params, alignment_params, batch, key):
        drawn, aux = draw(novelty, novelty_params, batch, key, samples, options)
        prompt = batch["tokens"].shape[1] - flags.length
        drawn = drawn[:, :, : flags.length]
        before = jnp.repeat(batch["tokens"][:, None, :prompt], samples, axis=1)
        whole = jnp.concatenate([before, drawn], axis=2).reshape(-1, prompt + flags.length)
        each = {name: jnp.repeat(rows, samples, axis=0) for name, rows in batch.items()}
        scores = alignment.score_batch(alignment_params, {**each, "tokens": whole})
        scores = scores.reshape(-1, samples)
        best = jnp.argmax(scores, axis=1)[:, None]
        return (
            jnp.take_along_axis(drawn, best[..., None], axis=1)[:, 0],
            jnp.take_along_axis(scores, best, axis=1)[:, 0],
            jnp.take_along_axis(aux["scores"], best, axis=1)[:, 0],
        )

    params = (pair.novelty_params["params"], pair.alignment_params["params"])
    return Program(step, (*params, jax.device_put(t5x_batch(flags, inputs, trie))), {})


def draws_alone(flags: argparse.Namespace, pair: pairs.Pair, cell: Cell) -> Program:
    """T5X's draws without scores."""
    inputs, trie = inputs_for(flags, pair, cell), trie_of(flags, pair)
    whole = t5x_program(flags, pair, inputs, trie, cell.samples, T5X["t5x, any tokens"])
    novelty_params, _, batch = whole.arguments
    model, options = novelty_of(pair, trie), draw_options(flags, {"logit_callback_fn": None})

    @jax.jit
    def step(params, batch, key):
        return draw(model, params, batch, key, cell.samples, options)

    return Program(step, (novelty_params, batch), {})


def our_program(pair, inputs, trie, samples: int, sampler: str) -> Program:
    """`explore_step`, the shared token read before, as `launch.Ready` does."""
    prefix = jnp.asarray(inputs.prefix)
    prefixes = Prefixes(
        prefix_cache(pair.novelty_model, pair.novelty_params, prefix),
        prefix_cache(pair.alignment_model, pair.alignment_params, prefix),
    )
    size, length = inputs.histories.shape
    prompts = Prompts(inputs.histories, np.full(size, length, np.int32))
    batch = Batch(prompts, prompts, inputs.clusters, np.full((size, 1), -1, np.int32))
    settings = BestOfN(num_samples=samples, num_chosen=1, sampler=sampler, temperature=1.0)
    arguments = (pair.novelty_params, pair.alignment_params, prefixes)
    static = {
        "settings": settings,
        "novelty_model": pair.novelty_model,
        "alignment_model": pair.alignment_model,
    }
    return Program(explore_step, (*arguments, *jax.device_put((trie, batch))), static)


def agreement(flags: argparse.Namespace, pair: pairs.Pair) -> float:
    """The largest difference between what T5X and the step say of the clusters that T5X chose.

    Raises:
      SystemExit: it is too large for a comparison to mean anything, or T5X chose no cluster.
    """
    inputs = inputs_for(flags, pair, Cell(4, flags.prompt, flags.shared[0]))
    trie = trie_of(flags, pair)
    drawn, scores, logs = t5x_program(flags, pair, inputs, trie, 4, {}).run(0)
    sequences = {tuple(row): cluster for cluster, row in enumerate(trie.sequences.tolist())}
    chosen = [sequences.get(tuple(row)) for row in np.asarray(drawn).tolist()]
    if None in chosen:
        raise SystemExit("T5X drew what is no cluster's description.")
    found = _ours_of(pair, inputs, trie, np.asarray(chosen))
    difference = max(float(np.abs(found[0] - scores).max()), float(np.abs(found[1] - logs).max()))
    if not difference <= TOLERANCE:
        raise SystemExit(f"Both sides differ by {difference:.2g}, more than {TOLERANCE:g}.")
    return difference


def _ours_of(pair, inputs, trie, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """recexplore's score and log-probability of one cluster each, by the exhaustive sampler."""
    program = our_program(pair, inputs, trie, trie.num_sequences, "exhaustive")
    tree = jax.device_put(pairs.build_tree(trie))
    explored = Program(program.step, program.arguments, {**program.static, "tree": tree}).run(0)
    rows = [
        np.flatnonzero(np.asarray(row) == cluster)[0]
        for row, cluster in zip(explored.draws.clusters, clusters, strict=True)
    ]
    at = np.arange(len(rows)), np.asarray(rows)
    return np.asarray(explored.draw_scores)[at], np.asarray(explored.draws.log_probabilities)[at]


def times(flags: argparse.Namespace, pair: pairs.Pair, cell: Cell) -> dict[str, list[float]]:
    """Seconds of every method in every round, in turns; compiled before."""
    runs: dict[str, Callable] = {n: program.run for n, program in programs(flags, pair, cell)}
    for run in runs.values():
        run(0)
    return interleaved(runs, 0.0, flags.rounds)


def temporary_bytes(flags: argparse.Namespace, pair: pairs.Pair, cell: Cell) -> dict[str, int]:
    """What a call of every method needs, and of T5X's draws alone."""
    made = {name: program.temporary_bytes() for name, program in programs(flags, pair, cell)}
    return made | {DRAWS_ALONE: draws_alone(flags, pair, cell).temporary_bytes()}


def time_table(flags: argparse.Namespace, seconds: dict[Cell, dict]) -> Iterator[str]:
    """Decisions per second, and how many times as many as T5X's faster way."""
    yield f"\nB = {flags.batch}, prompts of {flags.prompt} tokens: decisions per second (ratio)"
    yield from _table(
        {
            cell: {name: flags.batch / np.median(values) for name, values in rows.items()}
            for cell, rows in seconds.items()
        },
        "{:.2f}".format,
        lambda ours, theirs: ours / max(theirs),
    )


def memory_table(flags: argparse.Namespace, memory: dict[Cell, dict]) -> Iterator[str]:
    """Temporary megabytes, and T5X's leaner way's over ours."""
    yield f"\nB = {flags.batch}, prompts of {flags.memory_prompt} tokens: temporary MB (ratio)"
    yield from _table(
        {cell: {name: size / 1e6 for name, size in rows.items()} for cell, rows in memory.items()},
        "{:.0f}".format,
        lambda ours, theirs: min(theirs) / ours,
    )


def _table(rows: dict[Cell, dict], shown: Callable, ratio: Callable) -> Iterator[str]:
    first = next(iter(rows.values()))
    beside = [name for name in (*T5X, DRAWS_ALONE) if name in first]
    names = [*beside, *OURS]
    yield f"| n | shared tokens | {' | '.join(names)} |"
    yield f"|{' --- |' * (len(names) + 2)}"
    for cell, values in rows.items():
        theirs = [values[name] for name in T5X]
        cells = [shown(values[name]) for name in beside]
        for name in OURS:
            cells.append(f"{shown(values[name])} ({ratio(values[name], theirs):.1f}×)")
        yield f"| {cell.samples} | {cell.shared} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
