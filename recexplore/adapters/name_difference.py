"""Which parameters a checkpoint lacks, which it has too many, and what could be meant.

Names are paths with slashes; values have shapes.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from recexplore.errors import InputError

_SHOWN = 12  # names of a kind
_ALIKE = 0.6  # from which on two names may mean the same
Rules = Sequence[tuple[str, str]]


def renamed(wanted: Mapping[str, Any], found: Mapping[str, Any], rules: Rules) -> dict[str, Any]:
    """Found values by the wanted names.

    Args:
      wanted: by name.
      found: by name.
      rules: pairs (pattern, replacement): a wanted name that the whole pattern matches is called
        as the replacement says among those found; the first that matches counts.

    Raises:
      InputError: a rule is no pattern, matches nothing, or can't be replaced.
    """
    patterns, unused = [], {pattern for pattern, _ in rules}
    for pattern, replacement in rules:
        try:
            patterns.append((re.compile(pattern), replacement))
        except re.error as error:
            raise InputError(f"The mapping's pattern {pattern!r} is none: {error}.") from error
    named = {}
    for name in wanted:
        theirs = name
        for pattern, replacement in patterns:
            if match := pattern.fullmatch(name):
                theirs = _expanded(match, replacement)
                unused.discard(pattern.pattern)
                break
        if theirs in found:
            named[name] = found[theirs]
    if unused:
        raise InputError(
            f"The mapping's pattern {sorted(unused)[0]!r} matches no parameter of the model. They "
            f"are: {_listed(wanted)}"
        )
    return named


def check(
    what: str,
    wanted: Mapping[str, Any],
    named: Mapping[str, Any],
    found: Mapping[str, Any],
    remedy: str = "",
) -> None:
    """Checks that everything wanted is there, in its shape, and nothing else.

    Args:
      what: is checked, as an error message begins.
      wanted: by name.
      named: what was found, by the wanted names.
      found: the same by its own names, and what nobody wants.
      remedy: what an error message ends with; otherwise the mapping that may be meant.

    Raises:
      InputError: with the difference.
    """
    taken = {id(value) for value in named.values()}
    missing = {name: wanted[name] for name in wanted if name not in named}
    left = {name: value for name, value in found.items() if id(value) not in taken}
    shapes = [
        f"{name} has the shape {_shape(value)}, but {_shape(wanted[name])} is expected"
        for name, value in named.items()
        if _shape(value) != _shape(wanted[name])
    ]
    if not (missing or left or shapes):
        return
    said = [f"{what} doesn't fit the model."]
    if missing:
        said.append(f"Expected and not found: {_listed(missing)}")
    if left:
        said.append(f"Found and not expected: {_listed(left)}")
    if shapes:
        said.append(f"Other shapes: {'; '.join(shapes[:_SHOWN])}.")
    rules = suggested(missing, left)
    if remedy:
        said.append(remedy)
    elif rules:
        said.append(f"Perhaps this mapping is meant: {rules!r}.")
    else:
        said.append("Take the model's configuration that the checkpoint was trained with.")
    raise InputError(" ".join(said))


def suggested(missing: Mapping[str, Any], left: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rules that would find missing names among those left over, in the same shapes.

    >>> import numpy as np
    >>> suggested({"transformer/norm/scale": np.zeros(3)}, {"norm/scale": np.zeros(3)})
    [('transformer/(.*)', '\\\\1')]

    Args:
      missing: wanted by name.
      left: found by name.
    """
    rules: dict[tuple[str, str], None] = {}
    for name, value in missing.items():
        same = [other for other in left if _shape(left[other]) == _shape(value)]
        best = max(same, key=lambda other: _kinship(name, other), default=None)
        if best is None:
            continue
        tail, likeness = _kinship(name, best)
        ours, theirs = name.split("/"), best.split("/")
        if tail:
            ahead = ["/".join([*parts[: len(parts) - tail], ""]) for parts in (ours, theirs)]
            rules[f"{re.escape(ahead[0])}(.*)", f"{ahead[1]}\\1"] = None
        elif likeness >= _ALIKE:
            rules[re.escape(name), best] = None
    return list(rules)


def _expanded(match: re.Match[str], replacement: str) -> str:
    try:
        return match.expand(replacement)
    except (re.error, IndexError) as error:
        raise InputError(
            f"The mapping's pattern {match.re.pattern!r} can't be replaced by {replacement!r}: "
            f"{error}."
        ) from error


def _kinship(name: str, other: str) -> tuple[int, float]:
    """How many last components two names share, and how alike they look."""
    tail = 0
    for a, b in zip(reversed(name.split("/")), reversed(other.split("/")), strict=False):
        if a != b:
            break
        tail += 1
    return tail, difflib.SequenceMatcher(None, name, other).ratio()


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


def _listed(values: Mapping[str, Any]) -> str:
    shown = [f"{name} {list(_shape(values[name]))}" for name in sorted(values)]
    more = f", and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return f"{', '.join(shown[:_SHOWN])}{more}."
