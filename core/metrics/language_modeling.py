"""How well a language model predicts text."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from core.errors import InvalidInput


def perplexity(nll: ArrayLike) -> float:
    """The exponential of the mean negative log-likelihood (natural logarithm) of tokens, or of equally long windows.

    Infinite when the model gives some token no probability at all. Raises `InvalidInput` on no values, NaN or a
    negative one, which no probability has.
    """
    values = np.asarray(nll, dtype=np.float64).ravel()
    if values.size == 0 or np.isnan(values).any() or (values < -1e-6).any():
        raise InvalidInput(
            f"Perplexity takes the negative log-likelihoods of at least one token, all >= 0; got {values.size} values, "
            f"{int(np.isnan(values).sum())} of them NaN, {int((values < -1e-6).sum())} negative."
        )
    # A mean above 709.78 overflows to infinity, which is what such a model deserves.
    with np.errstate(over="ignore"):
        return float(np.exp(values.mean()))


def next_token_accuracy(predicted: ArrayLike, actual: ArrayLike) -> float:
    """The share of positions where the most probable token is the one that came.

    Raises `InvalidInput` when the two differ in shape or are empty.
    """
    first, second = np.asarray(predicted), np.asarray(actual)
    if first.shape != second.shape or first.size == 0:
        raise InvalidInput(
            f"Accuracy compares two equally long sequences of token ids; got shapes {first.shape} and {second.shape}."
        )
    return float((first == second).mean())
