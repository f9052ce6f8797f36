"""Verdicts under the null and under planted effects, and what evidence and presets refuse."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from core.errors import InvalidEvidence, InvalidInput
from core.experiment import Control, Evidence, Kind, Preset, Verdict, contradicts, verdict
from core.metrics.statistics import binomial_interval, cluster_bootstrap_interval, t_interval

NULLS = {
    "normal": lambda generator, shape: generator.normal(size=shape),
    "student with 3 degrees of freedom": lambda generator, shape: generator.standard_t(3, size=shape),
    "Cauchy": lambda generator, shape: generator.standard_cauchy(size=shape),
}


def rate_of(outcome: Verdict, draws: np.ndarray, **options: float) -> float:
    return float(np.mean([verdict(list(draw), **options).verdict is outcome for draw in draws]))


@pytest.mark.parametrize("law", NULLS)
def test_under_the_null_five_seeds_say_holds_at_most_three_times_in_a_hundred(law: str):
    draws = NULLS[law](np.random.default_rng(1), (4000, 5))
    assert rate_of(Verdict.HOLDS, draws) <= 0.03
    assert rate_of(Verdict.FAILS, draws) <= 0.03


@pytest.mark.parametrize("seed_effect", [0.0, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("law", NULLS)
def test_under_the_null_items_within_seeds_say_holds_at_most_three_times_in_a_hundred(law: str, seed_effect: float):
    generator = np.random.default_rng(2)
    draws = NULLS[law](generator, (2000, 5, 30)) + seed_effect * NULLS[law](generator, (2000, 5, 1))
    assert rate_of(Verdict.HOLDS, draws) <= 0.03


def test_a_percentile_bootstrap_over_three_seeds_would_say_holds_far_too_often():
    generator = np.random.default_rng(3)
    draws = generator.normal(size=(2000, 3))
    resampled = np.take_along_axis(draws[:, None, :], generator.integers(3, size=(2000, 500, 3)), axis=2).mean(axis=2)
    assert np.mean(np.quantile(resampled, 0.025, axis=1) > 0) > 0.10


def test_planted_effects_are_found_and_the_margin_moves_the_verdict():
    generator = np.random.default_rng(4)
    effects = 3.0 + generator.normal(size=(500, 5))
    assert rate_of(Verdict.HOLDS, effects) > 0.95
    assert rate_of(Verdict.FAILS, -effects) > 0.95
    assert rate_of(Verdict.FAILS, effects, margin=6.0) > 0.95
    assert rate_of(Verdict.HOLDS, effects - 3.0, margin=-3.0) > 0.95
    items = 1.0 + generator.normal(size=(300, 5, 40))
    assert rate_of(Verdict.HOLDS, items) > 0.95


def test_the_interval_of_seeds_is_scipys():
    values = np.random.default_rng(5).normal(size=7)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    interval = t_interval(values)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_the_closed_form_of_the_cluster_bootstrap_is_what_resampling_gives():
    generator = np.random.default_rng(6)
    clusters = [generator.normal(size=size) + generator.normal() for size in (5, 9, 30, 12, 7)]
    means = np.empty(20000)
    for draw in range(means.size):
        chosen = generator.integers(5, size=5)
        means[draw] = np.mean([generator.choice(clusters[c], size=clusters[c].size).mean() for c in chosen])
    half = stats.t.ppf(0.975, 4) * np.sqrt(5 / 4) * means.std()
    interval = cluster_bootstrap_interval(clusters)
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.03)
    assert interval.num_items == 63


def test_the_binomial_interval_is_exact_and_refuses_what_is_not_a_proportion():
    interval = binomial_interval(0, 10)
    assert (interval.low, interval.high) == pytest.approx((0.0, 1 - 0.025 ** (1 / 10)))
    with pytest.raises(InvalidEvidence, match="11 successes in 10"):
        binomial_interval(11, 10)


def test_too_few_seeds_and_nan_are_refused():
    with pytest.raises(InvalidEvidence, match="at least 5 seeds and got 4"):
        verdict([1.0, 1.0, 1.0, 1.0])
    with pytest.raises(InvalidEvidence, match="position 2"):
        verdict([1.0, 1.0, float("nan"), 1.0, 1.0])
    with pytest.raises(InvalidEvidence, match="NaN or infinite"):
        verdict([[1.0, 2.0], [1.0], [float("inf")], [0.0], [1.0]])


def test_a_method_against_itself_is_inconclusive():
    assert verdict([0.0] * 5).verdict is Verdict.INCONCLUSIVE


def test_seeds_that_do_not_vary_decide_nothing():
    assert verdict([0.3] * 5).verdict is Verdict.INCONCLUSIVE
    assert verdict([0.3, 0.3, 0.3, 0.3, 0.31]).verdict is Verdict.HOLDS


def test_a_control_of_several_parts_holds_as_soon_as_one_does():
    good, bad = verdict([1.0, 1.1, 0.9, 1.0, 1.2]), verdict([-1.0, -1.1, -0.9, -1.0, -1.2])
    assert Control.of("", bad, good, bad).verdict is Verdict.HOLDS
    assert Control.of("", bad, bad).verdict is Verdict.FAILS


def test_a_conjunction_is_decided_by_its_worst_part():
    holds, fails, unclear, not_run = Verdict.HOLDS, Verdict.FAILS, Verdict.INCONCLUSIVE, Verdict.NOT_RUN
    assert Verdict.all_of([holds, holds]) is holds
    assert Verdict.all_of([holds, unclear, fails]) is fails
    assert Verdict.all_of([holds, unclear]) is unclear
    assert Verdict.all_of([holds, not_run, unclear]) is not_run
    with pytest.raises(InvalidEvidence, match="no verdicts"):
        Verdict.all_of([])


def test_nan_in_a_table_is_refused_with_its_place_and_a_missing_cell_is_not():
    with pytest.raises(InvalidEvidence, match="column 'loss', row 1"):
        Evidence(verdict=Verdict.HOLDS, headline="", table=pd.DataFrame({"loss": [1.0, float("nan")]}))
    missing = pd.DataFrame({"loss": pd.array([1.0, pd.NA], dtype="Float64")})
    assert Evidence(verdict=Verdict.HOLDS, headline="", table=missing).table is missing


def test_a_verdict_that_was_not_run_gives_its_reason():
    assert Evidence.not_run("Needs a GPU.").verdict is Verdict.NOT_RUN
    with pytest.raises(InvalidEvidence, match="not_run_reason"):
        Evidence(verdict=Verdict.NOT_RUN, headline="")


@pytest.mark.parametrize(
    ("kind", "expected", "found", "news"),
    [
        (Kind.EXACT, Verdict.HOLDS, Verdict.FAILS, True),
        (Kind.EXACT, Verdict.HOLDS, Verdict.INCONCLUSIVE, True),
        (Kind.MEASURED, Verdict.HOLDS, Verdict.INCONCLUSIVE, False),
        (Kind.MEASURED, Verdict.HOLDS, Verdict.FAILS, True),
        (Kind.MEASURED, Verdict.FAILS, Verdict.HOLDS, True),
        (Kind.MEASURED, Verdict.INCONCLUSIVE, Verdict.FAILS, False),
        (Kind.EXACT, Verdict.HOLDS, Verdict.NOT_RUN, False),
    ],
)
def test_what_contradicts_an_expectation(kind: Kind, expected: Verdict, found: Verdict, news: bool):
    assert contradicts(kind, expected, found) is news


@dataclass(frozen=True, kw_only=True)
class ToyPreset(Preset):
    layers: tuple[int, ...] = (1, 2)
    model: str = "tiny"
    scale: float = 1.0


def test_settings_are_read_by_the_type_of_their_field():
    preset = ToyPreset(name="quick").with_values(
        {"layers": "[3, 4]", "scale": "2", "model": "other", "seeds": "[1,2,3,4,5]"}
    )
    assert (preset.layers, preset.scale, preset.model, preset.seeds) == ((3, 4), 2.0, "other", (1, 2, 3, 4, 5))


def test_an_unknown_setting_names_the_close_ones_and_a_wrong_value_its_type():
    with pytest.raises(InvalidInput, match="Did you mean layers"):
        ToyPreset(name="quick").with_values({"layer": "3"})
    with pytest.raises(InvalidInput, match="does not fit"):
        ToyPreset(name="quick").with_values({"scale": "wide"})
    with pytest.raises(InvalidInput, match="at least 5 seeds, all different"):
        ToyPreset(name="quick").with_values({"seeds": "[0, 1, 1, 1, 1]"})
