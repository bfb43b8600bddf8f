"""Off-policy estimates against the exact value of a small bandit, simulated logs, and obp."""

import itertools

import numpy as np
import pytest
import scipy.stats

from recexplore.errors import InputError
from recexplore.evaluation import off_policy
from recexplore.evaluation.off_policy import Log

H, M = 3, 4
_RANDOM = np.random.default_rng(0)
MET = np.array([0.5, 0.3, 0.2])  # how often each context comes
LOGGED, TARGET = 0.1 + 0.6 * _RANDOM.dirichlet(np.ones(M), (2, H))
TRUTH = _RANDOM.random((H, M))  # chance of the reward 1
VALUE = float((MET[:, None] * TARGET * TRUTH).sum())
WRONG_MODEL = _RANDOM.random((H, M))
WRONG_PROPENSITIES = _RANDOM.dirichlet(np.ones(M), H)


def some_log(rows, seed=0, policy=LOGGED, rows_a_user=1):
    random = np.random.default_rng(seed)
    contexts = random.choice(H, rows, p=MET)
    actions = (random.random((rows, 1)) > np.cumsum(policy, axis=1)[contexts]).sum(axis=1)
    actions = np.minimum(actions, M - 1)
    rewards = (random.random(rows) < TRUTH[contexts, actions]).astype(float)
    users = np.arange(rows) // rows_a_user
    return Log(contexts, actions, rewards, policy[contexts, actions], users)


def expectation(estimate, propensities):
    """Of an estimate of one row that is linear in the reward, over all rows there can be."""
    total = 0.0
    for context, action in itertools.product(range(H), range(M)):
        row = Log(
            *(np.array([index]) for index in (context, action)),
            rewards=TRUTH[context, [action]],
            propensities=propensities[context, [action]],
            users=np.zeros(1, int),
        )
        total += MET[context] * LOGGED[context, action] * estimate(row)
    return total


@pytest.mark.parametrize(
    ("predicted", "propensities", "unbiased"),
    [
        (WRONG_MODEL, LOGGED, True),
        (TRUTH, WRONG_PROPENSITIES, True),
        (WRONG_MODEL, WRONG_PROPENSITIES, False),
    ],
)
def test_doubly_robust_is_unbiased_if_either_part_is_right(predicted, propensities, unbiased):
    def estimate(row):
        return off_policy.estimate_value(row, TARGET, predicted, samples=1).doubly_robust.value

    assert bool(expectation(estimate, propensities) == pytest.approx(VALUE)) is unbiased


def test_inverse_propensities_are_unbiased_if_they_are_right():
    def estimate(row):
        return off_policy.estimate_value(row, TARGET, samples=1).inverse_propensity.value

    assert expectation(estimate, LOGGED) == pytest.approx(VALUE)
    assert expectation(estimate, WRONG_PROPENSITIES) != pytest.approx(VALUE, abs=0.01)

    def clipped(row):
        return off_policy.estimate_value(row, TARGET, clip=1.0, samples=1).inverse_propensity.value

    assert expectation(clipped, LOGGED) < VALUE - 0.01


def test_over_many_simulated_logs_estimates_are_right_and_intervals_hold_the_value():
    logs, estimators = 200, ("inverse_propensity", "self_normalised", "doubly_robust")
    found = {name: [] for name in estimators}
    for seed in range(logs):
        log = some_log(400, seed)
        value = off_policy.estimate_value(log, TARGET, WRONG_MODEL, samples=200, seed=seed)
        for name in estimators:
            found[name].append(getattr(value, name))
    for name, estimates in found.items():
        value, low, high = np.array(estimates).T
        error = value.std() / np.sqrt(logs)
        bias = 4 / 400 if name == "self_normalised" else 0.0  # of the order of 1 / rows
        assert value.mean() == pytest.approx(VALUE, abs=4 * error + bias), name
        held = int(((low <= VALUE) & (high >= VALUE)).sum())
        assert scipy.stats.binomtest(held, logs, 0.95).pvalue > 1e-4, name
    spread = {name: np.std([each.value for each in found[name]]) for name in estimators}
    assert spread["self_normalised"] < spread["inverse_propensity"]


def test_a_right_model_and_the_logs_own_policy_leave_little_to_chance():
    log = some_log(2000)
    own = off_policy.estimate_value(log, LOGGED, samples=50)
    assert own.inverse_propensity.value == pytest.approx(log.rewards.mean())
    assert own.self_normalised.value == pytest.approx(log.rewards.mean())
    assert own.doubly_robust is None
    assert own.effective_sample_size == pytest.approx(2000)
    certain = log._replace(rewards=TRUTH[log.contexts, log.actions])
    found = off_policy.estimate_value(certain, TARGET, TRUTH, samples=50).doubly_robust
    direct = (TARGET * TRUTH).sum(axis=1)[log.contexts].mean()
    assert found.value == pytest.approx(direct)


def test_the_self_normalised_estimate_stays_within_the_rewards():
    rare = np.full((H, M), 0.01)
    outside = 0
    for seed in range(50):
        log = some_log(5, seed)._replace(propensities=rare[0, np.zeros(5, int)])
        value = off_policy.estimate_value(log, TARGET, samples=50)
        assert 0 <= value.self_normalised.low <= value.self_normalised.high <= 1
        outside += value.inverse_propensity.value > 1
        alone, effective = off_policy.self_normalised(log, TARGET)
        assert alone == pytest.approx(value.self_normalised.value)
        assert effective == pytest.approx(value.effective_sample_size)
    assert outside > 0


def test_effective_sample_sizes_by_hand():
    size = off_policy.effective_sample_size
    assert size(np.full(7, 0.3)) == pytest.approx(7)
    assert size(np.array([0.0, 5.0, 0.0])) == pytest.approx(1)
    assert size(np.array([1.0, 1.0, 2.0])) == pytest.approx(16 / 6)
    assert size(np.zeros(3)) == 0.0


def test_weights_are_ratios_up_to_the_clip():
    log = Log(
        np.array([0, 2]), np.array([1, 3]), np.ones(2), np.array([0.5, 0.001]), np.array([0, 1])
    )
    weights = off_policy.importance_weights(log, TARGET)
    np.testing.assert_allclose(weights, [TARGET[0, 1] / 0.5, TARGET[2, 3] / 0.001])
    assert off_policy.importance_weights(log, TARGET, clip=2.0)[1] == 2.0


def test_a_policy_that_shows_nothing_of_the_log_has_no_self_normalised_value():
    log, nowhere = some_log(50), np.zeros((H, M))
    assert np.isnan(off_policy.self_normalised(log, nowhere)[0])
    assert off_policy.self_normalised(log, nowhere)[1] == 0
    value = off_policy.estimate_value(log, nowhere, samples=10)
    assert np.isnan(value.self_normalised).all() and value.inverse_propensity.value == 0


def test_intervals_are_over_users_not_rows():
    log = some_log(200)
    repeated = Log(*(np.repeat(part, 30) for part in log))
    once = off_policy.estimate_value(log, TARGET, WRONG_MODEL)
    often = off_policy.estimate_value(repeated, TARGET, WRONG_MODEL)
    for first, second in zip(once[:3], often[:3], strict=True):
        assert second == pytest.approx(first)
    named = log._replace(users=np.array([f"user {user}" for user in log.users]))
    assert off_policy.estimate_value(named, TARGET).inverse_propensity.value == pytest.approx(
        once.inverse_propensity.value
    )


def spoilt(field, **values):
    part = getattr(some_log(10), field).copy()
    for row, value in values.items():
        part[int(row[1:])] = value
    return some_log(10)._replace(**{field: part})


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (spoilt("propensities", r3=0.0, r7=np.nan), r"2 of 10 .* \(0, 1\]; the first is row 3"),
        (spoilt("propensities", r5=1.5), r"1 of 10 .* \(0, 1\]; the first is row 5"),
        (spoilt("propensities", r0=-0.1), r"1 of 10 .* \(0, 1\]; the first is row 0"),
        (spoilt("propensities", r9=np.inf), r"1 of 10 .* \(0, 1\]; the first is row 9"),
        (spoilt("rewards", r2=np.inf), "1 of 10 .* rewards that are no finite numbers"),
        (spoilt("contexts", r1=H), r"1 of 10 .* contexts that don't lie in 0\.\.2"),
        (spoilt("actions", r1=-1, r2=M), r"2 of 10 .* clusters that don't lie in 0\.\.3"),
        (some_log(0), "The log is empty"),
    ],
)
def test_rows_that_cannot_be_used_are_counted(log, message):
    with pytest.raises(InputError, match=message):
        off_policy.estimate_value(log, TARGET)


def test_a_clip_must_be_positive():
    with pytest.raises(InputError, match="clip is 0.0; it must be above 0"):
        off_policy.estimate_value(some_log(10), TARGET, clip=0.0)


@pytest.mark.filterwarnings("ignore")  # an older package with warnings of its own
def test_estimates_are_those_of_open_bandit_pipeline():
    ope = pytest.importorskip("obp.ope", reason="obp (Open Bandit Pipeline) is not installed")
    log = some_log(500)
    given = dict(
        reward=log.rewards,
        action=log.actions,
        pscore=log.propensities,
        action_dist=TARGET[log.contexts][:, :, None],
    )
    value = off_policy.estimate_value(log, TARGET, WRONG_MODEL, samples=10)
    model = dict(estimated_rewards_by_reg_model=WRONG_MODEL[log.contexts][:, :, None])
    for ours, theirs in (
        (value.inverse_propensity, ope.InverseProbabilityWeighting()),
        (value.self_normalised, ope.SelfNormalizedInverseProbabilityWeighting()),
        (value.doubly_robust, ope.DoublyRobust()),
    ):
        expected = theirs.estimate_policy_value(
            **given, **(model if isinstance(theirs, ope.DoublyRobust) else {})
        )
        assert ours.value == pytest.approx(expected)
