"""The novelty model tuned on the alignment model's score: policy gradient, or DPO.

The published system keeps novelty and alignment apart because this collapsed the novelty model
(arXiv 2504.05522): here it can be seen, and compared with best of n.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from recexplore.distributed import partitioning
from recexplore.distributed.checkpoints import Checkpoints
from recexplore.distributed.processes import PreemptionNotice
from recexplore.errors import Preempted, SharedError, check_field
from recexplore.inference.best_of_n import Batch
from recexplore.inference.launch import Model, Ready, pad_columns
from recexplore.models.lora import split
from recexplore.models.saved import CHECKPOINTS, fresh_variables
from recexplore.models.trie import Trie
from recexplore.training.optimization import Optimization
from recexplore.training.policy import DECODINGS, Policy
from recexplore.training.telemetry import Curves
from recexplore.training.train_step import State
from recexplore.training.tuning_step import METHODS, Given, Judged, Tuning, figures

_EVALUATING = np.iinfo(np.int32).max  # where steps have their number in a key


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
    """How the novelty model is tuned on reward; see recexplore.training.preferences.

    Attributes:
      kl_weight: β, what a nat of distance from the model it was costs in reward.
      method: "policy_gradient", on the policy's own draws; "direct_preference" (DPO), on pairs that
        the model it was drew and the alignment model ordered.
      decoding: "free", any tokens up to the longest description's length; "constrained" to
        descriptions of clusters that aren't in the history, as when exploring.
      temperature: of drawing; the probabilities that are tuned are those at this temperature.
      prompts_per_step: histories of a step, drawn at random.
      samples_per_prompt: answers drawn to each; they are one another's baseline, or come in pairs.
      steps: of tuning.
      learning_rate: at its peak; it warms up and decays as in training.
      evaluate_every: steps between two evaluations, each followed by a checkpoint.
      seed: of all that is drawn.
    """

    kl_weight: float = 0.1
    method: str = "policy_gradient"
    decoding: str = "free"
    temperature: float = 1.0
    prompts_per_step: int = 32
    samples_per_prompt: int = 8
    steps: int = 300
    learning_rate: float = 1e-3
    evaluate_every: int = 20
    seed: int = 0

    def __post_init__(self):
        for name, choices in {"method": METHODS, "decoding": DECODINGS}.items():
            check_field(
                self, getattr(self, name) in choices, name, f"must be one of {', '.join(choices)}"
            )
        for name in ("prompts_per_step", "steps", "evaluate_every"):
            check_field(
                self, _is_whole(getattr(self, name), 1), name, "must be a whole number from 1 on"
            )
        for name in ("temperature", "learning_rate"):
            check_field(self, 0 < getattr(self, name) < math.inf, name, "must be a number above 0")
        check_field(self, _is_whole(self.seed, 0), "seed", "must be a whole number from 0 on")
        paired = self.method == "direct_preference"
        check_field(
            self,
            0 <= self.kl_weight < math.inf and not (paired and self.kl_weight == 0),
            "kl_weight",
            "must be a number above 0 for the method direct_preference"
            if paired
            else "must be a number from 0 on",
        )
        check_field(
            self,
            _is_whole(self.samples_per_prompt, 2) and not (paired and self.samples_per_prompt % 2),
            "samples_per_prompt",
            "must be an even number for the method direct_preference"
            if paired
            else "must be a whole number from 2 on",
        )

    @property
    def evaluated(self) -> list[int]:
        """The steps after which the policy is evaluated, 0 and the last among them."""
        return sorted({*range(0, self.steps, self.evaluate_every), self.steps})


class Outputs(NamedTuple):
    """What the policy answered to P histories, N times each, at E steps; the same dice every time.

    Attributes:
      steps: the steps.
      tokens: right-padded with 0.
      clusters: whose description an answer is; -1 where it is none, or in the history.
      rewards: the alignment model's scores.
    """

    steps: Int[np.ndarray, "E"]
    tokens: Int[np.ndarray, "E P N T"]
    clusters: Int[np.ndarray, "E P N"]
    rewards: Float[np.ndarray, "E P N"]

    def rows(self, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
        """One row an answer, as columns: step, history (its place), cluster, reward, text.

        Args:
          decode: tokens → text, as a Vocabulary does it.
        """
        places = np.indices(self.clusters.shape).reshape(3, -1)
        different, which = np.unique(
            self.tokens.reshape(-1, self.tokens.shape[-1]), axis=0, return_inverse=True
        )
        texts = np.array([decode(tokens.tolist()) for tokens in different], object)
        return {
            "step": self.steps[places[0]],
            "history": places[1].astype(np.int32),
            "cluster": self.clusters.reshape(-1),
            "reward": self.rewards.reshape(-1),
            "text": texts[which.reshape(-1)],
        }


def tune(
    folder: Path,
    novelty: Model,
    alignment: Model,
    prefixes: tuple[Sequence[int], Sequence[int]],
    trie: Trie,
    prompts: Batch,
    evaluation: Batch,
    settings: PolicyGradient,
    progress: Callable[..., None],
    *,
    pad_id: int | None = 0,
    make_mesh: Callable[[], jax.sharding.Mesh] = partitioning.make_mesh,
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
) -> Outputs:
    """Tunes the novelty model, or goes on where an interrupted run in the same folder stopped.

    Args:
      folder: gets checkpoints/, metrics.jsonl and TensorBoard events. `saved.describe` of the
        novelty model beside them makes it a model's folder; what is loaded is the last step's.
      novelty: where to start from, and what not to go far from.
      alignment: gives the reward.
      prefixes: what the prompts of each begin with, in tokens.
      trie: the descriptions, in numpy.
      prompts: the histories to tune on, in numpy; each counts alike.
      evaluation: the histories to look at, in numpy.
      settings: how.
      progress: called as progress(step, steps, **figures).
      pad_id: is padding and therefore no token of a prompt; None where every id may be one.
      make_mesh: the devices.
      rules: logical axis → mesh axis.

    Returns:
      What the policy answered to the histories of `evaluation`.

    Raises:
      InputError: models or histories that don't belong together, see `launch.Ready`; a batch that
        doesn't divide by the mesh; figures that aren't finite any more.
      Preempted: the machine is to be taken away; a checkpoint is saved.
    """
    ready = Ready(novelty, alignment, prefixes, trie, pad_id=pad_id)
    ready.check(prompts)
    ready.check(evaluation)
    run = _Run(novelty, alignment, settings, make_mesh(), rules)
    given = run.place(novelty, alignment, prefixes, trie, prompts)
    outputs = _no_outputs(settings, len(evaluation.history), trie.max_length)

    with contextlib.ExitStack() as stack:
        notice = stack.enter_context(PreemptionNotice())  # first in, last out: it guards the saving
        checkpoints = Checkpoints(folder / CHECKPOINTS)
        stack.enter_context(contextlib.closing(checkpoints))
        state = run.initialize(given.reference)
        restored = checkpoints.latest(run.abstract(state, outputs))
        start = 0
        if restored is not None:
            start, saved = restored.step, dict(restored.state)
            outputs = Outputs(**jax.tree.map(np.array, saved.pop("outputs")))
            state = State(**saved, average=None)
        curves = stack.enter_context(contextlib.closing(Curves(folder, start)))
        stack.enter_context(jax.transfer_guard("disallow"))
        recent, shown = _Recent(curves), {}

        def evaluate(step: int) -> dict[str, float]:
            judged = run.evaluate(state.params, given, evaluation)
            _keep(outputs, step, judged)
            with jax.transfer_guard("allow"):  # all of it is on the host
                found = figures(judged, trie.num_sequences)
            told = {f"evaluation_{name}": float(value) for name, value in found.items()}
            curves.write(step, told)
            return told

        if restored is None:
            shown = evaluate(0)
        for step in range(start + 1, settings.steps + 1):
            state, told = run.step(state, given)
            recent.add(step, told)
            stop, is_last = notice.came(), step == settings.steps
            evaluated = step in outputs.steps
            if evaluated or stop:
                recent.write()
            if evaluated:
                shown = evaluate(step)
            if evaluated or stop:
                # The last one alone has a value to be chosen by, so it is the one that is used.
                value = -shown["evaluation_reward"] if is_last else None
                saving = jax.device_put(outputs._asdict(), run.everywhere)
                whole = state.saved | {"outputs": saving}
                checkpoints.save(step, whole, {"step": step}, value)
            progress(step, settings.steps, **shown)
            if stop and not is_last:
                raise Preempted(
                    f"Tuning stopped after step {step} of {settings.steps} and is saved."
                )
    return outputs


class _Run:
    """The compiled programs, and where everything lies."""

    def __init__(self, novelty: Model, alignment: Model, settings: PolicyGradient, mesh, rules):
        partitioning.check_batch_size(
            settings.prompts_per_step,
            mesh,
            name="policy_gradient.PolicyGradient.prompts_per_step",
        )
        self._settings, self._rules, self._mesh = settings, rules, mesh
        self._config = novelty.network.config
        self.everywhere = jax.NamedSharding(mesh, jax.P())
        optimization = Optimization(
            steps=settings.steps,
            learning_rate=settings.learning_rate,
            weight_decay=0.0,
            average_decay=0.0,
        )
        self._optimizer = optimization.transformation()
        tuning = Tuning(
            Policy(novelty.network, settings.decoding, settings.temperature),
            alignment.network,
            self._optimizer,
            settings.method,
            settings.prompts_per_step,
            settings.samples_per_prompt,
            partitioning.batch_sharding(mesh),
        )
        self._networks = (novelty.network, alignment.network)
        shardings = self._state_shardings()
        self.step = jax.jit(
            tuning.step, donate_argnums=0, out_shardings=(shardings, self.everywhere)
        )
        self._judge = jax.jit(tuning.judge, out_shardings=self.everywhere)
        self._shardings = shardings

    def _shardings_of(self, network: nn.Module) -> Any:
        boxed = jax.eval_shape(lambda: fresh_variables(network, jax.random.key(0)))
        found = partitioning.shardings_of(boxed, self._mesh, self._rules)
        partitioning.check_shapes(nn.unbox(boxed), found)
        return found

    def _state_shardings(self) -> State:
        def fresh() -> State:
            variables = fresh_variables(self._networks[0], jax.random.key(0))
            return self._state_of(split(variables, self._config)[0])

        return partitioning.shardings_of(jax.eval_shape(fresh), self._mesh, self._rules)

    def _state_of(self, params: Any) -> State:
        key = jax.random.key_data(jax.random.key(self._settings.seed))
        return State(jnp.int32(0), key, params, None, self._optimizer.init(params))

    def initialize(self, params: Any) -> State:
        """The state before the first step; its parameters are copies, since a step consumes it."""
        start = jax.jit(
            lambda params: self._state_of(jax.tree.map(jnp.copy, params)),
            out_shardings=self._shardings,
        )
        return start(params)

    def abstract(self, state: State, outputs: Outputs) -> dict[str, Any]:
        """Shapes and shardings of what a checkpoint holds."""
        placed = partitioning.placed(state.saved, self._shardings.saved)
        kept = partitioning.placed(outputs._asdict(), self.everywhere)
        return placed | {"outputs": kept}

    def place(self, novelty: Model, alignment: Model, prefixes, trie: Trie, prompts) -> Given:
        """Puts what tuning reads where it belongs."""
        of_novelty, of_alignment = map(self._shardings_of, self._networks)
        reference, frozen = split(jax.device_put(novelty.params, of_novelty), self._config)
        rest = (
            tuple(np.asarray(prefix, np.int32) for prefix in prefixes),
            trie,
            pad_columns(prompts),
            np.float32(self._settings.kl_weight),
        )
        return Given(
            frozen,
            reference,
            jax.device_put(alignment.params, of_alignment),
            *jax.device_put(rest, self.everywhere),
        )

    def evaluate(self, params: Any, given: Given, histories: Batch) -> Judged:
        """The policy's answers to all histories, as many at once as in a step; numpy arrays.

        The keys are those of the histories' places, whatever the step: curves then show what
        changed in the policy, not in the dice.
        """
        size, total = self._settings.prompts_per_step, len(histories.history)
        histories, parts = pad_columns(histories), []
        for start in range(0, total, size):
            rows = np.minimum(np.arange(start, start + size), total - 1)
            batch = jax.tree.map(lambda x, rows=rows: x[rows], histories)
            batch = jax.device_put(batch, partitioning.batch_sharding(self._mesh))
            parts.append(jax.device_get(self._judge(params, given, batch, self._keys(rows))))
        return jax.tree.map(lambda *some: np.concatenate(some)[:total], *parts)

    def _keys(self, rows: Int[np.ndarray, "B"]) -> jax.Array:
        """A key for each history by its place; other ones than tuning draws with."""
        with jax.transfer_guard("allow"):  # whole numbers from the host
            key = jax.random.fold_in(jax.random.key(self._settings.seed), _EVALUATING)
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(rows))
            return jax.device_put(keys, self.everywhere)


class _Recent:
    """The last step's figures, looked at while the next one runs."""

    def __init__(self, curves: Curves):
        self._curves, self._waiting = curves, None

    def add(self, step: int, told: dict[str, jax.Array]) -> None:
        self.write()
        self._waiting = (step, told)

    def write(self) -> None:
        if self._waiting is None:
            return
        (step, told), self._waiting = self._waiting, None
        values = {name: float(value) for name, value in jax.device_get(told).items()}
        if not all(map(math.isfinite, values.values())):
            raise SharedError(
                f"Tuning diverged at step {step}: {values}. The last good checkpoint is kept. Try "
                "a lower policy_gradient.PolicyGradient.learning_rate."
            )
        self._curves.write(step, values)


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _no_outputs(settings: PolicyGradient, num_histories: int, width: int) -> Outputs:
    """Room for the answers, -1 where none are yet."""
    shape = (len(settings.evaluated), num_histories, settings.samples_per_prompt)
    return Outputs(
        np.array(settings.evaluated, np.int32),
        np.zeros((*shape, width), np.int32),
        np.full(shape, -1, np.int32),
        np.zeros(shape, np.float32),
    )


def _keep(outputs: Outputs, step: int, judged: Judged) -> None:
    place = int(np.searchsorted(outputs.steps, step))
    for kept, found in zip(outputs[1:], judged[:3], strict=True):
        kept[place] = found
