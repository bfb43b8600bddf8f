"""The experiment's parts against brute force, and the whole of it on a small platform."""

import copy
import dataclasses

import numpy as np
import pytest

from recexplore.errors import InputError
from recexplore.evaluation import arms, experiment, statistics
from recexplore.evaluation.standing import ENGAGED, Standing, history_code
from recexplore.evaluation.tallies import COMPLETED, METRICS
from recexplore.simulation.platform import EXPLORATION, Platform
from recexplore.simulation.world import Settings, make_world

SETTINGS = Settings(num_users=300, num_items=600, seed=3)
NUM_CLUSTERS = 40


@pytest.fixture(scope="module")
def item_clusters():
    return make_world(SETTINGS).item_topics // 5


@pytest.fixture(scope="module")
def scene(item_clusters):
    return experiment.Scene(SETTINGS, 6, item_clusters, NUM_CLUSTERS, 2, pre_period=3)


def brute_force_standing(days, item_clusters, length):
    """Each user's history and engagement, impression by impression."""
    histories, engaged, novel = {}, {}, []
    for day in days:
        told = np.zeros(len(day.users), bool)
        for row in np.lexsort((day.slots, day.users)):
            user, cluster = day.users[row], item_clusters[day.items[row]]
            times = engaged.setdefault(user, {})
            told[row] = times.get(cluster, 0) == 0
            if day.watch_fraction[row] >= ENGAGED:
                times[cluster] = times.get(cluster, 0) + 1
            if not day.skipped[row]:
                history = [c for c in histories.get(user, []) if c != cluster] + [cluster]
                histories[user] = history[-length:]
        novel.append(told)
    return histories, engaged, novel


@pytest.mark.parametrize("length", [1, 2, 3])
def test_standing_follows_every_user_as_one_by_one(item_clusters, length):
    platform = Platform(SETTINGS)
    standing = Standing(SETTINGS.num_users, item_clusters, NUM_CLUSTERS, length)
    days, found = [], []
    for _ in range(4):
        platform.arrive()
        days.append(platform.show())
        found.append(standing.follow(days[-1]))
    histories, engaged, novel = brute_force_standing(days, item_clusters, length)
    for user in range(SETTINGS.num_users):
        expected = histories.get(user, [])
        assert [c for c in standing.last[user] if c >= 0] == expected
        times = np.zeros(NUM_CLUSTERS)
        for cluster, count in engaged.get(user, {}).items():
            times[cluster] = count
        np.testing.assert_array_equal(standing.engaged[user], times)
    for mine, theirs, day in zip(found, novel, days, strict=True):
        np.testing.assert_array_equal(mine.novel, theirs)
        np.testing.assert_array_equal(mine.clusters, item_clusters[day.items])


def test_history_codes_are_row_numbers():
    histories = np.array([[3, 4], [0, 39], [-1, 4]])
    assert history_code(histories, 40).tolist() == [124, 39, -1]


def test_allowed_leaves_out_history_engagement_and_what_was_explored_lately(item_clusters):
    platform = Platform(SETTINGS)
    standing = Standing(SETTINGS.num_users, item_clusters, NUM_CLUSTERS, 2)
    explored = {}
    for day in range(5):
        users = platform.arrive()
        items = np.random.default_rng(day).integers(0, 600, len(users))
        items = np.where(platform.world.uploaded(day)[items], items, -1)
        shown = platform.show(items)
        standing.follow(shown)
        for row in np.flatnonzero(shown.source == EXPLORATION):
            explored[shown.users[row], item_clusters[shown.items[row]]] = day
    users = np.arange(SETTINGS.num_users)
    for novel_to in ("user", "history"):
        allowed = standing.allowed(users, novel_to=novel_to, cool_down=2)
        for user in users:
            for cluster in range(NUM_CLUSTERS):
                known = novel_to == "user" and standing.engaged[user, cluster] > 0
                recent = explored.get((user, cluster), -100) >= 5 - 2
                expected = not (known or recent or cluster in standing.last[user])
                assert allowed[user, cluster] == expected


def test_metrics_are_what_counting_finds(scene):
    here = copy.deepcopy(scene)
    before = here.standing.engaged.copy()
    tallies, days = here.tallies(), []
    for _ in range(3):
        here.platform.arrive()
        days.append(here.live(tallies))
    users = np.concatenate([day.users for day in days])
    watch = np.concatenate([day.watch_fraction for day in days])
    clusters = here.item_clusters[np.concatenate([day.items for day in days])]
    slots = np.concatenate([day.slots for day in days])

    def ratio(metric):
        return [side.sum() for side in tallies.ratio(metric)]

    assert ratio("positive_playback_rate") == [(watch >= ENGAGED).sum(), len(watch)]
    assert ratio("completion_rate") == [(watch >= COMPLETED).sum(), len(watch)]
    pairs = {(u, c) for u, c, w in zip(users, clusters, watch, strict=True) if w >= ENGAGED}
    assert ratio("ueuc") == [len(pairs), SETTINGS.num_users]
    came = sum(len(np.unique(day.users)) for day in days)
    assert ratio("daily_active_users") == [came, 3 * SETTINGS.num_users]
    gained = (before == 0) & (here.standing.engaged >= 2)
    assert ratio("interests_gained") == [gained.sum(), SETTINGS.num_users]
    slot = slots == SETTINGS.exploration_slot
    assert ratio("slot_positive_playback_rate") == [(slot & (watch >= ENGAGED)).sum(), slot.sum()]
    assert tallies.in_slot.sum() == slot.sum() and tallies.explored.sum() == 0
    assert ratio("explored_share")[0] == 0


def test_items_are_picked_in_their_cluster_in_proportion_to_weight(item_clusters):
    random = np.random.default_rng(0)
    weights = random.random(len(item_clusters)) * (random.random(len(item_clusters)) < 0.7)
    clusters = np.repeat([7, -1, 0, 39], 20_000)
    items = experiment.pick_items(clusters, item_clusters, weights, random)
    assert (items[clusters == -1] == -1).all()
    for cluster in (0, 7, 39):
        picked = items[clusters == cluster]
        members = np.flatnonzero(item_clusters == cluster)
        share = weights[members] / weights[members].sum()
        found = np.array([(picked == member).mean() for member in members])
        assert np.isin(picked, members[share > 0]).all()
        np.testing.assert_allclose(found, share, atol=5 * np.sqrt(0.25 / 20_000))


def test_a_cluster_whose_items_weigh_nothing_gets_none(item_clusters):
    weights = (item_clusters != 7).astype(float)
    found = experiment.pick_items(
        np.array([7, 8]), item_clusters, weights, np.random.default_rng(0)
    )
    assert found[0] == -1 and item_clusters[found[1]] == 8


def opinions(seed=0):
    random = np.random.default_rng(seed)
    shape = (NUM_CLUSTERS**2, NUM_CLUSTERS)
    log_p, scores, tuned, markov = (random.normal(size=shape) for _ in range(4))
    truth, popularity, feedback = (random.random(s) for s in (shape, shape[1:], shape[1:]))
    return arms.Opinions(log_p, scores, tuned, np.exp(markov), truth, popularity, feedback)


def bandit(told):
    features = arms.Features(
        np.random.default_rng(1).normal(size=(NUM_CLUSTERS, 12)),
        told.popularity,
        told.feedback,
        told.markov,
        2,
    )
    return arms.ThompsonBandit(features)


def all_arms(told):
    return arms.make_arms(told, bandit(told), sample_counts=(2, 20), relevance_weight=1.0)


def test_every_arm_chooses_only_what_is_allowed_and_greedy_ones_the_best():
    told, random = opinions(), np.random.default_rng(2)
    histories = random.integers(0, NUM_CLUSTERS**2, 500)
    allowed = random.random((500, NUM_CLUSTERS)) < 0.3
    allowed[:, 0] = True
    asked = arms.Asked(histories, allowed)
    rows = np.arange(500)
    for name, arm in all_arms(told).items():
        chosen = arm.choose(asked, np.random.default_rng(3))
        if name == "control":
            assert (chosen == -1).all()
            continue
        assert allowed[rows, chosen].all(), name
        if name in ("alignment_only", "popular_novel", "markov"):
            values = {
                "alignment_only": told.scores[histories],
                "popular_novel": np.tile(told.popularity, (500, 1)),
                "markov": told.markov[histories],
            }[name]
            best = np.where(allowed, values, -np.inf).argmax(axis=1)
            np.testing.assert_array_equal(chosen, best)


def test_best_of_n_and_the_oracle_choose_better_than_one_draw():
    told, random = opinions(), np.random.default_rng(2)
    histories = random.integers(0, NUM_CLUSTERS**2, 4000)
    asked = arms.Asked(histories, np.ones((4000, NUM_CLUSTERS), bool))
    made = all_arms(told)

    def mean(name, values):
        chosen = made[name].choose(asked, np.random.default_rng(4))
        return values[histories, chosen].mean()

    scores = [mean(name, told.scores) for name in ("novelty_only", "best_of_2", "best_of_20")]
    assert scores[0] < scores[1] < scores[2]
    assert mean("oracle", told.truth) > mean("best_of_20", told.truth) + 0.2


def test_the_bandit_s_posterior_is_ridge_regression_s():
    told, random = opinions(), np.random.default_rng(5)
    learner = bandit(told)
    histories, clusters = random.integers(0, 1600, 3000), random.integers(0, 40, 3000)
    truth = random.normal(size=learner._features.size)
    x = learner._features.of_pairs(histories, clusters)
    rewards = x @ truth + 0.1 * random.normal(size=3000)
    learner.learn_rewards(histories[:1000], clusters[:1000], rewards[:1000])
    learner.learn_rewards(histories[1000:], clusters[1000:], rewards[1000:])
    ridge = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ rewards)
    np.testing.assert_allclose(learner._mean(), ridge, rtol=1e-8)
    whole = learner._features.of_all(histories[:50])[np.arange(50), clusters[:50]]
    np.testing.assert_allclose(whole, x[:50])
    asked = arms.Asked(histories[:200], np.ones((200, 40), bool))
    chosen = learner.choose(asked, random)
    values = learner._features.of_all(histories[:200]) @ truth
    regret = values.max(axis=1) - values[np.arange(200), chosen]
    assert regret.mean() < 0.1 * (values.max(axis=1) - values.mean(axis=1)).mean()


def test_an_experiment_finds_the_arm_that_knows_the_truth(scene):
    told = opinions()._replace(truth=experiment.truth_of_histories(scene, 2))
    some = {
        name: arm
        for name, arm in all_arms(told).items()
        if name in ("control", "random_novel", "oracle")
    }
    settings = experiment.Experiment(num_days=6, bootstrap_samples=200)
    outcome = experiment.run(copy.deepcopy(scene), some, settings, lambda day, days: None)
    assert np.bincount(outcome.arm_of).min() > 60
    changes = outcome.changes("oracle", "random_novel")
    assert changes["slot_positive_playback_rate"].low > 0
    metrics = outcome.metrics([("oracle", "random_novel")])
    for metric in (*METRICS, "distinct_clusters"):
        if not metric.startswith("explored_positive"):
            value, low, high = (metrics[f"oracle/{metric}{end}"] for end in ("", "_low", "_high"))
            assert low <= value <= high, metric
    assert metrics["control/explored_share"] == 0
    assert metrics["oracle/slot_positive_playback_rate_against_random_novel"] > 0
    assert "control/positive_playback_rate_change" not in metrics


def test_the_same_experiment_again_is_the_same(scene):
    settings = experiment.Experiment(num_days=2, bootstrap_samples=100)
    runs = [
        experiment.run(copy.deepcopy(scene), all_arms(opinions()), settings, lambda day, days: None)
        for _ in range(2)
    ]
    assert runs[0].metrics() == runs[1].metrics()


def test_a_suppressing_ranker_lowers_the_share_that_explores(scene):
    told = opinions()
    outcomes = [
        experiment.run(
            copy.deepcopy(scene),
            all_arms(told),
            experiment.Experiment(num_days=3, suppression=share),
            lambda day, days: None,
        )
        for share in (0.0, 0.4)
    ]
    shares = [outcome.values("random_novel")["explored_share"].value for outcome in outcomes]
    assert shares[1] == pytest.approx(0.6 * shares[0], abs=0.1)


def test_users_of_another_population_have_the_same_clusters(item_clusters):
    others = experiment.Scene(
        dataclasses.replace(SETTINGS, num_users=500),
        4,
        item_clusters,
        NUM_CLUSTERS,
        2,
        population=1,
    )
    truth = experiment.truth_of_histories(others, 2)
    assert truth.shape == (1600, 40)
    assert np.isfinite(truth).all() and (truth > 0).all() and (truth < 1).all()
    satisfaction = others.satisfaction()
    codes = np.concatenate([visits.histories for visits in others.visits])
    often = int(np.bincount(codes, minlength=1600).argmax())
    for novel_to in ("user", "history"):
        truth = experiment.truth_of_histories(others, 2, novel_to)
        for cluster in (0, 11, 25):
            own, last = [], []
            for visits in others.visits:
                for user, code, new in zip(*visits, strict=True):
                    if code % 40 == often % 40 and (new[cluster] or novel_to == "history"):
                        last.append(satisfaction[user, cluster])
                        if code == often:
                            own.append(satisfaction[user, cluster])
            expected = (sum(own) + 5 * np.mean(last)) / (len(own) + 5)
            assert truth[often, cluster] == pytest.approx(expected, rel=1e-4)


def test_intervals_of_a_split_for_nothing_hold_what_they_promise(scene):
    settings = experiment.Experiment(num_days=3)
    control = {"control": arms.Nothing()}
    outcome = experiment.run(copy.deepcopy(scene), control, settings, lambda day, days: None)
    found = experiment.same_treatment(outcome, splits=200)
    for metric in ("positive_playback_rate", "ueuc", "daily_active_users"):
        for name in (metric, f"{metric}_adjusted"):
            assert found[f"{name}_low"] <= 0.08 and found[name] <= 0.12
            assert found[f"{name}_high"] >= 0.03


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_days", 0),
        ("sample_counts", ()),
        ("novel_to", "nobody"),
        ("suppression", 1.0),
        ("bootstrap_samples", 10),
    ],
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(InputError, match=f"experiment.Experiment.{field} is"):
        experiment.Experiment(**{field: value})


def test_assignment_is_even_and_keeps_to_itself():
    arm_of = statistics.assign(np.arange(30_000), 15, "arms 0")
    counts = np.bincount(arm_of)
    assert len(counts) == 15 and counts.min() > 1800
