"""The toy tasks against their rules, and the tiny GPT-2 that learns them."""

from __future__ import annotations

import itertools

import pytest
import torch

from core.errors import InvalidInput
from sched_sampling.toys import (
    PARITY_END,
    PARITY_SEPARATOR,
    PARITY_VOCABULARY,
    SUMS_END,
    SUMS_VOCABULARY,
    counting,
    parity,
    running_sums,
    tiny_gpt,
)


def test_counting_goes_on_from_its_prompt_and_wraps_around():
    pairs = counting(200, length=20, modulus=7, seed=3)
    assert {pair.prompt_ids for pair in pairs} == {(a,) for a in range(7)}
    for pair in pairs:
        chain = [*pair.prompt_ids, *pair.target_ids]
        assert len(pair.target_ids) == 20
        assert all((after - before) % 7 == 1 for before, after in itertools.pairwise(chain))


def test_the_parity_answer_is_the_count_of_ones_then_the_count_so_far():
    for pair in parity(300, bits=5, seed=1):
        first, *running, end = pair.target_ids
        assert first == sum(pair.prompt_ids) % 2
        assert running == [sum(pair.prompt_ids[: k + 1]) % 2 for k in range(5)]
        assert end == PARITY_END


def test_parity_prompts_of_training_never_occur_in_the_test_and_together_they_are_all():
    for seed in range(3):
        train = {pair.prompt_ids for pair in parity(1024, seed=seed)}
        held = {pair.prompt_ids for pair in parity(1024, split="test", seed=seed + 10)}
        assert not train & held
        assert len(train) == 48
        assert len(held) == 16


def test_parity_rows_are_spread_evenly_over_the_prompts():
    prompts = [pair.prompt_ids for pair in parity(480)]
    assert {prompts.count(prompt) for prompt in set(prompts)} == {10}


def test_running_sums_add_up_modulo_ten():
    for pair in running_sums(200, digits=4, seed=2):
        *sums, end = pair.target_ids
        assert sums == [sum(pair.prompt_ids[: k + 1]) % 10 for k in range(4)]
        assert end == SUMS_END


@pytest.mark.parametrize("task", [counting, parity, running_sums])
def test_a_seed_gives_the_same_rows_and_another_seed_others(task):
    assert task(50, seed=4) == task(50, seed=4)
    assert task(50, seed=4) != task(50, seed=5)


def test_tokens_stay_inside_the_vocabularies_and_the_separator_is_free():
    tokens = {token for pair in parity(64) for token in (*pair.prompt_ids, *pair.target_ids)}
    assert tokens == {0, 1, PARITY_END}
    assert PARITY_SEPARATOR < PARITY_VOCABULARY
    assert max(token for pair in running_sums(64) for token in pair.target_ids) == SUMS_END < SUMS_VOCABULARY


@pytest.mark.parametrize(
    "call",
    [
        lambda: counting(0),
        lambda: parity(8, split="valid"),
        lambda: parity(8, bits=2, split="test", held_out_share=0.0),
        lambda: running_sums(-1),
    ],
)
def test_tasks_without_rows_or_prompts_are_refused(call):
    with pytest.raises(InvalidInput):
        call()


def test_the_tiny_gpt_is_a_function_of_its_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = (tiny_gpt(16, 13, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    weights = [model.transformer.wte.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_tiny_gpt_is_the_same_in_training_and_evaluation_because_it_has_no_dropout():
    model = tiny_gpt(16, 13)
    ids = torch.arange(13)[None]
    with torch.no_grad():
        assert torch.equal(model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert model.config.n_layer == 2
    assert model.config.n_embd == 64


def test_the_end_token_of_the_tiny_gpt_is_the_one_given_or_none():
    assert tiny_gpt(16, 13).generation_config.eos_token_id is None
    assert tiny_gpt(4, 20, end_id=PARITY_END).generation_config.eos_token_id == PARITY_END
