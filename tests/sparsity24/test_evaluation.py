"""Perplexity protocols against their literal reading, and the lm-eval adapter against lm-eval's own."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from core.errors import DataUnavailable, InvalidInput, MissingExtra
from core.llm.causal import CausalLM
from sparsity24.evaluation import PROTOCOLS, cloze, perplexity_on, zero_shot

CONTEXT = 48
START, END, UNKNOWN = "<s>", "</s>", "<unk>"


@pytest.fixture(scope="module")
def lm() -> CausalLM:
    """A random Llama over single characters, whose tokenizer puts a start token before every text."""
    vocabulary = {START: 0, END: 1, UNKNOWN: 2, **{chr(code): code - 29 for code in range(32, 127)}, "\n": 98}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.4,
    )
    torch.manual_seed(0)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
    return CausalLM(LlamaForCausalLM(config), wrapped, provenance="a random model")


@torch.no_grad()
def literal(lm: CausalLM, text: str, window: int, max_windows: int | None = None) -> float:
    """Section 5 read word by word, one full forward pass a window."""
    ids = lm.tokenizer(text)["input_ids"]
    means = []
    for start in range(0, len(ids) - window + 1, window):
        piece = torch.tensor([ids[start : start + window]])
        log_probs = lm.model(piece).logits[0].double().log_softmax(-1)
        means.append(-sum(log_probs[i - 1, piece[0, i]].item() for i in range(1, window)) / (window - 1))
    return math.exp(sum(means[:max_windows]) / len(means[:max_windows]))


LINES = [" \n", " = Robert = \n", " \n", " Robert is an actor . \n", " He had a role in 2000 . \n", " \n"]
HUB_ROWS = [line if line.strip() else "" for line in LINES]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PAPERS_DATA folder with a raw WikiText and a C4 of the published fields."""
    monkeypatch.setenv("PAPERS_DATA", str(tmp_path))
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "wiki.test.raw").write_text("".join(LINES) * 3)
    (tmp_path / "c4").mkdir()
    rows = [
        {"text": f"Page {i}.\nIt has two lines.", "timestamp": "2019-04-25T12:57:54Z", "url": f"https://a.b/{i}"}
        for i in range(1200)
    ]
    (tmp_path / "c4" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_wikitext2_is_the_literal_protocol_on_the_rows_of_the_hub(lm: CausalLM, data: Path) -> None:
    found = perplexity_on(lm, "wikitext2", window=20)
    assert found.value == pytest.approx(literal(lm, "\n\n".join(HUB_ROWS * 3), 20), rel=1e-6)


def test_a_raw_file_and_the_rows_of_the_hub_give_the_same_text(lm: CausalLM, data: Path) -> None:
    rows = data / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": row}) + "\n" for row in HUB_ROWS * 3))
    from_rows = perplexity_on(lm, f"folder:{rows}", window=20, protocol="wikitext2")
    np.testing.assert_array_equal(
        from_rows.measured.window_nll, perplexity_on(lm, "wikitext2", window=20).measured.window_nll
    )


def test_c4_takes_1100_documents_joined_with_a_space_and_256_windows(lm: CausalLM, data: Path) -> None:
    text = " ".join(f"Page {i}.\nIt has two lines." for i in range(1100))
    short, long = perplexity_on(lm, "c4", window=16), perplexity_on(lm, "c4", window=48)
    assert len(short.measured.window_nll) == 256
    assert short.value == pytest.approx(literal(lm, text, 16, 256), rel=1e-6)
    # Longer than the text before its end: 48 * 256 tokens are fewer than it has.
    assert long.value == pytest.approx(literal(lm, text, 48, 256), rel=1e-6)


def test_documents_after_the_1100th_are_not_read(lm: CausalLM, data: Path) -> None:
    file = data / "c4" / "validation.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["text"] = row["text"][:3]
    # 1100 documents of three letters and a space are 4400 tokens: with one document less the last window of 40 would be
    # missing, with one more there would be another of 27.
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(perplexity_on(lm, "c4", window=40).measured.window_nll) == 110
    assert len(perplexity_on(lm, "c4", window=27).measured.window_nll) == 162


def test_another_data_set_is_scored_as_it_stands(lm: CausalLM, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("One line.\n\nAnd another one, longer.\n" * 4)
    found = perplexity_on(lm, f"folder:{tmp_path / 'some.txt'}", window=24)
    assert found.value == pytest.approx(literal(lm, (tmp_path / "some.txt").read_text(), 24), rel=1e-6)


def test_the_text_form_states_window_count_and_text(lm: CausalLM, data: Path) -> None:
    line = str(perplexity_on(lm, "wikitext2", window=20))
    assert "WikiText-2 perplexity" in line
    assert "windows of 20 tokens (non-overlapping)" in line
    assert "wikitext2 [test] from the folder wikitext2 of PAPERS_DATA" in line


def test_the_text_form_says_when_windows_were_left_out_or_overlap(lm: CausalLM, data: Path) -> None:
    line = str(perplexity_on(lm, "wikitext2", window=20, stride=10, max_windows=2))
    assert "the first 2 windows only of 20 tokens (stride 10)" in line


def test_a_window_beyond_the_context_is_refused(lm: CausalLM, data: Path) -> None:
    with pytest.raises(InvalidInput, match="reads at most 48"):
        perplexity_on(lm, "wikitext2", window=64)


def test_an_unknown_protocol_names_the_known_ones(lm: CausalLM, data: Path) -> None:
    with pytest.raises(InvalidInput, match="wikitext2"):
        perplexity_on(lm, "c4", protocol="wikitext3")
    assert set(PROTOCOLS) == {"wikitext2", "wikitext2_small", "c4"}


def test_cloze_scores_are_those_of_full_forward_passes(lm: CausalLM) -> None:
    ids = torch.randint(3, 98, (40 * 7,), generator=torch.Generator().manual_seed(1))
    found = cloze(lm, ids, 4)
    windows = ids.view(-1, 40)[torch.randperm(7, generator=torch.Generator().manual_seed(0))]
    for item in range(4):
        scores = []
        for k in range(4):
            piece = torch.cat([windows[item, :32], windows[item + k, 32:]])[None]
            with torch.no_grad():
                log_probs = lm.model(piece).logits[0].double().log_softmax(-1)
            scores.append(sum(log_probs[i - 1, piece[0, i]] for i in range(32, 40)))
        probability = torch.stack(scores).softmax(0)
        assert found.log_likelihood[item] == pytest.approx(float(probability[0].log()), abs=1e-5)
        assert found.correct[item] == (int(probability.argmax()) == 0)


def test_cloze_refuses_a_text_without_other_endings(lm: CausalLM) -> None:
    with pytest.raises(InvalidInput, match="three others"):
        cloze(lm, torch.ones(120, dtype=torch.long), 4)


QUESTIONS = [
    ("The sky is", ["blue", "a long green one", "red"], 0),
    ("Two and two", [" is five?", " make four"], 1),
    ("Water", [" burns", " flows", " is dry and old"], 1),
    ("A dog", [" barks", " meows"], 0),
    ("Ice is", [" hot", " cold", " tall"], 1),
]


def task(folder: Path, name: str = "toy", **changes: Any) -> dict[str, Any]:
    file = folder / "questions.jsonl"
    rows = ({"question": q, "choices": c, "gold": g} for q, c, g in QUESTIONS)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        **changes,
    }


@torch.no_grad()
def literal_log_prob(lm: CausalLM, context: str, continuation: str) -> float:
    ids = torch.tensor([lm.tokenizer(context + continuation)["input_ids"]])
    log_probs = lm.model(ids).logits[0].double().log_softmax(-1)
    first = ids.shape[1] - len(continuation)
    return sum(log_probs[i - 1, ids[0, i]].item() for i in range(first, ids.shape[1]))


def test_zero_shot_accuracy_is_the_literal_one(lm: CausalLM, tmp_path: Path) -> None:
    plain, normed = [], []
    for question, choices, gold in QUESTIONS:
        scores = [literal_log_prob(lm, question, choice) for choice in choices]
        plain.append(int(np.argmax(scores)) == gold)
        normed.append(
            int(np.argmax([score / len(choice) for score, choice in zip(scores, choices, strict=True)])) == gold
        )
    assert plain != normed
    found = zero_shot(lm, [task(tmp_path), task(tmp_path, "short", metric_list=[{"metric": "acc"}])])
    assert found["task"].tolist() == ["toy", "short", "mean"]
    assert found["items"].tolist() == [5, 5, 10]
    assert found["acc"].tolist() == pytest.approx([np.mean(plain)] * 3)
    assert found["acc_norm"].tolist() == pytest.approx([np.mean(normed), math.nan, np.mean(normed)], nan_ok=True)


def test_zero_shot_limit_takes_the_first_items(lm: CausalLM, tmp_path: Path) -> None:
    scores = [literal_log_prob(lm, QUESTIONS[0][0], choice) for choice in QUESTIONS[0][1]]
    found = zero_shot(lm, [task(tmp_path)], limit=1)
    assert found["items"].tolist() == [1, 1]
    assert found["acc"][0] == (int(np.argmax(scores)) == QUESTIONS[0][2])


def test_zero_shot_leaves_the_random_state_alone(lm: CausalLM, tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    zero_shot(lm, [task(tmp_path)], limit=1)
    assert torch.equal(before, torch.get_rng_state())


def test_zero_shot_refuses_a_task_without_accuracy(lm: CausalLM, tmp_path: Path) -> None:
    perplexity = {"output_type": "loglikelihood_rolling", "doc_to_target": "{{question}}", "doc_to_text": ""}
    metrics = [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}]
    with pytest.raises(InvalidInput, match="no accuracy"):
        zero_shot(lm, [task(tmp_path, metric_list=metrics, **perplexity)])


def test_zero_shot_without_a_network_says_what_to_do(lm: CausalLM) -> None:
    with pytest.raises(DataUnavailable, match="HF_HOME"):
        zero_shot(lm, ["boolq"])


def test_zero_shot_refuses_an_unknown_task(lm: CausalLM) -> None:
    with pytest.raises(InvalidInput, match="arc_easy"):
        zero_shot(lm, ["arc_eazy"])


def test_zero_shot_without_lm_eval_names_the_extra(lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(MissingExtra, match="eval"):
        zero_shot(lm)


@pytest.fixture(scope="module")
def both(lm: CausalLM) -> tuple[Any, Any]:
    """Our adapter and lm-eval's own on the same model; theirs does not count the last token of a window."""
    from lm_eval.models.huggingface import HFLM

    from sparsity24.harness import HarnessLM

    theirs = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, max_length=CONTEXT - 1, device="cpu", batch_size=1)
    return HarnessLM(lm), theirs


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def test_loglikelihood_is_that_of_lm_evals_own_adapter(both: tuple[Any, Any]) -> None:
    pairs = [(q, c) for q, choices, _ in QUESTIONS for c in choices]
    # A trailing space, no context, a text with its own start token, and one that is too long for the model.
    pairs += [("The end ", "is near"), ("", "Nothing before"), ("<s>Started", " twice"), ("long " * 20, "and more")]
    ours, theirs = (adapter.loglikelihood(requests("loglikelihood", *pairs)) for adapter in both)
    np.testing.assert_allclose([score for score, _ in ours], [score for score, _ in theirs], rtol=1e-5, atol=1e-4)
    assert [flag for _, flag in ours] == [flag for _, flag in theirs]


def test_a_greedy_continuation_is_recognised(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    best = ours.lm.generate(["The sky"], max_new_tokens=5)[0][0].text
    pairs = [("The sky", best), ("The sky", best[:-1] + ("x" if best[-1] != "x" else "y"))]
    flags = [
        [flag for _, flag in adapter.loglikelihood(requests("loglikelihood", *pairs))] for adapter in (ours, theirs)
    ]
    assert flags == [[True, False]] * 2


@pytest.mark.parametrize("length", [5, CONTEXT - 2, CONTEXT - 1, 3 * CONTEXT + 7])
def test_rolling_loglikelihood_is_that_of_lm_evals_own_adapter(both: tuple[Any, Any], length: int) -> None:
    text = ("Return the sum of two arrays, element by element. " * 5)[:length]
    asked = requests("loglikelihood_rolling", (text,), ("Another.",))
    ours, theirs = (adapter.loglikelihood_rolling(asked) for adapter in both)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_generation_is_that_of_lm_evals_own_adapter(lm: CausalLM) -> None:
    from lm_eval.models.huggingface import HFLM

    from sparsity24.harness import HarnessLM

    options = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
    other = {"until": [], "max_gen_toks": 6}
    asked = requests("generate_until", ("The sky", options), ("Two and", other), ("word " * 20, options))
    theirs = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, max_length=CONTEXT, device="cpu", batch_size=1)
    assert HarnessLM(lm).generate_until(asked) == theirs.generate_until(asked)


def test_unknown_options_of_generation_are_refused(both: tuple[Any, Any]) -> None:
    with pytest.raises(InvalidInput, match="num_beams"):
        both[0].generate_until(requests("generate_until", ("The sky", {"num_beams": 4, "max_gen_toks": 3})))
