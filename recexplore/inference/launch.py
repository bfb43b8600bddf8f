"""The door to the compiled step: what goes in is checked on the host and padded to a few shapes.

Nothing is wrong any more once a program runs, so all errors are raised here, in words.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from recexplore.errors import InputError, gin_name
from recexplore.inference.best_of_n import Batch, BestOfN, Exploration, Prefixes, explore_step
from recexplore.inference.context import Prompts, prefix_cache
from recexplore.inference.exhaustive import Tree, build_tree
from recexplore.models.networks import LANGUAGE_MODELS
from recexplore.models.reward_model import RewardModel
from recexplore.models.saved import abstract_parameters
from recexplore.models.trie import Trie, token_range


class Model(NamedTuple):
    """A network and its parameters.

    Attributes:
      network: a language model (recexplore.models.networks) or a RewardModel.
      params: its variables.
      history_length: clusters of the longest history that it was trained on; None where nothing
        says. Whoever writes its prompts names no more.
    """

    network: nn.Module
    params: Any
    history_length: int | None = None


class Ready:
    """A pair of models that has been checked, with what they begin every prompt with read already.

    Args:
      novelty: proposes; a language model.
      alignment: scores; a RewardModel.
      prefixes: what the prompts of each begin with: (novelty's tokens, alignment's tokens).
      trie: the descriptions, in numpy.
      batch_sharding: of a batch's rows, where there are several devices; the parameters may be
        sharded as well.
      pad_id: is padding and therefore no token of a prompt; None where every id may be one.

    Raises:
      InputError: networks of the wrong kind, parameters of another network or with values that are
        no numbers, a vocabulary that the trie doesn't fit, an empty prefix, or no room for a
        prompt.
    """

    def __init__(
        self,
        novelty: Model,
        alignment: Model,
        prefixes: tuple[Sequence[int], Sequence[int]],
        trie: Trie,
        batch_sharding: jax.sharding.Sharding | None = None,
        pad_id: int | None = 0,
    ):
        check_model("novelty", novelty, LANGUAGE_MODELS, prefixes[0], trie, pad_id)
        check_model("alignment", alignment, (RewardModel,), prefixes[1], trie, pad_id)
        self._pad_id = pad_id
        self._batch_sharding = batch_sharding
        self._models = (novelty, alignment)
        self._trie = trie
        self._on_device: Trie = jax.device_put(trie)
        self._lengths = tuple(map(len, prefixes))
        self._prefixes = Prefixes(
            *(
                prefix_cache(model.network, model.params, jnp.asarray(prefix, jnp.int32))
                for model, prefix in zip(self._models, prefixes, strict=True)
            )
        )

    @functools.cached_property
    def _tree(self) -> Tree:
        return jax.device_put(build_tree(self._trie))

    def explore(self, batch: Batch, key: Key[Array, ""], settings: BestOfN) -> Exploration:
        """Checks, pads and explores a batch of any size.

        Args:
          batch: numpy arrays.
          key: same key and history, same answer.
          settings: n, k and how to draw and choose.

        Raises:
          InputError: see `check`.
        """
        self.check(batch)
        rows = len(batch.history)
        shares = 1 if self._batch_sharding is None else self._batch_sharding.num_devices
        found = self.launch(pad_rows(pad_columns(batch), shares), key, settings)
        return jax.tree.map(lambda x: x[:rows], found)

    def read(self, beginnings: tuple[Prompts, Prompts]) -> Prefixes:
        """What all prompts of some batches begin with, read once.

        Args:
          beginnings: for each model one row of tokens, the prefix among them.
        """
        return Prefixes(
            *(
                prefix_cache(model.network, model.params, prompt.tokens[0], prompt.lengths[0])
                for model, prompt in zip(self._models, beginnings, strict=True)
            )
        )

    def launch(
        self,
        batch: Batch,
        key: Key[Array, ""],
        settings: BestOfN,
        prefixes: Prefixes | None = None,
    ) -> Exploration:
        """Explores a batch that was checked; its arrays may be on the device already.

        Args:
          batch: prompts without what they begin with.
          key: same key and history, same answer.
          settings: n, k and how to draw and choose.
          prefixes: what they begin with, of `read`; None: the prefix of all prompts.
        """
        novelty, alignment = self._models
        return explore_step(
            novelty.params,
            alignment.params,
            self._prefixes if prefixes is None else prefixes,
            self._on_device,
            jax.device_put(batch, self._batch_sharding),
            key,
            settings=settings,
            novelty_model=novelty.network,
            alignment_model=alignment.network,
            tree=self._tree if settings.sampler == "exhaustive" else None,
        )

    def check(self, batch: Batch) -> None:
        """Checks a batch of numpy arrays.

        Raises:
          InputError: no history, arrays that don't belong together, a prompt that is empty, doesn't
            fit the model's context or has a token outside the vocabulary, a cluster that doesn't
            exist, or a history that leaves none to propose.
        """
        arrays = {
            "novelty tokens": (batch.novelty.tokens, 2),
            "novelty lengths": (batch.novelty.lengths, 1),
            "alignment tokens": (batch.alignment.tokens, 2),
            "alignment lengths": (batch.alignment.lengths, 1),
            "history": (batch.history, 2),
            "banned": (batch.banned, 2),
        }
        for name, (array, ndim) in arrays.items():
            if not isinstance(array, np.ndarray) or array.ndim != ndim or array.dtype.kind != "i":
                raise InputError(
                    f"A batch's {name} must be a numpy array of whole numbers with {ndim} "
                    f"axes; it is {type(array).__name__} "
                    f"{getattr(array, 'dtype', '')}{getattr(array, 'shape', '')}."
                )
        rows = sorted({len(array) for array in jax.tree.leaves(batch)})
        if len(rows) > 1:
            raise InputError(f"The arrays of a batch have {rows} rows; all must have as many.")
        if not rows[0]:
            raise InputError("There is no history to explore: the batch has no rows.")
        for name, model, length, prompts in zip(
            ("novelty", "alignment"),
            self._models,
            self._lengths,
            (batch.novelty, batch.alignment),
            strict=True,
        ):
            room = model.network.config.max_length - self._trie.max_length - length
            _check_prompts(name, prompts, room, model.network.config.vocab_size, self._pad_id)
        _check_clusters(batch, self._trie.num_sequences)


def bucket(size: int) -> int:
    """The power of two that a size is padded to.

    >>> [bucket(size) for size in (0, 1, 3, 4, 5)]
    [1, 1, 4, 4, 8]
    """
    return 1 << max(size - 1, 0).bit_length()


def pad_columns(batch: Batch) -> Batch:
    """Pads prompts, histories and banned clusters to buckets, which changes no answer."""

    def wide(array, fill):
        missing = bucket(array.shape[1]) - array.shape[1]
        return np.pad(array, ((0, 0), (0, missing)), constant_values=fill)

    return Batch(
        *(Prompts(wide(p.tokens, 0), p.lengths) for p in (batch.novelty, batch.alignment)),
        history=wide(batch.history, -1),
        banned=wide(batch.banned, -1),
    )


def pad_rows(batch: Batch, shares: int = 1) -> Batch:
    """Pads the batch itself to a bucket that can be dealt out, with copies of its last row."""
    rows = len(batch.history)
    index = np.minimum(np.arange(-(-bucket(rows) // shares) * shares), rows - 1)
    return jax.tree.map(lambda array: array[index], batch)


def check_model(
    name: str,
    model: Model,
    kinds: tuple[type[nn.Module], ...],
    prefix: Sequence[int],
    trie: Trie,
    pad_id: int | None = 0,
) -> None:
    """Checks that a model can be asked about the trie's descriptions after prompts.

    Args:
      name: what error messages call it.
      model: the model.
      kinds: the classes that its network may have.
      prefix: tokens that all prompts begin with.
      trie: the descriptions.
      pad_id: is padding and therefore no token of the prefix; None where every id may be one.

    Raises:
      InputError: see `Ready`.
    """
    if not isinstance(model.network, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(
            f"The {name} model is a {type(model.network).__name__}; it must be a {wanted}. "
            "Are two models swapped?"
        )
    _check_parameters(name, model)
    _check_tokens(f"{name} prefix", np.asarray([prefix]), model.network.config.vocab_size, pad_id)
    _check_room(name, model, prefix, trie)


def _check_parameters(name: str, model: Model) -> None:
    wanted = _shapes(abstract_parameters(model.network))
    found = _shapes(model.params)
    for path in sorted(wanted.keys() | found.keys()):
        if wanted.get(path) != found.get(path):
            raise InputError(
                f"The {name} model's parameters are not those of its configuration: {path} is "
                f"{found.get(path, 'missing')}, but {wanted.get(path, 'nothing')} is expected. "
                "Load the checkpoint with the configuration it was trained with."
            )
    wrong = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)
        if not jnp.all(jnp.isfinite(leaf))
    ]
    if wrong:
        raise InputError(
            f"The {name} model's parameter {wrong[0]} has values that are not finite numbers. "
            "Its training has diverged: take an earlier checkpoint."
        )


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}


def _check_room(name: str, model: Model, prefix: Sequence[int], trie: Trie) -> None:
    config = model.network.config
    if trie.sequences.max() >= config.vocab_size:
        raise InputError(
            f"A description has token {trie.sequences.max()}, outside the {name} model's "
            f"vocabulary, which ends at {config.vocab_size - 1}. Make the trie and the models from "
            "the same one."
        )
    if not len(prefix):
        raise InputError(
            f"The {name} model's prefix is empty; it must have at least one token, which all "
            "prompts begin with."
        )
    if len(prefix) + trie.max_length >= config.max_length:
        raise InputError(
            f"The {name} model's context of {config.max_length} tokens "
            f"({gin_name(type(config))}.max_length) has no room for a prompt beside a prefix "
            f"of {len(prefix)} and a description of {trie.max_length}."
        )


def _check_prompts(
    name: str, prompts: Prompts, room: int, vocab_size: int, pad_id: int | None
) -> None:
    shortest, longest = prompts.lengths.min(), prompts.lengths.max()
    if shortest < 1 or longest > prompts.tokens.shape[1]:
        raise InputError(
            f"The {name} prompts have lengths {shortest}..{longest}; they must lie in "
            f"1..{prompts.tokens.shape[1]}, the tokens given."
        )
    if longest > room:
        raise InputError(
            f"The {name} prompt of row {int(prompts.lengths.argmax())} has {longest} tokens after "
            f"the prefix; the model's context has room for {room}. Give it a shorter history."
        )
    real = np.arange(prompts.tokens.shape[1])[None, :] < prompts.lengths[:, None]
    _check_tokens(f"{name} prompts", prompts.tokens, vocab_size, pad_id, real)


def _check_tokens(
    name: str,
    tokens: np.ndarray,
    vocab_size: int,
    pad_id: int | None,
    real: np.ndarray | bool = True,
) -> None:
    padding = False if pad_id is None else tokens == pad_id
    wrong = np.argwhere(((tokens < 0) | (tokens >= vocab_size) | padding) & real)
    if len(wrong):
        row, column = wrong[0]
        raise InputError(
            f"Row {row} of the {name} has token {tokens[row, column]} at place {column}, outside "
            f"the vocabulary's {token_range(vocab_size, pad_id)}."
        )


def _check_clusters(batch: Batch, num_clusters: int) -> None:
    left_out = np.concatenate([batch.history, batch.banned], axis=1)
    wrong = np.argwhere((left_out < -1) | (left_out >= num_clusters))
    if len(wrong):
        row, column = wrong[0]
        raise InputError(
            f"Row {row} names cluster {left_out[row, column]} in its history or among the banned "
            f"ones; there are 0..{num_clusters - 1} (and -1 for none)."
        )
    ordered = np.sort(left_out, axis=1)
    new = np.diff(ordered, axis=1, prepend=-1) != 0
    full = np.flatnonzero((new & (ordered >= 0)).sum(axis=1) == num_clusters)
    if len(full):
        history = [int(c) for c in batch.history[full[0]] if c >= 0]
        raise InputError(
            f"Row {full[0]}, history {history}, leaves no cluster to propose: all {num_clusters} "
            "are in it or banned. Ban fewer, or leave this history out."
        )
