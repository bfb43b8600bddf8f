"""Models trained under T5X in a work directory of ours, and ours in a folder of T5X's.

`take_or_train` stands in for trainer.train in gin_configs/t5x/trained.gin, so that all other stages
see a model like any other; `give` is what scripts/export_t5x.py does.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from recexplore import artifacts
from recexplore.adapters import t5x_checkpoints
from recexplore.distributed.checkpoints import Checkpoints, best_step
from recexplore.errors import InputError
from recexplore.models import lora, saved, t5_names
from recexplore.models.encoder_decoder import EncoderDecoder
from recexplore.models.networks import LANGUAGE_MODELS
from recexplore.models.reward_model import RewardModel
from recexplore.models.trie import Trie, trie_fingerprint
from recexplore.training.optimization import Optimization
from recexplore.training.program import Objective
from recexplore.training.train_step import evaluation_step
from recexplore.training.trainer import TrainingData, TrainResult


def take_or_train(
    folder: Path,
    model: nn.Module,
    objective: Objective,
    constants: Any,
    data: TrainingData,
    progress: Callable[..., None],
    *,
    train: Callable[..., TrainResult],
    checkpoint: str | None = None,
    measure: Objective | None = None,
    pretrained: Path | None = None,
    seed: int = 0,
) -> TrainResult:
    """A model from T5X's checkpoint, measured on the validation split; or trained, without one.

    Args:
      folder: gets checkpoints/.
      model: the network.
      objective: what it was trained for.
      constants: what objectives need besides model and batch: the trie of descriptions.
      data: of the validation split.
      progress: called as progress(step, steps, **figures).
      train: recexplore.training.trainer.train, for a model without a checkpoint.
      checkpoint: a `checkpoint_<step>` folder, or one that has some; None: train.
      measure: what is told of the validation split; None: the objective.
      pretrained: must be None: T5X's checkpoint has the whole network.
      seed: of training.

    Raises:
      InputError: the checkpoint doesn't fit the network or the clusters, or has values that
        aren't finite; see also `t5x_checkpoints.read_parameters`.
    """
    if checkpoint is None:
        return train(
            folder,
            model,
            objective,
            constants,
            data,
            progress,
            pretrained=pretrained,
            seed=seed,
        )
    if pretrained is not None:
        raise InputError(
            f"t5x_trained.take_or_train.checkpoint is {checkpoint!r}, and "
            "pipeline.train.pretrained names another model. Bind one of them to None."
        )
    checkpoint = t5x_checkpoints.find(checkpoint)  # there may be a later one soon
    _check_clusters(checkpoint, constants)
    params = t5x_checkpoints.read_parameters(checkpoint, model)
    _check_finite(checkpoint, params)
    params = jax.device_put(params)
    step = t5x_checkpoints.read_step(checkpoint)
    told = _mean(model, params, measure or objective, constants, data)
    with contextlib.closing(Checkpoints(folder / saved.CHECKPOINTS)) as checkpoints:
        checkpoints.save(step, {"params": params}, {}, told)
    progress(step, step, validation_loss=told)
    return TrainResult(step, step, told)


def _check_clusters(checkpoint: epath.PathLike, trie: Trie) -> None:
    """Checks that a checkpoint which says what clusters it was trained on was trained on these."""
    position, own = t5x_checkpoints.read_position(checkpoint) or {}, trie_fingerprint(trie)
    if position.get(t5x_checkpoints.CLUSTERS, own) != own:
        raise InputError(
            f"The T5X checkpoint {checkpoint} was trained on other clusters "
            "or with another vocabulary than this work directory has: its token ids mean something "
            "else. Train it again on what `recexplore tokenize` wrote here."
        )


def _check_finite(checkpoint: epath.PathLike, params: Any) -> None:
    for path, leaf in traverse_util.flatten_dict(params["params"], sep="/").items():
        if not np.all(np.isfinite(np.asarray(leaf, np.float32))):
            raise InputError(
                f"The T5X checkpoint {checkpoint} has values in {path} that "
                "are not finite numbers: it is damaged, or its training has diverged. Take another."
            )


def give(trained: Path, to: epath.PathLike, to_train: bool = False) -> epath.Path:
    """A model that `recexplore train` made, as a checkpoint for T5X.

    Args:
      trained: the model's folder.
      to: gets `checkpoint_<step>`; here or in a bucket (gs://…).
      to_train: the latest parameters with the optimizer's state and the place of the next batch,
        for `t5x.train` to go on from; otherwise what is used: the best checkpoint's average,
        adapters merged into their kernels.

    Returns:
      The checkpoint's folder.

    Raises:
      InputError: there is no model, or one that T5X has nothing like; or, to train on, it has
        adapters, an encoder, no optimizer's state, or an optimizer that isn't T5X's.
    """
    if not (trained / saved.NETWORK).is_file():
        raise InputError(f"{trained} holds no trained model. Run `recexplore train` first.")
    trained = trained.resolve()  # as Orbax wants it
    description = artifacts.read_json(trained / saved.NETWORK)
    model = saved.rebuild(description)
    scores_by_encoder = isinstance(model, RewardModel) and model.config.has_encoder
    if not isinstance(model, (*LANGUAGE_MODELS, RewardModel)) or scores_by_encoder:
        raise InputError(
            f"{trained} is a {type(model).__name__} of {type(model.config).__name__}; for it T5X "
            "has nothing. Novelty models can be exported, and alignment models without an encoder."
        )
    folder = trained / saved.CHECKPOINTS
    steps = sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())
    if not steps:
        raise InputError(f"{folder} holds no checkpoint. Run `recexplore train` first.")
    if not to_train:
        params = saved.load_parameters(trained, model, description["pretrained"])
        if model.config.lora_rank:
            params, _ = lora.merge(params, model.config)
        if isinstance(model, EncoderDecoder):
            params = {"params": t5_names.to_t5x(params, model.config)}
        return t5x_checkpoints.write(to, best_step(folder), params)
    if model.config.lora_rank or model.config.has_encoder:
        part = "adapters" if model.config.lora_rank else "an encoder"
        raise InputError(
            f"{trained} has {part}, and under T5X recexplore's models are trained without. Export "
            "it without --to_train."
        )
    latest = folder / str(steps[-1])
    params, optimizer, position = _state(latest, model)
    return t5x_checkpoints.write(to, steps[-1], params, optimizer, position)


def _state(checkpoint: Path, model: nn.Module) -> tuple[Any, Any, dict[str, int]]:
    """Parameters, AdamW's state and the place of the next batch of one of our checkpoints."""
    state = checkpoint / "state"
    shapes = saved.abstract_parameters(model)
    adamw = Optimization(steps=1, learning_rate=1.0).transformation()
    abstract = {"params": shapes, "optimizer": jax.eval_shape(adamw.init, shapes)}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        said = reader.metadata(state).item_metadata
        if said is not None and "optimizer" not in said.tree:
            raise InputError(
                f"{state} has parameters alone: the model was taken from a checkpoint of T5X's and "
                "not trained here. Let t5x.train go on from that, or export without --to_train."
            )
        try:
            found = reader.restore(
                state,
                args=ocp.args.PyTreeRestore(
                    item=abstract, restore_args=as_numpy, partial_restore=True
                ),
            )
            position = ocp.JsonCheckpointHandler().restore(checkpoint / "position")
        except Exception as error:  # Orbax has kinds of its own
            raise InputError(
                f"{checkpoint} has no state of AdamW to go on from: "
                f"{str(error).splitlines()[0][:200]} T5X can go on from a model that was trained "
                "by AdamW, and trained whole."
            ) from error
    return found["params"], found["optimizer"], position


def _mean(model: nn.Module, params: Any, measure: Objective, constants: Any, data: TrainingData):
    step = jax.jit(
        lambda params, batch: evaluation_step(
            params, {}, batch, constants, model=model, objective=measure
        )
    )
    rows = np.arange(data.batch_size)
    sums = [jax.device_get(step(params, batch)) for batch in data.validation(rows)]
    loss, weight = (np.sum([s[i] for s in sums], dtype=np.float64) for i in (0, 1))
    return float(loss / max(weight, 1e-9))
