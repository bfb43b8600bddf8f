"""A T5X checkpoint of T5 1.1, Flan-T5, mT5 or T5 → a folder to start training from.

python scripts/import_t5x.py --checkpoint flan_t5_base/checkpoint_1184000 \\
    --tokenizer spiece.model --to flan-t5-base

The folder is as Hugging Face has it; bind pipeline.train.pretrained to it. Neither T5X nor
TensorFlow is needed. See docs/t5x.md.
"""

import argparse
import os
import sys
import textwrap
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # host memory is enough, and there is more of it

from recexplore.adapters.t5x_pretrained import to_huggingface
from recexplore.errors import InputError


def main(arguments: list[str] | None = None) -> int:
    """Imports; returns the exit status, 2 where something given is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="checkpoint_<step>")
    parser.add_argument("--tokenizer", type=Path, help="its SentencePiece model, of any name")
    parser.add_argument("--to", required=True, type=Path, help="a new folder")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    flags = parser.parse_args(arguments)
    try:
        config = to_huggingface(flags.checkpoint, flags.to, flags.tokenizer, flags.dtype)
    except InputError as error:
        said = f"import_t5x: {error}"
        whole = {"break_long_words": False, "break_on_hyphens": False}
        print(textwrap.fill(said, 100, **whole), file=sys.stderr)
        return 2
    print(
        f"{flags.to}: {config.num_encoder_layers} + {config.num_decoder_layers} layers of width "
        f"{config.model_dim}, {config.vocab_size:,} tokens"
    )
    if flags.tokenizer is None:
        print("It has no tokenizer yet: name T5's SentencePiece model with --tokenizer.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
