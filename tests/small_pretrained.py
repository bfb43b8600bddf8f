"""Small random models with tokenizers of their own, in folders as Hugging Face has them.

They differ as the families do: Gemma's texts begin with BOS, and padding is id 0; Qwen's begin with
nothing, id 0 is a letter, EOS is the last token, and what the embedding has beyond it is padding.
"""

import json
import re
from importlib import resources
from pathlib import Path

import jax
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from recexplore.models import pretrained
from recexplore.models.saved import abstract_parameters
from recexplore.models.transformer import Transformer, TransformerConfig

SIZES = dict(
    num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, max_length=512
)
NETWORKS = {
    "gemma": dict(
        vocab_size=640,
        activation="gelu",
        norm_offset=1.0,
        post_norms=True,
        scaled_embeddings=True,
        attention_windows=(8, 0),
        attention_softcap=50.0,
        logit_softcap=30.0,
    ),
    "qwen": dict(vocab_size=704, qk_norm=True, tied_embeddings=False),
}
_SPECIAL = {"gemma": ["<pad>", "<eos>", "<bos>"], "qwen": ["<|endoftext|>", "<|im_end|>"]}
_WORDS = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
_PIECES = 600


def write(folder: Path, family: str, **changes) -> TransformerConfig:
    """Makes a folder with a model and its tokenizer.

    Args:
      folder: to make.
      family: gemma or qwen.
      **changes: to the fields of the network's configuration.
    """
    config = TransformerConfig(**{**SIZES, **NETWORKS[family], **changes})
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (0.2 * random.standard_normal(x.shape)).astype(x.dtype),
        abstract_parameters(Transformer(config))["params"],
    )
    pretrained.save(folder, {"params": params}, config)
    _write_tokenizer(folder, family)
    return config


def bindings(config: TransformerConfig) -> str:
    """What a gin file of models/ would say for a network, but for what the folder decides."""
    left_out = {"vocab_size", "max_length", "scan_unroll"}
    names = [name for name in (*SIZES, *_fields_of(config)) if name not in left_out]
    return "".join(
        f"transformer.TransformerConfig.{name} = {getattr(config, name)!r}\n"
        for name in dict.fromkeys(names)
    )


def _fields_of(config: TransformerConfig) -> list[str]:
    usual = TransformerConfig(**SIZES, vocab_size=1)
    return [n for n in vars(config) if getattr(config, n) != getattr(usual, n)]


def _write_tokenizer(folder: Path, family: str) -> None:
    special = _SPECIAL[family]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    first = family == "gemma"  # whose special tokens have the first ids
    trainer = trainers.BpeTrainer(
        vocab_size=_PIECES,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special if first else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens(special)
    if first:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<bos> $A", special_tokens=[("<bos>", 2)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[1]}
    named |= {"pad_token": special[0], "bos_token": special[2] if first else None}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def _corpus() -> list[str]:
    """Words of the simulated platform, and what prompts are made of."""
    topics = resources.files("recexplore.simulation").joinpath("topics.json").read_text()
    words = sorted({*re.findall(r"[a-zé]+", topics)})
    return [f"interests: {word}; {word}; next: liking: {word}" for word in words]
