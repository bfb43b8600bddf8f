"""The item recommender is trained by the same trainer: it learns, and a killed run goes on."""

import jax
import numpy as np
import pytest
from copying_task import curve

from recexplore.models import saved
from recexplore.models.sequential_recommender import SequentialRecommender, recommender_config
from recexplore.training import item_objectives, trainer
from recexplore.training.optimization import Optimization

# clu and orbax bring warnings of their own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
ITEMS, T = 20, 5
MODEL = SequentialRecommender(
    recommender_config(ITEMS, T, model_dim=16, num_heads=2, mlp_dim=16, dropout_rate=0.1)
)
EVEN = np.full(ITEMS, 1 / ITEMS)
CATALOGUE = item_objectives.make_catalogue(np.arange(ITEMS) % 4, EVEN, EVEN)


class Counting:
    """Sequences that count upwards; batches know their place."""

    batch_size = 16

    def __init__(self, killed_at=None):
        self._step, self._killed_at = 0, killed_at

    def training(self, rows):
        self._rows = rows
        return self

    def validation(self, rows):
        other = Counting().training(rows)
        return [next(other)]

    def __next__(self):
        if self._step == self._killed_at:
            raise KeyboardInterrupt
        first = np.random.default_rng(self._step).integers(0, ITEMS, (self.batch_size, 1))
        self._step += 1
        items = ((first + np.arange(T + 1)) % ITEMS).astype(np.int32)[self._rows]
        return {
            "tokens": items[:, :-1],
            "targets": items,
            "lengths": np.full(len(items), T, np.int32),
            "example_id": np.arange(len(items)),
        }

    def position(self):
        return {"step": self._step}

    def move_to(self, position):
        self._step = position["step"]


def run(folder, killed_at=None):
    return trainer.train(
        folder,
        MODEL,
        item_objectives.next_item_loss,
        CATALOGUE,
        Counting(killed_at),
        lambda *_, **__: None,
        optimization=Optimization(steps=60, learning_rate=3e-2, average_decay=0.9),
        choose_by=item_objectives.next_in_cluster_loss,
        evaluate_every=20,
        log_every=10,
    )


def test_it_learns_and_a_killed_run_goes_on_bit_for_bit(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", killed_at=37)
    assert run(tmp_path / "killed") == whole
    names = ("loss", "validation_loss", "validation_choice")
    assert curve(tmp_path / "killed", names) == curve(tmp_path / "whole", names)
    first, second = (saved.load_parameters(tmp_path / n, MODEL) for n in ("whole", "killed"))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    choices = curve(tmp_path / "whole", ["validation_choice"])
    assert whole.best_validation == min(choices.values()) < 0.7 * np.log(ITEMS / 4)
