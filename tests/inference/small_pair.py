"""A small pair of models, eight histories, and what every answer must be by plain enumeration.

The references are made of whole forward passes over prefix + prompt + description, token by token,
and of Python over lists; they know nothing of tries, segments or samplers.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from recexplore.inference.best_of_n import Batch, Prefixes, explore_step
from recexplore.inference.context import Prompts, prefix_cache, read_prompts
from recexplore.inference.exhaustive import build_tree
from recexplore.inference.selection import BestOfN
from recexplore.models.reward_model import RewardModel
from recexplore.models.transformer import Transformer, TransformerConfig
from recexplore.models.trie import build_trie

EOS, V = 1, 12
SIZES = dict(
    vocab_size=V,
    num_layers=2,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=24,
    max_length=16,
)
NOVELTY = Transformer(
    TransformerConfig(**SIZES, attention_windows=(3, 0), attention_softcap=2.0, logit_softcap=3.0)
)
ALIGNMENT = RewardModel(TransformerConfig(**SIZES, attention_windows=(0, 5), rope_theta=500.0))
PREFIX = [3, 7]

# One is a beginning of another, one is EOS alone, two share most of their way, some part early.
SEQUENCES = [
    [2, 3, EOS],
    [2, 3, 4, EOS],
    [5, EOS],
    [2, 6, 7, 10, EOS],
    [2, 6, 8, EOS],
    [9, 3, 11, 4, EOS],
    [EOS],
]
M = len(SEQUENCES)
TRIE = build_trie(SEQUENCES, EOS, V)

B = 8
_LENGTHS = np.array([4, 2, 3, 1, 4, 3, 2, 4])
_RANDOM = np.random.default_rng(0)
NOVELTY_PROMPTS, ALIGNMENT_PROMPTS = (
    [_RANDOM.integers(2, V, length).tolist() for length in lengths]
    for lengths in (_LENGTHS, _LENGTHS % 3 + 1)
)
HISTORIES = [[0], [3, 4], [], [5, 2], [6], [0, 1], [2], [4, 0]]
BANNED = [[], [1, 1, 3], [], [0, 1, 3], [0, 1, 2], [2, 3, 4, 5], [5], [0, 0]]
LEFT_OUT = [set(h) | set(b) for h, b in zip(HISTORIES, BANNED, strict=True)]


def random_parameters(model, seed):
    """Of the right shapes, without the time that compiling `init` takes."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    random = np.random.default_rng(seed)

    def values(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(random.normal(centre, 0.3, leaf.shape), jnp.float32)

    return jax.tree.map_with_path(values, nn.unbox(jax.eval_shape(init(model), tokens)))


def init(model):
    return functools.partial(model.init, jax.random.key(0), method="prefill")


NOVELTY_PARAMS, ALIGNMENT_PARAMS = random_parameters(NOVELTY, 0), random_parameters(ALIGNMENT, 1)


def padded(rows, width, fill):
    return np.array([row + [fill] * (width - len(row)) for row in rows], np.int32)


def prompts_of(rows, width=None):
    width = width or max(map(len, rows))
    return Prompts(padded(rows, width, 0), np.array([len(row) for row in rows], np.int32))


def batch_of(rows=range(B), wider=0):
    """Some of the histories, in any order, with more padding if wanted."""

    def pick(lists):
        return [lists[row] for row in rows]

    return Batch(
        prompts_of(pick(NOVELTY_PROMPTS), 4 + wider),
        prompts_of(pick(ALIGNMENT_PROMPTS), 3 + wider),
        padded(pick(HISTORIES), 2 + wider, -1),
        padded(pick(BANNED), 4 + wider, -1),
    )


def prefix_of(model, params=None):
    """As the model has read it, with the parameters of the one of its kind or with others."""
    if params is None:
        params = NOVELTY_PARAMS if isinstance(model, Transformer) else ALIGNMENT_PARAMS
    return prefix_cache(model, params, jnp.array(PREFIX, jnp.int32))


@functools.cache
def prefixes():
    return Prefixes(prefix_of(NOVELTY), prefix_of(ALIGNMENT))


TREE = build_tree(TRIE)


def explore(
    *,
    batch=None,
    seed=7,
    novelty_params=NOVELTY_PARAMS,
    alignment_params=ALIGNMENT_PARAMS,
    novelty_model=NOVELTY,
    alignment_model=ALIGNMENT,
    **settings,
):
    """One step; `settings` are those of BestOfN, and `prefixes` if they aren't the usual ones."""
    read = settings.pop("prefixes", None) or prefixes()
    return explore_step(
        novelty_params,
        alignment_params,
        read,
        TRIE,
        batch or batch_of(),
        jax.random.key(seed),
        settings=BestOfN(**settings),
        novelty_model=novelty_model,
        alignment_model=alignment_model,
        tree=TREE if settings["sampler"] == "exhaustive" else None,
    )


_read = jax.jit(read_prompts, static_argnums=0)


def novelty_context(prompts):
    return _read(NOVELTY, NOVELTY_PARAMS, prefixes().novelty, prompts)


def alignment_context(prompts):
    return _read(ALIGNMENT, ALIGNMENT_PARAMS, prefixes().alignment, prompts)


_forward = jax.jit(NOVELTY.apply)
_score = jax.jit(ALIGNMENT.apply)


def _in_chunks(program, params, *rows):
    """Runs a program on all rows, B · M at a time, so that one compilation serves all."""
    index = np.arange(-(-len(rows[0]) // (B * M)) * B * M).reshape(-1, B * M)
    index = np.minimum(index, len(rows[0]) - 1)
    parts = [np.asarray(program(params, *(array[some] for array in rows))) for some in index]
    return np.concatenate(parts)[: len(rows[0])]


def _wholes(prompts, sequences):
    """prefix + prompt + description for all pairs, right-padded to one width, and their lengths."""
    rows = [PREFIX + p + s for p, s in itertools.product(prompts, sequences)]
    return padded(rows, SIZES["max_length"], 0), np.array([len(row) for row in rows])


def enumerated(left_out, prompts=NOVELTY_PROMPTS, sequences=SEQUENCES, temperature=1.0):
    """`among_allowed` of the novelty model's logits."""
    tokens, _ = _wholes(prompts, sequences)
    logits = _in_chunks(_forward, NOVELTY_PARAMS, tokens).astype(np.float64)
    logits = logits.reshape(len(prompts), len(sequences), *logits.shape[1:])
    places = [len(PREFIX) + len(prompt) - 1 for prompt in prompts]
    before = [
        [at[place : place + len(s)] for at, s in zip(row, sequences, strict=True)]
        for row, place in zip(logits, places, strict=True)
    ]
    return among_allowed(before, left_out, sequences, temperature)


def among_allowed(before, left_out, sequences=SEQUENCES, temperature=1.0):
    """[B, M] log-probabilities among the sequences that aren't left out; -inf for those that are.

    At every token the logits, over the temperature, are normalised over what an allowed sequence
    has there. `before`: for each prompt and sequence the logits [tokens, V] before its tokens.
    """
    found = np.full((len(before), len(sequences)), -np.inf)
    for row, (logits, missing) in enumerate(zip(before, left_out, strict=True)):
        allowed = [i for i in range(len(sequences)) if i not in missing]
        for i in allowed:
            total, sequence = 0.0, sequences[i]
            for depth, token in enumerate(sequence):
                mates = (sequences[j] for j in allowed if sequences[j][:depth] == sequence[:depth])
                options = sorted({mate[depth] for mate in mates})
                here = logits[i][depth] / temperature
                total += here[token] - np.logaddexp.reduce(here[options])
            found[row, i] = total
    return found


def whole_scores(prompts=ALIGNMENT_PROMPTS, sequences=SEQUENCES):
    """[B, M] alignment scores by whole forward passes."""
    tokens, lengths = _wholes(prompts, sequences)
    return _in_chunks(_score, ALIGNMENT_PARAMS, tokens, lengths).reshape(len(prompts), -1)


def agrees(counts, chances):
    """Pearson's chi-square at one in ten thousand, the rare outcomes taken together; what is
    impossible must never have happened."""
    counts, chances = np.ravel(counts), np.ravel(chances)
    assert counts[chances == 0].sum() == 0
    if (chances > 0).sum() == 1:
        return True
    order = np.argsort(chances)
    expected = np.cumsum(chances[order]) * counts.sum()
    rare = np.searchsorted(expected, 5.0) + 1  # together they are expected five times or more
    expected = np.concatenate([expected[rare - 1 : rare], np.diff(expected[rare - 1 :])])
    seen = counts[order]
    seen = np.concatenate([[seen[:rare].sum()], seen[rare:]])
    return scipy.stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > 1e-4


def pick(values, clusters):
    """values[b, cluster] of every cluster; -inf beside -1."""
    clusters = np.asarray(clusters)
    found = np.take_along_axis(values, np.maximum(clusters, 0), axis=1)
    return np.where(clusters < 0, -np.inf, found)
