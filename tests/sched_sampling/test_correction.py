"""Self-correction at inference against the plain model, and the accounts of what it fixed and broke."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from core.errors import InvalidInput
from core.llm.causal import CausalLM
from core.llm.examples import EncodedPair
from sched_sampling.correction import correct, correction_report, correction_scores, same_tokens
from sched_sampling.templates import RAC_TEXT, Draft, TokenTemplate

CONTEXT = 160
PROMPTS = ["What is it?", "Who", "A longer question than the others are", "?"]


@pytest.fixture(scope="module")
def lm():
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|end|>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=256
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return CausalLM(model, tokenizer, provenance="random")


def without_end(ids):
    return ids[:-1] if ids[-1] == 256 else ids


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_no_round_is_the_plain_model_token_for_token(lm, temperature):
    found = correct(lm.model, lm.tokenizer, PROMPTS, 0, max_new_tokens=12, temperature=temperature, seed=3)
    plain = lm.generate(PROMPTS, max_new_tokens=12, temperature=temperature, seed=3)
    assert len(found.answers) == 1
    assert [answer.token_ids for answer in found.answers[0]] == [without_end(said[0].token_ids) for said in plain]
    assert found.texts() == [said[0].text for said in plain]


@torch.no_grad()
def test_no_round_is_what_transformers_generates_greedily(lm):
    found = correct(lm.model, lm.tokenizer, PROMPTS, 0, max_new_tokens=12).answers[0]
    for prompt, answer in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([lm.encode(prompt)])
        theirs = lm.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=256
        )
        assert answer.token_ids == without_end(tuple(theirs[0, ids.shape[1] :].tolist()))


def test_every_round_corrects_the_answers_of_the_round_before(lm):
    found = correct(lm.model, lm.tokenizer, PROMPTS, 3, max_new_tokens=12)
    assert len(found.answers) == 4
    for before, after in zip(found.answers, found.answers[1:], strict=False):
        asked = [RAC_TEXT.encode(lm.tokenizer, *pair) for pair in zip(PROMPTS, before, strict=True)]
        expected = lm.generate(asked, max_new_tokens=12)
        assert [answer.token_ids for answer in after] == [without_end(said[0].token_ids) for said in expected]
    assert found.texts(1) == [answer.text for answer in found.answers[1]]


def test_first_answers_from_elsewhere_are_corrected_instead_of_the_models_own(lm):
    drafts = [Draft((), "", ended=True)] * len(PROMPTS)
    found = correct(lm.model, lm.tokenizer, PROMPTS, 1, max_new_tokens=12, drafts=drafts)
    assert found.answers[0] == tuple(drafts)
    assert found.answers[1] != correct(lm.model, lm.tokenizer, PROMPTS, 1, max_new_tokens=12).answers[1]


def test_an_answer_that_ran_into_the_limit_is_flagged(lm):
    answers = correct(lm.model, lm.tokenizer, PROMPTS * 20, 0, max_new_tokens=3, temperature=8.0).answers[0]
    assert {answer.ended for answer in answers} == {True, False}
    assert all(answer.ended == (len(answer.token_ids) < 3) for answer in answers)


def test_what_cannot_be_corrected_is_refused_before_the_model_is_asked(lm, monkeypatch):
    monkeypatch.setattr(lm.model, "forward", lambda *_, **__: pytest.fail("the model was asked"))
    for prompts, rounds, message in (
        ("one text", 1, "list"),
        (PROMPTS, -1, "rounds"),
        ([*PROMPTS, "x" * 60], 1, "Prompt 4 takes .* at most 160"),
    ):
        with pytest.raises(InvalidInput, match=message):
            correct(lm.model, lm.tokenizer, prompts, rounds, max_new_tokens=50)
    with pytest.raises(InvalidInput, match="Each prompt needs its draft"):
        correct(lm.model, lm.tokenizer, PROMPTS, 1, max_new_tokens=5, drafts=[])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_the_report_counts_what_a_loop_counts(items):
    report = correction_report(*zip(*items, strict=True))
    assert report.fixed == sum(not was and now for was, now in items)
    assert report.broken == sum(was and not now for was, now in items)
    assert report.kept_right == sum(was and now for was, now in items)
    assert report.kept_wrong == sum(not was and not now for was, now in items)
    assert report.before == np.mean([was for was, _ in items])
    assert report.after == np.mean([now for _, now in items])
    right = sum(was for was, _ in items)
    assert report.broken_share == (report.broken / right if right else 0)
    assert report.fixed_share == (report.fixed / (len(items) - right) if right < len(items) else 0)


@pytest.mark.parametrize(("before", "after"), [([], []), ([1], [1, 0]), ([0.5], [1]), ([[1]], [[1]])])
def test_a_report_needs_one_verdict_for_each_answer_before_and_after(before, after):
    with pytest.raises(InvalidInput):
        correction_report(before, after)


def test_scores_judge_the_first_and_the_last_answers(lm):
    template = TokenTemplate(separator_ids=(7,), end_ids=(256,))
    prompts = [(i, i + 1) for i in range(20, 40)]
    answers = correct(lm.model, None, prompts, 1, max_new_tokens=4, template=template).answers
    # Half of the reference answers are what the model says first, the others what it says after correction.
    pairs = [EncodedPair(prompt, (*answers[i % 2][i].token_ids, 256)) for i, prompt in enumerate(prompts)]

    def said(answer, pair):
        return answer.token_ids == pair.target_ids[:-1]

    same = [a.token_ids == b.token_ids for a, b in zip(*answers, strict=True)]
    scores = correction_scores(lm.model, None, pairs, template=template, right=said, max_new_tokens=4)
    assert scores["direct"] == np.mean([same[i] or i % 2 == 0 for i in range(20)])
    assert scores["corrected"] == np.mean([same[i] or i % 2 == 1 for i in range(20)])
    assert scores["broken"] > 0
    assert scores["fixed"] == 1


def test_an_answer_without_its_end_is_not_the_reference_answer():
    pair = EncodedPair((1,), (5, 6, 0))
    assert same_tokens(Draft((5, 6), "", ended=True), pair)
    assert not same_tokens(Draft((5, 6), "", ended=False), pair)
    assert not same_tokens(Draft((5,), "", ended=True), pair)
