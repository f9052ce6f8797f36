"""The three task families: splits that share nothing, demonstrations without their scores, and scores that are known."""

from __future__ import annotations

import json
import sys

import datasets
import numpy as np
import pytest

from core.data import catalog
from core.errors import DataUnavailable, InvalidInput, MissingExtra
from sched_sampling import task_rows, tasks
from sched_sampling.tasks import SOLVERS, SOURCES, load_task, number_scores, recorded_drafts, shared_out

EMBEDDED = ("world:questions:1", "world:dialogues:2", "world:sums:1")
PUBLISHED = {
    "6b_finetuning": 0.217,
    "6b_verification": 0.390,
    "175b_finetuning": 0.347,
    "175b_verification": 0.563,
}
# One or two rows of every data set, with its own column names.
ROWS = {
    "squad": [
        {
            "id": "1",
            "title": "Rhine",
            "context": "The Rhine is long.",
            "question": "What is long?",
            "answers": {"text": ["Rhine", "The Rhine", "Rhine"], "answer_start": [4, 0, 4]},
        }
    ],
    "tldr": [
        {
            "id": "t3_1",
            "subreddit": "advice",
            "title": "Shoes",
            "post": "My shoes are wet.",
            "summary": " Wet shoes.",
        }
    ],
    "ultrachat": [
        {
            "prompt": "Hi",
            "prompt_id": "7",
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello."},
                {"role": "user", "content": "Who are you?"},
                {"role": "assistant", "content": "A model."},
                {"role": "user", "content": "I see."},
            ],
        }
    ],
    "math": [{"problem": "Halve 1.", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{\frac12}$."}],
    "metamath": [
        {"type": "GSM_Rephrased", "query": f"{a} of 2?", "original_question": "2?", "response": "The answer is: 2"}
        for a in ("Half", "All")
    ],
}


def items_of(name):
    return SOURCES[name].convert(ROWS[name])


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_task_scores_its_own_answers_as_perfect_and_others_as_wrong(name):
    task = load_task(name, num_train=8, num_valid=2, num_test=8)
    right = [item.completion for item in task.test]
    assert task.score(right, task.test)[task.headline].tolist() == [1.0] * 8
    assert task.score(["zzz"] * 8, task.test)[task.headline].max() == 0.0


@pytest.mark.parametrize("name", EMBEDDED)
def test_another_seed_is_another_draw_and_the_same_seed_the_same(name):
    prompts = [
        [item.prompt for item in load_task(name, num_train=20, num_valid=1, num_test=1, seed=seed).train]
        for seed in (0, 0, 1)
    ]
    assert prompts[0] == prompts[1]
    assert len(set(prompts[0]) & set(prompts[2])) <= 2


def test_no_prompt_of_an_embedded_task_is_in_two_splits():
    task = load_task("world:sums:1", num_train=500, num_valid=100, num_test=100)
    prompts = [{item.prompt for item in task.items(split)} for split in tasks.SPLITS]
    assert not prompts[0] & prompts[1]
    assert not (prompts[0] | prompts[1]) & prompts[2]


def test_a_demonstration_holds_nothing_that_predictions_are_scored_by():
    task = load_task("world:questions:1", num_train=3, num_valid=1, num_test=1)
    assert all(set(pair) == {"prompt", "completion"} for pair in task.pairs("train"))


def test_two_predictions_are_scored_item_by_item():
    task = load_task("world:sums:1", num_train=1, num_valid=1, num_test=2)
    assert task.score([task.test[0].completion, "#### -1"], task.test)["accuracy"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_answers_of_recorded_solvers_are_right_as_often_as_published(papers_data, solver):
    drafts = recorded_drafts(solver)
    right = number_scores([draft.text for draft in drafts], [draft.item.references for draft in drafts])["accuracy"]
    assert len(drafts) == 1319
    assert right.tolist() == [float(draft.right) for draft in drafts]
    assert round(right.mean(), 3) == pytest.approx(PUBLISHED[solver], abs=1e-9)


def test_recorded_drafts_answer_the_test_questions_and_no_training_question(papers_data):
    task = load_task("gsm8k")
    asked = {draft.item.prompt for draft in recorded_drafts(SOLVERS[0])}
    assert asked == {item.prompt for item in task.test}
    assert not asked & {item.prompt for item in (*task.train, *task.valid)}


def test_without_the_folder_recorded_drafts_say_where_they_are_from(monkeypatch):
    monkeypatch.delenv("PAPERS_DATA", raising=False)
    with pytest.raises(DataUnavailable, match="grade-school-math"):
        recorded_drafts("6b_finetuning")


def test_calculator_marks_stay_unless_they_are_left_out(papers_data):
    kept, left_out = (load_task("gsm8k", num_train=50, calculator_marks=marks) for marks in (True, False))
    assert any("<<" in item.completion for item in kept.train)
    assert not any("<<" in item.completion for item in left_out.train)
    assert left_out.score([item.completion for item in left_out.train], left_out.train)["accuracy"].min() == 1.0


def test_dialogsum_of_the_folder_trains_on_a_part_of_dev_and_says_so(papers_data):
    task = load_task("dialogsum")
    assert len(task.train) + len(task.valid) == 500 == len(task.test)
    assert not {item.prompt for item in task.train} & {item.prompt for item in task.valid}
    assert "80% of valid are train" in task.provenance[-1]


def test_a_folder_with_a_train_file_is_split_as_its_files_are(tmp_path, monkeypatch):
    (tmp_path / "dialogsum").mkdir()
    for split in ("train", "dev", "test"):
        row = {"fname": split, "dialogue": f"#Person1#: {split}", "summary": f"{split}.", "topic": ""}
        (tmp_path / "dialogsum" / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("PAPERS_DATA", str(tmp_path))
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    task = load_task("dialogsum")
    assert [task.items(split)[0].completion for split in tasks.SPLITS] == [" train.", " dev.", " test."]


def test_three_summaries_are_three_references_in_the_layout_of_the_authors_and_in_the_hubs():
    authors = [{"fname": "test_0", "dialogue": "d", **{f"summary{n}": f"s{n}" for n in (1, 2, 3)}}]
    hub = [{"id": f"test_0_{n}", "dialogue": "d", "summary": f"s{n}", "topic": ""} for n in (1, 2, 3)]
    assert task_rows.dialogsum(authors) == task_rows.dialogsum(hub)
    (item,) = task_rows.dialogsum(hub)
    assert (item.completion, item.references) == (" s1", ("s1", "s2", "s3"))


def test_several_references_are_averaged():
    scores = tasks.rouge_scores(["one two"], [("one two", "three four")])
    assert scores["rouge1"].tolist() == [0.5]


def test_a_question_of_squad_has_every_answer_once():
    (item,) = items_of("squad")
    assert item.prompt == "The Rhine is long.\nQuestion: What is long?\nAnswer:"
    assert (item.completion, item.references) == (" Rhine", ("Rhine", "The Rhine"))


def test_an_unanswerable_question_is_refused():
    row = {**ROWS["squad"][0], "answers": {"text": [], "answer_start": []}}
    with pytest.raises(InvalidInput, match="What is long"):
        task_rows.squad([row])


def test_a_post_is_asked_about_in_the_format_of_summarize_from_feedback():
    (item,) = items_of("tldr")
    assert item.prompt == "SUBREDDIT: r/advice\n\nTITLE: Shoes\n\nPOST: My shoes are wet.\n\nTL;DR:"
    assert item.completion == " Wet shoes."


def test_a_conversation_ends_with_the_assistants_last_turn():
    (item,) = items_of("ultrachat")
    assert [turn["content"] for turn in item.prompt] == ["Hi", "Hello.", "Who are you?"]
    assert item.completion == ({"role": "assistant", "content": "A model."},)


def test_a_conversation_without_an_answer_is_refused():
    with pytest.raises(InvalidInput, match="Row 0"):
        task_rows.ultrachat([{"messages": [{"role": "user", "content": "Hi"}]}])


def test_rewritings_of_one_question_stay_in_one_split():
    rows = [
        {"type": "", "query": f"{n}, rewritten {k} times", "original_question": str(n), "response": "The answer is: 1"}
        for n in range(200)
        for k in range(3)
    ]
    split = shared_out(task_rows.metamath(rows), {"train": 0.5, "valid": 0.25, "test": 0.25})
    groups = [{item.group for item in items} for items in split.values()]
    assert all(50 > len(found) - size > -50 for found, size in zip(groups, (100, 50, 50), strict=True))
    assert sum(map(len, groups)) == 200
    assert sum(map(len, split.values())) == 600


def test_a_split_of_shares_does_not_depend_on_what_else_is_there():
    items = task_rows.competition([{"problem": str(n), "solution": ""} for n in range(100)])
    whole, half = (shared_out(part, {"train": 0.95, "valid": 0.05}) for part in (items, items[::2]))
    assert [item for item in whole["valid"] if item in items[::2]] == half["valid"]


def test_an_expression_is_right_when_it_equals_the_boxed_one():
    pytest.importorskip("math_verify")
    (item,) = items_of("math")
    answers = [r"So \boxed{0.5}.", r"So \boxed{\frac{2}{4}}.", r"So \boxed{2}.", "No idea."]
    scores = tasks.expression_scores(answers, [item.references] * 4)["accuracy"]
    assert scores.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_math_verify_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(MissingExtra, match=r"math_verify.*tenfold\[sched_sampling\]"):
        tasks.expression_scores(["1"], [("1",)])


@pytest.mark.parametrize("name", SOURCES)
def test_a_public_data_set_is_read_from_the_splits_that_the_hub_has(name, monkeypatch):
    asked = []

    def load(spec, split):
        asked.append((spec, split))
        rows = (
            ROWS.get(name)
            or {
                "dialogsum": [{"dialogue": "d", "summary": "s"}],
                "gsm8k": [{"question": "1?", "answer": "#### 1"}],
            }[name]
        )
        return catalog.LoadedData(spec, split, "a test", "0" * 64, datasets.Dataset.from_list(rows))

    monkeypatch.delenv("PAPERS_DATA", raising=False)
    monkeypatch.setattr(catalog, "load", load)
    if name in ("math", "metamath"):
        pytest.importorskip("math_verify")
    task = load_task(name)
    source = SOURCES[name]
    assert sorted(asked) == sorted((part, split) for split in set(source.splits.values()) for part in source.parts)
    assert task.headline in task.score([item.references[0] for item in task.test], task.test)


def test_items_are_chosen_by_the_seed_and_no_more_than_there_are(papers_data):
    first, again, other = (load_task("dialogsum", num_train=20, seed=seed).train for seed in (0, 0, 1))
    assert first == again != other
    with pytest.raises(InvalidInput, match="has 500 items; 501 were asked for"):
        load_task("dialogsum", num_test=501)


def test_misspelt_tasks_are_refused_with_the_nearest_name():
    with pytest.raises(InvalidInput, match="dialogsum"):
        load_task("dialogsun")
    with pytest.raises(InvalidInput, match="questions"):
        load_task("world:question:1")
    with pytest.raises(InvalidInput, match="the level a number"):
        load_task("world:sums")
    with pytest.raises(InvalidInput, match="num_train"):
        load_task("world:sums:1", num_train=0)


def test_every_item_of_a_task_counts_once_in_its_scores():
    task = load_task("world:dialogues:1", num_train=1, num_valid=1, num_test=5)
    scores = task.score([item.completion for item in task.test], task.test)
    assert {name: values.shape for name, values in scores.items()} == dict.fromkeys(
        ("rouge1", "rouge2", "rougeL"), (5,)
    )
    assert all(np.isfinite(values).all() for values in scores.values())


def test_a_file_of_ones_own_is_a_task(tmp_path):
    rows = [{"prompt": f"{i} and one is", "completion": f" {i + 1}"} for i in range(200)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(f"folder:{path}")
    sizes = [len(task.items(split)) for split in ("train", "valid", "test")]
    assert sum(sizes) == 200
    assert 140 < sizes[0] < 180
    assert task.pairs("train")[0] in rows
    item = task.test[0]
    assert task.score([item.references[0], "nothing"], [item, item])["F1"].tolist() == [1.0, 0.0]
    assert task.max_new_tokens == len("200") + 2
    with pytest.raises(InvalidInput, match="written folder:"):
        load_task(str(path))


def test_a_file_without_the_two_columns_says_which_row_and_column(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n')
    with pytest.raises(InvalidInput, match="Row 1 has no completion"):
        load_task(f"folder:{path}")
