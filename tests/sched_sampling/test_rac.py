"""RAC's data sets and rounds: what is a target, where drafts come from, and that nothing else gets in."""

from __future__ import annotations

import importlib.util
import random
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from core.errors import InvalidInput
from core.llm.chat import ChatRefused, Patience, load_chat
from core.llm.examples import EncodedPair, collate
from core.llm.finetuning import Finetuning, completion_loss
from core.llm.generation import Sampling, generate
from sched_sampling import crossfit, rac
from sched_sampling.crossfit import split
from sched_sampling.rac import LeakageWarning, ReferenceAnswerCorrection, likeness, rac_dataset, row_shares
from sched_sampling.storage import load_mixed
from sched_sampling.templates import RAC_TEXT, Draft, TokenTemplate
from sched_sampling.weights import trained_state

_spec = importlib.util.spec_from_file_location(
    "chat_server_of_rac", Path(__file__).parents[1] / "core" / "llm" / "server.py"
)
misbehave = importlib.util.module_from_spec(_spec)
sys.modules["chat_server_of_rac"] = misbehave
_spec.loader.exec_module(misbehave)

END, SEPARATOR, VOCABULARY, CONTEXT = 0, 1, 12, 40
TEMPLATE = TokenTemplate(separator_ids=(SEPARATOR,), end_ids=(END,))
QUICK = Finetuning(num_steps=4, batch_size=8, learning_rate=1e-3)


def make_model(seed=0, *, std=0.3, dropout=0.0):
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=None,
        eos_token_id=END,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.GPT2LMHeadModel(config)
        for parameter in model.parameters():
            # Large weights: what a model is shown must move what it says.
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def make_pairs(number=24, *, prompts=None, seed=0):
    draw = random.Random(seed)
    return [
        EncodedPair(
            tuple(draw.randrange(2, VOCABULARY) for _ in range(draw.randint(2, 5)))
            if prompts is None
            else prompts[i % len(prompts)],
            (*(draw.randrange(2, VOCABULARY) for _ in range(draw.randint(1, 5))), END),
        )
        for i in range(number)
    ]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def letters():
    backend = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|end|>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def corrections(rows):
    return [row for row in rows if row["kind"] == "correction"]


def context_of(row):
    return tuple(token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100)


def build(model, pairs, **options):
    return list(rac_dataset(model, None, pairs, **{"template": TEMPLATE, "direct_share": 0.5, **options}))


# What a row is.


def test_only_the_reference_answer_is_a_target_in_both_kinds_of_row(model):
    pairs = make_pairs()
    rows = build(model, pairs)
    assert Counter(row["kind"] for row in rows) == {"direct": 24, "correction": 24}
    for row in rows:
        target = pairs[row["row"]].target_ids
        assert tuple(row["input_ids"][-len(target) :]) == target
        assert row["labels"] == [-100] * (len(row["input_ids"]) - len(target)) + list(target)


@torch.no_grad()
def test_the_stock_loss_of_a_correction_is_the_likelihood_of_the_answer_behind_the_template(model):
    pairs = make_pairs()
    for row in corrections(build(model, pairs))[:5]:
        context, target = context_of(row), pairs[row["row"]].target_ids
        one_by_one = [
            -model(torch.tensor([[*context, *target[:t]]])).logits[0, -1].log_softmax(-1)[target[t]].item()
            for t in range(len(target))
        ]
        assert completion_loss(model, collate([row])).item() == pytest.approx(sum(one_by_one) / len(target), abs=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_draft_in_the_context_is_what_the_plain_model_says_without_its_end(model, temperature):
    pairs = make_pairs()
    longest = max(len(pair.target_ids) for pair in pairs)
    said = generate(
        model,
        [pair.prompt_ids for pair in pairs],
        Sampling(temperature, seed=7),
        max_new_tokens=longest,
        ended=lambda ids: ids[-1] == END,
        max_batch_tokens=500,
    )
    for row in corrections(build(model, pairs, temperature=temperature, seed=7)):
        ids = said[row["row"]][0].token_ids
        assert row["ended"] == (ids[-1] == END)
        shown = tuple(token for token in ids if token not in (END, SEPARATOR))
        assert context_of(row) == (*pairs[row["row"]].prompt_ids, *shown, SEPARATOR)


@pytest.mark.parametrize("share", [0, 1 / 3, 0.5, 0.8, 1])
def test_direct_share_is_the_share_of_rows_and_no_pair_has_two_of_a_kind(model, share):
    rows = build(model, make_pairs(40), direct_share=share)
    counts = Counter(row["kind"] for row in rows)
    assert counts["direct"] / len(rows) == pytest.approx(share, abs=0.01)
    assert max(Counter((row["row"], row["kind"]) for row in rows).values()) == 1
    assert {row["row"] for row in rows} == set(range(40))


def test_which_pairs_lack_the_rarer_row_depends_on_the_seed_alone():
    direct, corrected = row_shares(60, 1 / 3, seed=3)
    assert (len(direct), len(corrected)) == (30, 60)
    assert row_shares(60, 1 / 3, seed=3)[0] == direct != row_shares(60, 1 / 3, seed=4)[0]


def test_right_drafts_are_kept_and_told_apart_by_their_quality(model):
    pairs = make_pairs(6)
    drafts = [Draft(pair.target_ids[:-1] if i % 2 else (), "", ended=True) for i, pair in enumerate(pairs)]
    rows = corrections(build(model, pairs, drafts=drafts))
    assert [row["draft_quality"] for row in rows] == [0.0, 1.0] * 3
    assert context_of(rows[1]) == (*pairs[1].prompt_ids, *pairs[1].target_ids[:-1], SEPARATOR)


def test_unended_drafts_are_flagged_and_left_out_on_request(model):
    pairs = make_pairs(4)
    drafts = [Draft((5,), "", ended=i != 2) for i in range(4)]
    assert [row["ended"] for row in corrections(build(model, pairs, drafts=drafts))] == [True, True, False, True]
    kept = build(model, pairs, drafts=drafts, drop_unended=True)
    assert [row["row"] for row in corrections(kept)] == [0, 1, 3]
    assert len(kept) == 4 + 3


def test_a_long_draft_loses_its_beginning_so_that_question_and_answer_fit(model):
    pairs = make_pairs(3)
    long = tuple(2 + i % 10 for i in range(CONTEXT))
    for row in corrections(build(model, pairs, drafts=[Draft(long, "", ended=True)] * 3)):
        pair = pairs[row["row"]]
        assert len(row["input_ids"]) == CONTEXT
        room = CONTEXT - len(pair.prompt_ids) - 1 - len(pair.target_ids)
        assert context_of(row) == (*pair.prompt_ids, *long[-room:], SEPARATOR)


def test_equal_prompts_get_different_drafts_that_do_not_depend_on_the_other_prompts(model):
    pairs = make_pairs(24, prompts=[(2, 3), (4, 5, 6)])
    rows = corrections(build(model, pairs, max_new_tokens=6))
    few = corrections(build(model, pairs[:10:2], max_new_tokens=6))
    assert len({context_of(row) for row in rows}) > 12
    assert [context_of(row) for row in few] == [context_of(row) for row in rows if row["row"] in range(0, 10, 2)]
    assert len({context_of(row) for row in corrections(build(model, pairs, temperature=0.0))}) == 2


def test_dropout_is_off_while_drafting_and_the_mode_is_back_afterwards():
    shaky = make_model(dropout=0.5).train()
    assert build(shaky, make_pairs(), seed=2) == build(make_model(), make_pairs(), seed=2)
    assert all(module.training for module in shaky.modules())


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_likeness_is_the_longest_common_subsequence_by_brute_force(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    expected = 2 * table[-1][-1] / (len(a) + len(b)) if a or b else 1.0
    assert likeness(a, b) == pytest.approx(expected)


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direct_share": 1.5}, "direct_share"),
        ({"direct_share": float("nan")}, "direct_share"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": CONTEXT}, "Prompt 0 of .* at most 40"),
        ({"drafts": []}, "one draft for each of 24"),
        ({"template": None}, "TokenTemplate"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_before_the_model_is_asked(monkeypatch, model, options, message):
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("the model was asked"))
    with pytest.raises(InvalidInput, match=message):
        build(model, make_pairs(), **options)


def test_a_question_whose_correction_cannot_fit_is_named(monkeypatch, model):
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("the model was asked"))
    pairs = [*make_pairs(3), EncodedPair((5,) * (CONTEXT - 2), (6, END))]
    with pytest.raises(InvalidInput, match=f"Pair 3: .* {CONTEXT + 1} tokens .* at most {CONTEXT}"):
        build(model, pairs, max_new_tokens=1)


def test_settings_of_the_method_are_checked_when_it_is_made():
    for settings in (
        {"folds": 0},
        {"held_out_share": 1.0},
        {"direct_share": -0.1},
        {"folds": 2, "chat": lambda _: None},
    ):
        with pytest.raises(InvalidInput):
            ReferenceAnswerCorrection(**settings)


# Rounds.


def method(**settings):
    return ReferenceAnswerCorrection(
        **{"rounds": 3, "training": QUICK, "template": TEMPLATE, "direct_share": 1 / 3, **settings}
    )


class Offered(dict):
    """A pair that also offers a judge, and fails when anyone looks at more than the demonstration."""

    def __getitem__(self, name):
        assert name in ("prompt", "completion"), f"{name} was looked at"
        return super().__getitem__(name)


def test_a_judge_that_raises_is_never_called(letters):
    def judge(*_):
        raise AssertionError("the judge was called")

    pairs = [Offered(prompt=f"{i} + 1 = ", completion=str(i + 1), judge=judge, reward=judge) for i in range(8)]
    wide = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=len(letters), n_positions=256, n_embd=16, n_layer=1, n_head=1, eos_token_id=256
        )
    )
    reports = method(template=None, rounds=2).fit(wide, letters, pairs)
    assert [report.built["correction_rows"] for report in reports] == [8, 8]


def test_every_round_trains_on_new_drafts_of_the_model_as_it_then_is(tmp_path):
    model, pairs = make_model(), make_pairs(30)
    seen = []
    method(training=Finetuning(num_steps=2, batch_size=8, learning_rate=1e-2)).fit(
        model, None, pairs, output_dir=tmp_path, evaluate=lambda _: seen.append(trained_state(model)) or {}
    )
    contexts = []
    for number in range(3):
        rows = list(load_mixed(tmp_path / f"round-{number:02d}" / "data"))
        contexts.append([context_of(row) for row in corrections(rows)])
        drafter = make_model()
        if number:
            drafter.load_state_dict(seen[number - 1], strict=False)
        # Weights other than those of this round would have drafted something else.
        stamp = load_mixed(tmp_path / f"round-{number:02d}" / "data").info.description
        assert rac.model_digest(drafter) in stamp
    assert contexts[0] != contexts[1] != contexts[2]


def test_pairs_of_one_prompt_stay_in_one_fold_and_every_pair_is_dealt_once():
    prompts = [(i % 10,) for i in range(35)]
    parts = split(prompts, folds=3, held_out_share=0.2)
    everything = [*parts.train, *parts.held_out]
    assert sorted(everything) == list(range(35))
    homes = [{prompts[i] for i in part} for part in (*parts.folds, parts.held_out)]
    assert [len(home) for home in homes] == [3, 3, 2, 2]
    assert len(set.union(*homes)) == 10
    assert parts.outside(1) == tuple(sorted((*parts.folds[0], *parts.folds[2])))
    with pytest.raises(InvalidInput, match="too few"):
        split(prompts, folds=11, held_out_share=0.0)


def drafts_by_round(folder, numbers):
    """The contexts of all corrections of some pairs, round by round."""
    found = []
    for home in sorted(folder.glob("round-*")):
        rows = [row for data in sorted(home.glob("data*")) for row in load_mixed(data)]
        found.append({row["row"]: context_of(row) for row in corrections(rows) if row["row"] in numbers})
    return found


def test_drafts_of_a_fold_do_not_depend_on_its_own_answers_in_any_round(tmp_path):
    pairs = make_pairs(30)
    own = split([pair.prompt_ids for pair in pairs], 3, 0.0).folds[1]
    changed = [
        EncodedPair(pair.prompt_ids, (*((token - 1) % 10 + 2 for token in pair.target_ids[:-1]), END))
        if i in own
        else pair
        for i, pair in enumerate(pairs)
    ]
    learning = Finetuning(num_steps=6, batch_size=8, learning_rate=1e-2)
    found = {}
    for folds in (1, 3):
        for name, given_pairs in (("as it is", pairs), ("changed", changed)):
            folder = tmp_path / f"{folds} {name}"
            method(folds=folds, training=learning).fit(make_model(), None, given_pairs, output_dir=folder)
            found[folds, name] = drafts_by_round(folder, set(own))
    assert len(found[3, "as it is"]) == 3
    assert found[3, "as it is"] == found[3, "changed"]
    # Without folds they do, from the second round on: the test would see it.
    assert found[1, "as it is"][0] == found[1, "changed"][0]
    assert found[1, "as it is"][2] != found[1, "changed"][2]


def test_a_cross_fitted_run_that_was_killed_ends_as_one_that_was_not(tmp_path, monkeypatch):
    pairs, whole, killed = make_pairs(24), make_model(), make_model()
    method(folds=2).fit(whole, None, pairs, output_dir=tmp_path / "whole")
    calls, train = [], crossfit.finetune

    def once_too_often(*args, **options):
        calls.append(options["description"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*args, **options)

    monkeypatch.setattr(crossfit, "finetune", once_too_often)
    before = trained_state(killed)
    with pytest.raises(KeyboardInterrupt):
        method(folds=2).fit(killed, None, pairs, output_dir=tmp_path / "killed")
    after = trained_state(killed)
    # What was left behind is the model after its first round, not a drafting model.
    first = make_model()
    method(folds=2, rounds=3).fit(first, None, pairs, output_dir=tmp_path / "first", stop=lambda _: True)
    assert all(torch.equal(after[name], value) for name, value in trained_state(first).items())
    killed.load_state_dict(before, strict=False)
    method(folds=2).fit(killed, None, pairs, output_dir=tmp_path / "killed")
    assert len(calls) == 2 + 3, "the fold that was trained before is not trained again"
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), killed.parameters(), strict=True))


def test_folds_without_an_output_dir_leave_the_same_model(tmp_path):
    models_ = [make_model(), make_model()]
    for model, folder in zip(models_, (None, tmp_path / "kept"), strict=True):
        method(folds=2, rounds=2).fit(model, None, make_pairs(), output_dir=folder)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models_), strict=True))


def test_held_out_prompts_are_never_trained_on(tmp_path):
    pairs = make_pairs(30)
    held = set(split([pair.prompt_ids for pair in pairs], 1, 0.2).held_out)
    method(held_out_share=0.2, leakage_threshold=1.0).fit(make_model(), None, pairs, output_dir=tmp_path)
    for home in tmp_path.glob("round-*"):
        assert {row["row"] for row in load_mixed(home / "data")} == set(range(30)) - held


def test_memorised_answers_raise_a_leakage_warning_and_folds_take_the_leak_away():
    pairs = make_pairs(30, seed=5)
    memorise = Finetuning(num_steps=120, batch_size=24, learning_rate=1e-2, schedule="constant")
    settings = {"rounds": 2, "training": memorise, "held_out_share": 0.2, "leakage_threshold": 0.3, "direct_share": 0.5}
    with pytest.warns(LeakageWarning, match="Round 1: .* folds=2"):
        leaky = method(**settings).fit(make_model(std=0.05), None, pairs)
    assert leaky[0].built["leakage"] < 0.3 < leaky[1].built["leakage"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", LeakageWarning)
        crossed = method(**settings, folds=2).fit(make_model(std=0.05), None, pairs)
    assert abs(crossed[1].built["leakage"]) < 0.3


# Drafts from a server.


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with misbehave.serving() as running:
        yield running


TEXTS = [{"prompt": f"{number} + 1 = ", "completion": str(number + 1)} for number in (3, 4, 5, 3, 6, 7)]


def from_server(server, letters, cache=None, **options):
    patience = Patience(max_retries=0, timeout=20, total_timeout=60, backoff=0.01, max_backoff=0.05)
    chat = load_chat(f"openai:tiny@{server.url}", cache=cache, patience=patience, max_concurrency=1)
    wide = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=300, n_positions=512, n_embd=8, n_layer=1, n_head=1, eos_token_id=256)
    )
    return list(rac_dataset(wide, letters, TEXTS, chat=chat, **{"max_new_tokens": 9, "seed": 5, **options}))


def test_drafts_of_a_server_stand_in_the_context_as_its_text(server, letters):
    rows = corrections(from_server(server, letters))
    for row in rows:
        # The server repeats the question and counts its samples; equal questions are asked once, for two of them.
        number = 1 if row["row"] == 3 else 0
        prompt = TEXTS[row["row"]]["prompt"]
        assert letters.decode(context_of(row)) == (
            f"{prompt}{RAC_TEXT.reference}{prompt} sample {number} seed 5{RAC_TEXT.request}"
        )
        assert row["ended"]
    assert sorted(server.questions) == sorted({text["prompt"] for text in TEXTS})
    assert not any(row["ended"] for row in corrections(from_server(server, letters, max_new_tokens=1)))


def test_a_server_that_fails_midway_is_asked_nothing_twice(server, letters, tmp_path):
    whole = from_server(server, letters)
    asked = len(server.bodies)
    assert asked == 5
    server.script.extend([misbehave.good, misbehave.good, misbehave.fail(400)])
    with pytest.raises(ChatRefused):
        from_server(server, letters, cache=tmp_path / "replies.jsonl")
    assert from_server(server, letters, cache=tmp_path / "replies.jsonl") == whole
    again = Counter(server.questions[asked:])
    # Two answered, one refused; then the refused one and the two that were never asked.
    assert sum(again.values()) == 3 + 3
    assert max(again.values()) == 2
    assert sum(count == 2 for count in again.values()) == 1


def test_every_round_asks_its_own_server(server, letters, tmp_path):
    rounds = []

    def chat(number):
        rounds.append(number)
        return load_chat(f"openai:round-{number}@{server.url}")

    wide = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=300, n_positions=512, n_embd=8, n_layer=1, n_head=1, eos_token_id=256)
    )
    method(template=None, rounds=2, chat=chat).fit(wide, letters, TEXTS)
    assert rounds == [0, 1]
    assert {body["model"] for body in server.bodies} == {"round-0", "round-1"}
