"""What the models are trained for.

An objective is a function (model, params, trie, batch, dropout key) → `Sums` over a batch, packed
or not (recexplore.training.reading). Without a dropout key the model runs deterministically, and
labels are taken as they are: smoothing belongs to training. The trie is for the novelty model's
objectives, and for networks that read descriptions apart from prompts; all are called alike. Those
of the item recommender are in item_objectives, with a catalogue in its place.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from recexplore.errors import InputError
from recexplore.models.reward_model import HEADS
from recexplore.models.trie import Trie
from recexplore.training import description_losses, reading
from recexplore.training.reading import Batch


class Sums(NamedTuple):
    """Weighted sums over a batch's examples (or pairs); means are quotients of them.

    Attributes:
      loss: what is minimised is the sum of it over batches, divided by that of `weight`.
      weight: of the examples.
      correct: correct / weight is the accuracy, in 0..1.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""]


def next_description_loss(
    model: nn.Module,
    params: dict,
    trie: Trie,
    batch: Batch,
    dropout_key: Key[Array, ""] | None = None,
    *,
    label_smoothing: float = 0.1,
) -> Sums:
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

    An example is as correct as the share of its tokens y_d that are the most probable in V_d.
    """
    smoothing = _in_training("next_description_loss", label_smoothing, dropout_key)
    before, targets, real = _descriptions(model, params, trie, batch, dropout_key)
    seen = batch["seen"].reshape(-1, trie.num_sequences)
    choices = description_losses.choices_along(trie, seen, targets)
    logits = model.apply(params, before, method="logits")
    steps = description_losses.losses_among_vocabulary(choices, logits, targets, smoothing)
    return _sum_descriptions(steps, real, batch)


def constrained_description_loss(
    model: nn.Module,
    params: dict,
    trie: Trie,
    batch: Batch,
    dropout_key: Key[Array, ""] | None = None,
    *,
    label_smoothing: float = 0.1,
) -> Sums:
    """`next_description_loss` with V_d the tokens that lead to some cluster the user hadn't seen.

    This is minus the log-probability with which constrained sampling draws the next cluster when
    the seen ones are excluded. A model trained for it alone needn't learn to spell. A token that is
    certain costs nothing and is correct.
    """
    name = "constrained_description_loss"
    smoothing = _in_training(name, label_smoothing, dropout_key)
    before, targets, real = _descriptions(model, params, trie, batch, dropout_key)
    seen = batch["seen"].reshape(-1, trie.num_sequences)
    choices = description_losses.choices_along(trie, seen, targets)

    def token_logits(hidden, tokens):
        return model.apply(params, hidden, tokens, method="token_logits")

    steps = description_losses.losses_among_children(trie, choices, token_logits, before, smoothing)
    return _sum_descriptions(steps, real, batch)


def pointwise_loss(
    model: nn.Module,
    params: dict,
    trie: Trie,
    batch: Batch,
    dropout_key: Key[Array, ""] | None = None,
    *,
    label_smoothing: float = 0.0,
    prior: float = 0.5,
    weight_power: float = 1.0,
) -> Sums:
    """Cross-entropy of the collective feedback, for the alignment model.

    For a score s and a label l in 0..1,

        loss = − l log σ(s) − (1 − l) log(1 − σ(s))

    whose minimum is at σ(s) = the mean label, so that scores are calibrated.

    In training l is (1 − ε) label + ε `prior` with ε = `label_smoothing`. Examples weigh
    weight ** `weight_power`: 1 counts every reaction, 0 every transition alike. Correct is a
    prediction σ(s) on the label's side of 1/2, which itself is counted to the upper side.
    """
    scores, wanted, right = _predictions(
        "pointwise_loss", model, params, trie, batch, dropout_key, label_smoothing, prior
    )
    losses = optax.sigmoid_binary_cross_entropy(scores, wanted)
    return _sums(losses, right, reading.weights(batch, weight_power))


def regression_loss(
    model: nn.Module,
    params: dict,
    trie: Trie,
    batch: Batch,
    dropout_key: Key[Array, ""] | None = None,
    *,
    label_smoothing: float = 0.0,
    prior: float = 0.5,
    weight_power: float = 1.0,
) -> Sums:
    """Squared error of the predicted label: (σ(s) − l)².

    It is σ(s) that is compared, not s, so that scores stay logits and σ(s) a calibrated prediction,
    as with `pointwise_loss`, whose options it has. Beside that, it is bounded and forgives a label
    far off, but has hardly any gradient where a score is badly wrong.
    """
    scores, wanted, right = _predictions(
        "regression_loss", model, params, trie, batch, dropout_key, label_smoothing, prior
    )
    losses = (jax.nn.sigmoid(scores) - wanted) ** 2
    return _sums(losses, right, reading.weights(batch, weight_power))


def binned_loss(
    model: nn.Module,
    params: dict,
    trie: Trie,
    batch: Batch,
    dropout_key: Key[Array, ""] | None = None,
    *,
    label_smoothing: float = 0.0,
    weight_power: float = 1.0,
) -> Sums:
    """Cross-entropy over the bins of the label, for a reward model with the head 'bins'.

    With the label's nearest bin y = ⌊label · (num_bins − 1) + ½⌋ and the logits z_b of the bins,

        loss = − log ( exp z_y / Σ_b exp z_b )

    In training `label_smoothing` of the target's probability is spread evenly over all bins.
    Examples weigh weight ** `weight_power`. Correct is the most probable bin being y.
    """
    _check_head("binned_loss", model, "bins")
    smoothing = _in_training("binned_loss", label_smoothing, dropout_key)
    return _bin_cross_entropy(model, params, trie, batch, dropout_key, smoothing, weight_power)


def ordinal_loss(
    model: nn.Module,
    params: dict,
    trie: Trie,
    batch: Batch,
    dropout_key: Key[Array, ""] | None = None,
    *,
    label_smoothing: float = 0.0,
    weight_power: float = 1.0,
) -> Sums:
    """`binned_loss` by the cumulative link of the head 'ordinal'.

    With the label's bin y, s = w·h and thresholds θ_0 < θ_1 < … of P(label > b) = σ(s − θ_b),

        loss = − log ( σ(s − θ_{y−1}) − σ(s − θ_y) )

    where the first term is 1 for the lowest bin and the second 0 for the highest: the proportional
    odds model (McCullagh 1980). All bins share one direction w, so rare labels learn from the rest.
    """
    _check_head("ordinal_loss", model, "ordinal")
    smoothing = _in_training("ordinal_loss", label_smoothing, dropout_key)
    return _bin_cross_entropy(model, params, trie, batch, dropout_key, smoothing, weight_power)


def bradley_terry_loss(
    model: nn.Module,
    params: dict,
    trie: Trie,
    batch: Batch,
    dropout_key: Key[Array, ""] | None = None,
    *,
    label_smoothing: float = 0.0,
    weight_power: float = 1.0,
) -> Sums:
    """Pairwise loss of Bradley & Terry (1952), for batches of pairs.

    In a pair, `tokens` is the better sequence, with score s; `other_tokens` the worse, with s'.
    With d = s − s' and ε = `label_smoothing` in training, the chance that a pair was noted the
    wrong way round,

        loss = − (1 − ε) log σ(d) − ε log σ(−d)

    Pairs weigh weight ** `weight_power`. Correct is a pair whose better one has the higher score;
    equal scores are half correct.
    """
    _check_head("bradley_terry_loss", model, "scalar")
    smoothing = _in_training("bradley_terry_loss", label_smoothing, dropout_key)
    gaps = _gaps_of_pairs(model, params, trie, batch, dropout_key)
    losses = -(1 - smoothing) * jax.nn.log_sigmoid(gaps) - smoothing * jax.nn.log_sigmoid(-gaps)
    return _sums(losses, 1 - _wrong(gaps), reading.weights(batch, weight_power))


def misordered_pairs(
    model: nn.Module,
    params: dict,
    trie: Trie,
    batch: Batch,
    dropout_key: Key[Array, ""] | None = None,
) -> Sums:
    """The pairs of a batch whose scores are in the wrong order, and all pairs of different labels.

    To choose the alignment model by: best-of-n needs the right order alone, and the pointwise loss
    on a later period says more about how feedback as a whole has drifted since. A pair weighs as
    the product of its examples; equal scores are half wrong. In batches of pairs, those are the
    pairs. Any head will do. It has no gradient to train by.
    """
    del dropout_key
    _check_head("misordered_pairs", model, *HEADS)
    if "other_tokens" in batch:
        wrong, pairs = _wrong(_gaps_of_pairs(model, params, trie, batch)), reading.weights(batch)
    else:
        scores, labels = _scores(model, params, trie, batch), batch["label"].reshape(-1)
        weights = reading.weights(batch)
        wrong = _wrong(scores[:, None] - scores[None, :])
        better = labels[:, None] > labels[None, :]
        pairs = better * weights[:, None] * weights[None, :]
    return _sums(wrong, 1 - wrong, pairs)


def _descriptions(
    model: nn.Module, params: dict, trie: Trie, batch: Batch, dropout_key
) -> tuple[
    Float[Array, "examples steps D"], Int[Array, "examples steps"], Bool[Array, "examples steps"]
]:
    """For each example's description: the hidden states before its tokens, they themselves, and
    which of them there are."""
    if not hasattr(model, "token_logits"):
        raise InputError(
            f"A {type(model).__name__} predicts no tokens, but pipeline.train.objective is about "
            "descriptions. Bind pipeline.train.make_network = @transformer.Transformer, or another "
            "objective, such as @objectives.pointwise_loss, for this model."
        )
    before = reading.before_descriptions(model, params, trie, batch, dropout_key)
    step = jnp.arange(trie.max_length)
    at = reading.prompt_lengths(batch)[..., None] + step[None, None, :]
    real = (at < reading.lengths(batch)[..., None]).reshape(-1, trie.max_length)
    places = reading.starts(batch)[..., None] + at
    return before, reading.at_places(batch["tokens"], places), real


def _sum_descriptions(steps: description_losses.Steps, real: Array, batch: Batch) -> Sums:
    """Sums over the real steps; there are none for tokens that are certain in any case."""
    counted = real[:, : steps.losses.shape[1]]
    losses = jnp.sum(jnp.where(counted, steps.losses, 0.0), axis=1)
    wrong = jnp.sum(counted & ~steps.right, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1)
    return _sums(losses, 1 - wrong, reading.weights(batch))


def _predictions(
    objective: str,
    model,
    params,
    trie: Trie | None,
    batch: Batch,
    dropout_key,
    label_smoothing: float,
    prior: float,
) -> tuple[Float[Array, "examples"], Float[Array, "examples"], Bool[Array, "examples"]]:
    """Scores, the labels that they are to predict, and which are on their label's side of 1/2."""
    _check_head(objective, model, "scalar")
    if not 0 <= prior <= 1:
        raise InputError(f"objectives.{objective}.prior is {prior!r}; it must lie in [0, 1].")
    smoothing = _in_training(objective, label_smoothing, dropout_key)
    scores, labels = _scores(model, params, trie, batch, dropout_key), batch["label"].reshape(-1)
    wanted = (1 - smoothing) * labels + smoothing * prior
    return scores, wanted, (scores >= 0) == (labels >= 0.5)


def _bin_cross_entropy(
    model,
    params,
    trie: Trie | None,
    batch: Batch,
    dropout_key,
    smoothing: float,
    weight_power: float,
) -> Sums:
    last = reading.last_states(model, params, trie, batch, dropout_key)
    log_probabilities = model.apply(params, last, method="bin_log_probabilities")
    bins = jnp.floor(batch["label"].reshape(-1) * (model.num_bins - 1) + 0.5)
    bins = jnp.clip(bins.astype(jnp.int32), 0, model.num_bins - 1)
    wanted = (1 - smoothing) * jax.nn.one_hot(bins, model.num_bins) + smoothing / model.num_bins
    losses = -jnp.sum(wanted * log_probabilities, axis=1)
    right = jnp.argmax(log_probabilities, axis=1) == bins
    return _sums(losses, right, reading.weights(batch, weight_power))


def _scores(
    model, params, trie: Trie | None, batch: Batch, dropout_key=None
) -> Float[Array, "examples"]:
    last = reading.last_states(model, params, trie, batch, dropout_key)
    return model.apply(params, last, method="score")


def _gaps_of_pairs(
    model, params, trie: Trie | None, batch: Batch, dropout_key=None
) -> Float[Array, "B"]:
    """Score of the better less that of the worse sequence."""
    if "other_tokens" not in batch or reading.is_packed(batch):
        raise InputError(
            "objectives.bradley_terry_loss needs examples in pairs, other_tokens beside tokens, "
            f"and not packed; the batch has {', '.join(sorted(batch))}. Train with pairs, or bind "
            "the model's pipeline.train.objective to one of single examples, such as "
            "@objectives.pointwise_loss."
        )
    # Beside each other, so that both stay where the pair is when the batch is dealt out.
    tokens = jnp.stack([batch["tokens"], batch["other_tokens"]], axis=1)
    lengths = jnp.stack([batch["lengths"], batch["other_lengths"]], axis=1)
    both = {"tokens": tokens.reshape(-1, tokens.shape[-1]), "lengths": lengths.reshape(-1)}
    if reading.has_encoder(model):
        both["prompt_lengths"] = jnp.repeat(batch["prompt_lengths"], 2)
    scores = _scores(model, params, trie, both, dropout_key).reshape(-1, 2)
    return scores[:, 0] - scores[:, 1]


def _wrong(gaps: Float[Array, "*pairs"]) -> Float[Array, "*pairs"]:
    """1 where the better one is scored lower, 1/2 where both are scored alike."""
    return jnp.where(gaps < 0, 1.0, jnp.where(gaps == 0, 0.5, 0.0))


def _sums(losses: Array, right: Array, weights: Array) -> Sums:
    return Sums(
        jnp.sum(losses * weights, dtype=jnp.float32),
        jnp.sum(weights, dtype=jnp.float32),
        jnp.sum(right * weights, dtype=jnp.float32),
    )


def _check_head(objective: str, model: nn.Module, *fitting: str) -> None:
    head = getattr(model, "head", None)
    if head not in fitting:
        has, wanted = "none", f"reward_model.RewardModel.head = {fitting[0]!r}"
        remedy = (
            "an objective about descriptions, such as @objectives.constrained_description_loss, or "
            f"pipeline.train.make_network = @reward_model.RewardModel and {wanted}"
        )
        if head:
            has, remedy = f"the head {head!r}", f"{wanted}, or another objective"
        raise InputError(
            f"objectives.{objective} needs a RewardModel with the head {' or '.join(fitting)}; "
            f"this {type(model).__name__} has {has}. Bind, with the trained model's name and / in "
            f"front, {remedy}."
        )


def _in_training(objective: str, label_smoothing: float, dropout_key) -> float:
    """The smoothing, which there is in training only."""
    if not 0 <= label_smoothing < 1:
        raise InputError(
            f"objectives.{objective}.label_smoothing is {label_smoothing!r}; it must lie in [0, 1)."
        )
    return 0.0 if dropout_key is None else label_smoothing
