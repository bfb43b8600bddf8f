"""A trained model → a folder that transformers reads.

What was trained goes out as the language model that it is: adapters are merged into the kernels,
the tokenizer lies beside it. A reward model's head fits no network of transformers (theirs have no
bias and no order among labels), so it is a file of its own, `REWARD_HEAD`, for hidden states of the
exported transformer. With h the last token's, after the last norm (of T5 the decoder's):

    scalar    head [D], bias []                score = head · h + bias
    bins      head [D, bins], bias [bins]      P(bin) = softmax(hᵀ head + bias)
    ordinal   head [D], thresholds [bins − 1]  P(bin > b) = sigmoid(head · h − thresholds[b])

All are float32; the file's metadata has `head` (which of the three) and, of the last two,
`num_bins`: the labels 0, 1/(num_bins − 1), …, 1. There, the score is the expected label's logit.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save as as_safetensors

from recexplore import artifacts
from recexplore.errors import InputError
from recexplore.explorer import NETWORK, load_model
from recexplore.models import pretrained
from recexplore.models.config_file import CONFIG_FILE, longest_context
from recexplore.models.families import family_of
from recexplore.models.lora import merge
from recexplore.models.networks import Config
from recexplore.models.reward_model import RewardModel
from recexplore.models.saved import rebuild
from recexplore.tasks.published_tokenizer import token_ids, tokenizer_files
from recexplore.tasks.vocabulary import Vocabulary

REWARD_HEAD = "reward_head.safetensors"
_DTYPES = ("float32", "bfloat16")


def export_model(
    trained: Path, vocabulary: Vocabulary, folder: Path, dtype: str | None = None
) -> list[str]:
    """Writes the best checkpoint of a model as a Hugging Face folder.

    Args:
      trained: the model's folder in a work directory.
      vocabulary: of the work directory.
      folder: made; an earlier export there is replaced.
      dtype: of the parameters written; None: that which they were trained around. Adapters are
        summed in float32, and rounded with their kernels where those are bfloat16.

    Returns:
      The names of the files written.

    Raises:
      InputError: there is no such model, another dtype, a network or a vocabulary that transformers
        has nothing like, or the folder holds something else.
    """
    if dtype not in (None, *_DTYPES):
        raise InputError(f"The dtype to export is {dtype!r}; it must be {' or '.join(_DTYPES)}.")
    config = _config(trained)  # before anything else is read
    family_of(dataclasses.replace(config, lora_rank=0) if config.lora_rank else config)
    network, variables, _ = load_model(trained, vocabulary)
    config = network.config
    if dtype:
        config = dataclasses.replace(config, param_dtype=dtype)
        variables = jax.tree.map(lambda x: x.astype(np.float32), variables)
    if config.lora_rank:
        variables, config = merge(variables, config)
    params, beside = variables["params"], tokenizer_files(vocabulary)
    if isinstance(network, RewardModel):
        beside[REWARD_HEAD] = _reward_head(network, variables)
        params = params["transformer"]
    made_for = vocabulary.path.parent
    # A pretrained model reads more than prompts have.
    of_base = longest_context(made_for) if (made_for / CONFIG_FILE).is_file() else None
    pretrained.save(
        folder,
        {"params": params},
        config,
        beside=beside,
        token_ids=token_ids(vocabulary),
        context_length=of_base,
    )
    return sorted(path.name for path in Path(folder).iterdir())


def _config(trained: Path) -> Config:
    if not (trained / NETWORK).is_file():
        there = sorted(path.parent.name for path in trained.parent.glob(f"*/{NETWORK}"))
        raise InputError(
            f"{trained} holds no trained model. {trained.parent} has: {', '.join(there) or 'none'}."
        )
    return rebuild(artifacts.read_json(trained / NETWORK)).config


def _reward_head(network: RewardModel, variables: dict[str, Any]) -> bytes:
    head = {
        name: np.asarray(value, np.float32)
        for name, value in variables["params"].items()
        if name != "transformer"
    }
    said = {"head": network.head, "format": "pt"}
    if network.head != "scalar":
        said["num_bins"] = str(network.num_bins)
    if network.head == "ordinal":
        head["thresholds"] = np.asarray(network.apply(variables, method="thresholds_in_order"))
    return as_safetensors(head, metadata=said)
