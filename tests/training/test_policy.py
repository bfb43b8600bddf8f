"""What the policy answers, how probable it says that is, and what the answers are worth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_policy import (
    ALIGNMENT,
    ALL,
    EOS,
    HISTORIES,
    NOVELTY,
    OTHER_PROMPTS,
    PREFIX,
    PROMPTS,
    SEQUENCES,
    agrees,
    answers_of,
    batch_of,
    draw,
    enumerated,
    log_probabilities,
    prompts_of,
)

from recexplore.inference.context import prefix_cache, read_prompts
from recexplore.inference.scoring import score_texts

BATCH = jax.tree.map(jnp.asarray, batch_of())
NUM_DRAWS = 3000


def drawn(decoding, temperature=1.0):
    keys = jax.random.split(jax.random.key(3), 3)
    return draw(NOVELTY.params, BATCH, keys, NUM_DRAWS, decoding, temperature)


def texts_of(answers, row):
    tokens, lengths = np.asarray(answers.tokens[row]), np.asarray(answers.lengths[row])
    return [tokens[i, :length].tolist() for i, length in enumerate(lengths)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_free_draws_have_the_autoregressive_probabilities(temperature):
    answers = drawn("free", temperature)
    place = {tuple(text): i for i, text in enumerate(ALL)}
    for row, (prompt, history) in enumerate(zip(PROMPTS, HISTORIES, strict=True)):
        chances = np.exp(enumerated(prompt, ALL, history, "free", temperature))
        assert chances.sum() == pytest.approx(1)
        counts = np.bincount([place[tuple(t)] for t in texts_of(answers, row)], minlength=len(ALL))
        assert agrees(counts, chances)


def test_constrained_draws_have_the_probabilities_among_what_is_allowed():
    answers = drawn("constrained")
    for row, (prompt, history) in enumerate(zip(PROMPTS, HISTORIES, strict=True)):
        allowed = [i for i in range(len(SEQUENCES)) if i not in history]
        texts = [SEQUENCES[i] for i in allowed]
        counts = np.bincount(np.asarray(answers.clusters[row]), minlength=len(SEQUENCES))
        assert counts.sum() == counts[allowed].sum() == NUM_DRAWS
        assert agrees(counts[allowed], np.exp(enumerated(prompt, texts, history, "constrained")))
        some = zip(np.asarray(answers.clusters[row]), texts_of(answers, row), strict=True)
        assert all(SEQUENCES[cluster] == text for cluster, text in some)


def test_an_answer_is_valid_if_it_is_a_whole_description_and_its_cluster_not_in_the_history():
    answers = drawn("free")
    valid, cut_off = 0, 0
    for row, history in enumerate(HISTORIES):
        for text, cluster in zip(texts_of(answers, row), answers.clusters[row], strict=True):
            known = SEQUENCES.index(text) if text in SEQUENCES else -1
            assert cluster == (-1 if known in history else known)
            valid += cluster >= 0
            cut_off += text[-1] != EOS
    assert min(valid, cut_off) > 100


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_free_log_probabilities_are_those_of_whole_forward_passes(temperature):
    found = log_probabilities(NOVELTY.params, BATCH, answers_of(ALL), "free", temperature)
    wanted = [enumerated(prompt, ALL, (), "free", temperature) for prompt in PROMPTS]
    np.testing.assert_allclose(found, wanted, atol=2e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_constrained_log_probabilities_leave_out_what_cannot_be_drawn(temperature):
    texts = answers_of(SEQUENCES)
    found = log_probabilities(NOVELTY.params, BATCH, texts, "constrained", temperature)
    for row, (prompt, history) in enumerate(zip(PROMPTS, HISTORIES, strict=True)):
        allowed = [i for i in range(len(SEQUENCES)) if i not in history]
        texts = [SEQUENCES[i] for i in allowed]
        wanted = enumerated(prompt, texts, history, "constrained", temperature)
        np.testing.assert_allclose(np.asarray(found)[row, allowed], wanted, atol=1e-4)
        assert np.exp(wanted).sum() == pytest.approx(1)


def test_any_text_is_scored_as_by_a_whole_forward_pass():
    model, params = ALIGNMENT[:2]

    @jax.jit
    def scores(params, prompts, answers):
        prefix = prefix_cache(model, params, jnp.array(PREFIX, jnp.int32))
        context = read_prompts(model, params, prefix, prompts)
        return score_texts(model, params, context, answers.tokens, answers.lengths)

    found = scores(params, prompts_of(OTHER_PROMPTS), answers_of(ALL))
    for row, prompt in enumerate(OTHER_PROMPTS):
        wholes = prompts_of([PREFIX + prompt + text for text in ALL])
        wanted = jax.jit(model.apply)(params, wholes.tokens, wholes.lengths)
        np.testing.assert_allclose(found[row], wanted, atol=1e-4)
        assert np.std(wanted) > 0.1
