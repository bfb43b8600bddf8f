"""What a log's randomised share tells of policies that were never tried, beside the truth.

Some slots of the platform are filled uniformly at random over all items. In those, cluster c was
shown with probability (items of c) / (items); what users did there is feedback that no policy has
selected. Off-policy estimates are made of it, and since the platform can be lived through again,
the same days are also lived with each policy in charge.
"""

import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from recexplore.evaluation import off_policy
from recexplore.evaluation.arms import Asked, Policy, draw
from recexplore.evaluation.experiment import Experiment, Scene, pick_items
from recexplore.simulation.platform import EXPLORATION, RANDOM, Day


class Randomised(NamedTuple):
    """Feedback on what stood in the exploration slot at random, on some days.

    Attributes:
      asked: history and allowed clusters of everyone who could have explored something.
      log: what was shown at random to any of them, allowed or not; contexts are rows of `asked`,
        actions clusters, rewards watch fractions.
    """

    asked: Asked
    log: off_policy.Log


def live_days(
    scene: Scene,
    settings: Experiment,
    days: int,
    policies: Mapping[str, Policy],
    progress: Callable[..., None],
) -> tuple[Randomised, dict[str, float]]:
    """Days after the log, without exploration and once more with each policy.

    Args:
      scene: where they begin; stays as it is.
      settings: what is allowed.
      days: how many.
      policies: by name.
      progress: called as progress(days done, all).

    Returns:
      The days' randomised share; and each policy's true value: the watch fraction that what it
      chose could expect in the exploration slot, items drawn uniformly from the cluster.
    """
    here = copy.deepcopy(scene)
    random = np.random.default_rng([settings.seed, 6])
    parts, totals, counts = [], dict.fromkeys(policies, 0.0), dict.fromkeys(policies, 0)
    for day in range(days):
        users = here.platform.arrive()
        ready, asked = here.ask(users, settings)
        uploaded = here.platform.world.uploaded(here.platform.day)
        for name, policy in policies.items():
            clusters = np.full(len(users), -1)
            clusters[ready] = draw(policy(asked), random)
            items = pick_items(clusters, here.item_clusters, uploaded.astype(np.float64), random)
            shown = copy.deepcopy(here.platform).show(items)
            explored = shown.source == EXPLORATION
            totals[name] += float(shown.satisfaction[explored].sum())
            counts[name] += int(explored.sum())
        lived = here.live(None)
        parts.append(_randomised(here, lived, users[ready], asked, uploaded))
        progress(day + 1, days)
    return _joined(parts), {name: totals[name] / max(counts[name], 1) for name in policies}


def _randomised(
    scene: Scene,
    lived: Day,
    users: Int[np.ndarray, "A"],
    asked: Asked,
    uploaded: Bool[np.ndarray, "I"],
) -> Randomised:
    context = np.full(len(scene.standing.last), -1)
    context[users] = np.arange(len(users))
    slot = scene.platform.settings.exploration_slot
    rows = (lived.source == RANDOM) & (lived.slots == slot) & (context[lived.users] >= 0)
    clusters = scene.item_clusters[lived.items[rows]]
    sizes = np.bincount(scene.item_clusters[uploaded], minlength=scene.num_clusters)
    log = off_policy.Log(
        contexts=context[lived.users[rows]],
        actions=clusters,
        rewards=lived.watch_fraction[rows].astype(np.float64),
        propensities=sizes[clusters] / uploaded.sum(),
        users=lived.users[rows],
    )
    return Randomised(asked, log)


def _joined(parts: list[Randomised]) -> Randomised:
    """Several days as one."""
    starts = np.cumsum([0] + [len(part.asked.histories) for part in parts])
    logs = [
        part.log._replace(contexts=part.log.contexts + start)
        for part, start in zip(parts, starts, strict=False)
    ]
    asked = (np.concatenate(columns) for columns in zip(*(p.asked for p in parts), strict=True))
    log = (np.concatenate(columns) for columns in zip(*logs, strict=True))
    return Randomised(Asked(*asked), off_policy.Log(*log))
