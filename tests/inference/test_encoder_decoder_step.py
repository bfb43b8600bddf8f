"""The whole step with encoder–decoders, against transformers' T5 on one description at a time.

Nothing of the reference knows of tries, segments or samplers; nor does it of our networks.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_pair import (
    ALIGNMENT,
    ALIGNMENT_PARAMS,
    ALIGNMENT_PROMPTS,
    EOS,
    LEFT_OUT,
    NOVELTY_PROMPTS,
    PREFIX,
    SEQUENCES,
    TRIE,
    B,
    M,
    V,
    agrees,
    among_allowed,
    batch_of,
    explore,
    pick,
    prefix_of,
    whole_scores,
)

from recexplore.inference.best_of_n import BestOfN, Prefixes
from recexplore.inference.context import Prompts, prefix_cache, read_prompts
from recexplore.inference.free_sampler import sample_freely
from recexplore.inference.grouping import share
from recexplore.inference.launch import Model, Ready
from recexplore.inference.scoring import score_texts
from recexplore.models import config_file, pretrained
from recexplore.models.encoder_decoder import EncoderDecoder
from recexplore.models.reward_model import RewardModel

_WHY = "needs transformers and torch: pip install -e '.[bench]'"
torch = pytest.importorskip("torch", reason=_WHY)
transformers = pytest.importorskip("transformers", reason=_WHY)

SIZES = dict(
    **dict(vocab_size=V, d_model=16, d_kv=4, d_ff=24, num_heads=3, num_layers=2),
    **dict(relative_attention_num_buckets=8, relative_attention_max_distance=9),
)
INDEPENDENT = dict(num_samples=16, num_chosen=3, sampler="independent")
DISTINCT = dict(num_samples=5, num_chosen=2, sampler="distinct", temperature=1.5)
EXHAUSTIVE = dict(num_samples=1, num_chosen=3, sampler="exhaustive", relevance_weight=0.5)
EVERY = pytest.mark.parametrize(
    "settings", [INDEPENDENT, DISTINCT, EXHAUSTIVE], ids=lambda s: s["sampler"]
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two networks of transformers, and ours read from their folders, the second with a head."""

    def make(seed, **differences):
        config = transformers.T5Config(**SIZES, **differences)
        network = transformers.T5ForConditionalGeneration(config)
        if "tie_word_embeddings" in differences:
            network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.clone())
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(0.0, 0.3, generator=generator)
        folder = tmp_path_factory.mktemp("t5")
        network.save_pretrained(folder)
        read = config_file.read_config(folder, max_length=16)
        return network.eval(), read, pretrained.load(folder, read)

    gated = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    novelty, novelty_config, novelty_params = make(0, **gated, num_decoder_layers=3)
    alignment, alignment_config, alignment_params = make(1, feed_forward_proj="relu")
    head = np.random.default_rng(0).normal(0, 0.3, 16).astype(np.float32)
    alignment_params = {
        "params": {
            "transformer": alignment_params["params"],
            "head": jnp.asarray(head),
            "bias": jnp.float32(0.2),
        }
    }
    return types.SimpleNamespace(
        theirs=(novelty, alignment),
        head=head,
        novelty=Model(EncoderDecoder(novelty_config), novelty_params),
        alignment=Model(RewardModel(alignment_config), alignment_params),
    )


def one_by_one(network, prompts):
    """For each prompt and description the decoder's last hidden states and logits, the token that
    begins the description first."""
    found = []
    for prompt in prompts:
        rows = []
        for sequence in SEQUENCES:
            with torch.no_grad():
                said = network(
                    input_ids=torch.tensor([PREFIX + prompt + [EOS]]),
                    decoder_input_ids=torch.tensor([[0, *sequence]]),
                    output_hidden_states=True,
                )
            rows.append(
                (said.decoder_hidden_states[-1][0].numpy(), said.logits[0].double().numpy())
            )
        found.append(rows)
    return found


@pytest.fixture(scope="module")
def expected(pair):
    """[B, M] log-probabilities, at a temperature, and scores."""
    logits = [
        [of_one[:-1] for _, of_one in row] for row in one_by_one(pair.theirs[0], NOVELTY_PROMPTS)
    ]
    states = one_by_one(pair.theirs[1], ALIGNMENT_PROMPTS)
    scores = np.array([[hidden[-1] @ pair.head + 0.2 for hidden, _ in row] for row in states])

    @functools.cache
    def log_probabilities(temperature=1.0):
        return among_allowed(logits, LEFT_OUT, temperature=temperature)

    return types.SimpleNamespace(log_probabilities=log_probabilities, scores=scores)


@pytest.fixture(scope="module")
def found_with(pair):
    """Runs the step."""
    models = (pair.novelty, pair.alignment)
    prefix = jnp.array(PREFIX, jnp.int32)
    prefixes = Prefixes(*(prefix_cache(m.network, m.params, prefix) for m in models))

    def run(settings, **how):
        return jax.device_get(
            explore(
                prefixes=prefixes,
                novelty_model=pair.novelty.network,
                novelty_params=pair.novelty.params,
                alignment_model=pair.alignment.network,
                alignment_params=pair.alignment.params,
                **how,
                **settings,
            )
        )

    return run


@EVERY
def test_every_number_is_that_of_transformers(settings, found_with, expected):
    found = found_with(settings)
    tempered = expected.log_probabilities(settings.get("temperature", 1.0))
    for clusters, numbers, wanted in (
        (found.clusters, found.scores, expected.scores),
        (found.clusters, found.log_probabilities, expected.log_probabilities()),
        (found.draws.clusters, found.draw_scores, expected.scores),
        (found.draws.clusters, found.draws.log_probabilities, expected.log_probabilities()),
        (found.draws.clusters, found.draws.tempered, tempered),
    ):
        np.testing.assert_allclose(numbers, pick(wanted, clusters), atol=1e-4)


@EVERY
def test_the_best_of_the_proposals_are_chosen(settings, found_with, expected):
    found = found_with(settings)
    value = expected.scores
    if settings is EXHAUSTIVE:
        value = expected.log_probabilities() + 0.5 * expected.scores
    for row in range(B):
        drawn = {int(cluster) for cluster in found.draws.clusters[row] if cluster >= 0}
        assert drawn.isdisjoint(LEFT_OUT[row])
        if settings is EXHAUSTIVE:
            assert drawn == set(range(M)) - LEFT_OUT[row]
        if settings is DISTINCT:
            assert len(drawn) == min(5, M - len(LEFT_OUT[row]))
        count = settings["num_chosen"]
        best = sorted(drawn, key=lambda cluster: -value[row, cluster])[:count]
        assert found.clusters[row].tolist() == best + [-1] * (count - len(best))


def test_independent_draws_have_their_probabilities(found_with, expected):
    found = found_with({**INDEPENDENT, "num_samples": 4000})
    for row in range(B):
        counts = np.bincount(found.draws.clusters[row], minlength=M)
        assert agrees(counts, np.exp(expected.log_probabilities()[row]))


def test_the_first_of_distinct_draws_has_its_probability(found_with, expected):
    firsts = np.stack([found_with(DISTINCT, seed=seed).draws.clusters[:, 0] for seed in range(200)])
    for row in range(B):
        counts = np.bincount(firsts[:, row], minlength=M)
        assert agrees(counts, np.exp(expected.log_probabilities(1.5)[row]))


@EVERY
def test_the_rest_of_the_batch_and_padding_change_nothing(settings, found_with):
    together = found_with(settings)
    for row in (0, 5):
        alone = found_with(settings, batch=batch_of([row], wider=3))
        np.testing.assert_array_equal(alone.clusters[0], together.clusters[row])
        np.testing.assert_allclose(alone.scores[0], together.scores[row], atol=1e-5)


@EVERY
def test_histories_that_begin_alike_are_read_whole(settings, pair, expected):
    """Through the door, where what a batch shares is handed over apart, padded."""
    ready = Ready(pair.novelty, pair.alignment, (PREFIX, PREFIX), TRIE)
    batch, settings = batch_of([1, 1, 1]), BestOfN(**settings)
    key = jax.random.key(7)
    wanted = ready.explore(batch, key, settings)
    grouped = share(batch, PREFIX, size=4)
    assert grouped.beginnings[0].lengths[0] > len(PREFIX)
    found = ready.launch(grouped.batch, key, settings, ready.read(grouped.beginnings))
    np.testing.assert_array_equal(found.clusters[:3], wanted.clusters)
    numbers = pick(expected.scores[[1, 1, 1]], wanted.clusters)
    np.testing.assert_allclose(found.scores[:3], numbers, atol=1e-4)
    np.testing.assert_allclose(wanted.scores, numbers, atol=1e-4)


def test_a_decoder_only_alignment_model_goes_with_an_encoder_decoder(pair, expected):
    prefix = jnp.array(PREFIX, jnp.int32)
    found = jax.device_get(
        explore(
            prefixes=Prefixes(
                prefix_cache(pair.novelty.network, pair.novelty.params, prefix),
                prefix_of(ALIGNMENT, ALIGNMENT_PARAMS),
            ),
            novelty_model=pair.novelty.network,
            novelty_params=pair.novelty.params,
            **INDEPENDENT,
        )
    )
    log_probabilities = pick(expected.log_probabilities(), found.clusters)
    np.testing.assert_allclose(found.log_probabilities, log_probabilities, atol=1e-4)
    np.testing.assert_allclose(found.scores, pick(whole_scores(), found.clusters), atol=1e-4)


def test_free_texts_are_drawn_by_the_decoder(pair):
    """The first tokens have transformers' probabilities, and what follows is possible at all."""
    model, params = pair.novelty[:2]
    prefix = prefix_cache(model, params, jnp.array(PREFIX, jnp.int32))
    context = read_prompts(model, params, prefix, Prompts(*map(jnp.asarray, batch_of().novelty)))
    keys = jax.random.split(jax.random.key(0), B)
    written = jax.device_get(
        jax.jit(sample_freely, static_argnums=(0, 4, 5, 6))(
            model, params, context, keys, 3000, 1.0, 3, EOS
        )
    )
    for row, prompt in enumerate(NOVELTY_PROMPTS[:3]):
        (_, logits), *_ = one_by_one(pair.theirs[0], [prompt])[0]
        first = written.tokens[row, :, 0]
        assert agrees(np.bincount(first, minlength=V), softmax(logits[0]))
        token = int(np.bincount(first[first != EOS]).argmax())
        with torch.no_grad():
            said = pair.theirs[0](
                input_ids=torch.tensor([PREFIX + prompt + [EOS]]),
                decoder_input_ids=torch.tensor([[0, token]]),
            )
        second = written.tokens[row, first == token, 1]
        assert agrees(np.bincount(second, minlength=V), softmax(said.logits[0, 1].double().numpy()))


def softmax(logits):
    return np.exp(logits - np.logaddexp.reduce(logits))


def test_nothing_is_copied_for_every_continuation(pair):
    """No array has a place for every text, every token of the prompt and every number of a key."""
    model, params = pair.alignment[:2]
    prefix = prefix_cache(model, params, jnp.array(PREFIX, jnp.int32))
    prompts = Prompts(jnp.ones((B, 34), jnp.int32), jnp.full(B, 34))
    num_texts, length, width = 11, 37, 4  # the prefix and what ends a prompt are read too

    def score(prefix, prompts, texts):
        context = read_prompts(model, params, prefix, prompts)
        return score_texts(model, params, context, texts, jnp.full(texts.shape[:2], 5))

    made = jax.make_jaxpr(score)(prefix, prompts, jnp.ones((B, num_texts, 5), jnp.int32))
    shapes = shapes_of(made.jaxpr)
    assert any({length, width} <= {*shape} for shape in shapes)
    assert any({length, num_texts} <= {*shape} for shape in shapes)
    assert not any({length, width, num_texts} <= {*shape} for shape in shapes)


def shapes_of(jaxpr):
    """Of all that a program computes, in its loops too."""
    found = {tuple(value.aval.shape) for step in jaxpr.eqns for value in step.outvars}
    for inner in jax.tree.leaves([step.params for step in jaxpr.eqns], is_leaf=is_program):
        if is_program(inner):
            found |= shapes_of(getattr(inner, "jaxpr", inner))
    return found


def is_program(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")
