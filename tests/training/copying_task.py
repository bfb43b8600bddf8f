"""A task that a small transformer learns in seconds: the answer is the prompt's last token."""

import json

import numpy as np

from recexplore.models.transformer import Transformer, TransformerConfig
from recexplore.models.trie import build_trie
from recexplore.training import objectives, trainer
from recexplore.training.optimization import Optimization

TRIE = build_trie([[token, 1] for token in range(2, 6)], 1, 8)
CONFIG = TransformerConfig(
    vocab_size=8,
    num_layers=2,
    model_dim=16,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    max_length=6,
    dropout_rate=0.1,
)


class Batches:
    """Endless batches that know their position; some of each one's rows."""

    def __init__(self, rows, size, poison_at=None, before=lambda step: None):
        self._rows, self._size, self._poison_at, self._before = rows, size, poison_at, before
        self._step = 0

    def __next__(self):
        self._before(self._step)
        random = np.random.default_rng(self._step)
        self._step += 1
        prompt = random.integers(2, 6, (self._size, 3))
        tokens = np.concatenate(
            [prompt, prompt[:, -1:], np.ones((self._size, 1), int)], axis=1
        ).astype(np.int32)
        weight = np.ones(self._size, np.float32)
        if self._step == self._poison_at:
            weight[:] = np.inf
        whole = {
            "tokens": tokens,
            "prompt_lengths": np.full(self._size, 3, np.int32),
            "lengths": np.full(self._size, 5, np.int32),
            "seen": np.zeros((self._size, 4), bool),
            "label": np.zeros(self._size, np.float32),
            "weight": weight,
            "example_id": np.arange(self._size) + 100 * self._step,
        }
        return {name: array[self._rows] for name, array in whole.items()}

    def position(self):
        return {"step": self._step}

    def move_to(self, position):
        self._step = position["step"]


class Copying:
    """Training and validation batches of 16 rows."""

    batch_size = 16

    def __init__(self, **options):
        self._options = options

    def training(self, rows):
        return Batches(rows, self.batch_size, **self._options)

    def validation(self, rows):
        return [next(Batches(rows, self.batch_size))]


def some_batch():
    """One whole batch."""
    return next(Batches(np.arange(Copying.batch_size), Copying.batch_size))


def run(folder, steps=60, data=None, model=None, optimization=None, **options):
    """Trains a little."""
    return trainer.train(
        folder,
        model or Transformer(CONFIG),
        objectives.constrained_description_loss,
        TRIE,
        data or Copying(),
        lambda *_, **__: None,
        optimization=Optimization(**{"steps": steps, "learning_rate": 1e-2} | (optimization or {})),
        **{"evaluate_every": 20, "log_every": 10, **options},
    )


def curve(folder, names=("loss", "validation_loss")):
    """(step, name) → figure, as metrics.jsonl has them."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(r["step"], name): r[name] for r in lines for name in names if name in r}
