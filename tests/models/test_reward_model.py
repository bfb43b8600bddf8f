"""The heads of the reward model against their formulas in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recexplore.configuration import Configuration
from recexplore.errors import InputError
from recexplore.models import saved
from recexplore.models.encoder_decoder import EncoderDecoderConfig
from recexplore.models.reward_model import RewardModel
from recexplore.models.transformer import TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=8,
    num_layers=1,
    model_dim=2,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    mlp_dim=2,
    max_length=4,
)
ORDINAL, BINS = RewardModel(CONFIG, "ordinal", 4), RewardModel(CONFIG, "bins", 4)
ORDINAL_PARAMS = {"params": {"head": [1.0, 0.0], "thresholds": [-1.5, 0.3, 1.0]}}
BINS_PARAMS = {
    "params": {"head": [[1.0, 0.5, -0.2, 0.0], [0.0] * 4], "bias": [0.1, 0.0, 0.0, -0.3]}
}
PARAMS = {ORDINAL: ORDINAL_PARAMS, BINS: BINS_PARAMS}


def ask(model, projections, method):
    """Of hidden states of which the head's first column takes `projections`."""
    hidden = jnp.stack([jnp.asarray(projections, jnp.float32), jnp.ones(len(projections))], axis=1)
    params = jax.tree.map(jnp.asarray, PARAMS[model], is_leaf=lambda x: isinstance(x, list))
    return np.asarray(model.apply(params, hidden, method=method), np.float64)


def test_an_encoder_is_not_guessed_where_a_prompt_ends():
    config = EncoderDecoderConfig(
        vocab_size=8,
        num_encoder_layers=1,
        num_decoder_layers=1,
        model_dim=4,
        num_heads=1,
        head_dim=2,
        mlp_dim=2,
        max_length=4,
    )
    model = RewardModel(config)
    params = saved.fresh_variables(model, jax.random.key(0))
    with pytest.raises(ValueError, match="where a prompt ends"):
        model.apply(params, jnp.ones((1, 4), int), jnp.array([3]))


def test_the_ordinal_head_has_a_cumulative_link():
    s = np.array([-4.0, -0.3, 0.0, 2.5])
    first, second, third = -1.5, -1.5 + np.log1p(np.exp(0.3)), None
    third = second + np.log1p(np.exp(1.0))
    exceeds = 1 / (1 + np.exp(np.array([first, second, third])[None] - s[:, None]))
    found = np.exp(ask(ORDINAL, s, "bin_log_probabilities"))
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-3)
    for b in range(3):
        np.testing.assert_allclose(found[:, b + 1 :].sum(axis=1), exceeds[:, b], rtol=1e-3)


def test_the_bins_head_is_a_softmax():
    s = np.array([-1.0, 2.0])
    logits = s[:, None] * np.array([[1.0, 0.5, -0.2, 0.0]]) + [[0.1, 0.0, 0.0, -0.3]]
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(ask(BINS, s, "bin_log_probabilities")), expected, rtol=1e-5)


@pytest.mark.parametrize("model", [ORDINAL, BINS])
def test_the_score_is_the_logit_of_the_expected_label(model):
    s = [-3.0, 0.0, 1.0]
    probabilities = np.exp(ask(model, s, "bin_log_probabilities"))
    mean = probabilities @ np.array([0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(1 / (1 + np.exp(-ask(model, s, "score"))), mean, rtol=1e-3)


def test_the_ordinal_score_rises_with_the_projection_and_stays_finite():
    scores = ask(ORDINAL, [-1e4, -90.0, -30.0, -29.9, 0.0, 0.1, 25.0, 25.1, 200.0, 1e4], "score")
    assert np.isfinite(scores).all()
    assert (np.diff(scores) > 0).all()


def test_scores_of_certain_bins_are_finite():
    assert np.isfinite(ask(BINS, [-1e4, 1e4], "score")).all()


@pytest.mark.parametrize("num_bins", [2, 6])
def test_a_fresh_model_takes_all_labels_for_equally_likely(num_bins):
    for head in ("bins", "ordinal"):
        model = RewardModel(CONFIG, head, num_bins)
        params = model.init(jax.random.key(0), jnp.ones((1, 2)), method="score")
        found = model.apply(params, jnp.ones((1, 2)), method="bin_log_probabilities")
        np.testing.assert_allclose(np.exp(found), 1 / num_bins, rtol=1e-4)
        np.testing.assert_allclose(
            model.apply(params, jnp.ones((1, 2)), method="score"), 0, 0, 1e-5
        )


def test_a_description_keeps_the_head_and_an_older_one_has_the_scalar_head():
    for model in (ORDINAL, BINS):
        assert saved.rebuild(saved.describe(model)) == model
    described = saved.describe(RewardModel(CONFIG))
    del described["settings"]
    assert saved.rebuild(described) == RewardModel(CONFIG, "scalar")
    with pytest.raises(InputError, match="doesn't fit this version"):
        saved.rebuild({**described, "settings": {"spread": 1}})


def test_run_files_can_choose_the_head():
    chosen = [
        "alignment/reward_model.RewardModel.head = 'ordinal'",
        "alignment/reward_model.RewardModel.num_bins = 11",
        "alignment/pipeline.train.objective = @objectives.ordinal_loss",
        "alignment/objectives.ordinal_loss.weight_power = 0.5",
    ]
    configuration = Configuration(["runs/demo.gin"], chosen)
    found = configuration.reachable_from("recexplore.pipeline.train", "alignment")
    assert found["alignment/recexplore.models.reward_model.RewardModel.head"] == "'ordinal'"
    assert found["alignment/recexplore.training.objectives.ordinal_loss.weight_power"] == "0.5"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("linear",), "RewardModel.head is 'linear'; it must be one of scalar, bins, ordinal"),
        (("bins", 1), "RewardModel.num_bins is 1; it must be at least 2"),
    ],
)
def test_impossible_heads_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        RewardModel(CONFIG, *settings)
