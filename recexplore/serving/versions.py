"""A folder of numbered versions, one of which is current, for readers that never wait.

    folder/000001/  folder/000002/     whole tables
    folder/current                     a file that says 000002
    folder/.turn                       locked by whoever writes

A version is whole before it has its name, and `current` is replaced in one step, so that a reader
meets the old version or the new one and nothing in between, whenever a writer is killed. What a
reader has open stays readable after its version was removed.
"""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recexplore import artifacts
from recexplore.errors import InputError

CURRENT = "current"
_NAME = "{:06d}"


def path_of(folder: Path, version: int) -> Path:
    """Where a version lies."""
    return folder / _NAME.format(version)


def add_version(folder: Path, fill: Callable[[Path], None]) -> int:
    """Makes a new version and makes it the current one.

    Args:
      folder: of the versions; made where there is none.
      fill: writes the version's files into an empty folder.

    Returns:
      The version's number, one above the highest there is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with artifacts.locked(folder):
        artifacts.remove_leftovers(folder)
        version = max(all_versions(folder), default=0) + 1
        with artifacts.new_folder(path_of(folder, version)) as temporary:
            fill(temporary)
            for path in (*temporary.iterdir(), temporary):
                _sync(path)  # or a power cut could leave empty files under their final names
        _point(folder, version)
    return version


def all_versions(folder: Path) -> list[int]:
    """The numbers of all versions, oldest first."""
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(name) for name in names if re.fullmatch(r"\d{6,}", name))


def current_version(folder: Path) -> int:
    """The number of the current version.

    Raises:
      InputError: there is none.
    """
    try:
        text = (folder / CURRENT).read_text()
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} has no exploration table: the file {CURRENT} is missing. Name a folder that "
            "ExplorationTable.write has written; in a work directory remove it, and run "
            "`recexplore explore` again."
        ) from error
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{folder / CURRENT} can't be read ({error}).") from error
    if not re.fullmatch(r"\d{6,}\n", text):
        raise InputError(
            f"{folder / CURRENT} says {text[:40]!r}, not which version is current. Call "
            f"versions.switch with one of these: {_list(folder)}."
        )
    return int(text)


def switch(folder: Path, version: int) -> None:
    """Makes a version the current one that is there already, such as the one before.

    Raises:
      InputError: there is no such version.
    """
    with artifacts.locked(folder):
        if version not in all_versions(folder):
            raise InputError(f"{folder} has no version {version}; it has {_list(folder)}.")
        _point(folder, version)


def remove_old(folder: Path, keep: int) -> list[int]:
    """Removes all versions but the current one and the newest of the others.

    Args:
      folder: of the versions.
      keep: versions that are left, at least 1.

    Returns:
      The numbers of those that were removed.

    Raises:
      InputError: `keep` below 1, or nothing is current.
    """
    check_keep(keep)
    with artifacts.locked(folder):
        removed = superfluous(all_versions(folder), current_version(folder), keep)
        for version in removed:
            path = path_of(folder, version)
            leaving = path.with_name(f".{path.name}.leaving.tmp")  # a leftover, should we be killed
            os.replace(path, leaving)
            shutil.rmtree(leaving)
    return removed


def check_keep(keep: int) -> None:
    """Refuses to keep fewer versions than the current one."""
    if keep < 1:
        raise InputError(f"keep is {keep}; the current version stays, so it must be at least 1.")


def superfluous(versions: Sequence[Any], current: Any, keep: int) -> list[Any]:
    """All versions but the current one and the newest `keep` - 1 of the others.

    Args:
      versions: oldest first.
      current: one of them.
      keep: versions that are left.
    """
    others = [version for version in versions if version != current]
    return others[: max(len(others) - (keep - 1), 0)]


def _list(folder: Path) -> str:
    return ", ".join(map(str, all_versions(folder))) or "none"


def _point(folder: Path, version: int) -> None:
    with artifacts.new_file(folder / CURRENT) as temporary:
        temporary.write_text(_NAME.format(version) + "\n")
        _sync(temporary)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
