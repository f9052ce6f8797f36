"""The shared runs of claims 9, 10 and 13, and their evidence at a size at which nothing is learned."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from core.errors import InvalidInput
from core.experiment import Verdict
from sched_sampling.baselines import SupervisedFineTuning
from sched_sampling.bash import BatchScheduledSampling
from sched_sampling.claims import families, family_runs
from sched_sampling.claims.family_runs import BASE, BASH, EQUAL_TIME, LONGER, NULL, RAC, RANDOM, trained
from sched_sampling.presets import QUICK
from sched_sampling.schedule import constant
from sched_sampling.world_models import CORRECTION, RECIPES, Recipe, correction_template, world_llama

TASK = "world:questions:1"
TINY = Recipe(num_steps=2, texts=200, batch_size=4, vocabulary=512, hidden_size=32, intermediate_size=32)
PRESET = replace(
    QUICK,
    tasks=(TASK,),
    task_pairs=6,
    task_valid=2,
    task_test=3,
    task_answer_tokens=4,
    task_base_steps=2,
    task_rounds=2,
    task_round_steps=2,
    task_batch=3,
    sensitivity_task=TASK,
)


@pytest.fixture(autouse=True)
def tiny_models(tmp_path_factory, monkeypatch):
    """Models that were hardly trained, in a cache of the tests' own."""
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path_factory.getbasetemp() / "families"))
    monkeypatch.setattr(family_runs, "world_llama", lambda name: world_llama(name, recipe=TINY))


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", RECIPES)
def test_a_correction_is_asked_for_by_one_token_that_no_text_has(kind):
    lm = world_llama(f"world:{kind}:1", recipe=TINY)
    (mark,) = lm.tokenizer(CORRECTION)["input_ids"]
    task = family_runs.load_task(f"world:{kind}:1", num_train=20, num_valid=1, num_test=1)
    assert mark == lm.tokenizer.convert_tokens_to_ids(CORRECTION)
    assert not any(mark in lm.tokenizer(item.prompt + item.completion)["input_ids"] for item in task.train)


def test_every_number_of_the_sums_is_one_token():
    tokenizer = world_llama("world:sums:1", recipe=replace(TINY, vocabulary=RECIPES["sums"].vocabulary)).tokenizer
    assert {len(tokenizer(f" {number}")["input_ids"]) for number in range(201)} == {1}


def test_pretraining_gives_the_same_weights_again(tmp_path, monkeypatch):
    first = world_llama(TASK, recipe=TINY).model.state_dict()
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path))
    assert equal(first, world_llama(TASK, recipe=TINY).model.state_dict())


def test_tasks_without_a_model_are_refused():
    with pytest.raises(InvalidInput, match="questions"):
        world_llama("world:question:1")
    with pytest.raises(InvalidInput, match="the level a number"):
        world_llama("world:questions")


def test_all_methods_make_as_many_updates_as_longer_fine_tuning():
    steps = {method: trained(PRESET, 0, TASK, method).steps for method in (LONGER, RANDOM, BASH, RAC, NULL)}
    assert set(steps.values()) == {PRESET.task_rounds * PRESET.task_round_steps}


def test_fine_tuning_for_the_cpu_time_of_bash_makes_up_for_the_time_that_mixing_takes():
    other = trained(PRESET, 0, TASK, BASH)
    steps = trained(PRESET, 0, TASK, EQUAL_TIME).steps
    wanted = PRESET.task_rounds * PRESET.task_round_steps * other.seconds / other.train_seconds
    assert wanted <= steps < wanted + PRESET.task_rounds


def test_bash_without_replacement_is_longer_fine_tuning_bit_by_bit():
    start = trained(PRESET, 0, TASK, BASE).weights
    longer = trained(PRESET, 0, TASK, LONGER)
    settings = family_runs._settings(PRESET, PRESET.task_round_steps)
    same = BatchScheduledSampling(rounds=PRESET.task_rounds, training=settings, schedule=constant(0.0))
    assert equal(family_runs.fitted(PRESET, 0, TASK, same, start).weights, longer.weights)
    assert not equal(trained(PRESET, 0, TASK, NULL).weights, longer.weights)
    assert not equal(trained(PRESET, 0, TASK, BASH).weights, longer.weights)


def test_every_run_continues_the_base_of_its_seed():
    base = trained(PRESET, 0, TASK, BASE).weights
    nothing = SupervisedFineTuning(rounds=1, training=replace(family_runs._settings(PRESET, 1), learning_rate=1e-30))
    assert equal(family_runs.fitted(PRESET, 0, TASK, nothing, base).weights, base)
    assert not equal(trained(PRESET, 1, TASK, BASE).weights, base)


def test_scores_of_a_run_do_not_depend_on_what_was_scored_before():
    weights = [trained(PRESET, 0, TASK, method).weights for method in (BASE, LONGER)]
    before = family_runs.exposure(PRESET, 0, TASK, BASE)
    family_runs.scored(PRESET, 0, TASK, weights[1], temperature=0.0)
    family_runs.exposure.cache_clear()
    after = family_runs.exposure(PRESET, 0, TASK, BASE)
    assert np.array_equal(before.gap, after.gap)
    assert np.array_equal(before.gold_nll, after.gold_nll)


def test_a_data_set_gives_only_items_that_fit_the_context(papers_data, monkeypatch):
    preset = replace(PRESET, task_context=700, task_pairs=3, task_valid=2, task_test=2)
    lm = world_llama(TASK, recipe=TINY)
    monkeypatch.setattr(family_runs, "model_of", lambda preset, name: lm)
    lengths = [
        len(pair.prompt_ids) + len(pair.target_ids)
        for split in ("train", "valid", "test")
        for pair in family_runs.encoded(preset, "dialogsum", 0, split)
    ]
    assert len(lengths) == 7
    assert max(lengths) <= 700
    with pytest.raises(InvalidInput, match="of at most 10 tokens"):
        family_runs.task_of(replace(preset, task_context=10), "dialogsum", 0)


def test_the_evidence_on_three_families_compares_both_methods_with_longer_fine_tuning():
    evidence = families.overall_improvement(PRESET)
    decisive = evidence.comparisons[:2]
    assert [comparison.label for comparison in decisive] == [f"{TASK}: BASH − {LONGER}", f"{TASK}: RAC − {LONGER}"]
    assert evidence.verdict is Verdict.all_of(comparison.verdict for comparison in decisive)
    assert evidence.control is not None
    assert evidence.control.verdict is not Verdict.HOLDS
    greedy = evidence.table.set_index(["task", "method", "score"])["greedy"]
    measured = np.mean(
        [family_runs.answers(PRESET, seed, TASK, BASH).greedy["exact match"].mean() for seed in PRESET.seeds]
    )
    assert greedy[TASK, BASH, "exact match"] == pytest.approx(100 * measured)
    assert len(evidence.table) == 2 * len(families._ROWS) + len(families._SENSITIVITY) + 4


def test_the_evidence_on_exposure_is_the_difference_of_gaps():
    evidence = families.exposure_gap_on_text(PRESET)
    gaps = evidence.table.set_index("method")["exposure gap"]
    assert evidence.comparisons[0].interval.estimate == pytest.approx(gaps[LONGER] - gaps[BASH])
    assert evidence.verdict is evidence.comparisons[0].verdict


def test_preference_tuning_is_not_run_where_no_task_is_named_for_it():
    evidence = families.better_start_for_preference_tuning(PRESET)
    assert evidence.verdict is Verdict.NOT_RUN
    assert "full preset" in evidence.not_run_reason


def test_every_start_is_tuned_on_the_same_preferences_for_demonstrations_over_samples():
    pairs = {pair.prompt_ids: pair.target_ids for pair in family_runs.encoded(PRESET, TASK, 0, "train")}
    found = family_runs.preferences(PRESET, 0, TASK)
    assert found
    assert all(each.chosen_ids == pairs[each.prompt_ids] != each.rejected_ids for each in found)


def test_the_evidence_on_preference_tuning_compares_starts_after_it():
    preset = replace(PRESET, preference=(TASK,), preference_steps=2, preference_learning_rate=1e-3)
    evidence = families.better_start_for_preference_tuning(preset)
    after = evidence.table.set_index("start")["after"]
    difference = evidence.comparisons[0].interval.estimate
    assert 100 * difference == pytest.approx(after[BASH] - after[LONGER])
    assert evidence.verdict is Verdict.all_of(comparison.verdict for comparison in evidence.comparisons)
    assert evidence.control is not None
    assert evidence.control.verdict is not Verdict.HOLDS


def test_a_correction_prompt_of_a_small_model_ends_as_its_prompts_do():
    tokenizer = family_runs.model_of(PRESET, TASK).tokenizer
    template = family_runs.template_of(PRESET, TASK)
    assert tokenizer.decode([*template.separator_ids, *template.request_ids]) == f"{CORRECTION}\nAnswer:"
    assert family_runs.template_of(replace(PRESET, task_model="pretrained:smollm2-135m"), TASK) is None


def test_every_run_is_the_method_that_its_row_names():
    # A claim that is expected to be inconclusive would not notice another method in its place.
    preset, name = replace(QUICK, task_rounds=2), "world:questions:1"
    made = {method: family_runs._method(preset, name, method, 3) for method in ROWS_OF_METHODS}
    kinds = {method: type(each).__name__ for method, each in made.items()}
    assert kinds == {
        family_runs.LONGER: "SupervisedFineTuning",
        family_runs.EQUAL_TIME: "SupervisedFineTuning",
        family_runs.RANDOM: "RandomTokenReplacement",
        family_runs.RAC: "ReferenceAnswerCorrection",
        family_runs.BASH: "BatchScheduledSampling",
        family_runs.NULL: "BatchScheduledSampling",
    }
    betas = {
        method: [made[method].schedule(k, 2) for k in range(2)] for method in (family_runs.BASH, family_runs.RANDOM)
    }
    assert betas[family_runs.BASH] == betas[family_runs.RANDOM] == pytest.approx([0.0, preset.task_beta])
    assert [made[family_runs.NULL].schedule(k, 2) for k in range(2)] == [0.0, 0.0]
    assert made[family_runs.BASH].mixing.proposal == "mixed"
    assert made[family_runs.RANDOM].mixing.proposal == "random"
    assert made[family_runs.RAC].template is not None


def test_a_draft_of_ordinary_tokens_stands_in_its_correction_prompt_unchanged():
    lm = family_runs.model_of(QUICK, "world:questions:1")
    prompt = "[1] The door is red.\nQuestion: What colour?\nAnswer:"
    template = correction_template(lm.tokenizer, prompt)
    assert template is not None
    draft = tuple(lm.tokenizer(" Answer: red\nAnswer: blue")["input_ids"])
    ids = template.encode(lm.tokenizer, prompt, draft)
    assert lm.tokenizer.decode(ids) == f"{prompt} Answer: red\nAnswer: blue{CORRECTION}\nAnswer:"


ROWS_OF_METHODS = (
    family_runs.LONGER,
    family_runs.EQUAL_TIME,
    family_runs.RANDOM,
    family_runs.RAC,
    family_runs.BASH,
    family_runs.NULL,
)
