"""Presets refuse what no claim could use, and know the names that they cannot import."""

from __future__ import annotations

import pytest

from core.errors import InvalidInput
from sparsity24.presets import FULL, LAYER_SOURCES, QUICK, REAL, REFINEMENTS
from sparsity24.refinement import check_settings
from sparsity24.synthetic import LAYER_KINDS


def test_the_names_that_presets_spell_out_are_those_of_the_method():
    assert set(LAYER_SOURCES) == {*LAYER_KINDS, "model"}
    for name in REFINEMENTS:
        check_settings(name, 1, 0.0)


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("num_groups", "-3", "num_groups counts something"),
        ("max_windows", "0", "max_windows counts something"),
        ("window", "1", "nothing to predict"),
        ("layer_kinds", "[]", "at least one kind of layer"),
        ("layer_kinds", "[low-rnk]", "Did you mean low-rank"),
        ("refinement", "bogus", "refinement among"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_before_any_work(setting: str, value: str, said: str):
    with pytest.raises(InvalidInput, match=said):
        QUICK.with_values({setting: value})


def test_every_preset_has_five_seeds_and_its_own_name():
    assert [(preset.name, len(preset.seeds)) for preset in (QUICK, REAL, FULL)] == [
        ("quick", 5),
        ("real", 5),
        ("full", 5),
    ]
