"""What importing a published language model costs: host memory and time, beside its size on disk.

A random checkpoint of the Llama family is written (and removed afterwards); a fresh process then
imports it on one CPU device and reads its own peak of resident memory, less what it had before.

python scripts/benchmark_import.py
python scripts/benchmark_import.py --layers 22 --stored float32 --wanted bfloat16
python scripts/benchmark_import.py --folder path/to/a/hugging-face-folder --max_length 2048
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = dict(model_dim=2048, num_heads=32, num_kv_heads=4, head_dim=64, mlp_dim=5632)
MAX_LENGTH = 2048


def main() -> None:
    """Prints a markdown table with one row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="a model to import instead of a random one")
    parser.add_argument("--max_length", type=int, default=MAX_LENGTH)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--stored", default="bfloat16", help="dtype of the random checkpoint")
    parser.add_argument("--wanted", default="bfloat16", help="dtype of the imported parameters")
    parser.add_argument("--temporary", type=Path, help="where the random checkpoint is written")
    parser.add_argument("--alone", action="store_true", help="the row only, from this process")
    flags = parser.parse_args()
    if flags.alone:
        print(measure(flags.folder, flags.max_length, flags.wanted))
        return
    print("| on disk, GB | imported, GB | peak of memory, GB | peak / on disk | seconds |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    if flags.folder:
        measure_in_fresh_process(flags.folder, flags)
        return
    with tempfile.TemporaryDirectory(dir=flags.temporary) as temporary:
        folder = Path(temporary) / "model"
        write_random(folder, flags)
        measure_in_fresh_process(folder, flags)


def write_random(folder: Path, flags: argparse.Namespace) -> None:
    """A checkpoint in several files, as published ones are."""
    import jax
    import numpy as np

    from recexplore.models import pretrained
    from recexplore.models.saved import abstract_parameters
    from recexplore.models.transformer import Transformer, TransformerConfig

    config = TransformerConfig(
        **MODEL,
        vocab_size=flags.vocab_size,
        num_layers=flags.layers,
        max_length=flags.max_length,
        tied_embeddings=False,
        param_dtype=flags.stored,
    )
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: random.random(x.shape, np.float32).astype(x.dtype),
        abstract_parameters(Transformer(config)),
    )
    pretrained.save(folder, {"params": params["params"]}, config, shard_bytes=5 * 10**8)


def measure_in_fresh_process(folder: Path, flags: argparse.Namespace) -> None:
    """Prints the row that a process prints which does nothing else."""
    arguments = ["--alone", "--folder", folder, "--wanted", flags.wanted]
    arguments += ["--max_length", flags.max_length]
    command = [sys.executable, __file__, *map(str, arguments)]
    subprocess.run(command, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def measure(folder: Path, max_length: int, wanted: str) -> str:
    """Imports, and reads the highest resident memory that this process ever had."""
    import jax

    from recexplore.models import config_file, pretrained

    config = config_file.read_config(folder, max_length, param_dtype=wanted)
    jax.block_until_ready(jax.device_put(0.0))
    before = resident("VmRSS")
    start = time.perf_counter()
    params = jax.block_until_ready(pretrained.load(folder, config))
    seconds = time.perf_counter() - start
    peak = resident("VmHWM") - before
    disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    imported = sum(x.nbytes for x in jax.tree.leaves(params))
    cells = [f"{disk / 1e9:.2f}", f"{imported / 1e9:.2f}", f"{peak / 1e9:.2f}"]
    return f"| {' | '.join([*cells, f'{peak / disk:.2f}', f'{seconds:.1f}'])} |"


def resident(kind: str) -> int:
    """Bytes of this process in memory, mapped files among them: VmRSS is now, VmHWM the most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status says nothing of memory here; this needs Linux.")


if __name__ == "__main__":
    main()
