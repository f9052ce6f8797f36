"""The closed forms against simulation and against brute-force minimisation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from core.errors import InvalidInput
from sched_sampling.theory import bash_optimum, two_state_accuracy, two_state_off


def _chains(slip: float, recovery: float, length: int, num: int = 100_000) -> np.ndarray:
    """Whether each of `num` chains is off after 0, 1, ..., `length` tokens."""
    rng = np.random.default_rng(0)
    off = np.zeros((num, length + 1), dtype=bool)
    for t in range(length):
        draw = rng.random(num)
        off[:, t + 1] = np.where(off[:, t], draw >= recovery, draw < slip)
    return off


@pytest.mark.parametrize(
    ("slip", "recovery"), [(0.05, 0.0), (0.05, 0.3), (0.2, 0.9), (0.6, 0.7), (0.0, 0.4), (1.0, 1.0)]
)
def test_the_share_that_is_off_is_that_of_simulated_chains(slip, recovery):
    simulated = _chains(slip, recovery, 12).mean(axis=0)
    np.testing.assert_allclose(two_state_off(slip, recovery, np.arange(13)), simulated, atol=0.006)


def test_without_recovery_an_answer_is_on_track_as_long_as_no_token_has_slipped():
    np.testing.assert_allclose(two_state_off(0.05, 0.0, [0, 1, 12]), [0, 0.05, 1 - 0.95**12])


def test_with_recovery_the_share_that_is_off_stays_below_its_limit():
    assert two_state_off(0.02, 0.18, 1000) == pytest.approx(0.1)
    assert two_state_off(0.02, 0.18, np.arange(200)).max() <= 0.1 + 1e-12


def test_a_world_without_slips_and_recovery_stays_on_track():
    assert two_state_off(0.0, 0.0, 5) == 0


def test_the_accuracy_under_five_percent_noise_is_the_one_that_the_reference_computed():
    assert two_state_accuracy(0.05 * 15 / 16, 0.0, 12).mean() == pytest.approx(0.778, abs=0.001)


def test_accuracy_with_credit_is_that_of_simulated_tokens():
    """A token is replaced with probability 0.1; left alone it is wrong with 0.02 on track and right with 0.4 off."""
    rng = np.random.default_rng(1)
    num, length, noise, own, back = 200_000, 10, 0.1, 0.02, 0.4
    on, accuracy = np.ones(num, dtype=bool), []
    for _ in range(length):
        alone = rng.random(num) >= noise
        right = np.where(on, rng.random(num) >= own, rng.random(num) < back)
        accuracy.append(right[alone].mean())
        on = alone & right
    slip, recovery = noise + (1 - noise) * own, (1 - noise) * back
    predicted = two_state_accuracy(slip, recovery, length, credit=back, own_slip=own)
    np.testing.assert_allclose(predicted, accuracy, atol=0.006)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("p", "q"), [(0.5, 0.5), (0.7, 0.7), (0.6, 0.2)])
def test_the_optimum_minimises_the_loss_summed_over_all_answers_coins_and_draws(p, q, beta):
    weight = {(first, second): 0.0 for first in "AC" for second in "BD"}
    for gold, coin, draw in itertools.product(("AB", "CD"), (0, 1), "AC"):
        chance = (p if gold == "AB" else 1 - p) * (beta if coin else 1 - beta) * (q if draw == "A" else 1 - q)
        weight[draw if coin else gold[0], gold[1]] += chance
    found = bash_optimum(p, q, beta)
    for first, conditional in (("A", found.b_given_a), ("C", found.b_given_c)):
        b, d = weight[first, "B"], weight[first, "D"]
        best = minimize_scalar(
            lambda x, b=b, d=d: -(b * np.log(x) + d * np.log1p(-x)), bounds=(1e-9, 1 - 1e-9), method="bounded"
        ).x
        assert conditional == pytest.approx(best, abs=1e-4)


def test_with_a_calibrated_proposal_the_bias_is_beta_times_the_chance_of_the_other_answer():
    assert bash_optimum(0.3, 0.3, 0.5).b_given_a == pytest.approx(1 - 0.5 * 0.7)


def test_a_first_token_that_never_occurs_has_no_conditional():
    assert bash_optimum(0.0, 0.0, 0.5).b_given_a is None
    assert bash_optimum(1.0, 1.0, 0.5).b_given_c is None


@pytest.mark.parametrize(
    "call",
    [
        lambda: two_state_off(1.2, 0.0, 3),
        lambda: two_state_off(0.1, -0.1, 3),
        lambda: two_state_off(0.1, 0.1, -1),
        lambda: two_state_accuracy(0.1, 0.1, 0),
        lambda: two_state_accuracy(0.1, 0.1, 3, credit=2.0),
        lambda: bash_optimum(0.5, 0.5, 1.5),
    ],
)
def test_what_is_no_probability_is_refused(call):
    with pytest.raises(InvalidInput):
        call()
