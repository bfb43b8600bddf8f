"""How a history is put into words for each model."""

from collections.abc import Sequence

INSTRUCTIONS = ("interests:", "next:", "liking:")  # each one piece of our own vocabulary


def novelty_prompt(descriptions: Sequence[str]) -> str:
    """The novelty model's prompt; it answers with the description of the next cluster.

    >>> novelty_prompt(["space opera", "slow cooking"])
    'interests: space opera; slow cooking; next:'

    Args:
      descriptions: of the history's clusters, oldest first.
    """
    return f"interests: {'; '.join(descriptions)}; next:"


def alignment_prompt(descriptions: Sequence[str]) -> str:
    """The alignment model's prompt; the description of the cluster to score follows it.

    >>> alignment_prompt(["space opera", "slow cooking"])
    'interests: space opera; slow cooking; liking:'

    Args:
      descriptions: of the history's clusters, oldest first.
    """
    return f"interests: {'; '.join(descriptions)}; liking:"
