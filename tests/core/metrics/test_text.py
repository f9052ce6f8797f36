"""Text metrics against literal re-implementations, SQuAD's examples, and verdicts on real model answers."""

from __future__ import annotations

import collections
import json
import re
import string
import sys
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InvalidInput, MissingExtra
from core.metrics.text import exact_match, final_number, normalise_answer, numeric_match, rouge, token_f1

WORDS = st.lists(
    st.sampled_from(["the", "a", "An", "cat", "sat", "mat", "Cat,", "on", "--", "it's", "the."]), max_size=8
)
TEXTS = WORDS.map(" ".join)


def squad_normalise(s):
    """As in SQuAD's evaluation script, step by step."""
    s = s.lower()
    s = "".join(ch for ch in s if ch not in set(string.punctuation))
    s = re.sub(r"\b(a|an|the)\b", " ", s)
    return " ".join(s.split())


def squad_f1(gold, predicted):
    gold, predicted = squad_normalise(gold).split(), squad_normalise(predicted).split()
    same = sum((collections.Counter(gold) & collections.Counter(predicted)).values())
    if len(gold) == 0 or len(predicted) == 0:
        return int(gold == predicted)
    if same == 0:
        return 0
    precision, recall = same / len(predicted), same / len(gold)
    return (2 * precision * recall) / (precision + recall)


@settings(deadline=None)
@given(st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), max_size=5))
def test_exact_match_and_f1_are_those_of_the_squad_script(items):
    predictions, references = [item[0] for item in items], [item[1] for item in items]
    exact = [max(int(squad_normalise(p) == squad_normalise(g)) for g in golds) for p, golds in items]
    f1 = [max(squad_f1(g, p) for g in golds) for p, golds in items]
    np.testing.assert_array_equal(exact_match(predictions, references), exact)
    np.testing.assert_allclose(token_f1(predictions, references), f1, atol=1e-12)


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1"),
    [
        ("The Denver Broncos!", ["Denver Broncos", "Denver"], 1, 1),
        ("Broncos", ["Denver Broncos", "Denver"], 0, 2 / 3),
        ("in 1998, in Denver", ["Denver in 1998"], 0, 6 / 7),
        ("the the", ["the"], 1, 1),
        ("theatre", ["theatre an"], 1, 1),
        ("", [""], 1, 1),
        ("the", ["..."], 1, 1),
        ("", ["no"], 0, 0),
        ("no", [""], 0, 0),
        ("no", ["", "No."], 1, 1),
    ],
)
def test_squad_examples(prediction, references, exact, f1):
    assert exact_match([prediction], [references]).tolist() == [exact]
    assert token_f1([prediction], [references])[0] == pytest.approx(f1)


def test_normalisation_removes_punctuation_before_articles_and_keeps_other_scripts():
    assert normalise_answer(" The  an-swer, A.  is “Ä” ") == "answer is “ä”"


def literal_rouge(gold, predicted, variant):
    gold, predicted = (re.findall("[a-z0-9]+", text.lower()) for text in (gold, predicted))
    if variant == "rougeL":
        table = np.zeros((len(gold) + 1, len(predicted) + 1), int)
        for i, first in enumerate(gold):
            for j, second in enumerate(predicted):
                table[i + 1, j + 1] = table[i, j] + 1 if first == second else max(table[i, j + 1], table[i + 1, j])
        hits, size, other = table[-1, -1], len(gold), len(predicted)
    else:
        n = int(variant[-1])
        grams = [
            collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
            for words in (gold, predicted)
        ]
        hits, size, other = sum((grams[0] & grams[1]).values()), sum(grams[0].values()), sum(grams[1].values())
    return 2 * hits / (size + other) if hits else 0.0


@settings(deadline=None)
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_rouge_is_the_f_measure_of_n_grams_and_longest_common_subsequences(prediction, references):
    for multi, join in (("mean", np.mean), ("max", max)):
        scores = rouge([prediction], [references], multi=multi, stemmer=False)
        assert list(scores) == ["rouge1", "rouge2", "rougeL"]
        for variant, values in scores.items():
            expected = join([literal_rouge(gold, prediction, variant) for gold in references])
            assert values == pytest.approx([expected], abs=1e-12)


def test_rouge_stems_unless_told_otherwise_and_takes_lines_as_sentences():
    assert rouge(["she works"], ["she worked"])["rouge1"].tolist() == [1]
    assert rouge(["she works"], ["she worked"], stemmer=False)["rouge1"].tolist() == [0.5]
    swapped = rouge(["one two\nthree four"], ["three four\none two"], variants=["rougeL", "rougeLsum"])
    assert swapped["rougeL"].tolist() == [0.5]
    assert swapped["rougeLsum"].tolist() == [1]


def test_rouge_of_empty_texts_is_zero():
    scores = rouge(["", "", "word"], ["", "word", ""])
    assert {name: values.tolist() for name, values in scores.items()} == {name: [0, 0, 0] for name in scores}


def test_rouge_without_its_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.delitem(sys.modules, "rouge_score.rouge_scorer", raising=False)
    with pytest.raises(MissingExtra, match=r"tenfold\[sched_sampling\]"):
        rouge(["a"], ["b"])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 + 4 = <<6+4=10>>10 eggs.\n#### 10", "10"),
        ("#### 1,234.50", "1234.50"),
        ("#### -7.", "-7"),
        ("#### 3\nno, wait\n#### 4", "4"),
        ("#### 5 and the answer is 6 or 7", "5"),
        ("The answer is $18. It took 3 steps.", "18"),
        ("The answer is: **42**.", "42"),
        ("A: 5% of 20", "5"),
        ("DATA: 5 of 20", "20"),
        ("it costs $1,200, which is more than 20%.", "20"),
        ("so 16 - 3", "3"),
        ("5-3", "3"),
        ("so it is -3", "-3"),
        ("about .5", "0.5"),
        ("#### none, but 12 perhaps", "12"),
        ("#### 1.2.3", None),
        ("####", None),
        ("no number.", None),
        ("", None),
    ],
)
def test_the_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_numbers_are_compared_as_numbers():
    golds = ["#### 18", "18.0", "#### 1,000", ["#### 3", "#### 4"], "#### 5"]
    predictions = ["so 18.00", "$18", "1000", "it is 4", "five"]
    assert numeric_match(predictions, golds).tolist() == [1, 1, 1, 1, 0]


@pytest.mark.data
def test_every_verdict_on_real_model_answers_to_gsm8k_is_met(papers_data):
    lines = (papers_data / "gsm8k" / "example_model_solutions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for solver in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
        ours = numeric_match([row[solver]["solution"] for row in rows], [row["ground_truth"] for row in rows])
        assert ours.tolist() == [row[solver]["is_correct"] for row in rows]


@pytest.mark.parametrize("metric", [rouge, exact_match, token_f1, numeric_match])
def test_lists_that_do_not_pair_are_refused(metric):
    with pytest.raises(InvalidInput, match="2 items and 1 items"):
        metric(["1", "2"], ["1"])
    with pytest.raises(InvalidInput, match="a single text"):
        metric("12", ["1", "2"])
    with pytest.raises(InvalidInput, match="Item 1 has no reference"):
        metric(["1", "2"], ["1", []])


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(InvalidInput, match="rougeW"):
        rouge(["a"], ["b"], variants=["rougeW"])
    with pytest.raises(InvalidInput, match="'mean' or 'max'"):
        rouge(["a"], ["b"], multi="min")
    with pytest.raises(InvalidInput, match="Reference 1 has no final number: 'none'"):
        numeric_match(["1", "2"], ["1", "none"])


@pytest.mark.parametrize("metric", [exact_match, token_f1, numeric_match])
def test_no_items_give_no_scores(metric):
    assert metric([], []).shape == (0,)
    assert rouge([], [])["rouge1"].shape == (0,)
