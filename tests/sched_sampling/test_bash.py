"""BASH rows, data sets and rounds: gold targets on mixed contexts, beta 0 is supervised fine-tuning, builds that resume."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from core.errors import CheckpointError, DataUnavailable, InvalidInput
from core.llm.examples import EncodedPair, collate, supervised_row
from core.llm.finetuning import Finetuning
from core.training import Event, Moment
from sched_sampling.bash import BatchScheduledSampling, bash_dataset, mixed_row, protected_ids
from sched_sampling.mixing import MixedRow, Mixing
from sched_sampling.provenance import model_digest
from sched_sampling.schedule import constant, linear
from sched_sampling.storage import load_mixed, provenance

VOCABULARY, END = 19, 1


def _model(seed: int = 0):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=END,
    )
    return GPT2LMHeadModel(config)


def _pairs(num: int, seed: int = 0) -> list[EncodedPair]:
    rng = np.random.default_rng(seed)
    return [
        EncodedPair(
            tuple(rng.integers(2, VOCABULARY, rng.integers(1, 5)).tolist()),
            (*rng.integers(2, VOCABULARY, rng.integers(2, 9)).tolist(), END),
        )
        for _ in range(num)
    ]


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_inputs_are_mixed_and_targets_gold():
    pair = EncodedPair((5, 6), (7, 8, 9, END))
    row = mixed_row(pair, MixedRow((7, 3, 9, END), (False, True, False, False), 1), 4)
    assert row == {
        "input_ids": [5, 6, 7, 3, 9, END],
        "labels": [-100, -100, 7, 8, 9, END],
        "replaced": [False, False, False, True, False, False],
        "row": 4,
    }


def test_the_stock_loss_of_a_mixed_row_is_the_objective_and_only_answer_predictions_have_a_gradient():
    model = _model().eval()
    pair = EncodedPair((5, 6, 7), (8, 9, 10, 11, END))
    row = mixed_row(pair, MixedRow((8, 3, 4, 11, END), (False, True, True, False, False), 1), 0)
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    with torch.no_grad():
        terms = []
        for t, gold in enumerate(pair.target_ids):
            logits = model(input_ids=torch.tensor([[*pair.prompt_ids, *row["input_ids"][3 : 3 + t]]])).logits[0, -1]
            terms.append(-logits.log_softmax(0)[gold])
        assert float(model(input_ids=ids, labels=labels).loss) == pytest.approx(
            float(torch.stack(terms).mean()), abs=1e-5
        )
    output = model(input_ids=ids)
    output.logits.retain_grad()
    model.loss_function(logits=output.logits, labels=labels, vocab_size=VOCABULARY).backward()
    touched = output.logits.grad[0].abs().sum(-1).nonzero()[:, 0].tolist()
    assert touched == list(range(2, 7))


def test_special_tokens_of_the_model_and_every_end_are_protected():
    model = _model()
    model.generation_config.eos_token_id = [END, 17]
    model.generation_config.pad_token_id = 18
    assert protected_ids(model, None) == {0, END, 17, 18}
    data = bash_dataset(model, None, _pairs(200), 1.0, temperature=3.0)
    for row in data:
        inside = [token for token, replaced in zip(row["input_ids"], row["replaced"], strict=True) if replaced]
        assert not {0, END, 17, 18} & set(inside)


def test_beta_zero_is_supervised_fine_tuning_bit_for_bit():
    pairs, training = _pairs(40), Finetuning(num_steps=12, batch_size=8, learning_rate=1e-2)
    mixed, plain = _model(), _model()
    BatchScheduledSampling(rounds=2, schedule=constant(0.0), training=training).fit(mixed, None, pairs, seed=3)
    from sched_sampling.baselines import SupervisedFineTuning

    SupervisedFineTuning(rounds=2, training=training).fit(plain, None, pairs, seed=3)
    for name, tensor in _state(mixed).items():
        assert torch.equal(tensor, plain.state_dict()[name]), name
    other = _model()
    BatchScheduledSampling(rounds=2, schedule=constant(0.5), training=training).fit(other, None, pairs, seed=3)
    assert not all(torch.equal(a, b) for a, b in zip(_state(mixed).values(), _state(other).values(), strict=True))


def test_every_round_is_built_with_the_model_as_it_then_is():
    pairs = _pairs(30)
    training = Finetuning(num_steps=5, batch_size=10, learning_rate=5e-2)
    method = BatchScheduledSampling(rounds=2, schedule=constant(1.0), training=training, mixing=Mixing(temperature=0.0))
    model = _model()
    seen = []
    method.fit(model, None, pairs, evaluate=lambda k: seen.append(copy.deepcopy(model)) or {})
    again = _model()
    reports = method.fit(again, None, pairs)
    fresh = bash_dataset(seen[0], None, pairs, 1.0, temperature=0.0)
    assert reports[1].built["changed"] == pytest.approx(
        np.mean([a != b for row in fresh for a, b in zip(row["input_ids"], row["labels"], strict=True) if b != -100])
    )


def test_the_default_begins_with_supervised_fine_tuning_and_reports_what_was_replaced():
    training = Finetuning(num_steps=2, batch_size=4)
    reports = BatchScheduledSampling(training=training).fit(_model(), None, _pairs(200))
    assert [report.built["beta"] for report in reports] == pytest.approx([0.0, 0.15, 0.3])
    assert reports[0].built["replaced"] == 0
    # The last token of an answer of about 6.5 is never replaced.
    assert 0.2 < reports[2].built["replaced"] < 0.3


def test_the_data_set_on_the_disk_is_the_one_in_memory_and_says_what_it_is(tmp_path):
    model, pairs = _model(), _pairs(25)
    memory = bash_dataset(model, None, pairs, 0.5, seed=2)
    disk = bash_dataset(model, None, pairs, 0.5, seed=2, output_dir=tmp_path / "mixed", rows_per_file=10)
    assert disk.to_list() == memory.to_list()
    assert load_mixed(tmp_path / "mixed").to_list() == memory.to_list()
    assert sorted(file.name for file in (tmp_path / "mixed").glob("*.arrow")) == [
        f"part-0000{i}.arrow" for i in range(3)
    ]
    stamp = provenance(disk)
    assert (stamp["model"], stamp["beta"], stamp["seed"], stamp["proposal"]) == (model_digest(model), 0.5, 2, "mixed")
    assert provenance(memory)["pairs"] == stamp["pairs"]


def test_a_build_that_was_killed_goes_on_with_the_next_file(tmp_path, monkeypatch: pytest.MonkeyPatch):
    model, pairs = _model(), _pairs(25)
    whole = bash_dataset(model, None, pairs, 0.5).to_list()
    built = []
    from sched_sampling import bash

    real = bash.mix_rows

    def failing(model, part, beta, *, row_ids, **options):
        if len(built) == 2:
            raise KeyboardInterrupt
        built.append(list(row_ids))
        return real(model, part, beta, row_ids=row_ids, **options)

    monkeypatch.setattr(bash, "mix_rows", failing)
    with pytest.raises(KeyboardInterrupt):
        bash_dataset(model, None, pairs, 0.5, output_dir=tmp_path / "mixed", rows_per_file=8)
    with pytest.raises(DataUnavailable, match="lacks 2 of 4 files"):
        load_mixed(tmp_path / "mixed")
    monkeypatch.setattr(bash, "mix_rows", lambda *a, **o: built.append(list(o["row_ids"])) or real(*a, **o))
    assert bash_dataset(model, None, pairs, 0.5, output_dir=tmp_path / "mixed", rows_per_file=8).to_list() == whole
    assert [numbers[0] for numbers in built] == [0, 8, 16, 24]


@pytest.mark.parametrize("change", ["model", "beta", "seed", "pairs"])
def test_a_folder_of_another_build_is_refused(tmp_path, change: str):
    bash_dataset(_model(), None, _pairs(5), 0.5, seed=0, output_dir=tmp_path)
    model, pairs, beta, seed = _model(), _pairs(5), 0.5, 0
    if change == "model":
        model = _model(seed=1)
    elif change == "pairs":
        pairs = _pairs(5, seed=1)
    elif change == "beta":
        beta = 0.4
    else:
        seed = 1
    with pytest.raises(InvalidInput, match=rf"was made with another {change}"):
        bash_dataset(model, None, pairs, beta, seed=seed, output_dir=tmp_path)


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InvalidInput, match="is not empty"):
        bash_dataset(_model(), None, _pairs(5), 0.5, output_dir=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


class _Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at", [("build", 1), ("train", 1), ("train", 0)])
def test_rounds_that_were_killed_end_in_the_same_weights(tmp_path, monkeypatch: pytest.MonkeyPatch, kill_at):
    pairs = _pairs(20)
    method = BatchScheduledSampling(
        rounds=3, schedule=linear(0.2, 0.6), training=Finetuning(num_steps=6, batch_size=5, learning_rate=1e-2)
    )
    whole = _model()
    wanted = method.fit(whole, None, pairs, seed=1)
    moment, number = kill_at
    rounds = []

    def hook(event: Event) -> None:
        if event.moment is Moment.START:
            rounds.append(event)
        if moment == "train" and len(rounds) == number + 1 and event.step == 4:
            raise _Killed

    from sched_sampling import bash

    real = bash.bash_dataset

    def build(*args, **options):
        if moment == "build" and len(rounds) == number:
            raise _Killed
        return real(*args, **options)

    monkeypatch.setattr(bash, "bash_dataset", build)
    killed = _model()
    with pytest.raises(_Killed):
        method.fit(killed, None, pairs, seed=1, output_dir=tmp_path / "run", hooks=[hook])
    monkeypatch.undo()
    resumed = _model()
    reports = method.fit(resumed, None, pairs, seed=1, output_dir=tmp_path / "run")
    assert [report.built for report in reports] == [report.built for report in wanted]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    # Once more: everything is there already.
    finished = _model()
    method.fit(finished, None, pairs, seed=1, output_dir=tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(_state(whole).values(), _state(finished).values(), strict=True))


def test_a_run_with_other_settings_is_refused_and_says_which(tmp_path):
    training = Finetuning(num_steps=1, batch_size=5)
    BatchScheduledSampling(rounds=1, training=training).fit(_model(), None, _pairs(5), output_dir=tmp_path)
    with pytest.raises(CheckpointError, match="another method"):
        BatchScheduledSampling(rounds=1, schedule=linear(0, 0.5), training=training).fit(
            _model(), None, _pairs(5), output_dir=tmp_path
        )
    with pytest.raises(CheckpointError, match="another model"):
        BatchScheduledSampling(rounds=1, training=training).fit(_model(1), None, _pairs(5), output_dir=tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["method"]["name"] == "BatchScheduledSampling"


def test_training_stops_when_the_scores_say_so():
    reports = BatchScheduledSampling(rounds=5, training=Finetuning(num_steps=1, batch_size=5)).fit(
        _model(), None, _pairs(5), evaluate=lambda k: {"score": k}, stop=lambda scores: scores["score"] >= 1
    )
    assert [report.scores for report in reports] == [{"score": 0.0}, {"score": 1.0}]


def test_rows_go_through_the_collator_with_their_gold_targets():
    pair = EncodedPair((5,), (7, 8, END))
    rows = [mixed_row(pair, MixedRow((3, 4, END), (True, True, False), 1), 0), supervised_row(pair)]
    batch = collate(rows)
    assert batch["labels"].tolist() == [[-100, 7, 8, END]] * 2
    assert batch["input_ids"].tolist() == [[5, 3, 4, END], [5, 7, 8, END]]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "no pairs"),
        ([EncodedPair((5,), (6,) * 40)], "32"),
        ([EncodedPair((5,), (7, END)), EncodedPair((), (6, END))], "1"),
        ([EncodedPair((5,), ())], "0"),
    ],
)
def test_pairs_that_cannot_be_used_are_refused_before_any_work(pairs, message: str):
    model = _model()
    before = model_digest(model)
    with pytest.raises(InvalidInput, match=message):
        BatchScheduledSampling(rounds=1, training=Finetuning(num_steps=1)).fit(model, None, pairs)
    assert model_digest(model) == before
