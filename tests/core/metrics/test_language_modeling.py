"""Perplexity and accuracy on numbers that can be checked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from core.errors import InvalidInput
from core.metrics.language_modeling import next_token_accuracy, perplexity


def test_a_uniform_model_has_the_vocabulary_size_as_perplexity():
    assert perplexity(np.full(7, math.log(50))) == pytest.approx(50)


def test_perplexity_is_the_geometric_mean_of_inverse_probabilities():
    assert perplexity(-np.log([0.5, 0.25, 0.125])) == pytest.approx((2 * 4 * 8) ** (1 / 3))


def test_a_token_without_probability_makes_perplexity_infinite():
    assert perplexity([1.0, math.inf]) == math.inf


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [1.0, -0.5]])
def test_values_that_are_no_negative_log_likelihoods_are_refused(values):
    with pytest.raises(InvalidInput, match="at least one token"):
        perplexity(values)


def test_accuracy_counts_equal_tokens():
    assert next_token_accuracy([1, 2, 3, 4], [1, 0, 3, 0]) == 0.5


def test_accuracy_refuses_sequences_of_different_length():
    with pytest.raises(InvalidInput, match=r"\(2,\) and \(3,\)"):
        next_token_accuracy([1, 2], [1, 2, 3])
