"""Examples that share rows train a model as those in rows of their own do."""

import dataclasses

import numpy as np
import pytest
from copying_task import CONFIG, curve, run

from recexplore.models.transformer import Transformer
from recexplore.tasks import rows

# clu and orbax bring warnings of their own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


class Dealt:
    """Sixteen examples a batch, one in each row, or up to three in each of eight."""

    def __init__(self, packed):
        self.batch_size, self._packed = (8 if packed else 16), packed

    def training(self, local):
        return _DealtBatches(local, self._packed)

    def validation(self, local):
        return [next(_DealtBatches(local, self._packed))]


class _DealtBatches:
    def __init__(self, local, packed):
        self._local, self._packed, self._step = local, packed, 0

    def __next__(self):
        random = np.random.default_rng(self._step)
        self._step += 1
        lengths = random.integers(1, 5, 16)
        prompts = random.integers(2, 6, (16, 4))
        prompts[np.arange(4) >= lengths[:, None]] = rows.NOTHING
        last = prompts[np.arange(16), lengths - 1]
        examples = {
            "inputs": prompts,
            "targets": np.stack([last, np.ones(16, int)], axis=1),
            "seen": np.where(last == 2, 1, rows.NOTHING)[:, None],
            "label": random.random(16).astype(np.float32),
            "weight": random.choice([0.5, 1.0, 7.0], 16).astype(np.float32),
        }
        if self._packed:
            grid = np.full((8, 3), rows.ABSENT)
            grid[np.arange(3) < np.array([[2], [3], [3], [1], [2], [2], [2], [1]])] = np.arange(16)
            made = rows.packed_rows(examples, grid, rows.Shape(20, 4, 0, 4))
        else:
            made = rows.single_rows(examples, np.arange(16)[:, None], rows.Shape(6, 4, 0, 4))
        return {name: values[self._local] for name, values in made.items()}

    def position(self):
        return {"step": self._step}

    def move_to(self, position):
        self._step = position["step"]


def test_packed_rows_train_like_single_ones(tmp_path):
    for packed in (False, True):
        run(
            tmp_path / str(packed),
            steps=2,
            data=Dealt(packed),
            model=Transformer(dataclasses.replace(CONFIG, dropout_rate=0.0, max_length=20)),
            evaluate_every=2,
            log_every=1,
        )
    names = ("loss", "validation_loss", "validation_accuracy", "gradient_norm", "accuracy")
    packed, single = (curve(tmp_path / str(packed), names) for packed in (True, False))
    assert len(single) == 2 * 3 + 2
    assert packed == pytest.approx(single, rel=1e-5)
    of_padding = {name: curve(tmp_path / name, ["padding_fraction"]) for name in ("True", "False")}
    assert of_padding["True"][2, "padding_fraction"] == pytest.approx(0.5, abs=0.2)
