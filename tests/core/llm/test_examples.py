"""Encoding of demonstrations, and batches of rows: labels come from lengths, boundaries read right, packing fits."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from core.errors import InvalidInput
from core.llm.causal import end_tokens
from core.llm.examples import IGNORED, EncodedPair, collate, encode_pairs, first_fit, supervised_row

from .conftest import make_model, make_tokenizer

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
END = 0


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def chat():
    found = make_tokenizer()
    found.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    found.chat_template = CHAT
    return found


def _text(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def _messages(*turns: str) -> dict[str, list[dict[str, str]]]:
    roles = itertools.cycle(("user", "assistant"))
    said = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    return {"prompt": said[:-1], "completion": said[-1:]}


def _one(tokenizer, pair, **options) -> EncodedPair:
    (found,) = encode_pairs(tokenizer, [pair], **options)
    return found


@pytest.mark.parametrize(
    ("prompt", "completion"),
    # "\n" + "\n" and "valu" + "e" merge into one token when they are tokenized together.
    [("return the", " value"), ("valu", "e of the"), ("a\n", "\nb"), ("the ", " order")],
)
def test_prompt_and_completion_decode_to_their_concatenation_and_an_end(tokenizer, prompt, completion):
    pair = _one(tokenizer, _text(prompt, completion))
    assert tokenizer.decode([*pair.prompt_ids, *pair.target_ids]) == prompt + completion + "<end>"


def test_the_boundary_changes_no_token_of_the_prompt(tokenizer):
    assert tokenizer("value")["input_ids"][: len(tokenizer("valu")["input_ids"])] != tokenizer("valu")["input_ids"]
    assert list(_one(tokenizer, _text("valu", "e")).prompt_ids) == tokenizer("valu")["input_ids"]


def _sentencepiece():
    """As Llama 2 and Mistral have it: every text begins with a space of the tokenizer's own."""
    pieces = ["<unk>", "</s>", "\n", "▁", *"abcdefghijklmnopqrstuvwxyz", "▁the", "▁answer"]
    scores = [(piece, -2.0 if len(piece) > 1 else -4.0) for piece in pieces]
    backend = Tokenizer(models.Unigram(scores, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    special = {"eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.mark.parametrize("completion", [" answer", "answer", "r the", "\nabc"])
def test_a_tokenizer_that_begins_every_text_with_a_space_puts_none_between_prompt_and_completion(completion):
    tokenizer = _sentencepiece()
    naive = tokenizer("answer", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([*tokenizer("the")["input_ids"], *naive]) == "the answer"
    pair = _one(tokenizer, _text("the", completion))
    assert tokenizer.decode([*pair.prompt_ids, *pair.target_ids]) == f"the{completion}</s>"


def test_the_start_token_begins_the_prompt_and_the_completion_has_none():
    tokenizer = make_tokenizer(start=True, close=True)
    pair = _one(tokenizer, _text("the", " value"))
    assert pair.prompt_ids[0] == 1
    assert 1 not in pair.target_ids
    assert [i for i, token in enumerate((*pair.prompt_ids, *pair.target_ids)) if token == END] == [
        len(pair.prompt_ids) + len(pair.target_ids) - 1
    ]


def test_a_completion_that_brings_its_end_token_gets_no_second(tokenizer):
    assert _one(tokenizer, _text("the", " value<end>")) == _one(tokenizer, _text("the", " value"))


@pytest.mark.parametrize("completion", [" one <end> two", "<end> two", " one <end><end>", "<start>"])
def test_control_tokens_that_a_completion_spells_are_text(completion):
    tokenizer = make_tokenizer(start=True)
    pair = _one(tokenizer, _text("the", completion))
    assert not {END, 1} & set(pair.target_ids[:-1])
    assert pair.target_ids[-1] == END
    assert tokenizer.decode(pair.target_ids) == completion.removesuffix("<end>") + "<end>"


def test_a_completion_that_can_only_be_read_with_a_control_token_in_it_is_refused():
    special = {"eos_token": "<end>", "unk_token": "?"}
    backend = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "?": 2}, unk_token=special["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    assert _one(words, _text("a", "a b")).target_ids == (1, 2, 0)
    with pytest.raises(InvalidInput, match="Row 0: the completion spells <end>"):
        encode_pairs(words, [_text("a", "a <end> a")])


def test_messages_are_the_template_up_to_the_end_of_the_last_turn(chat):
    turn = chat.convert_tokens_to_ids("<turn>")
    pair = _one(chat, _messages("return", "the", "value", " of the order"), end_ids=[turn])
    assert (
        chat.decode(pair.prompt_ids)
        == "<|user|>return<turn>\n<|assistant|>the<turn>\n<|user|>value<turn>\n<|assistant|>"
    )
    assert chat.decode(pair.target_ids) == " of the order<turn>"
    assert pair.target_ids[-1] == turn


def test_a_template_whose_turns_end_with_another_token_is_closed_by_the_end_token(chat):
    pair = _one(chat, _messages("return", "the"))
    assert chat.decode(pair.target_ids) == "the<turn>\n<end>"


def test_a_prompt_of_messages_is_what_generation_will_be_given(chat):
    pair = _messages("return", "the")
    text = chat.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True)
    assert list(_one(chat, pair).prompt_ids) == chat(text, add_special_tokens=False)["input_ids"]


def test_all_end_tokens_of_a_model_are_known(tokenizer):
    model = make_model("llama")
    model.generation_config.eos_token_id = [7, 9]
    assert end_tokens(model, tokenizer) == {END, 7, 9}
    assert end_tokens(model, None) == {7, 9}
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tokenizer) == {END}


def test_encoded_pairs_pass_through_without_a_tokenizer():
    pairs = [EncodedPair((3, 4), (5, 0)), EncodedPair((6,), (0,))]
    assert encode_pairs(None, pairs) == pairs


GOOD = _text("the", " value")


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (_text("the", ""), "Row 1 has an empty completion"),
        (_text("", " value"), "Row 1 has an empty prompt"),
        (_text("the", " value" * 40), r"Row 1 has \d+ tokens .* reads at most 20"),
        ({"prompt": "the"}, "Row 1 needs `prompt` and `completion`"),
        ({"prompt": "the", "completion": [{"role": "assistant", "content": "x"}]}, "Row 1 mixes a text and messages"),
        (_messages("return", "the"), "Row 1 is messages and this tokenizer has no chat template"),
        (EncodedPair((), (1,)), "Row 1 has an empty prompt"),
        (EncodedPair((1,), ()), "Row 1 has an empty completion"),
    ],
)
def test_a_pair_that_cannot_be_used_is_named(tokenizer, pair, message):
    with pytest.raises(InvalidInput, match=message):
        encode_pairs(tokenizer, [GOOD, pair], max_length=20)


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ([], "Row 0 has an empty completion"),
        ([{"role": "assistant", "content": ""}], "not empty"),
        ([{"role": "user", "content": "x"}], "from user. Earlier turns belong into the prompt"),
    ],
)
def test_a_completion_is_what_the_assistant_says(chat, completion, message):
    with pytest.raises(InvalidInput, match=message):
        encode_pairs(chat, [{"prompt": [{"role": "user", "content": "x"}], "completion": completion}])


def test_a_template_that_writes_the_prompt_in_two_ways_is_refused(chat):
    chat = make_tokenizer()
    chat.chat_template = CHAT.replace("<|assistant|>", "<|assistant|><think>")
    with pytest.raises(InvalidInput, match="Row 0: the chat template writes the prompt differently"):
        encode_pairs(chat, [_messages("return", "the")])


def test_a_template_that_refuses_a_conversation_names_the_row():
    chat = make_tokenizer()
    chat.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(InvalidInput, match="Row 0: the chat template refuses this conversation: no system turns"):
        encode_pairs(chat, [_messages("return", "the")])


def test_a_tokenizer_without_an_end_token_is_refused():
    backend = make_tokenizer().backend_tokenizer
    with pytest.raises(InvalidInput, match="no end token"):
        encode_pairs(transformers.PreTrainedTokenizerFast(tokenizer_object=backend), [GOOD])


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(InvalidInput, match="Row 0 is text and needs a tokenizer"):
        encode_pairs(None, [GOOD])


def test_the_end_is_a_target_also_where_the_padding_token_is_the_same():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    pairs = encode_pairs(tokenizer, [_text("the", " value of the order"), _text("the", " value")])
    batch = collate([supervised_row(pair) for pair in pairs])
    for labels, pair in zip(batch["labels"].tolist(), pairs, strict=True):
        assert [label for label in labels if label != IGNORED] == list(pair.target_ids)
        assert pair.target_ids[-1] == tokenizer.pad_token_id


def test_a_supervised_row_learns_the_answer_only():
    assert supervised_row(EncodedPair((5, 6), (7, 0))) == {"input_ids": [5, 6, 7, 0], "labels": [-100, -100, 7, 0]}


rows_of_any_length = st.lists(st.integers(1, 12), min_size=1, max_size=12)


@given(rows_of_any_length)
def test_a_packed_batch_holds_every_row_once_with_its_own_positions(lengths):
    # Token ids say which row and place they are from.
    rows = [
        {"input_ids": [100 * i + 1 + t for t in range(n)], "labels": [100 * i + 1 + t for t in range(n)]}
        for i, n in enumerate(lengths)
    ]
    batch = collate(rows, packing=True)
    ids, positions, labels = batch["input_ids"], batch["position_ids"], batch["labels"]
    assert ids.shape[1] == max(lengths)
    real = ids > 0
    assert sorted(ids[real].tolist()) == sorted(token for row in rows for token in row["input_ids"])
    assert torch.equal(positions[real], (ids[real] - 1) % 100)
    # Rows are not torn apart, and filling begins to count anew.
    assert bool(((ids[:, 1:] - ids[:, :-1] == 1) | (positions[:, 1:] == 0) | ~real[:, 1:]).all())
    first_filling = ~real & torch.cat([torch.ones_like(real[:, :1]), real[:, :-1]], dim=1)
    assert not positions[first_filling].any()
    assert torch.equal(labels, torch.where(real & (positions > 0), ids, IGNORED))


@given(rows_of_any_length)
def test_first_fit_decreasing_needs_at_most_eleven_ninths_of_the_fewest_bins(lengths):
    bins = first_fit(lengths)
    assert sorted(i for line in bins for i in line) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in line) <= max(lengths) for line in bins)
    # Dosa 2007: FFD <= 11/9 OPT + 6/9, and OPT is at least the total over the capacity.
    if len(lengths) <= 6:
        assert len(bins) <= 11 / 9 * _fewest(lengths) + 6 / 9


def _fewest(lengths: list[int]) -> int:
    capacity = max(lengths)
    return min(
        len(set(places))
        for places in itertools.product(range(len(lengths)), repeat=len(lengths))
        if all(sum(n for n, at in zip(lengths, places, strict=True) if at == b) <= capacity for b in set(places))
    )


def test_a_row_without_one_label_for_each_token_is_refused():
    with pytest.raises(InvalidInput, match="got 1 for 2 tokens"):
        collate([{"input_ids": [1, 2], "labels": [1]}])
