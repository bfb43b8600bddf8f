"""A tiny pair of models, three histories, and all that the novelty model could answer to them.

The references are whole forward passes over prefix + prompt + answer and Python over lists.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from small_models import some_parameters

from recexplore.distributed import partitioning
from recexplore.inference.best_of_n import Batch
from recexplore.inference.context import Prompts
from recexplore.inference.launch import Model
from recexplore.models.reward_model import RewardModel
from recexplore.models.transformer import Transformer, TransformerConfig
from recexplore.models.trie import build_trie
from recexplore.training import policy_gradient
from recexplore.training.policy import Answers, Policy

EOS, V, T = 1, 6, 3
SIZES = dict(
    vocab_size=V,
    num_layers=1,
    model_dim=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_dim=8,
    max_length=10,
)
NETWORK = Transformer(TransformerConfig(**SIZES, attention_windows=(3,)))
NOVELTY = Model(NETWORK, some_parameters(NETWORK, seed=1))
REWARDS = RewardModel(TransformerConfig(**SIZES))
ALIGNMENT = Model(REWARDS, some_parameters(REWARDS, seed=2))
ALIGNMENT.params["params"]["head"] *= 5  # so that some answers are much better than others
PREFIX = [5, 2]
SEQUENCES = [[2, 3, EOS], [2, EOS], [4, EOS], [3, 5, EOS], [3, EOS]]
TRIE = build_trie(SEQUENCES, EOS, V)
ON_DEVICE = jax.tree.map(jnp.asarray, TRIE)
PROMPTS = [[3, 4], [2], [4, 3, 2]]
OTHER_PROMPTS = [[4], [3, 3], [2, 5]]
HISTORIES = [[1], [0, 4], []]
# Free answers: all that end in EOS, or are cut off.
ENDED = [
    [*words, EOS]
    for length in range(T)
    for words in itertools.product([t for t in range(V) if t != EOS], repeat=length)
]
CUT = [list(words) for words in itertools.product([t for t in range(V) if t != EOS], repeat=T)]
ALL = ENDED + CUT


def padded(rows, fill=0):
    width = max(map(len, rows))
    return np.array([row + [fill] * (width - len(row)) for row in rows], np.int32)


def prompts_of(rows):
    return Prompts(padded(rows), np.array([len(row) for row in rows], np.int32))


def batch_of(rows=range(3)):
    """Some of the histories, in numpy."""

    def pick(lists):
        return [lists[row] for row in rows]

    history = padded(HISTORIES, -1)[list(rows)]
    none = np.full((len(history), 1), -1, np.int32)
    return Batch(prompts_of(pick(PROMPTS)), prompts_of(pick(OTHER_PROMPTS)), history, none)


def answers_of(texts, batch=3):
    """The same texts as answers to every prompt; whose they are is left open."""
    tokens = np.broadcast_to(padded(texts), (batch, len(texts), T))
    lengths = np.broadcast_to([len(text) for text in texts], tokens.shape[:2]).astype(np.int32)
    return Answers(jnp.array(tokens), jnp.array(lengths), jnp.full(lengths.shape, -1))


@functools.cache
def policy(decoding, temperature=1.0):
    return Policy(NETWORK, decoding, temperature)


@functools.partial(jax.jit, static_argnames=("decoding", "temperature"))
def log_probabilities(params, batch, answers, decoding, temperature=1.0):
    prefix = jnp.array(PREFIX, jnp.int32)
    model = policy(decoding, temperature)
    return model.log_probabilities(params, prefix, ON_DEVICE, batch, answers)


@functools.partial(jax.jit, static_argnames=("count", "decoding", "temperature"))
def draw(params, batch, keys, count, decoding, temperature=1.0):
    prefix = jnp.array(PREFIX, jnp.int32)
    return policy(decoding, temperature).draw(params, prefix, ON_DEVICE, batch, keys, count)


def logits_of(prompt, texts):
    """[texts, T, V] before every token, by whole forward passes."""
    rows = [PREFIX + prompt + text + [0] * (T - len(text)) for text in texts]
    whole = jax.jit(NETWORK.apply)(NOVELTY.params, jnp.array(rows))
    start = len(PREFIX) + len(prompt) - 1
    return np.asarray(whole, np.float64)[:, start : start + T]


def enumerated(prompt, texts, history, decoding, temperature=1.0):
    """Log-probability of each text, token by token, in Python over lists."""
    logits = logits_of(prompt, texts) / temperature
    allowed = [s for i, s in enumerate(SEQUENCES) if i not in history]
    found = []
    for text, here in zip(texts, logits, strict=True):
        total = 0.0
        for depth, token in enumerate(text):
            options = range(V)
            if decoding == "constrained":
                options = sorted({s[depth] for s in allowed if s[:depth] == text[:depth]})
            total += here[depth, token] - np.logaddexp.reduce(here[depth, list(options)])
        found.append(total)
    return np.array(found)


def agrees(counts, chances):
    """Pearson's chi-square at one in ten thousand, the rare outcomes taken together."""
    expected = np.asarray(chances) * counts.sum()
    rare = expected < 5
    seen = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    kept = expected > 0
    expected *= seen.sum() / expected.sum()
    return scipy.stats.chisquare(seen[kept], expected[kept]).pvalue > 1e-4


def one_device():
    return partitioning.make_mesh(devices=jax.devices()[:1])


def tune(
    folder,
    progress=lambda *_, **__: None,
    *,
    prompts=None,
    make_mesh=one_device,
    **settings,
):
    """Tunes a little; `settings` are those of PolicyGradient."""
    usual = dict(prompts_per_step=8, samples_per_prompt=4, steps=12, evaluate_every=4)
    return policy_gradient.tune(
        folder,
        NOVELTY,
        ALIGNMENT,
        (PREFIX, PREFIX),
        TRIE,
        batch_of() if prompts is None else prompts,
        batch_of(),
        policy_gradient.PolicyGradient(**usual | settings),
        progress,
        make_mesh=make_mesh,
    )
