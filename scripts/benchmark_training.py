"""One step of training beside transformers and torch's AdamW, on the same weights and shapes.

    pip install -e '.[bench]'   # on a machine without a GPU install the CPU build of torch first
    python scripts/benchmark_training.py

Both sides learn to answer prompts with descriptions, in float32, without dropout: the loss is the
cross-entropy of the description's tokens, over the whole vocabulary. transformers is used as in any
tutorial: labels of -100 on the prompt, gradients clipped, `torch.optim.AdamW`. Losses are compared
before anything is timed. The sides take turns, so that a busy moment of the machine hits both.
"""

import argparse
import ast
import functools
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from recexplore.aot import some_trie
from recexplore.configuration import Configuration
from recexplore.distributed import partitioning
from recexplore.distributed.devices import peak_flops
from recexplore.models import pretrained
from recexplore.models.transformer import Transformer, TransformerConfig
from recexplore.training import objectives
from recexplore.training.optimization import Optimization
from recexplore.training.program import Program

try:
    import torch
    from transformers import AutoModelForCausalLM
except ImportError as error:
    raise SystemExit(
        f"The transformers side of this benchmark needs torch and transformers ({error}). "
        "Install them: pip install 'recexplore[bench]'"
    ) from error

CLUSTERS, DESCRIPTION, LEARNING_RATE = 1000, 8, 1e-4


class Ours:
    """recexplore's training step.

    Args:
      config: of the network.
      batch: trained on again and again.
    """

    def __init__(self, config: TransformerConfig, batch: dict[str, np.ndarray]):
        optimization = Optimization(steps=1000, learning_rate=LEARNING_RATE, average_decay=0.0)
        objective = functools.partial(objectives.next_description_loss, label_smoothing=0.0)
        mesh = partitioning.make_mesh()
        self._program = Program(Transformer(config), objective, optimization, mesh)
        self._state = self._program.initialize(seed=0)
        trie = some_trie(CLUSTERS, DESCRIPTION, config.vocab_size)
        self._batch = partitioning.put_batch(batch, len(batch["tokens"]), mesh)
        self._trie = jax.device_put(trie, self._program.everywhere)
        self.flops = self._program.flops(self._batch, trie)

    def params(self):
        """The parameters, as they are now."""
        return jax.device_get(self._state.params)

    def step(self) -> float:
        """Trains once; the loss for each token."""
        self._state, metrics = self._program.step(self._state, {}, self._batch, self._trie)
        return float(metrics["loss"]) / DESCRIPTION


class Theirs:
    """transformers' model and torch's AdamW.

    Args:
      folder: the weights.
      batch: trained on again and again.
    """

    def __init__(self, folder: Path, batch: dict[str, np.ndarray]):
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=LEARNING_RATE, weight_decay=0.1
        )
        tokens = torch.tensor(batch["tokens"], dtype=torch.long)
        labels = tokens.clone()
        labels[:, :-DESCRIPTION] = -100
        self._batch = {"input_ids": tokens, "labels": labels}

    def step(self) -> float:
        """Trains once; the loss for each token."""
        loss = self._model(**self._batch).loss
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        return float(loss.detach())


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/small.gin", help="of gin_configs")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--vocab", type=int, nargs="+", default=[1024, 32_000])
    parser.add_argument("--rounds", type=int, default=9)
    flags = parser.parse_args()
    peak = peak_flops(jax.devices())
    print(f"matrix products: {peak / 1e9:.0f} Gflop/s, float32, measured")
    print(f"B={flags.batch}, T={flags.length}, {Path(flags.model).stem}")
    for vocab in flags.vocab:
        _compare(flags, vocab, peak)


def _compare(flags: argparse.Namespace, vocab: int, peak: float) -> None:
    config = _config(flags.model, vocab, flags.length)
    batch = _batch(flags.batch, flags.length, vocab)
    ours = Ours(config, batch)
    with tempfile.TemporaryDirectory() as folder:
        pretrained.save(Path(folder) / "model", ours.params(), config)
        theirs = Theirs(Path(folder) / "model", batch)
    losses = ours.step(), theirs.step()
    if abs(losses[0] - losses[1]) > 1e-3 * losses[1]:
        raise SystemExit(f"The losses of both sides differ: {losses}.")
    ours.step(), theirs.step()
    times = {"recexplore": [], "transformers": []}
    for _ in range(flags.rounds):
        for name, side in (("recexplore", ours), ("transformers", theirs)):
            start = time.perf_counter()
            side.step()
            times[name].append(time.perf_counter() - start)
    tokens = batch["tokens"].size
    seconds = {name: statistics.median(found) for name, found in times.items()}
    print(f"\nvocabulary of {vocab:,}: first losses {losses[0]:.5f} and {losses[1]:.5f}")
    for name, second in seconds.items():
        print(f"  {name:<13} {tokens / second:8,.0f} tokens/s  {1e3 * second:7.1f} ms a step")
    print(f"  ratio tokens/s V={vocab} {seconds['transformers'] / seconds['recexplore']:.2f}")
    share = ours.flops / seconds["recexplore"] / peak
    print(f"  share of the matrix-product rate V={vocab} {100 * share:.0f} %")


def _config(model: str, vocab: int, length: int) -> TransformerConfig:
    configuration = Configuration(["ahead.gin", model])
    bindings = configuration.reachable_from("recexplore.aot.training_step", "train")
    prefix = "recexplore.models.transformer.TransformerConfig."
    sizes = {
        name.removeprefix(prefix): ast.literal_eval(value)
        for name, value in bindings.items()
        if name.startswith(prefix)
    }
    chosen = {"vocab_size": vocab, "max_length": length, "dropout_rate": 0.0, "dtype": "float32"}
    return TransformerConfig(**sizes | chosen)


def _batch(batch: int, length: int, vocab: int) -> dict[str, np.ndarray]:
    """Rows without padding: random prompts, and descriptions drawn from the clusters."""
    random = np.random.default_rng(0)
    trie = some_trie(CLUSTERS, DESCRIPTION, vocab)
    prompts = random.integers(2, vocab, (batch, length - DESCRIPTION))
    answers = np.asarray(trie.sequences)[random.integers(0, CLUSTERS, batch)]
    return {
        "tokens": np.concatenate([prompts, answers], axis=1).astype(np.int32),
        "prompt_lengths": np.full(batch, length - DESCRIPTION, np.int32),
        "lengths": np.full(batch, length, np.int32),
        "seen": np.zeros((batch, CLUSTERS), bool),
        "label": np.zeros(batch, np.float32),
        "weight": np.ones(batch, np.float32),
    }


if __name__ == "__main__":
    main()
