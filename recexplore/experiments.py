"""The stages that need a platform whose truth is known: the A/B experiment, best of n studied.

Like the other stages of `pipeline`, they go from artefacts to artefacts. The platform is lived
through again from its seed, so that the experiment goes on where the log ended.
"""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from recexplore import artifacts
from recexplore.errors import InputError
from recexplore.progress import Progress

if TYPE_CHECKING:
    from recexplore.evaluation.arms import Arm, Opinions
    from recexplore.evaluation.baselines import Rows
    from recexplore.evaluation.experiment import Scene
    from recexplore.evaluation.randomised import Randomised
    from recexplore.evaluation.study import Visits
    from recexplore.explorer import Explorer
    from recexplore.inference.launch import Model
    from recexplore.interests.cluster_table import ClusterTable
    from recexplore.simulation.world import Settings

EXPERIMENT = "experiment"
METRICS, STUDY, EXAMPLES = "metrics.json", "study.json", "examples.json"  # in its folder
VISITS = "visits.npz"  # likewise; what best of n is studied on
_PROMPTS = 16_384  # histories that tuning draws from
OUTPUTS, ASKED = "outputs.parquet", "asked.json"  # in the folder of a tuned model
_LONGEST_HISTORY = 2  # M² histories can all be asked about, M³ can't
_OTHERS = 1  # population over whose users the truth of a history is averaged
_SPLITS_ALIKE = 200  # A/A comparisons
_VALUED = ("random_novel", "markov", "novelty_only", "best_of_5", "best_of_20", "exhaustive")
_STRENGTH_ROWS = 4_000  # of randomised feedback, to choose a strength on
_EXAMPLES_SHOWN, _EXAMPLE_DRAWS, _EXAMPLE_CANDIDATES = 12, 20, 6


def tune(
    work: Path,
    progress: Progress,
    name: str,
    *,
    settings: Any,
    variants: Mapping[str, Mapping[str, Any]],
    evaluated: int = 256,
    batch_size: int = 64,
    seed: int = 0,
) -> None:
    """The novelty model → one tuned on the alignment model's score, and what it answered meanwhile.

    Args:
      work: the work directory.
      progress: where to say what is going on.
      name: of the tuned model.
      settings: a policy_gradient.PolicyGradient.
      variants: name of each tuned model → fields of the settings that differ for it.
      evaluated: histories that are held out, and looked at as tuning goes on.
      batch_size: histories a call of a compiled step, when the model is used.
      seed: of the choice of those histories.
    """
    from recexplore.explorer import NETWORK, description_trie, load_explorer
    from recexplore.interests.cluster_table import ClusterTable
    from recexplore.tasks.vocabulary import Vocabulary
    from recexplore.training import policy_gradient

    explorer, models = load_explorer(work, ("novelty", "alignment"), batch_size)
    novelty, alignment = models["novelty"], models["alignment"]
    vocabulary = Vocabulary(work / "vocabulary")
    trie = description_trie(vocabulary, ClusterTable.read(work / "clusters").descriptions)
    table = artifacts.read_table(work / "feedback" / "histories.parquet", artifacts.HISTORIES)
    histories = table["history"].to_pylist()
    often = table["count"].to_numpy().astype(np.float64)
    if len(histories) < 2 * evaluated:
        raise InputError(
            f"experiments.tune.evaluated is {evaluated}, but there are {len(histories)} histories "
            "in the log; at least half of them must remain to tune on."
        )
    random = np.random.default_rng(seed)
    held_out = random.choice(len(often), evaluated, replace=False, p=often / often.sum())
    often[held_out] = 0  # the others are tuned on as often as users stand there
    drawn = random.choice(len(often), _PROMPTS, p=often / often.sum())
    watched, used = ([histories[i] for i in some] for some in (held_out, drawn))
    folder = work / "models" / name
    description = artifacts.read_json(work / "models" / "novelty" / NETWORK)
    artifacts.write_json(folder / NETWORK, description)
    with progress.bar(f"tune {name}") as update:
        outputs = policy_gradient.tune(
            folder,
            novelty,
            alignment,
            (vocabulary.prefix, vocabulary.prefix),
            trie,
            *(explorer.batch(novelty, alignment, h, [[]] * len(h)) for h in (used, watched)),
            _variant(settings, name, variants[name]),
            update,
            pad_id=vocabulary.pad_id,
        )
    artifacts.write_json(folder / ASKED, watched)
    rows = pa.table(outputs.rows(vocabulary.decode))
    artifacts.write_table(folder / OUTPUTS, rows, artifacts.TUNING_OUTPUTS)
    last = outputs.clusters[-1]
    progress.say(
        f"  after {outputs.steps[-1]} steps {(last >= 0).mean():.1%} of the answers are clusters "
        f"that could be explored, {len(np.unique(last[last >= 0]))} different ones"
    )


def _variant(settings: Any, name: str, fields: Mapping[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(settings)}
    if unknown := set(fields) - known:
        raise InputError(
            f"experiments.tune.variants (TUNED) gives {name!r} {', '.join(sorted(unknown))}, which "
            f"is no field of PolicyGradient. There is: {', '.join(sorted(known))}."
        )
    return dataclasses.replace(settings, **fields)


def check_settings(bound: Callable[..., Any]) -> None:
    """Checks what gin binds for `tune` and `experiment`.

    Args:
      bound: (selector, argument, default) → the value bound.

    Raises:
      InputError: a value is out of range.
    """
    from recexplore.evaluation.experiment import Experiment
    from recexplore.simulation.world import Settings
    from recexplore.training.policy_gradient import PolicyGradient

    def made(kind: Any) -> Any:
        selector = f"{kind.__module__}.{kind.__qualname__}"
        fields = {f.name: bound(selector, f.name, None) for f in dataclasses.fields(kind)}
        return kind(**{name: value for name, value in fields.items() if value is not None})

    made(Settings)
    made(Experiment)
    tuning = made(PolicyGradient)
    for name, fields in (bound(f"{__name__}.tune", "variants", None) or {}).items():
        _variant(tuning, name, fields)
    counts = {
        "experiment": ("log_days", "truth_users", "num_visits", "randomised_days", "batch_size"),
        "tune": ("evaluated", "batch_size"),
    }
    for stage, names in counts.items():
        for name in names:
            value = bound(f"{__name__}.{stage}", name, None)
            if value is not None and value < 1:
                raise InputError(f"experiments.{stage}.{name} is {value}; it must be at least 1.")
    suppression = bound(f"{__name__}.experiment", "suppression", None)
    if suppression is not None and not 0 <= suppression < 1:
        raise InputError(
            f"experiments.experiment.suppression is {suppression}; it must lie in 0..1, below 1."
        )


def experiment(
    work: Path,
    progress: Progress,
    *,
    platform: "Settings",
    log_days: int,
    settings: Any,
    history_length: int,
    tuned: Mapping[str, Any] | None = None,
    suppression: float = 0.41,
    truth_users: int = 50_000,
    num_visits: int = 4_000,
    randomised_days: int = 3,
    batch_size: int = 64,
) -> None:
    """Models and the platform → every arm's metrics; what best of n gains, and what limits it.

    Args:
      work: the work directory.
      progress: where to say what is going on.
      platform: the world.Settings of the log.
      log_days: days of the log.
      settings: an experiment.Experiment.
      history_length: K.
      tuned: `variants` of `tune`. The first is the arm policy_gradient; of all is told what became
        of them.
      suppression: share of exploration items that the final ranker throws out, in a second
        experiment with the same arms; 0: no second one.
      truth_users: users over whom the truth of a history is averaged: others than those of the
        experiment, lest it know them personally.
      num_visits: moments at which best of n is studied.
      randomised_days: days whose randomised share off-policy estimates are made of.
      batch_size: histories a call of a compiled step.
    """
    from recexplore.evaluation import experiment as trial
    from recexplore.evaluation import study
    from recexplore.evaluation.arms import make_arms
    from recexplore.explorer import load_explorer
    from recexplore.interests.cluster_table import ClusterTable
    from recexplore.simulation.log import check_same

    if not 1 <= history_length <= _LONGEST_HISTORY:
        raise InputError(
            f"experiments.experiment.history_length is {history_length}; all histories are asked "
            f"about, so it must be 1 or {_LONGEST_HISTORY}."
        )
    clusters = ClusterTable.read(work / "clusters")
    item_clusters = _item_clusters(clusters, platform.num_items)

    def scene(users: int, population: int, what: str) -> "Scene":
        with progress.bar(what) as update:
            return trial.Scene(
                dataclasses.replace(platform, num_users=users),
                log_days,
                item_clusters,
                clusters.num_clusters,
                history_length,
                pre_period=settings.num_days,
                population=population,
                progress=update,
            )

    here = scene(platform.num_users, 0, "the log again")
    counted = artifacts.read_json(work / "interactions" / "counts.json")["interactions"]
    check_same(counted, here.impressions, "experiments.experiment")
    truth = trial.truth_of_histories(
        scene(truth_users, _OTHERS, "truth"), history_length, settings.novel_to
    )
    tuned = list(tuned or ())
    explorer, models = load_explorer(work, ["novelty", "alignment", *tuned[:1]], batch_size)
    opinions, make_bandit = _opinions(
        work, progress, explorer, models, clusters, truth, history_length
    )
    visits = _visits(here, opinions, settings, num_visits)
    found = {
        "experiment/users": float(platform.num_users),
        "experiment/days": float(settings.num_days),
    }
    shares = {"experiment": 0.0} | ({"suppressed": suppression} if suppression else {})
    for name, share in shares.items():
        arms = make_arms(
            opinions,
            make_bandit(),
            sample_counts=settings.sample_counts,
            relevance_weight=settings.relevance_weight,
        )
        started = copy.deepcopy(here)
        with progress.bar(name) as update:
            outcome = trial.run(
                started, arms, dataclasses.replace(settings, suppression=share), update
            )
        found |= {f"{name}/{key}": value for key, value in outcome.metrics(trial.CLAIMS).items()}
        if name == "experiment":
            alike = trial.same_treatment(outcome, _SPLITS_ALIKE)
            found |= {f"{trial.SAME}/{key}": value for key, value in alike.items()}
    told, judged = _off_policy(progress, here, settings, opinions, arms, randomised_days)
    strength = _strength(opinions, told)
    with progress.bar("study") as update:
        studied = study.everything(visits, strength["chosen"], update)
    studied |= {"off_policy": judged, "strength": strength}
    studied["tuning"] = {name: tuning_curve(work / "models" / name, truth) for name in tuned}
    found |= {f"study/{key}": value for key, value in studied["gap"].items()}
    examples = _examples(work, explorer, models, clusters.descriptions, truth, settings.seed)
    with artifacts.new_folder(work / EXPERIMENT) as folder:
        artifacts.write_json(folder / METRICS, found)
        artifacts.write_json(folder / STUDY, studied)
        artifacts.write_json(folder / EXAMPLES, examples)
        visits.write(folder / VISITS)
    for name in arms:
        played = found.get(f"experiment/{name}/slot_positive_playback_rate", float("nan"))
        progress.say(f"  {name}: positive playback of the slot {played:.4f}")


def _off_policy(
    progress: Progress,
    scene: "Scene",
    settings: Any,
    opinions: "Opinions",
    arms: dict[str, "Arm"],
    days: int,
) -> tuple["Randomised", list[dict[str, Any]]]:
    """What the log's randomised share says of some arms, beside what they are truly worth."""
    from recexplore.evaluation import off_policy, randomised

    policies = {name: arms[name].distribution for name in _VALUED if name in arms}
    with progress.bar("off-policy") as update:
        told, truth = randomised.live_days(scene, settings, days, policies, update)
    rows = []
    for name, policy in policies.items():
        chosen = policy(told.asked)
        value = off_policy.estimate_value(
            told.log, chosen, np.tile(opinions.feedback, (len(chosen), 1)), seed=settings.seed
        )
        row = {"arm": name, "truth": truth[name], "effective": value.effective_sample_size}
        for kind in ("inverse_propensity", "self_normalised", "doubly_robust"):
            estimate = getattr(value, kind)
            for part, end in zip(estimate, ("", "_low", "_high"), strict=True):
                if np.isfinite(estimate).all():  # a resample may have no row to tell by
                    row[f"{kind}{end}"] = float(part)
        rows.append(row)
    return told, rows


def _strength(opinions: "Opinions", told: "Randomised") -> dict[str, Any]:
    """How hard to select by the score, as the randomised feedback likes best.

    `chosen` is None where there is too little of it.
    """
    from recexplore.evaluation import off_policy, policies, study
    from recexplore.evaluation.arms import Asked

    contexts, places = np.unique(told.log.contexts[:_STRENGTH_ROWS], return_inverse=True)
    log = off_policy.Log(*(column[:_STRENGTH_ROWS] for column in told.log))
    asked = Asked(*(column[contexts] for column in told.asked))
    log_p = asked.among_allowed(opinions.log_p)
    scores = opinions.scores[asked.histories].astype(np.float64)
    try:
        found = policies.choose_strength(
            lambda strength: policies.soft_selection(log_p, scores, study.HEADLINE, strength),
            study.STRENGTHS,
            log._replace(contexts=places),
        )
    except InputError:
        return {"chosen": None, "curve": []}
    columns = zip(study.STRENGTHS, found.values.tolist(), found.effective.tolist(), strict=True)
    rows = [{"strength": s, "feedback": v, "effective": e} for s, v, e in columns if e]
    return {"chosen": found.chosen, "curve": rows}


def tuning_curve(folder: Path, truth: Float[np.ndarray, "H M"]) -> list[dict[str, Any]]:
    """What became of a tuned model's answers, step by step.

    Args:
      folder: of the model.
      truth: expected satisfaction by history code and cluster.

    Returns:
      For each step looked at: the share of valid answers; the mean reward; the mean true
      satisfaction of all answers, nothing for one that is no cluster, and of the valid ones alone;
      how many different clusters there are, and how many texts.
    """
    from recexplore.evaluation.standing import history_code

    table = artifacts.read_table(folder / OUTPUTS, artifacts.TUNING_OUTPUTS)
    asked = history_code(np.array(artifacts.read_json(folder / ASKED)), truth.shape[1])
    columns = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    valid = columns["cluster"] >= 0
    value = np.where(valid, truth[asked[columns["history"]], columns["cluster"]], 0.0)
    rows = []
    for step in np.unique(columns["step"]):
        at = columns["step"] == step
        rows.append(
            {
                "step": int(step),
                "valid": float(valid[at].mean()),
                "reward": float(columns["reward"][at].mean()),
                "satisfaction": float(value[at].mean()),
                "satisfaction_if_valid": float(value[at].sum() / max(valid[at].sum(), 1)),
                "distinct_clusters": len(np.unique(columns["cluster"][at & valid])),
                "distinct_texts": len(np.unique(columns["text"][at])),
            }
        )
    return rows


def _item_clusters(clusters: "ClusterTable", num_items: int) -> Int[np.ndarray, "I"]:
    """Cluster of each item of the platform, by the item's number."""
    from recexplore.simulation.log import item_ids

    table = clusters.item_clusters
    of_item = dict(zip(table["item_id"].to_pylist(), table["cluster_id"].to_pylist(), strict=True))
    missing = [item for item in item_ids(num_items) if item not in of_item]
    if missing:
        raise InputError(
            f"{len(missing)} items of experiments.experiment.platform, {missing[0]} first, are not "
            "in the log's clusters. Use the settings that the log was made with."
        )
    return np.array([of_item[item] for item in item_ids(num_items)])


def _opinions(
    work: Path,
    progress: Progress,
    explorer: "Explorer",
    models: dict[str, "Model"],
    clusters: "ClusterTable",
    truth: Float[np.ndarray, "H M"],
    history_length: int,
) -> tuple["Opinions", Any]:
    """What models, baselines and the truth say of every history; and a maker of bandits that have
    learnt from the log."""
    from recexplore.evaluation import baselines, offline
    from recexplore.evaluation.arms import Features, Opinions, ThompsonBandit
    from recexplore.evaluation.standing import history_code
    from recexplore.feedback.collective import target_mean

    size = clusters.num_clusters
    histories = list(itertools.permutations(range(size), history_length))
    codes = history_code(np.array(histories), size)
    excluded = np.zeros((len(histories), 1, size), bool)
    np.put_along_axis(excluded[:, 0], np.array(histories), True, axis=1)

    def table(values: Float[np.ndarray, "B M"]) -> Float[np.ndarray, "H M"]:
        """Rows where the codes of histories are; those that name a cluster twice stay 0."""
        found = np.zeros((size**history_length, size), np.float32)
        found[codes] = values
        return found

    def proposed(name: str) -> Float[np.ndarray, "H M"]:
        with progress.bar(f"every history, {name}") as update:
            found = explorer.log_probabilities(models[name], histories, excluded, update)
        return table(found[:, 0])

    with progress.bar("every history, alignment") as update:
        scores = table(explorer.scores(models["alignment"], histories, update))
    transitions = artifacts.read_table(
        work / "feedback" / "transitions.parquet", artifacts.TRANSITIONS
    )
    train, validation = (
        offline.rows_of(transitions, split, size) for split in ("train", "validation")
    )
    fitted = baselines.fit_counts(train, validation, pairs=history_length > 1)
    asked = _rows_of_histories(histories, size)
    markov = table(fitted["markov"](asked))
    popularity = fitted["popularity"](asked)[0]
    log = _feedback(transitions, size, history_length)
    feedback = target_mean(log[1], log[2], np.ones(len(log[1])), size)
    features = Features(clusters.centroids, popularity, feedback, markov, history_length)

    def make_bandit() -> ThompsonBandit:
        bandit = ThompsonBandit(features)
        bandit.learn_rewards(*log)
        return bandit

    tuned = [name for name in models if name not in ("novelty", "alignment")]
    opinions = Opinions(
        log_p=proposed("novelty"),
        scores=scores,
        tuned_log_p=proposed(tuned[0]) if tuned else None,
        markov=markov,
        truth=truth,
        popularity=popularity,
        feedback=feedback,
    )
    return opinions, make_bandit


def _feedback(transitions: pa.Table, size: int, history_length: int) -> tuple[np.ndarray, ...]:
    """Training transitions as (history code, next cluster, watch fraction), skipped ones too."""
    from recexplore.evaluation.standing import history_code

    rows = transitions.filter(pc.equal(transitions["split"], "train"))
    histories = np.array([history[-history_length:] for history in rows["history"].to_pylist()])
    codes = history_code(histories, size)
    return codes, rows["next_cluster"].to_numpy(), rows["watch_fraction"].to_numpy()


def _rows_of_histories(histories: Sequence[Sequence[int]], size: int) -> "Rows":
    """Histories as rows that baselines can be asked about."""
    from recexplore.evaluation.baselines import Rows

    count = len(histories)
    last_two = np.array([(history[0], history[-1]) for history in histories])
    nothing = np.zeros(count, np.int64)
    return Rows(nothing, list(histories), last_two, nothing, np.zeros((count, size), bool))


def _examples(
    work: Path,
    explorer: "Explorer",
    models: dict[str, "Model"],
    descriptions: Sequence[str],
    truth: Float[np.ndarray, "H M"],
    seed: int,
) -> list[dict[str, Any]]:
    """Best of 20 in words, by the compiled step: histories, candidates with both models' opinions
    and the truth, and which was chosen."""
    from recexplore.evaluation.standing import history_code
    from recexplore.feedback.transitions import busiest
    from recexplore.inference.selection import BestOfN

    table = artifacts.read_table(work / "feedback" / "histories.parquet", artifacts.HISTORIES)
    histories = busiest(table, _EXAMPLES_SHOWN)
    found = explorer.explore(
        models["novelty"],
        models["alignment"],
        histories,
        [[]] * len(histories),
        BestOfN(num_samples=_EXAMPLE_DRAWS, num_chosen=_EXAMPLE_DRAWS),
        seed,
    )
    codes = history_code(np.array(histories), len(descriptions))
    return [
        {
            "history": [descriptions[cluster] for cluster in history],
            "candidates": [
                {
                    "description": descriptions[cluster],
                    "probability": float(np.exp(found.log_probabilities[row, place])),
                    "score": float(1 / (1 + np.exp(-found.scores[row, place]))),
                    "truth": float(truth[codes[row], cluster]),
                    "chosen": place == 0,
                }
                for place, cluster in enumerate(found.clusters[row][:_EXAMPLE_CANDIDATES])
                if cluster >= 0
            ],
        }
        for row, history in enumerate(histories)
    ]


def _visits(scene: "Scene", opinions: "Opinions", settings: Any, count: int) -> "Visits":
    """Users at the end of the log who could explore something, drawn at random."""
    from recexplore.evaluation.arms import Asked
    from recexplore.evaluation.study import Visits

    everyone = np.arange(len(scene.standing.last))
    ready, asked = scene.ask(everyone, settings, least=2)
    if not len(ready):
        raise InputError(
            "No user of the platform has a whole history and two clusters left to explore. Use "
            "more clusters, users or days of the log."
        )
    random = np.random.default_rng([settings.seed, 5])
    users = np.sort(random.choice(ready, min(count, len(ready)), replace=False))
    drawn = np.searchsorted(ready, users)
    asked = Asked(*(column[drawn] for column in asked))
    satisfaction = np.nan_to_num(scene.satisfaction())[users]
    return Visits(
        users,
        asked.among_allowed(opinions.log_p),
        opinions.scores[asked.histories].astype(np.float64),
        satisfaction.astype(np.float64),
        opinions.truth[asked.histories].astype(np.float64),
        scene.standing.recent[users],
    )
