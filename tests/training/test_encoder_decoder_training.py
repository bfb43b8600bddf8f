"""Objectives of encoder–decoders: as if every example were read alone, by plain whole passes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from slow_description_loss import slow_description_loss
from small_models import batch_of, packed_batch_of, random_examples

from recexplore.distributed import partitioning
from recexplore.errors import InputError
from recexplore.models import saved
from recexplore.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from recexplore.models.reward_model import RewardModel
from recexplore.models.trie import build_trie
from recexplore.training import objectives
from recexplore.training.optimization import Optimization
from recexplore.training.program import Program

# clu and orbax bring warnings of their own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

SEQUENCES = [[2, 3, 1], [2, 3, 4, 1], [5, 1], [2, 6, 7, 10, 1], [9, 3, 11, 4, 1], [1]]
TRIE = jax.tree.map(jnp.asarray, build_trie(SEQUENCES, 1, 12))
SIZES = dict(vocab_size=16, num_encoder_layers=2, num_decoder_layers=2, model_dim=8, num_heads=2)
CONFIG = EncoderDecoderConfig(**SIZES, head_dim=4, mlp_dim=8, max_length=16)
LANGUAGE, REWARD = EncoderDecoder(CONFIG), RewardModel(CONFIG)
EXAMPLES = random_examples(SEQUENCES, 8)
BATCH = batch_of(EXAMPLES, len(SEQUENCES))


def parameters_of(model):
    random = np.random.default_rng(2)
    return jax.tree.map(
        lambda x: jnp.asarray(random.normal(0, 0.4, x.shape), x.dtype),
        saved.abstract_parameters(model),
    )


def states_of(params, prompt, description):
    """The decoder's hidden states, or logits where `params` are the language model's."""
    prompt, description = jnp.array([prompt]), jnp.array([[CONFIG.start_id, *description]])
    return LANGUAGE.apply(params, prompt, jnp.array([prompt.shape[1]]), description)[0]


class Alone:
    """A language model as slow_description_loss asks it: logits in the places of a row."""

    def apply(self, params, tokens):
        found = np.zeros((*tokens.shape, CONFIG.vocab_size), np.float32)
        for row, example in zip(found, EXAMPLES, strict=True):
            logits = states_of(params, example["prompt"], example["description"])
            start = len(example["prompt"]) - 1
            row[start : start + len(logits)] = logits[: len(row) - start]
        return found


@pytest.mark.parametrize("constrained", [True, False])
def test_the_description_losses_are_those_of_examples_read_alone(constrained):
    objective = objectives.next_description_loss
    if constrained:
        objective = objectives.constrained_description_loss
    params = parameters_of(LANGUAGE)
    found = jax.jit(objective, static_argnums=0)(LANGUAGE, params, TRIE, BATCH)
    wanted = slow_description_loss(Alone(), params, TRIE, BATCH, 0.0, constrained)
    np.testing.assert_allclose(found.loss, wanted, rtol=1e-4)
    np.testing.assert_allclose(found.weight, sum(e["weight"] for e in EXAMPLES))


def scores_alone(params, descriptions):
    """Scores by whole passes: with the output table of ones and zeros logits are hidden states."""
    inner = params["params"]["transformer"]
    table = jnp.eye(CONFIG.vocab_size, CONFIG.model_dim)
    whole = {"params": {**inner, "logits_dense": table}}
    hidden = [
        states_of(whole, example["prompt"], description)[-1, : CONFIG.model_dim]
        for example, description in zip(EXAMPLES, descriptions, strict=True)
    ]
    return np.stack(hidden) @ params["params"]["head"] + params["params"]["bias"]


def test_alignment_losses_are_those_of_examples_read_alone():
    params = parameters_of(REWARD)
    scores = scores_alone(params, [e["description"] for e in EXAMPLES])
    labels, weights = (np.array([e[name] for e in EXAMPLES]) for name in ("label", "weight"))
    losses = optax.sigmoid_binary_cross_entropy(scores, labels)
    found = jax.jit(objectives.pointwise_loss, static_argnums=0)(REWARD, params, TRIE, BATCH)
    np.testing.assert_allclose(found.loss, (losses * weights).sum(), rtol=1e-4)
    others = [SEQUENCES[(i + 1) % len(SEQUENCES)] for i in range(len(EXAMPLES))]
    worse = [{**e, "description": o} for e, o in zip(EXAMPLES, others, strict=True)]
    rows = batch_of(worse, len(SEQUENCES))
    pairs = BATCH | {"other_tokens": rows["tokens"], "other_lengths": rows["lengths"]}
    found = jax.jit(objectives.bradley_terry_loss, static_argnums=0)(REWARD, params, TRIE, pairs)
    gaps = scores - scores_alone(params, others)
    wanted = (-jax.nn.log_sigmoid(gaps) * weights).sum()
    np.testing.assert_allclose(found.loss, wanted, rtol=1e-4)


def test_dropout_needs_a_key_and_changes_the_loss():
    model = EncoderDecoder(EncoderDecoderConfig(**vars(CONFIG) | {"dropout_rate": 0.5}))
    params = parameters_of(LANGUAGE)
    loss = jax.jit(objectives.constrained_description_loss, static_argnums=0)
    plain, still = (loss(m, params, TRIE, BATCH).loss for m in (LANGUAGE, model))
    np.testing.assert_allclose(plain, still, rtol=1e-6)
    one, other = (loss(model, params, TRIE, BATCH, jax.random.key(i)).loss for i in (0, 1))
    assert len({float(plain), float(one), float(other)}) == 3


def test_packed_rows_are_refused():
    packed = packed_batch_of([EXAMPLES[:2]], len(SEQUENCES))
    for model, objective in (
        (LANGUAGE, objectives.next_description_loss),
        (REWARD, objectives.pointwise_loss),
    ):
        with pytest.raises(InputError, match="reads one example a row, .* pipeline.train.pack = F"):
            objective(model, parameters_of(model), TRIE, packed)


@pytest.mark.parametrize(
    ("model", "objective"),
    [
        (LANGUAGE, objectives.constrained_description_loss),
        (REWARD, objectives.pointwise_loss),
    ],
)
def test_a_mesh_of_eight_takes_the_steps_of_one_device(model, objective):
    optimization = Optimization(steps=20, learning_rate=1e-2, warmup_share=0.0, average_decay=0.0)
    losses, params = [], []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        mesh = partitioning.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
        program = Program(model, objective, optimization, mesh)
        state, some = program.initialize(0), []
        trie = jax.device_put(TRIE, program.everywhere)
        batch = {name: np.asarray(values) for name, values in BATCH.items()}
        for _ in range(3):
            placed = partitioning.put_batch(batch, len(EXAMPLES), mesh)
            state, figures = program.step(state, {}, placed, trie)
            some.append(float(figures["loss"]))
        losses.append(some)
        params.append(jax.device_get(state.params))
    assert losses[0][2] < losses[0][0]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), *params)
