"""Our networks as T5X models: trained by `t5x.train`, asked by `t5x.infer`. Needs t5x.

T5X wants parameters without boxes, their logical axes in a collection `params_axes`, and caches
whose leaves have the layers first and the batch next (`scan_layers`). Losses are the objectives of
recexplore.training, so that a run under T5X minimises what `recexplore train` does.

A batch is either one of ours (`t5x_data.get_dataset`) or has T5X's features of a decoder, as
`t5x_data.ExampleConverter` makes them. One that says nothing of labels, weights or seen clusters,
such as seqio.DecoderFeatureConverter's, will do to predict and to score.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import seqio
from clu import metrics as clu_metrics
from flax import traverse_util
from flax.core import freeze
from flax.linen import partitioning as flax_partitioning
from jaxtyping import Array, Bool, Float, Int
from t5x import decoding, metrics, models, optimizers

from recexplore.adapters.t5x_data import ExampleConverter
from recexplore.errors import InputError
from recexplore.models.attention import Segment
from recexplore.models.saved import fresh_variables
from recexplore.models.trie import Trie
from recexplore.training.objectives import Sums
from recexplore.training.optimization import Optimization

Batch = Mapping[str, Array | np.ndarray]
Objective = Callable[..., Sums]


class _Objective:
    """What both models share: fresh variables, and the loss by an objective of ours."""

    module: nn.Module
    _objective: Objective
    _trie: Trie
    _loss_normalizing_factor: float | None

    def get_initial_variables(self, rng, input_shapes, input_types=None):
        """Parameters, unboxed, and `params_axes`, their logical axes."""
        del input_shapes, input_types
        boxed = fresh_variables(self.module, _typed(rng))
        if others := sorted(set(boxed) - {"params"}):
            raise InputError(
                f"T5X trains all parameters, but the network has {', '.join(others)} too. Bind "
                "transformer.TransformerConfig.lora_rank to 0."
            )
        params = nn.unbox(boxed["params"])
        specs = traverse_util.flatten_dict(nn.get_partition_spec(boxed["params"]))
        axes = {}
        for path, leaf in traverse_util.flatten_dict(params).items():
            names = (*specs[path], *(None,) * (leaf.ndim - len(specs[path])))
            axes[*path[:-1], f"{path[-1]}_axes"] = flax_partitioning.AxisMetadata(names)
        return freeze({"params": params, "params_axes": traverse_util.unflatten_dict(axes)})

    def loss_fn(self, params, batch: Batch, dropout_rng=None):
        """The objective's mean over the batch, and metrics under T5X's names.

        Where `loss_normalizing_factor` is set, the sum is divided by that instead of by the sum of
        weights: T5X adds up what the parts of a batch give.
        """
        ours = as_ours(batch, self._trie.num_sequences)
        key = None if dropout_rng is None else _typed(dropout_rng)
        sums = self._sums(params, ours, key)
        factor = self._loss_normalizing_factor
        loss = sums.loss / (jnp.maximum(sums.weight, 1e-9) if factor is None else factor)
        return loss, _metrics(sums, loss, ours)

    def _sums(self, params, batch: dict[str, Array], dropout_key=None) -> Sums:
        trie = jax.tree.map(jnp.asarray, self._trie)
        return self._objective(self.module, {"params": params}, trie, batch, dropout_key)


class NoveltyModel(_Objective, models.DecoderOnlyModel):
    """The novelty model: a Transformer trained to say the next novel cluster's description.

    Decoding draws descriptions of clusters alone, those that a batch has as `seen` excepted;
    `decoder_params={'logit_callback_fn': None}` draws any tokens instead.

    Args:
      module: a recexplore.models.transformer.Transformer.
      input_vocabulary: of prompts.
      output_vocabulary: of descriptions.
      trie: the clusters' descriptions.
      optimizer_def: see `optimizer`; None to decode and score.
      objective: of recexplore.training.objectives, about descriptions.
      decode_fn: t5x.decoding.temperature_sample, its arguments bound.
      loss_normalizing_factor: what the summed loss is divided by; None: the sum of weights.
      feature_converter_cls: None: `t5x_data.ExampleConverter`.

    Raises:
      InputError: the network has an encoder.
    """

    def __init__(
        self,
        module: nn.Module,
        input_vocabulary: seqio.Vocabulary,
        output_vocabulary: seqio.Vocabulary,
        trie: Trie,
        optimizer_def: Any,
        objective: Objective,
        decode_fn: Callable[..., Any] = decoding.temperature_sample,
        loss_normalizing_factor: float | None = None,
        feature_converter_cls: Callable[..., Any] | None = None,
    ):
        _check_decoder(module)
        super().__init__(
            module,
            input_vocabulary,
            optimizer_def,
            decode_fn=decode_fn,
            feature_converter_cls=feature_converter_cls or _converter_for(trie),
            loss_normalizing_factor=loss_normalizing_factor,
        )
        self._output_vocabulary = output_vocabulary
        self._trie, self._objective = trie, objective

    def score_batch(self, params, batch: Batch, return_intermediates: bool = False):
        """Minus the objective's loss of each example [B]: its description's log-probability.

        Among all tokens or among those that lead to some cluster, as the objective has it. There
        are no intermediates.
        """
        ours = as_ours(batch, self._trie.num_sequences)
        ours["weight"] = jnp.ones_like(ours["weight"])

        def loss(row):
            alone = jax.tree.map(lambda x: x[None], row)
            return self._sums(params, alone).loss

        scores = -jax.vmap(loss)(ours)
        return (scores, {}) if return_intermediates else scores

    def _compute_logits(
        self, params, batch, dropout_rng=None, mutable=False, other_variables=None
    ) -> Float[Array, "B T V"]:
        """Logits of all tokens; of the first, before which there is nothing, zeros."""
        del mutable, other_variables
        deterministic = dropout_rng is None
        rngs = None if deterministic else {"dropout": _typed(dropout_rng)}
        tokens = as_ours(batch, self._trie.num_sequences)["tokens"]
        logits = self.module.apply({"params": params}, tokens, deterministic, rngs=rngs)
        return jnp.pad(logits[:, :-1], ((0, 0), (1, 0), (0, 0)))

    def _compute_kv_cache(
        self, params, inputs: Int[Array, "B T"], causal_attention_mask: Int[Array, "B T"]
    ):
        """Keys and values of prompts but for their last token, and how long the prompts are.

        T5X's inputs begin with a 0 that our networks don't know, so its places are ours plus one.
        """
        lengths = jnp.sum(causal_attention_mask, axis=-1) - 1
        tokens = jnp.pad(inputs[:, 1:], ((0, 0), (0, 1)))
        _, segment = self.module.apply({"params": params}, tokens, method="prefill")
        cache = {
            "cached_key": segment.keys,
            "cached_value": segment.values,
            "cache_index": (lengths - 1)[None],
        }
        return cache, lengths

    def _compute_logits_from_slice(self, decoding_state, params, max_decode_length: int):
        """Logits after one more token of each sequence, and the cache with it."""
        keys, values = (decoding_state.cache[name] for name in ("cached_key", "cached_value"))
        index = decoding_state.cache["cache_index"][0]
        place = jnp.arange(max_decode_length)[None, :]
        positions = jnp.broadcast_to(place, (len(index), max_decode_length))
        hidden, own = self.module.apply(
            {"params": params},
            decoding_state.cur_token,
            index[:, None],
            jnp.ones((1, 1), bool),
            (Segment(keys, values, positions),),
            ((place < index[:, None])[:, None],),
            method="extend",
        )
        row = jnp.arange(len(index))
        cache = {  # what lies beyond the end is dropped
            "cached_key": keys.at[:, row, index].set(own.keys[:, :, 0]),
            "cached_value": values.at[:, row, index].set(own.values[:, :, 0]),
            "cache_index": (index + 1)[None],
        }
        return self.module.apply({"params": params}, hidden[:, 0], method="logits"), cache

    def predict_batch_with_aux(
        self,
        params,
        batch: Batch,
        rng=None,
        *,
        return_all_decodes: bool = False,
        num_decodes: int = 1,
        decoder_params: Mapping[str, Any] | None = None,
    ):
        """Draws descriptions; see t5x.models.DecoderOnlyModel, and the class."""
        ours = as_ours(batch, self._trie.num_sequences)
        lengths = ours["prompt_lengths"]
        inputs = jnp.pad(ours["tokens"][:, :-1], ((0, 0), (1, 0)))
        attention = jnp.arange(inputs.shape[1])[None, :] <= lengths[:, None]
        only = functools.partial(
            _only_clusters,
            trie=self._trie,
            prompt_lengths=jnp.repeat(lengths, num_decodes),
            seen=jnp.repeat(ours["seen"], num_decodes, axis=0),
        )
        return super().predict_batch_with_aux(
            params,
            {"decoder_input_tokens": inputs, "decoder_causal_attention": attention.astype(int)},
            rng,
            return_all_decodes=return_all_decodes,
            num_decodes=num_decodes,
            decoder_params={"logit_callback_fn": only, **(decoder_params or {})},
        )


class AlignmentModel(_Objective, models.BaseTransformerModel):
    """The alignment model: a RewardModel. `t5x.infer` in mode 'score' gives the alignment score.

    Args:
      module: a recexplore.models.reward_model.RewardModel.
      input_vocabulary: of prompts.
      output_vocabulary: of descriptions.
      trie: the clusters' descriptions.
      optimizer_def: see `optimizer`; None to score.
      objective: of recexplore.training.objectives, about labels.
      loss_normalizing_factor: what the summed loss is divided by; None: the sum of weights.
      feature_converter_cls: None: `t5x_data.ExampleConverter`.

    Raises:
      InputError: the network has an encoder.
    """

    def __init__(
        self,
        module: nn.Module,
        input_vocabulary: seqio.Vocabulary,
        output_vocabulary: seqio.Vocabulary,
        trie: Trie,
        optimizer_def: Any,
        objective: Objective,
        loss_normalizing_factor: float | None = None,
        feature_converter_cls: Callable[..., Any] | None = None,
    ):
        _check_decoder(module)
        super().__init__(
            module,
            input_vocabulary,
            output_vocabulary,
            optimizer_def,
            loss_normalizing_factor=loss_normalizing_factor,
        )
        self._trie, self._objective = trie, objective
        self.FEATURE_CONVERTER_CLS = feature_converter_cls or _converter_for(trie)

    def score_batch(self, params, batch: Batch, return_intermediates: bool = False):
        """The alignment score of each description after its prompt [B]: the higher the better."""
        scores = self._compute_logits(params, batch)
        return (scores, {}) if return_intermediates else scores

    def _compute_logits(self, params, batch: Batch, dropout_rng=None) -> Float[Array, "B"]:
        """The score is the logit of the predicted label."""
        ours = as_ours(batch, self._trie.num_sequences)
        deterministic = dropout_rng is None
        rngs = None if deterministic else {"dropout": _typed(dropout_rng)}
        tokens, lengths = ours["tokens"], ours["lengths"]
        return self.module.apply({"params": params}, tokens, lengths, deterministic, rngs=rngs)

    def predict_batch_with_aux(self, params, batch: Batch, rng=None):
        """Refused: an alignment model says nothing."""
        raise InputError(
            "An alignment model predicts no text. Bind infer_script.infer.mode = 'score', and "
            "infer_eval_dataset_cfg = None in training."
        )


def as_ours(batch: Batch, num_clusters: int) -> dict[str, Array]:
    """A batch with T5X's features of a decoder, as our objectives want it; ours stays as it is.

    Args:
      batch: of B rows.
      num_clusters: M.
    """
    batch = {name: jnp.asarray(rows) for name, rows in batch.items()}
    if "tokens" in batch:
        return batch
    tokens = batch["decoder_target_tokens"]
    if "decoder_causal_attention" not in batch:
        raise InputError(
            "The batch doesn't say where prompts end: decoder_causal_attention is missing. "
            "task_feature_lengths must have both inputs and targets."
        )
    prompts = jnp.sum(batch["decoder_causal_attention"], axis=-1) - 1
    rows = len(tokens)
    return {
        "tokens": tokens,
        "prompt_lengths": prompts,
        "lengths": prompts + jnp.sum(batch["decoder_loss_weights"] != 0, axis=-1),
        "seen": batch.get("seen", jnp.zeros((rows, num_clusters), bool)),
        "label": batch.get("label", jnp.zeros(rows)),
        "weight": batch.get("weight", jnp.ones(rows)),
    }


def optimizer(optimization: Optimization) -> optimizers.OptaxWrapper:
    """`Optimization`'s chain as T5X's optimizer. T5X keeps no moving average of the parameters.

    Raises:
      InputError: it isn't one that T5X can shard, or has microbatches, which are the trainer's.
    """
    if optimization.optimizer != "adamw":
        raise InputError(
            f"optimization.Optimization.optimizer is {optimization.optimizer!r}; T5X knows how to "
            "shard the state of adamw alone."
        )
    if optimization.microbatches != 1:
        raise InputError(
            f"optimization.Optimization.microbatches is {optimization.microbatches}; under T5X "
            "bind trainer.Trainer.num_microbatches instead. It adds up the gradients of the parts, "
            "so bind loss_normalizing_factor to the sum of weights in a batch as well."
        )
    return optimizers.OptaxWrapper(optimization.transformation())


def learning_rate(optimization: Optimization) -> optax.Schedule:
    """What the optimizer does by itself, for T5X to log: its trainer's own rate would be ignored.

    Args:
      optimization: the optimizer's.
    """
    return optimization.schedule()


def _only_clusters(
    logits: Float[Array, "R V"],
    state: Any,
    *,
    trie: Trie,
    prompt_lengths: Int[Array, "R"],
    seen: Bool[Array, "R M"],
) -> Float[Array, "R V"]:
    """Logits with all tokens masked that lead to no cluster, or only to seen ones.

    Where all are seen there is nothing to choose from, and none is left out.
    """
    sequences = jnp.asarray(trie.sequences)
    width = sequences.shape[1]
    said = state.cur_index - prompt_lengths  # tokens drawn so far
    places = prompt_lengths[:, None] + 1 + jnp.arange(width)[None, :]
    drawn = jnp.take_along_axis(state.sequences, places, axis=1, mode="clip")
    later = jnp.arange(width)[None, :] >= said[:, None]
    agree = later[:, None, :] | (drawn[:, None, :] == sequences[None])
    possible = jnp.all(agree, axis=2) & (~seen | jnp.all(seen, axis=1, keepdims=True))
    tokens = sequences.T[jnp.clip(said, 0, width - 1)]
    row = jnp.arange(len(logits))[:, None]
    allowed = jnp.zeros(logits.shape, bool).at[row, tokens].max(possible)
    return jnp.where(allowed, logits, decoding.NEG_INF.astype(logits.dtype))


def _check_decoder(module: nn.Module) -> None:
    if module.config.has_encoder:
        raise InputError(
            f"The network's configuration is {type(module.config).__name__}, but under T5X "
            "recexplore's models are decoders: bind t5x_data.network.make_config = "
            "@transformer.TransformerConfig. Train encoder-decoders by `recexplore train`."
        )


def _metrics(sums: Sums, loss: Float[Array, ""], batch: Batch) -> dict[str, clu_metrics.Metric]:
    """The batch's figures under T5X's names."""
    examples = jnp.sum(batch["lengths"] > 0)
    tokens = jnp.asarray(batch["tokens"].size)
    real = jnp.sum(batch["lengths"])
    rate = metrics.TimeRate.from_model_output
    cores = jax.device_count()
    return {
        "loss": metrics.AveragePerStep(total=loss),
        "accuracy": clu_metrics.Average(total=sums.correct, count=sums.weight),
        "loss_per_example": clu_metrics.Average(total=sums.loss, count=sums.weight),
        "weight_sum": metrics.AveragePerStep(total=sums.weight),
        "non_padding_fraction/overall": clu_metrics.Average(total=real, count=tokens),
        "timing/steps_per_second": metrics.StepsPerTime.from_model_output(),
        "timing/seconds": metrics.Time(),
        "timing/seqs": metrics.Sum(examples),
        "timing/seqs_per_second": rate(numerator=examples),
        "timing/seqs_per_second_per_core": rate(numerator=examples / cores),
        "timing/target_tokens_per_second": rate(numerator=tokens),
        "timing/target_tokens_per_second_per_core": rate(numerator=tokens / cores),
    }


def _converter_for(trie: Trie) -> Callable[..., Any]:
    return functools.partial(ExampleConverter, trie.num_sequences)


def _typed(rng: Array | np.ndarray) -> Array:
    """A key of the new kind; T5X has old ones."""
    return rng if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(rng)
