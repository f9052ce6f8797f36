"""The baselines against literal loops: one step, one token, one coin at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from core.errors import InvalidInput
from core.llm.examples import EncodedPair, collate, supervised_row
from core.llm.finetuning import Finetuning, completion_loss
from core.training import Batches, Event, Moment
from sched_sampling.baselines import (
    SPIN,
    NEFTune,
    OnlineScheduledSampling,
    Preference,
    RandomTokenReplacement,
    SupervisedFineTuning,
    TwoPassScheduledSampling,
    tune_on_preferences,
)
from sched_sampling.baselines.neftune import noisy_embeddings
from sched_sampling.baselines.preference import preference_batch, preference_loss, preference_rows
from sched_sampling.baselines.two_pass import replaced_places
from sched_sampling.bash import BatchScheduledSampling, protected_ids
from sched_sampling.mixing import Mixing, mix_rows
from sched_sampling.rounds import RoundJob
from sched_sampling.schedule import constant, linear

VOCABULARY, END = 19, 1


def _model(seed: int = 0, kind: str = "gpt2", dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    shared = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": END}
    if kind == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**shared, **sizes))
    else:
        drop = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        model = GPT2LMHeadModel(GPT2Config(**shared, **drop, n_positions=32, n_embd=32, n_layer=2, n_head=2))
    for parameter in model.parameters():
        # Confident enough that samples, predictions and gold differ from each other.
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def _pairs(num: int, seed: int = 0) -> list[EncodedPair]:
    rng = np.random.default_rng(seed)
    return [
        EncodedPair(
            tuple(rng.integers(2, VOCABULARY, rng.integers(1, 5)).tolist()),
            (*rng.integers(2, VOCABULARY, rng.integers(3, 9)).tolist(), END),
        )
        for _ in range(num)
    ]


def _sgd(**settings) -> Finetuning:
    options = {"batch_size": 4, "learning_rate": 0.1, "schedule": "constant", "max_grad_norm": None, **settings}
    return Finetuning(**options, optimizer=torch.optim.SGD)


def _weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def _equal(left: nn.Module, right: nn.Module, tolerance: float = 0.0) -> bool:
    pairs = zip(_weights(left), _weights(right), strict=True)
    return all(torch.allclose(a, b, rtol=0, atol=tolerance) for a, b in pairs)


def _job(model: nn.Module, pairs: list[EncodedPair], **changes) -> RoundJob:
    fields = {"round": 0, "rounds": 1, "tokenizer": None, "texts": pairs, "seed": 5, **changes}
    return RoundJob(model=model, pairs=pairs, **fields)


@pytest.mark.parametrize(
    "other",
    [
        BatchScheduledSampling(schedule=constant(0.0), training=_sgd(), rounds=2),
        RandomTokenReplacement(schedule=constant(0.0), training=_sgd(), rounds=2),
        OnlineScheduledSampling(schedule=constant(0.0), training=_sgd(), rounds=2),
        TwoPassScheduledSampling(schedule=constant(0.0), training=_sgd(), rounds=2),
        NEFTune(alpha=0.0, training=_sgd(), rounds=2),
    ],
    ids=lambda method: type(method).__name__,
)
def test_without_replacement_and_noise_every_method_is_supervised_fine_tuning_bit_for_bit(other):
    plain, same = _model(), _model()
    SupervisedFineTuning(training=_sgd(), rounds=2).fit(plain, None, _pairs(10), seed=3)
    other.fit(same, None, _pairs(10), seed=3)
    assert not _equal(plain, _model())
    assert _equal(plain, same)


def test_random_tokens_are_uniform_over_what_is_not_protected_and_share_the_coins_of_bash():
    pairs = [EncodedPair((2,), (*[3] * 30, END))] * 200
    (random_data, mixed_data) = (
        method(schedule=constant(0.4), **options).build(_job(_model(), pairs[:n])).rows
        for method, n, options in (
            (RandomTokenReplacement, 200, {}),
            # At temperature 0 nothing else is random.
            (BatchScheduledSampling, 5, {"mixing": Mixing(proposal="gold", temperature=0)}),
        )
    )
    drawn = [
        token
        for row in random_data
        for token, replaced in zip(row["input_ids"], row["replaced"], strict=True)
        if replaced
    ]
    assert len(drawn) / (200 * 30) == pytest.approx(0.4, abs=0.03)
    counts = np.bincount(drawn, minlength=VOCABULARY)
    assert counts[:2].sum() == 0
    expected = len(drawn) / (VOCABULARY - 2)
    # Chi-square with 16 degrees of freedom: 39.3 has probability 0.001.
    assert ((counts[2:] - expected) ** 2 / expected).sum() < 39.3
    for mixed, random in zip(mixed_data, random_data, strict=False):
        # A protected draw counts as not replaced, and only the model makes such draws.
        assert all(not one or other for one, other in zip(mixed["replaced"], random["replaced"], strict=True))


@pytest.mark.parametrize("packing", [False, True])
def test_online_scheduled_sampling_mixes_with_the_weights_and_the_beta_of_every_step(packing):
    pairs, schedule, rounds = _pairs(10), linear(0.2, 0.9), 2
    training = _sgd(num_steps=3, packing=packing, learning_rate=0.5)
    trained, literal = _model(), _model()
    method = OnlineScheduledSampling(schedule=schedule, rounds=rounds, training=training)
    seeds = []

    class Spy(OnlineScheduledSampling):
        def build(self, job):
            seeds.append(job.seed)
            return super().build(job)

    Spy(schedule=schedule, rounds=rounds, training=training).fit(trained, None, pairs, seed=7)
    for number, seed in enumerate(seeds):
        batches = Batches(len(pairs), 4, seed=seed)
        optimizer = torch.optim.SGD(literal.parameters(), lr=0.5)
        for step in range(3):
            numbers = batches.indices(step).tolist()
            chosen = [pairs[i] for i in numbers]
            mixed = mix_rows(
                literal,
                chosen,
                schedule(3 * number + step, 6),
                seed=int(np.random.SeedSequence([seed, step]).generate_state(1)[0]),
                row_ids=numbers,
                protected_ids=protected_ids(literal, None),
            )
            assert any(row.tokens != pair.target_ids for row, pair in zip(mixed, chosen, strict=True))
            total = torch.zeros(())
            for row, pair in zip(mixed, chosen, strict=True):
                logits = literal(torch.tensor([[*pair.prompt_ids, *row.tokens]])).logits[0]
                predictions = logits[len(pair.prompt_ids) - 1 : -1]
                total = total + functional.cross_entropy(predictions, torch.tensor(pair.target_ids), reduction="sum")
            optimizer.zero_grad()
            (total / sum(len(pair.target_ids) for pair in chosen)).backward()
            optimizer.step()
    assert method.training.steps(10) == 3
    assert _equal(trained, literal, 1e-5)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("method", [OnlineScheduledSampling, TwoPassScheduledSampling])
def test_a_resumed_run_goes_on_with_the_beta_of_its_step(method, tmp_path):
    training = _sgd(num_steps=103)
    # A clock that began again would give the last steps a beta near 0. Checkpoints are written every 100 steps.
    made = method(schedule=linear(0.0, 0.6), rounds=1, training=training)

    def die(event: Event) -> None:
        if event.moment is Moment.STEP and event.step == 102:
            raise _Killed

    whole, resumed = _model(), _model()
    made.fit(whole, None, _pairs(6), output_dir=tmp_path / "whole")
    with pytest.raises(_Killed):
        made.fit(_model(), None, _pairs(6), output_dir=tmp_path / "killed", hooks=[die])
    made.fit(resumed, None, _pairs(6), output_dir=tmp_path / "killed")
    assert _equal(whole, resumed)


def _two_pass_literally(model: nn.Module, pair: EncodedPair, number: int, beta: float, seed: int, top_k: int):
    """The loss terms of one row, token by token."""
    from sched_sampling.noise import coins

    embed, start = model.get_input_embeddings(), len(pair.prompt_ids)
    gold = [*pair.prompt_ids, *pair.target_ids]
    read = [embed.weight[token] for token in gold]
    with torch.no_grad():
        for place in range(start, len(gold) - 1):
            coin = coins(seed, torch.tensor([number]), torch.tensor([place])).item()
            if coin >= beta:
                continue
            # What the model says of this very token, having read the gold tokens before it.
            probabilities = model(torch.tensor([gold[:place]])).logits[0, -1].softmax(0)
            best = probabilities.topk(top_k)
            if best.indices[0] in (0, END):
                continue
            shares = best.values / best.values.sum()
            read[place] = sum(w * embed.weight[t] for w, t in zip(shares, best.indices, strict=True))
    terms = []
    for t, token in enumerate(pair.target_ids):
        logits = model(inputs_embeds=torch.stack(read[: start + t])[None]).logits[0, -1]
        terms.append(-logits.log_softmax(0)[token])
    return terms


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_two_pass_sampling_is_a_loop_over_tokens(kind, top_k, packing):
    model, pairs, beta = _model(kind=kind), _pairs(6), 0.6
    method = TwoPassScheduledSampling(schedule=constant(beta), training=_sgd(packing=packing), top_k=top_k)
    job = _job(model, pairs)
    batch = method.batch(method.build(job).rows)
    _, seed = method.now(job)
    terms = [
        term
        for number, pair in enumerate(pairs)
        for term in _two_pass_literally(model, pair, number, beta, seed, top_k)
    ]
    loss = method.loss(job)(model, batch)
    assert loss.item() == pytest.approx((sum(terms) / len(terms)).item(), abs=1e-5)
    assert abs(loss.item() - completion_loss(model, batch).item()) > 1e-3


def test_two_pass_sampling_learns_from_the_second_pass_and_reads_without_dropout_in_the_first():
    pairs = _pairs(4)
    model = _model(dropout=0.5).train()
    method = TwoPassScheduledSampling(schedule=constant(1.0), training=_sgd())
    job = _job(model, pairs)
    modes = []
    model.transformer.register_forward_hook(
        lambda module, inputs, output: modes.append((module.training, torch.is_grad_enabled()))
    )
    loss = method.loss(job)(model, method.batch(method.build(job).rows))
    assert modes == [(False, False), (True, True)]
    assert loss.requires_grad


def test_the_coins_of_two_pass_sampling_are_independent_over_rows_and_places_and_spare_the_last_token():
    rows = [{**supervised_row(EncodedPair((2, 3), (4, 5, 6, END))), "row": i} for i in range(3000)]
    batch = TwoPassScheduledSampling().batch(rows)
    chosen = replaced_places(batch, 0.3, seed=1)
    assert not chosen[:, [0, 1, 5]].any()
    coins = chosen[:, 2:5].double()
    # Four standard errors.
    assert (coins.mean(dim=0) - 0.3).abs().max() < 4 * math.sqrt(0.3 * 0.7 / 3000)
    correlations = torch.corrcoef(coins.T) - torch.eye(3)
    assert correlations.abs().max() < 4 / math.sqrt(3000)
    assert torch.equal(replaced_places(batch, 1.0, seed=1)[:, 2:5], torch.ones(3000, 3, dtype=torch.bool))
    assert not torch.equal(chosen, replaced_places(batch, 0.3, seed=2))


def test_neftune_adds_uniform_noise_of_its_size_while_training_and_never_else():
    model, ids = _model(), torch.tensor([[2, 3, 4, 5, 6]] * 400)
    embed = model.get_input_embeddings()
    plain = embed(ids)
    with noisy_embeddings(model, 5.0):
        assert torch.equal(embed(ids), plain)
        model.train()
        noise = (embed(ids) - plain).flatten()
    assert torch.equal(embed(ids), plain)
    size = 5.0 / math.sqrt(5 * 32)
    assert noise.abs().max() <= size * (1 + 1e-5)
    for k in (1, 2, 3):
        share = (noise < size * (k / 2 - 1)).double().mean().item()
        assert share == pytest.approx(k / 4, abs=4 * 0.5 / math.sqrt(len(noise)))


@pytest.mark.parametrize("fails", [False, True])
def test_neftune_leaves_no_hook_behind(fails):
    model = _model()

    def hook(event: Event) -> None:
        if fails and event.moment is Moment.STEP:
            raise _Killed

    try:
        NEFTune(training=_sgd(num_steps=1), rounds=1).fit(model, None, _pairs(4), hooks=[hook])
    except _Killed:
        assert fails
    assert not model.get_input_embeddings()._forward_hooks


def _preferences(num: int) -> list[Preference]:
    return [
        Preference(chosen.prompt_ids, chosen.target_ids, rejected.target_ids)
        for chosen, rejected in zip(_pairs(num), _pairs(num, seed=1), strict=True)
    ]


def _log_prob(model: nn.Module, prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
    ids, total = list(prompt), torch.zeros(())
    for token in answer:
        total = total + model(torch.tensor([ids])).logits[0, -1].log_softmax(0)[token]
        ids.append(token)
    return total


@pytest.mark.parametrize("packing", [False, True])
def test_the_preference_loss_is_its_formula(packing):
    reference, model, preferences, scale = _model(0), _model(1), _preferences(5), 0.7
    rows = preference_rows(reference, preferences)
    terms = []
    for p in preferences:
        margins = [
            _log_prob(m, p.prompt_ids, p.chosen_ids) - _log_prob(m, p.prompt_ids, p.rejected_ids)
            for m in (model, reference)
        ]
        terms.append(-torch.sigmoid(scale * (margins[0] - margins[1])).log())
    expected = (sum(terms) / len(terms)).item()
    batch = preference_batch(rows, packing=packing)
    assert preference_loss(model, batch, scale=scale).item() == pytest.approx(expected, abs=1e-5)
    assert preference_loss(reference, batch, scale=scale).item() == pytest.approx(math.log(2), abs=1e-5)


def test_micro_batches_of_unequal_size_give_the_preference_gradient_of_the_whole():
    whole, cut = _model(), _model()
    for model, parts in ((whole, 1), (cut, 2)):
        settings = _sgd(num_steps=2, batch_size=5, gradient_accumulation_steps=parts)
        tune_on_preferences(model, _preferences(5), settings)
    assert not _equal(whole, _model(), 1e-3)
    assert _equal(whole, cut, 1e-6)


def test_preference_tuning_raises_the_chosen_answer_over_the_rejected_one():
    model, preferences = _model(), _preferences(4)
    before = [row["reference"] for row in preference_rows(model, preferences)]
    tune_on_preferences(model, preferences, Finetuning(num_steps=40, learning_rate=3e-3, batch_size=4))
    after = [row["reference"] for row in preference_rows(model, preferences)]
    assert all(new > old + 1 for new, old in zip(after, before, strict=True))


def test_spin_rejects_own_samples_of_this_iteration_and_the_last_relative_to_the_current_model():
    pairs, built = _pairs(6), []

    class Spy(SPIN):
        def build(self, job):
            found = super().build(job)
            built.append((found.rows, _model_state(job.model)))
            return found

    model = _model()
    Spy(rounds=3, training=_sgd(num_steps=2, learning_rate=0.3)).fit(model, None, pairs, seed=2)
    rejected = [[row["rejected"]["input_ids"] for row in rows] for rows, _ in built]
    assert [len(rows) for rows in rejected] == [6, 12, 12]
    assert rejected[1][6:] == rejected[0]
    assert rejected[2][6:] == rejected[1][:6]
    assert rejected[1][:6] != rejected[0]
    for rows, state in built:
        opponent = _model()
        opponent.load_state_dict(state)
        for row, pair in zip(rows, pairs * 2, strict=False):
            start = len(pair.prompt_ids)
            assert row["chosen"] == supervised_row(pair)
            margin = _log_prob(opponent, pair.prompt_ids, pair.target_ids) - _log_prob(
                opponent, pair.prompt_ids, tuple(row["rejected"]["input_ids"][start:])
            )
            assert row["reference"] == pytest.approx(margin.item(), abs=1e-4)


def _model_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_samples_of_spin_end_as_the_reference_answer_does_or_are_cut():
    pairs = _pairs(40)
    rows = SPIN(rounds=1).build(_job(_model(), pairs)).rows
    longest = max(len(pair.target_ids) for pair in pairs)
    ended = 0
    for row, pair in zip(rows, pairs, strict=True):
        sample = row["rejected"]["input_ids"][len(pair.prompt_ids) :]
        assert END not in sample[:-1]
        assert sample[-1] == END or len(sample) == longest
        ended += sample[-1] == END
    assert 0 < ended < len(pairs)


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(InvalidInput, match="top_k is how many embeddings"):
        TwoPassScheduledSampling(top_k=0)
    with pytest.raises(InvalidInput, match="alpha is the size of the noise"):
        NEFTune(alpha=-1.0)
    with pytest.raises(InvalidInput, match="scale is above 0"):
        SPIN(scale=0.0)


def test_a_gold_batch_of_the_stepwise_methods_is_that_of_supervised_fine_tuning():
    pairs = _pairs(5)
    for method in (OnlineScheduledSampling(), TwoPassScheduledSampling()):
        batch = method.batch(method.build(_job(_model(), pairs)).rows)
        plain = collate([supervised_row(pair) for pair in pairs])
        assert all(torch.equal(batch[name], plain[name]) for name in plain)
