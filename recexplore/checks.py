"""Settings of several stages that must go together, checked before there is anything to lose."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recexplore import experiments
from recexplore.errors import InputError

if TYPE_CHECKING:
    from recexplore.configuration import Configuration
    from recexplore.inference.selection import BestOfN
    from recexplore.workdir import Stage

_AGGREGATE, _TOKENIZE, _TRAIN = (
    f"recexplore.pipeline.{stage}" for stage in ("aggregate", "tokenize", "train")
)
_TAKES = "recexplore.adapters.t5x_trained.take_or_train"
_HISTORIES = "pipeline.tokenize.novelty_histories (NOVELTY_HISTORIES)"
_TUNED = "experiments.tune.variants (TUNED)"


def novelty_histories(
    configuration: "Configuration", explores: str, taken: Sequence[str]
) -> dict[str, int]:
    """Every novelty model's name and how many clusters of history it reads.

    Args:
      configuration: of the run.
      explores: the model that fills the exploration table, which must be among them.
      taken: names of other models.

    Raises:
      InputError: names and lengths that can't be, or that other settings contradict.
    """
    histories = configuration.value(_TOKENIZE, "novelty_histories", default={explores: 2})
    if not isinstance(histories, dict) or explores not in histories:
        raise InputError(
            "pipeline.tokenize.novelty_histories must map model names to history lengths, and one "
            f"of them must be {explores!r}; it is {histories!r}."
        )
    for name, length in histories.items():
        if not re.fullmatch(r"\w+", str(name)) or name in taken:
            used = name if name in taken else taken[0]
            raise InputError(
                f"{_HISTORIES} names a model {name!r}. Names are made of letters, digits and _, "
                f"and {used!r} is taken."
            )
        if not isinstance(length, int) or length < 1:
            raise InputError(
                f"{_HISTORIES} gives {name!r} a history of {length!r} clusters; it must be a whole "
                "number from 1 on."
            )
    for argument in ("seen_excluded", "longer_histories"):
        unknown = set(configuration.value(_TOKENIZE, argument, ())) - set(histories)
        if unknown:
            raise InputError(
                f"pipeline.tokenize.{argument} names {', '.join(sorted(unknown))}, which is no "
                f"novelty model. There is: {', '.join(histories)}."
            )
    history_length = configuration.value(_TOKENIZE, "history_length", 2)
    if histories[explores] != history_length:
        raise InputError(
            f"{_HISTORIES} gives {explores!r} a history of {histories[explores]} clusters, but the "
            f"exploration table and the alignment model have {history_length}. Set HISTORY_LENGTH, "
            "which binds both."
        )
    longest = configuration.value(_AGGREGATE, "max_history", 2)
    longer = configuration.value(_TOKENIZE, "longer_histories", {})
    for name, length in [*histories.items(), *longer.items()]:
        if name in longer and not histories.get(name, length) < longer[name]:
            raise InputError(
                f"pipeline.tokenize.longer_histories gives {name!r} {longer[name]} clusters, but "
                f"its history has {histories[name]} already."
            )
        if length > max(longest, history_length):
            raise InputError(
                f"{_HISTORIES} gives {name!r} a history of {length} clusters, but "
                f"pipeline.aggregate.max_history (MAX_HISTORY) keeps {longest}. Raise it."
            )
    return histories


def tuned_models(configuration: "Configuration", taken: Sequence[str]) -> Mapping[str, Any]:
    """The novelty models tuned on reward, by name, and what is set for each.

    Args:
      configuration: of the run.
      taken: names of the models that aren't.

    Raises:
      InputError: names or settings that can't be.
    """
    asked = configuration.value(f"{experiments.__name__}.experiment", "tuned", default=None) or {}
    made = configuration.value(f"{experiments.__name__}.tune", "variants", default=None) or {}
    if not isinstance(asked, dict):
        raise InputError(
            f"{_TUNED} is {asked!r}. It must map names to dictionaries of PolicyGradient's "
            "fields; {} is for no tuned model."
        )
    if asked != made:
        raise InputError(
            "experiments.experiment.tuned and experiments.tune.variants differ. Set TUNED, which "
            "binds both."
        )
    for name, fields in asked.items():
        if not re.fullmatch(r"\w+", str(name)) or not isinstance(fields, dict):
            raise InputError(
                f"{_TUNED} maps {name!r} to {fields!r}. It must map names of letters, digits and _ "
                "to dictionaries of PolicyGradient's fields."
            )
        if name in taken:
            raise InputError(
                f"{_TUNED} names a model {name!r}, which is taken by one that isn't tuned. Call it "
                "something else."
            )
    return asked


def check_experiment(configuration: "Configuration", stages: Sequence["Stage"]) -> None:
    """Checks an experiment's settings.

    Args:
      configuration: of the run.
      stages: that are going to run.

    Raises:
      InputError: one is out of range.
    """
    if any(stage.function in (experiments.tune, experiments.experiment) for stage in stages):
        experiments.check_settings(configuration.value)


def check_pretrained(configuration: "Configuration", stages: Sequence["Stage"]) -> None:
    """Checks the folders of models that are started from or, from T5X, taken.

    Args:
      configuration: of the run.
      stages: that are going to run.

    Raises:
      InputError: a folder isn't there, lacks a file, has one that is damaged or not supported, or
        isn't that of the network that is bound.
    """

    def bound(selector: str, argument: str, scope: str = "") -> Any:
        for_all = configuration.value(selector, argument, None)
        return configuration.value(selector, argument, for_all, scope)

    trained = [stage for stage in stages if stage.selector == _TRAIN]
    if not trained and not any(stage.selector == _TOKENIZE for stage in stages):
        return
    vocabulary = None
    if tokenizer := bound("recexplore.tasks.vocabulary.pretrained_vocabulary", "pretrained"):
        from recexplore.tasks.vocabulary import check_embedding, read_pretrained

        vocabulary = read_pretrained(tokenizer)
    for stage in trained:
        if checkpoint := bound(_TAKES, "checkpoint", stage.model):
            from recexplore.adapters.t5x_checkpoints import find

            find(checkpoint)
        if folder := bound(stage.selector, "pretrained", stage.model):
            from recexplore.models.config_file import check_config, check_kind
            from recexplore.models.pretrained import check_folder

            config = check_folder(folder)
            if vocabulary:
                check_embedding(vocabulary, config.vocab_size, folder)
            network = f"{type(config).__module__}.{type(config).__name__}"
            make_config = bound(stage.selector, "make_config", stage.model)
            if made_by := getattr(make_config, "selector", None):
                check_kind(folder, ".".join(made_by.split(".")[-2:]))
            fields = {name: bound(network, name, stage.model) for name in vars(config)}
            said = {name: value for name, value in fields.items() if value is not None}
            check_config(folder, dataclasses.replace(config, **said))


def check_evaluation(settings: "BestOfN", **users: int | None) -> None:
    """Checks what `pipeline.evaluate` was given.

    Args:
      settings: its best of n.
      **users: sizes of samples by the names of its arguments.

    Raises:
      InputError: one is out of range.
    """
    for name, count in users.items():
        if count is not None and count < 1:
            raise InputError(
                f"pipeline.evaluate.{name} is {count}; it must be at least 1, or None for all."
            )
    if settings.num_chosen < 10:
        raise InputError(
            f"evaluate/selection.BestOfN.num_chosen is {settings.num_chosen}; recall@10 needs 10."
        )
    if settings.sampler == "exhaustive":
        raise InputError(
            "evaluate/selection.BestOfN.sampler is 'exhaustive'; evaluation looks at how quality "
            "grows with n, so it needs draws: bind 'independent' or 'distinct' for evaluate. The "
            "models over all clusters are evaluated anyway."
        )
