"""The counter-based generator: SplitMix64 to the bit, the right distributions, and nothing that depends on the company."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from sched_sampling.noise import _mixed, coins, gumbel, token_draws

MASK = (1 << 64) - 1


def _splitmix_finaliser(word: int) -> int:
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def test_the_mixing_function_is_splitmix64_in_unsigned_arithmetic():
    words = [
        0,
        1,
        2**63,
        MASK,
        0x9E3779B97F4A7C15,
        *np.random.default_rng(0).integers(0, MASK, 50, dtype=np.uint64).tolist(),
    ]
    signed = torch.tensor([word - (1 << 64) if word >> 63 else word for word in words])
    assert [value & MASK for value in _mixed(signed).tolist()] == [_splitmix_finaliser(word) for word in words]


def test_coins_and_draws_are_uniform_and_independent_of_each_other():
    rows = torch.arange(200).repeat_interleave(100)
    positions = torch.arange(100).repeat(200)
    first, second = coins(3, rows, positions).numpy(), token_draws(3, rows, positions).numpy()
    for values in (first, second):
        assert values.min() > 0
        assert values.max() < 1
        assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    # Neighbouring rows and positions, and neighbouring seeds.
    table = first.reshape(200, 100)
    assert abs(np.corrcoef(table[1:].ravel(), table[:-1].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(table[:, 1:].ravel(), table[:, :-1].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(first, coins(4, rows, positions).numpy())[0, 1]) < 0.03


def test_the_noise_is_standard_gumbel():
    noise = gumbel(5, torch.arange(50), torch.zeros(50, dtype=torch.long), torch.arange(400)[None]).numpy()
    assert np.isfinite(noise).all()
    assert stats.kstest(noise.ravel(), "gumbel_r").pvalue > 1e-3


def test_adding_it_and_taking_the_largest_samples_the_distribution():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0], dtype=torch.float64)
    n = 20_000
    noise = gumbel(1, torch.arange(n), torch.full((n,), 7), torch.arange(4)[None])
    counts = np.bincount((logits + noise).argmax(-1).numpy(), minlength=4)
    assert stats.chisquare(counts, logits.softmax(0).numpy() * n).pvalue > 1e-3


def test_a_token_has_its_noise_whichever_other_tokens_are_asked_for():
    rows, positions = torch.tensor([4, 9]), torch.tensor([1, 0])
    whole = gumbel(2, rows, positions, torch.arange(30)[None])
    some = torch.tensor([[3, 17], [29, 0]])
    assert torch.equal(gumbel(2, rows, positions, some), whole.gather(1, some))
    assert torch.equal(gumbel(2, rows[1:], positions[1:], torch.arange(30)[None]), whole[1:])
