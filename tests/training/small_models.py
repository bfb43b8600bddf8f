"""Networks and batches that the tests of objectives share."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from recexplore.models.reward_model import RewardModel
from recexplore.models.transformer import Transformer, TransformerConfig

SIZES = dict(
    vocab_size=12,
    num_layers=2,
    model_dim=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_dim=8,
    max_length=24,
)


class Bigram(nn.Module):
    """A language model that looks at nothing but the last token, and compiles in no time."""

    vocab_size: int = 12
    model_dim: int = 8

    def setup(self):
        shape = (self.vocab_size, self.model_dim)
        self.inputs = self.param("inputs", nn.initializers.normal(1.0), shape)
        self.outputs = self.param("outputs", nn.initializers.normal(1.0), shape)

    def __call__(self, tokens):
        return self.logits(self.inputs[tokens])

    def prefill(self, tokens, deterministic=True):
        return self.inputs[tokens], None

    def logits(self, hidden):
        return hidden @ self.outputs.T

    def token_logits(self, hidden, tokens):
        return hidden @ self.outputs[tokens].T


def bigram(vocab_size=12):
    """The network and parameters for it."""
    model = Bigram(vocab_size)
    return model, some_parameters(model)


def language_model(**changes):
    """A network and parameters for it."""
    model = Transformer(TransformerConfig(**{**SIZES, **changes}))
    return model, some_parameters(model)


def reward_model(head="scalar", num_bins=4, **changes):
    """A network and parameters for it."""
    model = RewardModel(TransformerConfig(**{**SIZES, **changes}), head, num_bins)
    return model, some_parameters(model)


def some_parameters(model, seed=1):
    """Of the right shapes, without the time that compiling `init` takes."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(
        functools.partial(model.init, method="prefill"), jax.random.key(0), tokens
    )
    leaves, structure = jax.tree.flatten(nn.unbox(shapes))
    random = np.random.default_rng(seed)
    leaves = [random.normal(size=x.shape, scale=0.5).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(structure, map(jnp.asarray, leaves))


def batch_of(examples, num_clusters, width=12):
    """A batch, one example a row.

    Each example is a dict of prompt and description (token lists), seen (cluster ids), label and
    weight.
    """
    rows = [[*e["prompt"], *e["description"]] for e in examples]
    return {
        "tokens": jnp.array([row + [0] * (width - len(row)) for row in rows], jnp.int32),
        "prompt_lengths": jnp.array([len(e["prompt"]) for e in examples], jnp.int32),
        "lengths": jnp.array([len(row) for row in rows], jnp.int32),
        "seen": jnp.stack([_mask(e["seen"], num_clusters) for e in examples]),
        "label": jnp.array([e["label"] for e in examples], jnp.float32),
        "weight": jnp.array([e["weight"] for e in examples], jnp.float32),
    }


def packed_batch_of(rows, num_clusters, width=24, room=4):
    """A packed batch of rows of examples; `room` is E."""
    shape = (len(rows), room)
    batch = {
        "tokens": np.zeros((len(rows), width), np.int32),
        "segment_ids": np.zeros((len(rows), width), np.int32),
        "positions": np.zeros((len(rows), width), np.int32),
        "starts": np.zeros(shape, np.int32),
        "prompt_lengths": np.ones(shape, np.int32),
        "lengths": np.zeros(shape, np.int32),
        "seen": np.zeros((*shape, num_clusters), bool),
        "label": np.zeros(shape, np.float32),
        "weight": np.zeros(shape, np.float32),
    }
    for i, row in enumerate(rows):
        start = 0
        for j, example in enumerate(row):
            tokens = [*example["prompt"], *example["description"]]
            stretch = slice(start, start + len(tokens))
            batch["tokens"][i, stretch] = tokens
            batch["segment_ids"][i, stretch] = j + 1
            batch["positions"][i, stretch] = range(len(tokens))
            batch["starts"][i, j] = start
            batch["prompt_lengths"][i, j] = len(example["prompt"])
            batch["lengths"][i, j] = len(tokens)
            batch["seen"][i, j] = _mask(example["seen"], num_clusters)
            batch["label"][i, j], batch["weight"][i, j] = example["label"], example["weight"]
            start += len(tokens)
    return jax.tree.map(jnp.asarray, batch)


def _mask(ids, count):
    return jnp.isin(jnp.arange(count), jnp.array(list(ids), jnp.int32))


def random_examples(sequences, count, vocab_size=12, seed=0):
    """Prompts of up to six tokens, targets that aren't seen."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        target, *others = random.permutation(len(sequences))
        found.append(
            {
                "prompt": random.integers(2, vocab_size, random.integers(1, 7)).tolist(),
                "description": sequences[target],
                "seen": others[: random.integers(0, len(others))],
                "label": float(random.integers(0, 4) / 3),
                "weight": float(random.integers(1, 4)),
            }
        )
    return found
