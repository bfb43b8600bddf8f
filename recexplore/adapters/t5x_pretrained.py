"""T5X's T5 checkpoints as folders to start from: `pipeline.train.pretrained` takes them.

A checkpoint of t5x/examples/t5 (T5 1.1, Flan-T5, mT5, the original T5) tells its own sizes, so that
nobody has to write them down.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath
from flax import traverse_util

from recexplore.adapters import t5x_checkpoints
from recexplore.errors import InputError
from recexplore.models import pretrained
from recexplore.models.encoder_decoder import EncoderDecoderConfig
from recexplore.models.t5_names import from_t5x

_MAX_LENGTH = 512  # relative positions have no end; this is what T5 was trained on
_TOKENIZER = "spiece.model"  # as T5's is called there; ours has another name
_BIASES = "encoder/relpos_bias/rel_embedding"


def to_huggingface(
    checkpoint: epath.PathLike,
    folder: Path,
    tokenizer: Path | str | None = None,
    dtype: str = "float32",
) -> EncoderDecoderConfig:
    """Writes a folder as Hugging Face has it from a T5X checkpoint.

    Args:
      checkpoint: a `checkpoint_<step>` folder, or one that has some, of which the latest is read.
      folder: made.
      tokenizer: T5's SentencePiece model, whatever it is called; it becomes spiece.model.
      dtype: of the parameters written.

    Returns:
      The network's sizes.

    Raises:
      InputError: there is no checkpoint, or it isn't T5's; there is no such tokenizer; see also
        `pretrained.save`.
    """
    if tokenizer is not None and not Path(tokenizer).is_file():
        raise InputError(f"{tokenizer}, the SentencePiece model to go with it, is missing.")
    beside = {} if tokenizer is None else {_TOKENIZER: Path(tokenizer).read_bytes()}
    tree = t5x_checkpoints.read(checkpoint, ("target",))["target"]
    config = config_of(tree, dtype)
    pretrained.save(
        folder,
        from_t5x(tree, config),
        config,
        beside=beside,
        token_ids={"eos_token_id": 1, "pad_token_id": 0},
    )
    return config


def config_of(tree: Mapping[str, Any], dtype: str = "float32") -> EncoderDecoderConfig:
    """The sizes of the network that a tree of T5X's parameters is of.

    Args:
      tree: the target of a checkpoint of t5x/examples/t5.
      dtype: of the configuration's parameters.

    Raises:
      InputError: it is another network's.
    """
    shapes = {name: x.shape for name, x in traverse_util.flatten_dict(dict(tree), sep="/").items()}
    try:
        vocab_size, model_dim = shapes["token_embedder/embedding"]
        num_heads, num_buckets = shapes[_BIASES]
        plain = "encoder/layers_0/mlp/wi/kernel" in shapes
        mlp_dim = shapes[f"encoder/layers_0/mlp/{'wi' if plain else 'wi_0'}/kernel"][1]
        joined = shapes["encoder/layers_0/attention/query/kernel"][1]
    except (KeyError, ValueError) as error:
        scanned = any(name.startswith("encoder/encoder/") for name in shapes)
        raise InputError(
            "The T5X checkpoint isn't one of t5x/examples/t5: "
            + (
                "its layers are scanned and have position biases of their own, as "
                "t5x/examples/scalable_t5 has them and no Hugging Face folder. "
                "t5_names.from_t5x reads it with EncoderDecoderConfig.bias_by_layer = True."
                if scanned
                else f"it has no {error.args[0] if error.args else _BIASES}."
            )
        ) from error
    return EncoderDecoderConfig(
        vocab_size=int(vocab_size),
        num_encoder_layers=_layers(shapes, "encoder"),
        num_decoder_layers=_layers(shapes, "decoder"),
        model_dim=int(model_dim),
        num_heads=int(num_heads),
        head_dim=int(joined // num_heads),
        mlp_dim=int(mlp_dim),
        max_length=_MAX_LENGTH,
        activation="relu" if plain else "gelu",
        num_buckets=int(num_buckets),
        tied_embeddings="decoder/logits_dense/kernel" not in shapes,
        param_dtype=dtype,
    )


def _layers(shapes: Mapping[str, Any], stack: str) -> int:
    return sum(name.endswith("/pre_mlp_layer_norm/scale") and stack in name for name in shapes)
