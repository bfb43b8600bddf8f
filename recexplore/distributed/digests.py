"""Size and checksum of every file of a checkpoint, so that none is taken for what it isn't.

What arrays are stored in has no checksums: where a disk has lost some bytes, other numbers would be
read without a word. So each process writes down, once a checkpoint is whole, what its own files
were, in `digests.process_0.json` and so on beside them.
"""

import json
import os
import re
import zlib
from pathlib import Path

_BLOCK = 1 << 20  # bytes
_NAME = "digests.process_{}.json"
_OURS = "digests.process_*"  # what another process is just writing, too
_OF_PROCESS = re.compile(r"ocdbt\.process_(\d+)")  # a folder that Orbax gives each process


def write(folder: Path, process: int = 0) -> None:
    """Writes the digests of what a process has written; what is shared is the first one's.

    Args:
      folder: of the checkpoint; nothing in it changes any more.
      process: its index.
    """
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    digests = {
        str(name): _digest(folder / name)
        for name in sorted(names)
        if _writer(name) == process and not name.match(_OURS)
    }
    path = folder / _NAME.format(process)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w") as file:
        file.write(json.dumps(digests, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())  # or a power cut could leave an empty one under the final name
    os.replace(temporary, path)


def find_damage(folder: Path, process: int = 0, processes: int = 1, under: str = "") -> str:
    """What is wrong with a checkpoint, in words; empty where nothing is or no digests tell.

    Args:
      folder: of the checkpoint.
      process: index of this process.
      processes: that share the work: each looks at some of the files.
      under: names of files that are looked at begin with this.
    """
    digests: dict[str, list[int]] = {}
    for path in sorted(folder.glob(_NAME.format("*"))):
        try:
            digests |= json.loads(path.read_text())
        except ValueError:
            return f"{path.name} can't be read"
    wanted = [name for name in digests if name.startswith(under)]
    wanted.sort(key=lambda name: (-digests[name][0], name))  # large ones are dealt out first
    for name in wanted[process::processes]:
        try:
            found = _digest(folder / name)
        except FileNotFoundError:
            return f"{name} is missing"
        if found[0] != digests[name][0]:
            return f"{name} has {found[0]:,} bytes, not {digests[name][0]:,}"
        if found != digests[name]:
            return f"{name} isn't what was written"
    return ""


def _digest(path: Path) -> list[int]:
    """A file's size and CRC-32."""
    size = checksum = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def _writer(name: Path) -> int:
    """Index of the process that wrote a file."""
    return next((int(m[1]) for part in name.parts if (m := _OF_PROCESS.fullmatch(part))), 0)
