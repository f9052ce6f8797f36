"""Exposure metrics against literal implementations without batches or caches, and on models whose behaviour is known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from core.errors import InvalidInput
from core.llm.examples import EncodedPair
from sched_sampling.evaluation import exposure_gap, noisy_accuracy, position_curves, recovery_rate
from sched_sampling.mixing import mix_rows
from sched_sampling.regret import excess_accumulated_error

VOCABULARY = 11


class Table(PreTrainedModel):
    """A model whose next token depends on its position and the last token only, by a table of logits."""

    def __init__(self, logits: torch.Tensor, end_id: int | None = None) -> None:
        config = PreTrainedConfig(bos_token_id=None, eos_token_id=end_id)
        config.vocab_size = logits.shape[-1]
        super().__init__(config)
        self.table = nn.Parameter(logits)
        self.generation_config = SimpleNamespace(eos_token_id=end_id)

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False):
        assert not self.training, "metrics are measured in evaluation mode"
        width = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
        positions = torch.arange(width - input_ids.shape[1], width)
        cache = SimpleNamespace(batch_select_indices=lambda indices: None, layers=[None])
        return SimpleNamespace(logits=self.table[positions, input_ids], past_key_values=cache)


def _peaked(successor, length: int = 16, modulus: int = VOCABULARY, sharpness: float = 30.0) -> torch.Tensor:
    """Logits that put nearly all mass on successor(position, token), where `position` is that of `token`."""
    logits = torch.zeros(length, modulus, modulus)
    for position in range(length):
        for token in range(modulus):
            logits[position, token, successor(position, token)] = sharpness
    return logits


def _counting_pairs(length: int = 8) -> list[EncodedPair]:
    return [EncodedPair((a,), tuple((a + t) % VOCABULARY for t in range(1, length + 1))) for a in range(VOCABULARY)]


def _sharp(kind: str, *, end_id: int | None = 1, seed: int = 0):
    """A random model that is far from uniform, with dropout on, as between two rounds of training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "gpt2":
            config = GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=40,
                n_embd=32,
                n_layer=2,
                n_head=2,
                bos_token_id=None,
                eos_token_id=end_id,
            )
            model = GPT2LMHeadModel(config)
        else:
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=VOCABULARY,
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    bos_token_id=None,
                    eos_token_id=end_id,
                )
            )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5) if parameter.ndim > 1 else None
    return model.train()


def _ragged_pairs(seed: int = 0, num: int = 7) -> list[EncodedPair]:
    """Prompts and answers of many lengths; the answers end with token 1."""
    rng = np.random.default_rng(seed)
    return [
        EncodedPair(
            tuple(rng.integers(2, VOCABULARY, rng.integers(1, 9)).tolist()),
            (*rng.integers(2, VOCABULARY, rng.integers(3, 10)).tolist(), 1),
        )
        for _ in range(num)
    ]


@torch.no_grad()
def _next(model, ids: list[int]) -> torch.Tensor:
    """The logits behind one sequence, from one forward pass over it alone."""
    was = model.training
    model.eval()
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
    model.train(was)
    return logits


def _decoded(model, pair: EncodedPair, forced: dict[int, int], ends=(1,)) -> list[bool]:
    """Whether greedy decoding gives gold at each position; `forced` tokens stand where they must."""
    answer: list[int] = []
    right, over = [], False
    for t, gold in enumerate(pair.target_ids):
        token = forced[t] if t in forced else int(_next(model, [*pair.prompt_ids, *answer]).argmax())
        right.append(token == gold and not over)
        over = over or (t not in forced and token in ends)
        answer.append(token)
    return right


def _own_answers(model, pairs: list[EncodedPair]) -> list[EncodedPair]:
    """The pairs with the model's own greedy answers as gold, so that a model of random weights is sometimes right."""
    results = []
    for pair in pairs:
        answer: list[int] = []
        for _ in pair.target_ids:
            answer.append(int(_next(model, [*pair.prompt_ids, *answer]).argmax()))
        results.append(EncodedPair(pair.prompt_ids, tuple(answer)))
    return results


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_recovery_is_that_of_a_literal_loop_over_prefixes_and_all_wrong_tokens(kind):
    model = _sharp(kind)
    pairs = _own_answers(model, _ragged_pairs(num=3))
    found = recovery_rate(model, pairs, wrong_tokens=VOCABULARY - 1, candidates=range(VOCABULARY), max_batch_tokens=200)
    by_pair, lags = [], {}
    for pair in pairs:
        shares = []
        for t in range(1, len(pair.target_ids) - 2):
            for token in set(range(VOCABULARY)) - {pair.target_ids[t]}:
                forced = {**dict(enumerate(pair.target_ids[:t])), t: token}
                right = _decoded(model, pair, forced)[t + 1 :]
                shares.append(np.mean(right))
                for lag, value in enumerate(right):
                    lags.setdefault(lag, []).append(value)
        by_pair.append(np.mean(shares))
    assert 0 < np.mean(by_pair) < 1
    np.testing.assert_allclose(found.by_pair, by_pair)
    np.testing.assert_allclose(found.by_lag, [np.mean(lags[lag]) for lag in sorted(lags)])
    assert found.value == pytest.approx(np.mean(by_pair))


def test_a_model_that_counts_positions_recovers_at_once_and_one_that_copies_forward_never():
    pairs = _counting_pairs()
    absolute = Table(_peaked(lambda position, token: (position + 1) % VOCABULARY))
    relative = Table(_peaked(lambda position, token: (token + 1) % VOCABULARY))
    assert recovery_rate(absolute, pairs[:1]).value == 1.0
    assert recovery_rate(relative, pairs).value == 0.0


def test_what_follows_an_end_that_the_model_chose_is_wrong_even_if_it_equals_gold():
    end = 10
    # Behind 7 comes the end, and behind the end what gold would have; elsewhere the position decides.
    logits = _peaked(lambda position, token: end if token == 7 else (position + 1) % VOCABULARY)
    pair = EncodedPair((0,), (1, 2, 3, 4, 5, 6))
    ends, goes_on = Table(logits, end_id=end), Table(logits)
    wrong = [7, 8, 9]
    assert recovery_rate(ends, [pair], candidates=wrong).value == pytest.approx(2 / 3)
    # The same table without an end: only the one token behind each 7 is wrong.
    shares = [np.mean([0, *[1] * (6 - t - 2)]) for t in (1, 2, 3)]
    assert recovery_rate(goes_on, [pair], candidates=wrong).value == pytest.approx((2 + np.mean(shares)) / 3)


def test_wrong_tokens_are_never_gold_never_special_and_all_different():
    class Seen(Table):
        def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False):
            if past_key_values is None:
                self.seen.update(tuple(row) for row in input_ids.tolist())
            return super().forward(input_ids, attention_mask, past_key_values, use_cache)

    model = Seen(_peaked(lambda position, token: (token + 1) % VOCABULARY), end_id=10)
    model.seen = set()
    pair = EncodedPair((0,), (1, 2, 3, 4))
    recovery_rate(model, [pair], wrong_tokens=8)
    # The only prefix is (0, 1); wrong are eight of the nine tokens that are neither gold (2) nor the end (10).
    assert len(model.seen) == 8
    assert {row[:2] for row in model.seen} == {(0, 1)}
    assert {row[2] for row in model.seen} < {0, 1, 3, 4, 5, 6, 7, 8, 9}


def test_drawn_positions_give_about_the_recovery_of_all_positions():
    model = _sharp("gpt2")
    pairs = _own_answers(model, _ragged_pairs(num=12))
    all_positions = recovery_rate(model, pairs, wrong_tokens=10, candidates=range(VOCABULARY)).value
    drawn = [recovery_rate(model, pairs, positions=1, seed=seed).value for seed in range(8)]
    assert np.std(drawn) > 0
    assert np.mean(drawn) == pytest.approx(all_positions, abs=0.08)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_noisy_accuracy_is_that_of_a_literal_loop_under_the_same_noise(kind):
    model = _sharp(kind)
    pairs = _own_answers(model, _ragged_pairs(1))
    rate, draws, seed = 0.3, 4, 7
    found = noisy_accuracy(
        model, pairs, rate=rate, draws=draws, seed=seed, candidates=range(2, 11), max_batch_tokens=150
    )
    by_pair, positions, slips, returns = [], {}, [], []
    for i, pair in enumerate(pairs):
        counted = []
        for draw in range(draws):
            rng = np.random.default_rng([seed, i, draw])
            replaced = rng.random(len(pair.target_ids)) < rate
            noise = rng.choice(np.arange(2, 11), len(replaced))
            right = _decoded(model, pair, {int(t): int(noise[t]) for t in np.flatnonzero(replaced)})
            before = True
            for t, value in enumerate(right):
                (slips if before else returns).append(value)
                before = value
                if not replaced[t]:
                    counted.append(value)
                    positions.setdefault(t, []).append(value)
        by_pair.append(np.mean(counted))
    np.testing.assert_allclose(found.by_pair, by_pair)
    np.testing.assert_allclose(found.by_position, [np.mean(positions[t]) for t in sorted(positions)])
    assert found.value == pytest.approx(np.mean(by_pair))
    assert found.slips == pytest.approx(1 - np.mean(slips))
    assert found.returns == pytest.approx(np.mean(returns))


def test_without_noise_noisy_accuracy_is_plain_greedy_accuracy():
    pairs = _counting_pairs()
    perfect = Table(_peaked(lambda position, token: (token + 1) % VOCABULARY))
    late = Table(_peaked(lambda position, token: (token + (1 if position < 4 else 2)) % VOCABULARY))
    assert noisy_accuracy(perfect, pairs, rate=0.0).value == 1.0
    assert noisy_accuracy(perfect, pairs, rate=0.0).slips == 0.0
    assert noisy_accuracy(perfect, pairs, rate=0.0).returns is None
    np.testing.assert_array_equal(noisy_accuracy(late, pairs, rate=0.0).by_position, [1, 1, 1, 1, 0, 0, 0, 0])


def test_a_model_that_copies_forward_follows_the_two_state_law_without_recovery():
    model = Table(_peaked(lambda position, token: (token + 1) % VOCABULARY))
    found = noisy_accuracy(model, _counting_pairs(12), rate=0.05, draws=150)
    slip = 0.05 * (VOCABULARY - 1) / VOCABULARY
    np.testing.assert_allclose(found.by_position, (1 - slip) ** np.arange(12), atol=0.025)
    assert found.slips == pytest.approx(slip, abs=0.006)
    # A second replacement may happen to be gold.
    assert found.returns == pytest.approx(0.05 / VOCABULARY, abs=0.005)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_position_curves_and_gap_are_those_of_one_forward_pass_a_token(kind):
    model = _sharp(kind)
    pairs = _ragged_pairs(2)
    samples, seed = 3, 5
    curves = position_curves(model, pairs, samples=samples, seed=seed, max_batch_tokens=120)
    gap = exposure_gap(model, pairs, samples=samples, seed=seed)
    many = [pair for pair in pairs for _ in range(samples)]
    own = [row.tokens for row in mix_rows(model, many, 1.0, protected_ids=[1], seed=seed)]
    assert any(row != pair.target_ids for row, pair in zip(own, many, strict=True))
    longest = max(len(pair.target_ids) for pair in pairs)
    cells: dict[str, list[list[float]]] = {
        name: [[] for _ in range(longest)] for name in ("gold", "own", "gold right", "own right")
    }
    gaps = np.zeros(len(pairs))
    for i, pair in enumerate(pairs):
        contexts = [("gold", pair.target_ids), *(("own", row) for row in own[i * samples : (i + 1) * samples])]
        for name, context in contexts:
            nll = []
            for t, gold in enumerate(pair.target_ids):
                logits = _next(model, [*pair.prompt_ids, *context[:t]])
                nll.append(-float(logits.log_softmax(-1)[gold]))
                cells[name][t].append(nll[-1])
                cells[f"{name} right"][t].append(float(logits.argmax() == gold))
            gaps[i] += np.mean(nll) / samples if name == "own" else -np.mean(nll)
    for name, found in (
        ("gold", curves.gold_nll),
        ("own", curves.own_nll),
        ("gold right", curves.gold_accuracy),
        ("own right", curves.own_accuracy),
    ):
        np.testing.assert_allclose(found, [np.mean(values) for values in cells[name]], atol=2e-5)
    assert curves.count.tolist() == [len(values) for values in cells["gold"]]
    np.testing.assert_allclose(gap.by_pair, gaps, atol=2e-5)
    assert gap.value == pytest.approx(gaps.mean(), abs=2e-5)


def test_a_model_that_looks_at_positions_only_has_no_gap_and_one_that_copies_forward_has():
    noisy = [
        _peaked(rule, sharpness=3.0)
        for rule in (lambda p, token: (p + 1) % VOCABULARY, lambda p, token: (token + 1) % VOCABULARY)
    ]
    pairs = [EncodedPair((0,), tuple(range(1, 9)))] * 20
    assert exposure_gap(Table(noisy[0]), pairs).value == pytest.approx(0, abs=1e-6)
    assert exposure_gap(Table(noisy[1]), pairs).value > 0.5


def test_mistakes_behind_gold_tokens_do_not_cascade_and_own_ones_do():
    """Counting from the last token, wrong with probability s: behind gold tokens the next answer is always the same."""
    model = Table(_peaked(lambda position, token: (token + 1) % VOCABULARY, sharpness=5.0))
    slip = 10 / (np.exp(5.0) + 10)
    pairs = _counting_pairs(12)
    isolated, cascading = (
        position_curves(model, pairs, proposal=proposal, samples=200).own_accuracy for proposal in ("gold", "mixed")
    )
    np.testing.assert_allclose(isolated[1:], 1 - slip, atol=0.025)
    assert isolated[0] == cascading[0] == 1
    # A slip by d is undone by another of -d, which is rare.
    np.testing.assert_allclose(cascading, (1 - slip) ** np.arange(12), atol=0.04)


def _regret_by_enumeration(table: torch.Tensor, truth, prompt: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Accumulated regret under model and true prefixes, exactly: prefixes enter through their last token only."""
    model = table.double().softmax(-1).numpy()
    results = []
    for own in (True, False):
        weight = np.zeros(VOCABULARY)
        weight[prompt] = 1
        regret = []
        for position in range(length):
            true = np.stack([truth(position, token) for token in range(VOCABULARY)])
            divergence = (true * (np.log(np.maximum(true, 1e-300)) - np.log(model[position]))).sum(-1)
            regret.append(weight @ divergence)
            weight = weight @ (model[position] if own else true)
        results.append(np.cumsum(regret))
    return results[0], results[1]


def test_excess_accumulated_error_is_that_of_exact_enumeration():
    generator = torch.Generator().manual_seed(0)
    table = 1.5 * torch.randn(8, VOCABULARY, VOCABULARY, generator=generator)
    true = (1.5 * torch.randn(8, VOCABULARY, VOCABULARY, generator=generator)).double().softmax(-1).numpy()
    length, prompt = 5, 3
    found = excess_accumulated_error(
        Table(table),
        [(prompt,)],
        lambda start, prefix: true[len(prefix), [*start, *prefix][-1]],
        length=length,
        samples=1500,
    )
    own, gold = _regret_by_enumeration(table, lambda position, token: true[position, token], prompt, length)
    np.testing.assert_allclose(found.regret, own, rtol=0.03)
    np.testing.assert_allclose(found.gold_regret, gold, rtol=0.03)
    np.testing.assert_allclose(found.excess, (own - gold) / gold, atol=0.04)
    assert found.excess[0] == pytest.approx(0, abs=1e-9)


def test_a_model_whose_regret_does_not_depend_on_the_prefix_has_no_excess():
    truth = np.eye(VOCABULARY)
    model = Table(_peaked(lambda position, token: (position + 1) % VOCABULARY, sharpness=2.0))
    found = excess_accumulated_error(model, [(0,)], lambda _, prefix: truth[len(prefix) + 1], length=6, samples=40)
    np.testing.assert_allclose(found.excess, 0, atol=1e-6)


def test_a_model_that_is_the_truth_is_refused_since_nothing_can_be_in_excess():
    table = torch.zeros(8, VOCABULARY, VOCABULARY)
    with pytest.raises(InvalidInput, match="no regret"):
        excess_accumulated_error(Table(table), [(0,)], lambda *_: np.full(VOCABULARY, 1 / VOCABULARY), length=3)


def test_a_truth_that_is_no_distribution_is_refused():
    with pytest.raises(InvalidInput, match="sum to 1"):
        excess_accumulated_error(_sharp("gpt2"), [(0,)], lambda *_: np.full(VOCABULARY, 0.2), length=3)


METRICS = [recovery_rate, noisy_accuracy, position_curves, exposure_gap]


@pytest.mark.parametrize("metric", METRICS)
def test_every_module_is_in_its_own_mode_afterwards_also_when_the_model_fails(metric):
    model = _sharp("llama")
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    metric(model, _ragged_pairs())
    assert [module.training for module in model.modules()] == before
    model.forward = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        metric(model, _ragged_pairs())
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("metric", METRICS)
def test_batches_change_nothing(metric):
    model, pairs = _sharp("llama"), _ragged_pairs(3)
    together, alone = (metric(model, pairs, max_batch_tokens=size) for size in (4096, 1))
    for name, value in vars(together).items():
        np.testing.assert_allclose(value, getattr(alone, name), atol=1e-5)


def test_a_seed_decides_the_noise_and_another_seed_draws_other_noise():
    model, pairs = _sharp("gpt2"), _ragged_pairs(4)
    pairs = _own_answers(model, pairs)
    first, again, other = (noisy_accuracy(model, pairs, rate=0.3, seed=seed).value for seed in (1, 1, 2))
    assert first == again != other


def test_noise_that_leaves_no_token_of_a_pair_alone_is_refused_and_the_pair_is_named():
    model, pairs = _sharp("gpt2"), [EncodedPair((2,), (3, 4) * 6), EncodedPair((2,), (3, 1))]
    seeds = range(20)
    replaced = [bool((np.random.default_rng([seed, 1, 0]).random(2) < 0.9).all()) for seed in seeds]
    assert 0 < sum(replaced) < len(replaced)
    for seed, nothing in zip(seeds, replaced, strict=True):
        if nothing:
            with pytest.raises(InvalidInput, match=r"Pair 1 has no token .* 2 tokens.* more draws"):
                noisy_accuracy(model, [EncodedPair((2,), (3,) * 100), pairs[1]], rate=0.9, draws=1, seed=seed)
    assert np.isfinite(noisy_accuracy(model, pairs, rate=0.9, draws=100).by_pair).all()


@pytest.mark.filterwarnings("error")
def test_a_position_that_the_noise_always_replaced_is_nan_and_the_rest_are_numbers():
    found = noisy_accuracy(_sharp("gpt2"), [EncodedPair((2,), (3, 4) * 6)], rate=0.8, draws=1)
    alone = np.random.default_rng([0, 0, 0]).random(12) >= 0.8
    assert 0 < alone.sum() < 12
    np.testing.assert_array_equal(np.isnan(found.by_position), ~alone)
    assert np.isfinite(found.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: recovery_rate(model, []),
        lambda model: recovery_rate(model, [EncodedPair((2,), (3, 4, 1))]),
        lambda model: recovery_rate(model, [EncodedPair((2,), (3, 4, 5, 1))], wrong_tokens=2),
        lambda model: recovery_rate(model, [EncodedPair((2,), (3, 4, 5, 1))], candidates=[3, 4, 5]),
        lambda model: recovery_rate(model, [EncodedPair((2,), (3, 4, 5, 1))], candidates=[2, 3, 4, 5, 99]),
        lambda model: recovery_rate(model, [EncodedPair((2,), (3, 4, 5, 1))], positions=0),
        lambda model: noisy_accuracy(model, [EncodedPair((2,), (3, 1))], rate=1.0),
        lambda model: noisy_accuracy(model, [EncodedPair((2,), (3, 1))], draws=0),
        lambda model: noisy_accuracy(model, [EncodedPair((), (3, 1))]),
        lambda model: position_curves(model, [EncodedPair((2,), ())]),
        lambda model: exposure_gap(model, [EncodedPair((2,), (3, 1))], samples=0),
        lambda model: excess_accumulated_error(model, [], lambda *_: np.ones(1), length=2),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(call):
    model = _sharp("gpt2")
    model.forward = lambda **_: 1 / 0
    with pytest.raises(InvalidInput):
        call(model)
