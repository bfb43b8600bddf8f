"""Users' items in order → the rows that the item recommender learns from and is measured on."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from recexplore.feedback.engagements import Engagements


class Window(NamedTuple):
    """Neighbouring items of one user.

    Attributes:
      items: item numbers, oldest first.
      context: the first so many are there to be read; the others are to be predicted, each from
        all before it.
    """

    items: Int[np.ndarray, "W"]
    context: int


def train_windows(
    engagements: Engagements, *, until: int, max_items: int, context: int
) -> list[Window]:
    """Windows in which each item that a user engaged with before a time is predicted once.

    Args:
      engagements: of all users.
      until: seconds since 1970; nothing from then on is in any window.
      max_items: items that a prediction reads at most.
      context: items that a window has in common with the one before it.
    """
    found = []
    for user in engagements.each():
        kept = engagements.engaged[user] & (engagements.times[user] < until)
        found += cut(engagements.items[user][kept], 0, max_items, context)
    return found


def held_out_windows(
    engagements: Engagements, *, start: int, until: int, max_items: int, context: int
) -> list[Window]:
    """Windows in which each item engaged with in a period is predicted once, from all before it.

    Args:
      engagements: of all users.
      start: of the period, in seconds since 1970.
      until: its end.
      max_items: items that a prediction reads at most.
      context: items read at least, where there are that many.
    """
    found = []
    for user in engagements.each():
        kept = engagements.engaged[user] & (engagements.times[user] < until)
        earlier = int(np.sum(kept & (engagements.times[user] < start)))
        found += cut(engagements.items[user][kept], earlier, max_items, context)
    return found


def cut(items: Int[np.ndarray, "W"], first: int, max_items: int, context: int) -> list[Window]:
    """A user's items as windows that have each item from `first` on to predict in one of them.

    Seven items with first = 0, max_items = 3 and context = 1, what is to be predicted in brackets:

        [0 1 2 3]   3 [4 5 6]

    Args:
      items: oldest first.
      first: the first to be predicted.
      max_items: items that a prediction reads at most; a window has one more.
      context: items that a window begins with which aren't predicted there, if there are so many
        before; at most `max_items`.
    """
    windows, at = [], first
    while at < len(items):
        begin = max(0, at - context)
        stop = min(begin + max_items + 1, len(items))
        windows.append(Window(items[begin:stop], at - begin))
        at = stop
    return windows
