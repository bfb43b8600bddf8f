"""How a history is put into words for each model."""

from collections.abc import Sequence

HISTORY_SEPARATOR = ";"  # stands after every description in a history
PREFIX = "interests:"  # all prompts begin with it, and are read from there on by compiled steps
INSTRUCTIONS = (PREFIX, "next:", "liking:")  # each one piece of our own vocabulary


def novelty_prompt(descriptions: Sequence[str]) -> str:
    """The novelty model's prompt; it answers with the description of the next cluster.

    >>> novelty_prompt(["space opera", "slow cooking"])
    'interests: space opera; slow cooking; next:'

    Args:
      descriptions: of the history's clusters, oldest first.
    """
    return f"{PREFIX} {_listed(descriptions)} next:"


def alignment_prompt(descriptions: Sequence[str]) -> str:
    """The alignment model's prompt; the description of the cluster to score follows it.

    >>> alignment_prompt(["space opera", "slow cooking"])
    'interests: space opera; slow cooking; liking:'

    Args:
      descriptions: of the history's clusters, oldest first.
    """
    return f"{PREFIX} {_listed(descriptions)} liking:"


def _listed(descriptions: Sequence[str]) -> str:
    return " ".join(f"{text}{HISTORY_SEPARATOR}" for text in descriptions)
