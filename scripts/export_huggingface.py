"""A trained model of a work directory → a folder that transformers reads.

python scripts/export_huggingface.py --workdir W --model novelty --to exported/novelty
python scripts/export_huggingface.py --workdir W --model alignment --to exported/alignment
python scripts/export_huggingface.py --workdir W --model novelty --to novelty32 --dtype float32

The best checkpoint so far, its adapters merged, with the tokenizer; the alignment model's head is
in reward_head.safetensors, which recexplore/export.py describes.
"""

import argparse
import os
import sys
import textwrap
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # host memory is enough, and there is more of it

from recexplore import pipeline
from recexplore.errors import InputError
from recexplore.export import export_model
from recexplore.tasks.vocabulary import Vocabulary


def main(arguments: list[str] | None = None) -> int:
    """Exports; returns the exit status, 2 where something given is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--model", required=True, help="novelty, alignment, …")
    parser.add_argument("--to", required=True, type=Path, help="a new folder, or an earlier export")
    parser.add_argument("--dtype", help="float32 or bfloat16; as it was trained if left out")
    flags = parser.parse_args(arguments)
    try:
        trained = flags.workdir / pipeline.model_folder(flags.model)
        vocabulary = Vocabulary(flags.workdir / pipeline.VOCABULARY)
        files = export_model(trained, vocabulary, flags.to, flags.dtype)
    except InputError as error:
        said = f"export_huggingface: {error}"
        whole = {"break_long_words": False, "break_on_hyphens": False}
        print(textwrap.fill(said, 100, **whole), file=sys.stderr)
        return 2
    print(f"{flags.to}: {', '.join(files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
