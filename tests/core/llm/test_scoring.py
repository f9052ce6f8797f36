"""Scores in a batch against scores one by one, and perplexity against the literal loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidInput
from core.llm.batching import length_buckets


def literal_log_probs(lm, ids, first):
    """One forward pass without any batching, one softmax a position."""
    logits = lm.model(input_ids=torch.tensor([ids])).logits[0].double()
    return [logits[i - 1].log_softmax(-1)[ids[i]].item() for i in range(first, len(ids))]


def random_ids(generator, length):
    return generator.integers(2, 300, size=length).tolist()


@torch.no_grad()
def test_scores_of_a_mixed_batch_equal_the_literal_ones_in_input_order(lm):
    generator = np.random.default_rng(0)
    contexts = [random_ids(generator, n) for n in (1, 40, 7, 3, 90, 12)]
    continuations = [random_ids(generator, n) for n in (5, 1, 30, 0, 6, 12)]
    found = lm.log_probs(contexts, continuations)
    for context, continuation, scores in zip(contexts, continuations, found, strict=True):
        expected = literal_log_probs(lm, context + continuation, len(context))
        assert scores.tolist() == pytest.approx(expected, abs=2e-5)


def test_the_batch_budget_does_not_change_scores(lm):
    generator = np.random.default_rng(1)
    texts = [random_ids(generator, n) for n in generator.integers(2, 90, size=20)]
    whole = lm.log_probs([t[:1] for t in texts], [t[1:] for t in texts])
    single = lm.log_probs([t[:1] for t in texts], [t[1:] for t in texts], max_batch_tokens=1)
    for a, b in zip(whole, single, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_an_end_token_inside_the_text_is_scored_like_any_other(lm):
    ids = [5, 0, 7, 0, 0, 9]
    assert lm.log_probs([ids[:1], [8]], [ids[1:], list(range(3, 60))])[0].tolist() == pytest.approx(
        literal_log_probs(lm, ids, 1), abs=2e-5
    )


@torch.no_grad()
def test_perplexity_equals_the_literal_implementation(lm):
    ids = random_ids(np.random.default_rng(2), 3 * 32 + 17)
    means = []
    for start in range(0, len(ids) // 32 * 32, 32):
        window = ids[start : start + 32]
        nll = [-score for score in literal_log_probs(lm, window, 1)]
        assert len(nll) == 31
        means.append(sum(nll) / 31)
    found = lm.perplexity(ids, window=32)
    assert found.value == pytest.approx(math.exp(sum(means) / 3), rel=1e-5)
    assert found.window_nll == pytest.approx(means, abs=2e-5)
    assert (found.num_tokens, found.window, found.stride) == (93, 32, 32)
    assert lm.perplexity(ids, window=32, max_windows=2).value == pytest.approx(math.exp(sum(means[:2]) / 2), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("length", "stride"), [(101, 8), (96, 31), (33, 5), (20, 7)])
def test_sliding_perplexity_scores_every_token_but_the_first_once(llama, length, stride):
    ids = random_ids(np.random.default_rng(3), length)
    nll = {}
    for start in range(0, length, stride):
        end = min(start + 32, length)
        for position, score in zip(range(start + 1, end), literal_log_probs(llama, ids[start:end], 1), strict=True):
            nll.setdefault(position, -score)
        if end == length:
            break
    found = llama.perplexity(ids, window=32, stride=stride)
    assert sorted(nll) == list(range(1, length))
    assert found.num_tokens == length - 1
    assert found.value == pytest.approx(math.exp(sum(nll.values()) / (length - 1)), rel=1e-5)


def test_a_text_is_tokenized_once_with_one_start_token(with_start_token):
    text = "return the values " * 30
    ids = with_start_token.encode(text)
    assert ids.count(1) == 1
    assert ids[0] == 1
    assert ids[-1] != 0
    assert with_start_token.perplexity(text, window=16).value == with_start_token.perplexity(ids, window=16).value


def test_a_continuation_gets_no_special_tokens_and_the_tokens_of_running_text(with_start_token):
    text = "return the value of the array"
    whole = with_start_token.encode(text)
    for cut in range(len(text) + 1):
        scores = with_start_token.log_probs([text[:cut]], [text[cut:]])[0]
        # A cut inside a token scores the tokens that the context alone does not have.
        before = with_start_token.encode(text[:cut])
        shared = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        assert len(scores) == len(whole) - shared
        assert scores.tolist() == pytest.approx(literal_log_probs(with_start_token, whole, shared), abs=2e-5)


def test_an_empty_continuation_has_no_scores(llama):
    empty, full = llama.log_probs(["return", "the"], ["", " value"])
    assert (len(empty), len(full)) == (0, len(llama.encode(" value")))
    assert llama.log_probs([], []) == []


def test_without_a_context_the_end_token_stands_in_for_a_missing_start_token(llama):
    ids = llama.encode("return the")
    assert llama.log_probs([""], ["return the"])[0].tolist() == pytest.approx(
        literal_log_probs(llama, [0, *ids], 1), abs=2e-5
    )


def test_what_does_not_fit_the_context_is_refused_with_its_length(llama):
    with pytest.raises(InvalidInput, match=r"continuation 1 make 97 tokens; the model reads at most 96"):
        llama.log_probs([[5], [5] * 90], [[6], [6] * 7])
    with pytest.raises(InvalidInput, match=r"at most 96"):
        llama.perplexity([5] * 500, window=128)


def test_the_default_window_is_the_context_of_a_short_model(llama):
    assert llama.perplexity([5] * 200).window == 96


@pytest.mark.parametrize("sizes", [{"window": 1}, {"window": 8, "stride": 8}, {"window": 8, "max_windows": 0}])
def test_impossible_windows_are_refused(llama, sizes):
    with pytest.raises(InvalidInput, match="0 < stride < window"):
        llama.perplexity([5] * 50, **sizes)


def test_a_text_shorter_than_a_window_is_refused(llama):
    with pytest.raises(InvalidInput, match="5 tokens, too few for one window of 8"):
        llama.perplexity([5] * 5, window=8)


def test_contexts_and_continuations_come_in_pairs_of_one_kind(llama):
    with pytest.raises(InvalidInput, match="got 2 and 1"):
        llama.log_probs(["a", "b"], ["c"])
    with pytest.raises(InvalidInput, match="both texts or both token ids"):
        llama.log_probs(["a"], [[5]])


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_buckets_hold_every_item_once_within_the_budget(lengths, budget):
    batches = length_buckets(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
