"""Generation: a batch against its prompts one by one, beam search against enumeration, sampling against probabilities."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
import transformers

from core.errors import InvalidInput
from core.llm.causal import CausalLM

PROMPTS = ["return the", "in", "value of the array in the given order and more", "a b c d e f g h", ""]
SETTINGS = {
    "greedy": {},
    "three best": {"num_return": 3},
    "sampled": {"temperature": 1.0, "seed": 3},
    "nucleus": {"temperature": 0.8, "top_p": 0.9, "num_return": 2, "seed": 5},
    "top k": {"temperature": 1.5, "top_k": 5},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_batch_equals_its_prompts_one_by_one(lm, settings):
    together = lm.generate(PROMPTS, max_new_tokens=12, **settings)
    small = lm.generate(PROMPTS, max_new_tokens=12, max_batch_tokens=80, **settings)
    for prompt, found, in_small in zip(PROMPTS, together, small, strict=True):
        alone = lm.generate([prompt], max_new_tokens=12, **settings)[0]
        assert [g.token_ids for g in found] == [g.token_ids for g in alone] == [g.token_ids for g in in_small]
        assert [g.text for g in found] == [g.text for g in alone]
        assert [g.log_prob for g in found] == pytest.approx([g.log_prob for g in alone], abs=5e-5)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_reported_log_prob_is_the_score_of_the_tokens(lm, settings):
    for prompt, found in zip(PROMPTS, lm.generate(PROMPTS, max_new_tokens=12, **settings), strict=True):
        context = lm.encode(prompt) or [0]
        scores = lm.log_probs([context] * len(found), [list(g.token_ids) for g in found])
        assert [g.log_prob for g in found] == pytest.approx([s.sum().item() for s in scores], abs=1e-4)


@torch.no_grad()
def test_greedy_takes_the_most_probable_token_each_time(lm):
    ids = lm.encode("return the")
    for token in lm.generate([ids], max_new_tokens=12)[0][0].token_ids:
        assert token == lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
        ids = [*ids, token]


@pytest.fixture(scope="module")
def six_words():
    """A model of six tokens, small enough to enumerate everything that it can say; token 0 ends."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=6,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=0,
        bos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    vocabulary = {word: i for i, word in enumerate(["<end>", "a", "b", "c", "d", "e"])}
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"eos_token": "<end>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    return CausalLM(model, tokenizer, provenance="six words")


def everything(lm, prompt, length):
    """All continuations up to `length`, closed ones only when they end earlier, with their log-probabilities."""
    found = [
        tokens
        for n in range(1, length + 1)
        for tokens in itertools.product(range(6), repeat=n)
        if 0 not in tokens[:-1] and (n == length or tokens[-1] == 0)
    ]
    scores = lm.log_probs([prompt] * len(found), [list(tokens) for tokens in found])
    return {tokens: score.sum().item() for tokens, score in zip(found, scores, strict=True)}


def test_a_wide_beam_finds_the_best_continuations_of_all(six_words):
    for prompt in ([1], [2, 3], [5, 4, 4]):
        truth = sorted(everything(six_words, prompt, 4).items(), key=lambda item: -item[1])
        found = six_words.generate([prompt], max_new_tokens=4, num_return=125)[0]
        assert len(found) == 125
        assert [g.token_ids for g in found[:20]] == [tokens for tokens, _ in truth[:20]]
        assert [g.log_prob for g in found[:20]] == pytest.approx([score for _, score in truth[:20]], abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [({}, 6), ({"top_k": 2}, 2), ({"top_p": 0.5}, None), ({"temperature": 0.5}, 6)],
    ids=["plain", "top k", "top p", "sharpened"],
)
def test_samples_follow_the_distribution(six_words, settings, allowed):
    settings = {"temperature": 1.0, **settings}
    prompt = [2, 3]
    probabilities = torch.tensor([score.item() for score in six_words.log_probs([prompt] * 6, [[i] for i in range(6)])])
    weights = (probabilities / settings["temperature"]).softmax(-1)
    order = weights.argsort(descending=True).tolist()
    if allowed is None:
        total = list(itertools.accumulate(weights[i].item() for i in order))
        allowed = next(n for n, mass in enumerate(total, start=1) if mass >= 0.5)
    weights[order[allowed:]] = 0
    weights /= weights.sum()
    drawn = six_words.generate([prompt], max_new_tokens=1, num_return=4000, max_batch_tokens=10**6, **settings)[0]
    counts = Counter(g.token_ids[0] for g in drawn)
    assert set(counts) <= set(order[:allowed])
    for token in range(6):
        # Five standard deviations of a share of 4000 draws.
        assert counts[token] / 4000 == pytest.approx(weights[token].item(), abs=5 * 0.5 / 4000**0.5)


def test_samples_change_with_the_seed_and_with_nothing_else(llama):
    first, again, other = (
        llama.generate(PROMPTS, max_new_tokens=8, temperature=1.0, num_return=2, seed=seed) for seed in (0, 0, 1)
    )
    state = torch.random.get_rng_state()
    assert first == again
    assert first != other
    assert first[0][0] != first[0][1]
    llama.generate(PROMPTS, max_new_tokens=2, temperature=1.0)
    assert torch.equal(state, torch.random.get_rng_state())


def test_more_new_tokens_extend_the_same_sample(llama):
    short, long = (llama.generate(["in"], max_new_tokens=n, temperature=1.0)[0][0].token_ids for n in (5, 15))
    assert long[: len(short)] == short


def test_generation_ends_with_the_end_token_and_not_at_one_in_the_prompt(six_words):
    found = six_words.generate([[1, 0, 0, 2]] * 1, max_new_tokens=30, temperature=1.0, num_return=50)[0]
    ended = [g for g in found if len(g.token_ids) < 30]
    assert len(ended) > 25
    assert all(g.token_ids.index(0) == len(g.token_ids) - 1 for g in ended)
    assert all("<end>" not in g.text for g in found)


def test_a_stop_string_ends_the_text_before_it(llama):
    free = llama.generate(["return the"], max_new_tokens=40, temperature=1.0)[0][0]
    stop = free.text[6:8]
    stopped = llama.generate(["return the"], max_new_tokens=40, temperature=1.0, stop=[stop])[0][0]
    assert stopped.text == free.text[: free.text.index(stop)]
    assert len(stopped.token_ids) < len(free.token_ids)
    assert free.token_ids[: len(stopped.token_ids)] == stopped.token_ids


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 90}, r"Prompt 0 of 8 and 90 new tokens make 98 tokens; the model reads at most 96"),
        ({"max_new_tokens": 5, "top_k": 3}, "temperature > 0"),
        ({"max_new_tokens": 5, "temperature": -1.0}, "temperature >= 0"),
        ({"max_new_tokens": 5, "temperature": 1.0, "top_p": 0.0}, r"top_p in \(0, 1\]"),
        ({"max_new_tokens": 5, "stop": [""]}, "not empty"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(llama, settings, message):
    with pytest.raises(InvalidInput, match=message):
        llama.generate([[5] * 8], **settings)


def test_a_single_text_is_not_taken_for_a_list_of_characters(llama):
    with pytest.raises(InvalidInput, match=r"write \[prompt\]"):
        llama.generate("return", max_new_tokens=2)
