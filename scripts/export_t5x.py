"""A trained model of a work directory → a checkpoint that t5x.train and t5x.infer restore.

python scripts/export_t5x.py --workdir W --model alignment --to exported/alignment
python scripts/export_t5x.py --workdir W --model novelty --to exported/novelty --to_train

Neither T5X nor TensorFlow is needed. Without --to_train it has what is used, the best checkpoint's
averaged parameters; with it, the latest parameters and the optimizer's state. See docs/t5x.md.
"""

import argparse
import os
import sys
import textwrap
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # host memory is enough, and there is more of it

from recexplore import pipeline
from recexplore.adapters.t5x_trained import give
from recexplore.errors import InputError


def main(arguments: list[str] | None = None) -> int:
    """Exports; returns the exit status, 2 where something given is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--model", required=True, help="novelty, alignment, …")
    parser.add_argument("--to", required=True, help="gets checkpoint_<step>")
    parser.add_argument("--to_train", action="store_true", help="with the optimizer's state")
    flags = parser.parse_args(arguments)
    try:
        trained = flags.workdir / pipeline.model_folder(flags.model)
        written = give(trained, flags.to, flags.to_train)
    except InputError as error:
        said = f"export_t5x: {error}"
        whole = {"break_long_words": False, "break_on_hyphens": False}
        print(textwrap.fill(said, 100, **whole), file=sys.stderr)
        return 2
    print(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
