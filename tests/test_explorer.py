"""Trained models asked about histories: how much of a long one each reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recexplore import artifacts
from recexplore.distributed.checkpoints import Checkpoints
from recexplore.explorer import NETWORK, Explorer, load_model
from recexplore.inference.grouping import deal
from recexplore.inference.launch import Model
from recexplore.inference.selection import BestOfN
from recexplore.models import saved
from recexplore.models.reward_model import RewardModel
from recexplore.models.transformer import Transformer, TransformerConfig
from recexplore.tasks.prompts import alignment_prompt
from recexplore.tasks.vocabulary import Vocabulary, train_vocabulary

DESCRIPTIONS = ["space opera", "slow cooking", "crime drama", "chess", "jazz", "home gardens"]
LONG = [0, 1, 2, 3]

# orbax brings warnings of its own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    prompts = [alignment_prompt([a, b]) for a in DESCRIPTIONS for b in DESCRIPTIONS]
    train_vocabulary(folder, prompts, DESCRIPTIONS, size=60, whole_descriptions=False)
    return Vocabulary(folder)


@pytest.fixture(scope="module")
def models(vocabulary):
    """A pair that looks far back; their rows would have room for much longer histories."""
    sizes = dict.fromkeys(("num_layers", "num_heads", "num_kv_heads"), 1)
    config = TransformerConfig(
        vocab_size=vocabulary.embedding_rows,
        model_dim=8,
        head_dim=4,
        mlp_dim=8,
        max_length=128,
        **sizes,
    )
    found, random = {}, np.random.default_rng(0)
    for name, network in (("novelty", Transformer(config)), ("alignment", RewardModel(config))):
        params = jax.tree.map(
            lambda x: jnp.asarray(random.standard_normal(x.shape), x.dtype),
            saved.abstract_parameters(network),
        )
        found[name] = Model(network, params)
    return found


@pytest.fixture(scope="module")
def explorer(vocabulary):
    return Explorer(vocabulary, DESCRIPTIONS, batch_size=4)


def test_a_model_reads_as_many_clusters_as_it_was_trained_for(explorer, models):
    alignment = models["alignment"]
    short, whole = explorer.scores(alignment, [LONG[-2:], LONG])
    assert np.abs(short - whole).max() > 0.01  # an older model reads all that it has room for
    for length, history in ((2, LONG[-2:]), (3, LONG[-3:])):
        found = explorer.scores(alignment._replace(history_length=length), [LONG])
        np.testing.assert_allclose(found, explorer.scores(alignment, [history]), rtol=1e-4)
    excluded = np.zeros((1, 1, len(DESCRIPTIONS)), bool)
    cut = explorer.log_probabilities(models["novelty"]._replace(history_length=2), [LONG], excluded)
    wanted = explorer.log_probabilities(models["novelty"], [LONG[-2:]], excluded)
    np.testing.assert_allclose(cut, wanted, rtol=1e-4)


def test_what_a_model_does_not_read_is_not_proposed_either(explorer, models):
    pair = [model._replace(history_length=2) for model in models.values()]
    settings = BestOfN(num_samples=2, num_chosen=2, sampler="exhaustive")
    found = explorer.explore(*pair, [LONG], [[]], settings, seed=0)
    assert sorted(found.clusters[0].tolist()) == [4, 5]
    (scores,) = explorer.scores(models["alignment"], [LONG[-2:]])
    np.testing.assert_allclose(found.scores[0], scores[found.clusters[0]], rtol=1e-4)


@pytest.mark.parametrize("length", [2, None])
def test_a_folder_says_how_long_histories_were(length, models, vocabulary, tmp_path):
    network, params, _ = models["alignment"]
    checkpoints = Checkpoints(tmp_path / saved.CHECKPOINTS)
    checkpoints.save(1, {"params": params}, {"epoch": 0, "at": 0}, 0.5)
    checkpoints.close()
    description = saved.describe(network, history_length=length)
    if length is None:
        del description["history_length"]  # as it was written once
    artifacts.write_json(tmp_path / NETWORK, description)
    assert load_model(tmp_path, vocabulary).history_length == length


def test_a_stream_of_batches_that_begin_alike_gives_the_same_answers(explorer, models):
    pair = list(models.values())
    histories = [[a, b] for a in range(6) for b in range(6) if a != b] + [[3], [4]]
    settings = BestOfN(num_samples=3, num_chosen=2, sampler="distinct")
    padded = np.array([[*history, -1][:2] for history in histories], np.int32)
    batches = deal(padded, 4)
    found = []
    times = explorer.explore_stream(
        *pair,
        [[histories[row] for row in rows] for rows in batches],
        [5],
        settings,
        3,
        found.append,
    )
    order = np.concatenate(batches)
    wanted = explorer.explore(*pair, histories, [[5]] * len(histories), settings, seed=3)
    for name in ("clusters", "scores", "log_probabilities", "propensities", "num_allowed"):
        values = np.concatenate([getattr(part, name) for part in found])
        np.testing.assert_allclose(values, getattr(wanted, name)[order], rtol=1e-4, atol=1e-5)
    assert 0 < times.busy <= times.total and 0 < times.compiling < times.total
