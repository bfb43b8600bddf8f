"""What the models are trained for.

An objective is a function (model, params, trie, batch, dropout key) → (sum of losses, sum of
weights) over a batch as recexplore.tasks.seqio_tasks.Batches makes it. Without a dropout key the
model runs deterministically.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from recexplore.models.trie import (
    ROOT,
    Trie,
    children_of,
    exclude_mask,
    num_allowed_below,
)

_IMPOSSIBLE = -1e30
Batch = dict[str, Array]


def next_description_loss(
    model: nn.Module,
    params: dict,
    trie: Trie,
    batch: Batch,
    dropout_key: Key[Array, ""] | None = None,
    *,
    label_smoothing: float = 0.1,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of the next cluster's description over the vocabulary, for the novelty model.

    For a prompt x and the tokens y_1 … y_m of the description, EOS included,

        loss = − Σ_d log ( exp z_d(y_d) / Σ_{v ∈ V_d} exp z_d(v) )

    where z_d are the logits after x y_1 … y_{d−1}. V_d is the vocabulary less those tokens that
    could only lead to clusters which the user had seen before: they can't be the next novel
    cluster, and sampling excludes them in the same way. So the model isn't taught that a cluster is
    unlikely just because most users know it already.

    In training (with a dropout key) `label_smoothing` of the target's probability is spread over
    the clusters the user hadn't seen, each token getting its share by the number of them below it:
    tastes move on, and a cluster that was never next in the log must not get probability zero.
    """
    smoothing = 0.0 if dropout_key is None else label_smoothing
    return _description_loss(model, params, trie, batch, dropout_key, smoothing, within_trie=False)


def constrained_description_loss(
    model: nn.Module,
    params: dict,
    trie: Trie,
    batch: Batch,
    dropout_key: Key[Array, ""] | None = None,
    *,
    label_smoothing: float = 0.1,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`next_description_loss` with V_d the tokens that lead to some cluster the user hadn't seen.

    This is minus the log-probability with which constrained sampling draws the next cluster when
    the seen ones are excluded. A model trained for it alone needn't learn to spell.
    """
    smoothing = 0.0 if dropout_key is None else label_smoothing
    return _description_loss(model, params, trie, batch, dropout_key, smoothing, within_trie=True)


def pointwise_loss(
    model: nn.Module,
    params: dict,
    trie: Trie,
    batch: Batch,
    dropout_key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of the collective feedback, for the alignment model.

    For a score s and a label l in 0..1,

        loss = − l log σ(s) − (1 − l) log(1 − σ(s))

    whose minimum is at σ(s) = the mean label, so that scores are calibrated. (Squared error of σ(s)
    has the same minimum but hardly any gradient where the score is badly wrong.)

    The trie is not needed here; all objectives are called alike.
    """
    del trie
    deterministic = dropout_key is None
    rngs = None if deterministic else {"dropout": dropout_key}
    scores = model.apply(params, batch["tokens"], batch["lengths"], deterministic, rngs=rngs)
    losses = optax.sigmoid_binary_cross_entropy(scores, batch["label"])
    return jnp.sum(losses * batch["weight"]), jnp.sum(batch["weight"])


def misordered_pairs(
    model: nn.Module,
    params: dict,
    trie: Trie,
    batch: Batch,
    dropout_key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The pairs of a batch whose scores are in the wrong order, and all pairs of different labels.

    To choose the alignment model by: best-of-n needs the right order alone, and the pointwise loss
    on a later period says more about how feedback as a whole has drifted since. A pair weighs as
    the product of its examples; equal scores are half wrong. It has no gradient to train by.
    """
    del trie, dropout_key
    scores = model.apply(params, batch["tokens"], batch["lengths"])
    better = batch["label"][:, None] > batch["label"][None, :]
    pairs = better * batch["weight"][:, None] * batch["weight"][None, :]
    gaps = scores[:, None] - scores[None, :]
    wrong = jnp.where(gaps < 0, 1.0, jnp.where(gaps == 0, 0.5, 0.0))
    return jnp.sum(pairs * wrong), jnp.sum(pairs)


def _description_loss(
    model, params, trie: Trie, batch: Batch, dropout_key, smoothing: float, within_trie: bool
):
    deterministic = dropout_key is None
    rngs = None if deterministic else {"dropout": dropout_key}
    hidden, _ = model.apply(params, batch["tokens"], deterministic, method="prefill", rngs=rngs)
    at = batch["prompt_lengths"][:, None] + jnp.arange(trie.max_length)[None, :]
    real = at < batch["lengths"][:, None]
    last = batch["tokens"].shape[1] - 1
    targets = jnp.take_along_axis(batch["tokens"], jnp.minimum(at, last), axis=1)
    before = jnp.take_along_axis(hidden, jnp.clip(at - 1, 0, last)[..., None], axis=1)
    logits = model.apply(params, before, method="logits")
    below, in_trie = _clusters_below(trie, batch["seen"], targets, logits.shape[-1])
    possible = below > 0 if within_trie else ~in_trie | (below > 0)
    log_probabilities = jax.nn.log_softmax(jnp.where(possible, logits, _IMPOSSIBLE))
    share = below / jnp.maximum(jnp.sum(below, axis=-1, keepdims=True), 1)
    wanted = (1 - smoothing) * jax.nn.one_hot(targets, logits.shape[-1]) + smoothing * share
    losses = -jnp.sum(jnp.where(wanted > 0, wanted * log_probabilities, 0.0), axis=-1)
    per_example = jnp.sum(jnp.where(real, losses, 0.0), axis=1)
    return jnp.sum(per_example * batch["weight"]), jnp.sum(batch["weight"])


def _clusters_below(
    trie: Trie, seen: Bool[Array, "B M"], targets: Int[Array, "B depth"], vocab_size: int
) -> tuple[Int[Array, "B depth V"], Bool[Array, "B depth V"]]:
    """At each step of the target's path down the trie: how many clusters not seen each token of the
    vocabulary leads to, and which tokens lead to any cluster at all."""
    excluded = exclude_mask(trie, seen)
    rows = jnp.arange(targets.shape[0])[:, None]
    nodes = jnp.full((targets.shape[0],), ROOT, jnp.int32)
    below, in_trie = [], []
    for step in range(trie.max_length):
        target = targets[:, step, None]
        # Once a single cluster is left, its own next token is all that can follow.
        tokens, certain = target, (jnp.take(trie.num_children, nodes) == 0)[:, None]
        counts = jnp.where(certain, num_allowed_below(trie, excluded, nodes[:, None]), 0)
        real = certain
        if step < trie.depth:
            children, exist = children_of(trie, trie.levels[step], nodes)
            exist = exist & ~certain
            found = jnp.where(exist, num_allowed_below(trie, excluded, children), 0)
            match = exist & (jnp.take(trie.tokens, children) == target)
            nodes = jnp.where(
                certain[:, 0], nodes, jnp.max(jnp.where(match, children, ROOT), axis=1)
            )
            tokens = jnp.concatenate([tokens, jnp.take(trie.tokens, children)], axis=1)
            counts = jnp.concatenate([counts, found], axis=1)
            real = jnp.concatenate([certain, exist], axis=1)
        below.append(jnp.zeros((len(targets), vocab_size), jnp.int32).at[rows, tokens].max(counts))
        in_trie.append(jnp.zeros((len(targets), vocab_size), bool).at[rows, tokens].max(real))
    return jnp.stack(below, axis=1), jnp.stack(in_trie, axis=1)
