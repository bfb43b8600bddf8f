"""What an exploration table says it was made from changes when that changes, and only then."""

import jax
import jax.numpy as jnp
import pyarrow as pa
import pytest

from recexplore.interests.cluster_table import ClusterTable
from recexplore.models import saved
from recexplore.models.reward_model import RewardModel
from recexplore.models.transformer import Transformer, TransformerConfig
from recexplore.tasks.vocabulary import Vocabulary, train_vocabulary

SIZES = dict.fromkeys(("num_layers", "num_heads", "num_kv_heads"), 1)
CONFIG = TransformerConfig(
    vocab_size=128, model_dim=8, head_dim=4, mlp_dim=8, max_length=16, **SIZES
)


def clusters(**changes):
    columns = {
        "cluster_id": pa.array([0, 1], pa.int32()),
        "description": ["space", "cooking"],
        "path": pa.array([[0], [0]], pa.list_(pa.int32())),
        "num_items": pa.array([1, 2], pa.int32()),
        "num_interactions": [5, 6],
        "centroid": pa.array([[0.5, 1.0], [0.0, 2.0]], pa.list_(pa.float32())),
    }
    items = pa.table({"item_id": ["a", "b", "c"], "cluster_id": pa.array([0, 1, 1], pa.int32())})
    return ClusterTable(pa.table({**columns, **changes}), items)


@pytest.mark.parametrize(
    "changes",
    [
        {"description": ["cooking", "space"]},
        {"path": [[0], [1]]},
        {"centroid": [[0.5, 1.0], [0.0, 2.5]]},
    ],
)
def test_other_clusters_have_another_fingerprint(changes):
    assert clusters(**changes).fingerprint != clusters().fingerprint


def test_new_items_leave_clusters_what_they_are(tmp_path):
    clusters().write(tmp_path)
    read = ClusterTable.read(tmp_path)
    more = clusters(num_items=[3, 2], num_interactions=[9, 9])
    assert read.fingerprint == clusters().fingerprint == more.fingerprint


def test_a_models_fingerprint_is_that_of_its_network_and_every_parameter():
    def fingerprint(network, change=lambda params: params):
        params = jax.tree.map(
            lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape),
            saved.abstract_parameters(network),
        )
        return saved.fingerprint(network, change(params))

    same = {fingerprint(Transformer(CONFIG)) for _ in range(2)}
    assert len(same) == 1

    def changed(place):
        def change(params):
            leaves, tree = jax.tree.flatten(params)
            leaves[place] = leaves[place].at[(0,) * leaves[place].ndim].add(1)
            return jax.tree.unflatten(tree, leaves)

        return change

    count = len(jax.tree.leaves(saved.abstract_parameters(Transformer(CONFIG))))
    others = {fingerprint(Transformer(CONFIG), changed(place)) for place in range(count)}
    others |= {fingerprint(RewardModel(CONFIG))}
    others |= {fingerprint(Transformer(CONFIG), lambda p: jax.tree.map(jnp.bfloat16, p))}
    assert len(others | same) == count + 3


def test_a_vocabularys_fingerprint_is_that_of_its_file(tmp_path):
    words = ["space opera", "slow cooking", "crime drama"]
    for name, descriptions in (("a", words), ("b", words), ("c", words[::-1] + ["jazz"])):
        train_vocabulary(tmp_path / name, [f"interests: {words[0]}; next:"], descriptions)
    first, second, third = (Vocabulary(tmp_path / name).fingerprint for name in "abc")
    assert first == second != third
