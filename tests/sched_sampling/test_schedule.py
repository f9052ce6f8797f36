"""Schedules: the values that Bengio et al. give, monotone, inside [0, 1], and refused where they could not be."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidInput
from sched_sampling.schedule import constant, exponential, inverse_sigmoid, linear, linear_decay

probabilities = st.floats(0, 1)
SCHEDULES = st.one_of(
    st.builds(constant, probabilities),
    st.builds(linear, probabilities, probabilities),
    st.builds(linear_decay, probabilities, st.floats(0, 2), probabilities),
    st.builds(exponential, st.floats(0.01, 0.999)),
    st.builds(inverse_sigmoid, st.floats(1, 1e4)),
)


@given(SCHEDULES, st.integers(1, 60))
def test_every_schedule_is_monotone_and_a_probability(schedule, total: int):
    values = [schedule(step, total) for step in range(total)]
    assert all(0 <= value <= 1 for value in values)
    assert values in (sorted(values), sorted(values, reverse=True))


def test_linear_reaches_its_ends_and_begins_at_its_start_when_there_is_one_round():
    assert [linear(0, 0.3)(k, 4) for k in range(4)] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert linear(0.1, 0.3)(0, 1) == 0.1


def test_rounding_does_not_leave_the_unit_interval():
    # 0.1 + 0.9 * 13 / 13 is more than 1 in floating point.
    assert linear(0.1, 1.0)(13, 14) == 1.0


def test_bengios_three_decays_have_their_formulas():
    for i in (0, 1, 5, 40):
        assert 1 - linear_decay(0.9, 0.02, 0.25)(i, 99) == pytest.approx(max(0.25, 0.9 - 0.02 * i))
        assert 1 - exponential(0.95)(i, 99) == pytest.approx(0.95**i)
        assert 1 - inverse_sigmoid(7.0)(i, 99) == pytest.approx(7.0 / (7.0 + math.exp(i / 7.0)))


def test_the_inverse_sigmoid_starts_above_zero_and_survives_a_million_steps():
    assert inverse_sigmoid(9.0)(0, 10) == pytest.approx(0.1)
    assert inverse_sigmoid(1.0)(1_000_000, 2) == 1.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: constant(1.1),
        lambda: linear(-0.1, 0.5),
        lambda: linear(0, float("nan")),
        lambda: linear_decay(1.2),
        lambda: linear_decay(1, -1),
        lambda: linear_decay(1, 0.1, 2),
        lambda: exponential(1.0),
        lambda: exponential(0.0),
        lambda: inverse_sigmoid(0.5),
    ],
)
def test_parameters_that_would_leave_the_unit_interval_are_refused(make):
    with pytest.raises(InvalidInput, match=r"got"):
        make()
