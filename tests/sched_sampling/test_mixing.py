"""The mixed sequence against a literal implementation, token by token; both engines, all proposals, any batch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from core.errors import InvalidInput
from core.llm.examples import EncodedPair
from sched_sampling import engines
from sched_sampling.bash import bash_dataset
from sched_sampling.mixing import mix, mix_rows, own_rollouts
from sched_sampling.noise import coins, gumbel

VOCABULARY = 23
PROTECTED = (0, 1)


def _model(kind: str = "gpt2", seed: int = 0):
    torch.manual_seed(seed)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2)
        model = GPT2LMHeadModel(config)
    elif kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
            )
        )
    elif kind == "mamba":
        # A state instead of keys and values, under another name.
        model = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4))
    elif kind == "qwen3_next":
        # Linear and full attention: a cache from which no rows can be selected.
        model = Qwen3NextForCausalLM(
            Qwen3NextConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                layer_types=["linear_attention", "full_attention"],
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                linear_num_key_heads=2,
                linear_num_value_heads=4,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
                mlp_only_layers=[0, 1],
                max_position_embeddings=64,
            )
        )
    else:
        # A sliding window of 5: its cache cannot be taken back.
        model = MistralForCausalLM(
            MistralConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                sliding_window=5,
            )
        )
    with torch.no_grad():
        for parameter in model.parameters():
            # Initial weights make nearly uniform predictions, which would hide a wrong context.
            parameter.mul_(6) if parameter.ndim > 1 else None
    # Dropout is on, as it would be between two training rounds; mixing has to turn it off.
    return model.train()


def _pairs(num: int, seed: int, longest: int = 20) -> list[EncodedPair]:
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(num):
        prompt = rng.integers(2, VOCABULARY, rng.integers(1, 9)).tolist()
        target = rng.integers(2, VOCABULARY, rng.integers(1, longest)).tolist()
        pairs.append(EncodedPair(tuple(prompt), (*target, 1)))
    return pairs


@torch.no_grad()
def literal(model, pair, beta, *, seed, row, temperature=1.0, top_k=0, top_p=1.0, protected=(), proposal="mixed"):
    """One forward pass of the whole prefix for every token, one row at a time, in the order in which they are read."""
    model.eval()
    betas = [beta] * len(pair.target_ids) if isinstance(beta, float) else beta
    z: list[int] = []
    replaced = []
    for t, gold in enumerate(pair.target_ids):
        where = (torch.tensor([row]), torch.tensor([t]))
        coin = float(coins(seed, *where))
        token, drawn = gold, False
        if coin < betas[t] and t < len(pair.target_ids) - 1:
            context = [*pair.prompt_ids, *(z if proposal == "mixed" else pair.target_ids[:t])]
            logits = model(input_ids=torch.tensor([context])).logits[0, -1].double()
            if temperature == 0:
                choice = int(logits.argmax())
            else:
                scaled = logits / temperature
                allowed = scaled.argsort(descending=True)[: top_k or None]
                mass = scaled[allowed].softmax(0)
                allowed = [int(v) for i, v in enumerate(allowed) if float(mass[:i].sum()) < top_p]
                noise = gumbel(seed, *where, torch.arange(VOCABULARY)[None])[0]
                choice = max(allowed, key=lambda v: float(scaled[v] + noise[v]))
            if choice not in protected:
                token, drawn = choice, True
        z.append(token)
        replaced.append(drawn)
    return tuple(z), tuple(replaced)


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 1.5, "top_k": 5},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 7, "top_p": 0.6},
]


@pytest.mark.parametrize(
    ("kind", "beta"),
    [*itertools.product(["gpt2", "llama", "mistral"], [0.1, 0.4, 1.0]), ("qwen3_next", 0.4), ("mamba", 0.4)],
)
def test_every_engine_is_the_literal_implementation(kind: str, beta: float):
    model, pairs = _model(kind), _pairs(7, seed=1)
    for i, options in enumerate(SETTINGS if kind in ("gpt2", "llama", "mistral") else SETTINGS[:2]):
        row_ids = range(10 * i, 10 * i + len(pairs))
        wanted = [
            literal(model, pair, beta, seed=4, row=row, protected=PROTECTED, **options)
            for pair, row in zip(pairs, row_ids, strict=True)
        ]
        for engine in ("parallel", "sequential", "auto"):
            found = mix_rows(
                model, pairs, beta, seed=4, row_ids=row_ids, protected_ids=PROTECTED, engine=engine, **options
            )
            assert [(row.tokens, row.replaced) for row in found] == wanted, (options, engine)
    assert any(row != pair.target_ids for (row, _), pair in zip(wanted, pairs, strict=True))


def test_the_gold_proposal_is_the_literal_one_and_takes_one_pass():
    model, pairs = _model(), _pairs(9, seed=2)
    found = mix_rows(model, pairs, 0.6, seed=1, proposal="gold", protected_ids=PROTECTED)
    for row, (pair, mixed) in enumerate(zip(pairs, found, strict=True)):
        assert (mixed.tokens, mixed.replaced) == literal(
            model, pair, 0.6, seed=1, row=row, protected=PROTECTED, proposal="gold"
        )
        assert mixed.passes <= 1
    mixed = mix_rows(model, pairs, 0.6, seed=1, protected_ids=PROTECTED)
    assert any(a.tokens != b.tokens for a, b in zip(found, mixed, strict=True)), "the prefixes make no difference"


@pytest.mark.parametrize("kind", ["qwen3_next", "mamba"])
def test_the_gold_proposal_needs_no_cache(kind: str):
    model, pairs = _model(kind), _pairs(4, seed=2)
    for row, (pair, mixed) in enumerate(zip(pairs, mix_rows(model, pairs, 0.6, proposal="gold"), strict=True)):
        assert (mixed.tokens, mixed.replaced) == literal(model, pair, 0.6, seed=0, row=row, proposal="gold")


def test_a_switch_to_the_sequential_engine_in_the_middle_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    model, pairs = _model("llama"), _pairs(8, seed=3, longest=40)
    whole = mix_rows(model, pairs, 0.25, seed=2, engine="sequential")
    calls = []
    monkeypatch.setattr("sched_sampling.mixing.MAX_PASSES", 2)
    real = engines.sequential

    def watched(model, batch, proposal):
        calls.append(bool(batch.open.any()))
        real(model, batch, proposal)

    monkeypatch.setattr("sched_sampling.mixing.sequential", watched)
    assert [row.tokens for row in mix_rows(model, pairs, 0.25, seed=2)] == [row.tokens for row in whole]
    assert any(calls), "two passes settled everything: nothing was left to the sequential engine"


def test_no_row_needs_more_passes_than_it_has_drawn_tokens():
    # One pass settles at least the first open position, and one that changes nothing settles all.
    model, pairs = _model(), _pairs(20, seed=4)
    longest = max(len(pair.target_ids) - 1 for pair in pairs)
    for row in mix_rows(model, pairs, 1.0, engine="parallel", temperature=2.0):
        assert row.passes <= longest


@pytest.mark.parametrize("window", [1, 3, 1000])
def test_any_window_settles_the_same_tokens(monkeypatch: pytest.MonkeyPatch, window: int):
    model, pairs = _model("llama"), _pairs(9, seed=8, longest=40)
    whole = mix_rows(model, pairs, 0.4, seed=2, engine="sequential")
    real = engines.parallel
    monkeypatch.setattr("sched_sampling.mixing.parallel", lambda *a, **o: real(*a, **o, window=window))
    assert [row.tokens for row in mix_rows(model, pairs, 0.4, seed=2, engine="parallel")] == [
        row.tokens for row in whole
    ]


def test_a_row_is_mixed_alike_in_any_company_and_any_order():
    model, pairs = _model("llama"), _pairs(12, seed=5)
    together = mix_rows(model, pairs, 0.3, seed=6)
    order = np.random.default_rng(0).permutation(12)
    shuffled = mix_rows(model, [pairs[i] for i in order], 0.3, seed=6, row_ids=order.tolist(), max_batch_tokens=40)
    for position, i in enumerate(order):
        assert shuffled[position].tokens == together[i].tokens
        assert mix_rows(model, [pairs[i]], 0.3, seed=6, row_ids=[int(i)])[0].tokens == together[i].tokens


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_tensors_give_what_single_rows_give(side: str):
    model, pairs = _model(), _pairs(6, seed=7)
    width = max(len(pair.prompt_ids) for pair in pairs)
    prompts, prompt_mask = torch.zeros(6, width, dtype=torch.long), torch.zeros(6, width, dtype=torch.bool)
    longest = max(len(pair.target_ids) for pair in pairs)
    targets, target_mask = torch.zeros(6, longest, dtype=torch.long), torch.zeros(6, longest, dtype=torch.bool)
    for i, pair in enumerate(pairs):
        place = slice(width - len(pair.prompt_ids), width) if side == "left" else slice(0, len(pair.prompt_ids))
        prompts[i, place], prompt_mask[i, place] = torch.tensor(pair.prompt_ids), True
        targets[i, : len(pair.target_ids)] = torch.tensor(pair.target_ids)
        target_mask[i, : len(pair.target_ids)] = True
    found = mix(model, prompts, targets, 0.5, prompt_mask=prompt_mask, target_mask=target_mask, seed=3)
    changed = 0
    for i, pair in enumerate(pairs):
        tokens, replaced = literal(model, pair, 0.5, seed=3, row=i)
        assert tuple(found.tokens[i, : len(tokens)].tolist()) == tokens
        assert tuple(found.replaced[i, : len(tokens)].tolist()) == replaced
        assert not found.tokens[i, len(tokens) :].any()
        assert not found.replaced[i, len(tokens) :].any()
        changed += sum(a != b for a, b in zip(tokens, pair.target_ids, strict=True))
    assert found.changed == pytest.approx(changed / sum(len(pair.target_ids) for pair in pairs))


def test_at_beta_one_the_first_drawn_token_has_the_distribution_of_the_model():
    model = _model().eval()
    pair = EncodedPair((5, 9), (3, 4, 1))
    n = 4000
    found = mix_rows(model, [pair] * n, 1.0, temperature=1.3)
    counts = np.bincount([row.tokens[0] for row in found], minlength=VOCABULARY)
    with torch.no_grad():
        expected = (model(input_ids=torch.tensor([[5, 9]])).logits[0, -1] / 1.3).softmax(0).double().numpy()
    assert expected.min() * n > 5
    assert stats.chisquare(counts, expected / expected.sum() * n).pvalue > 1e-3


def test_coins_are_bernoulli_independent_over_rows_and_positions_and_spare_the_last_token():
    model = _model()
    pairs = [EncodedPair((2,), (3,) * 11 + (1,))] * 2000
    replaced = np.array([row.replaced for row in mix_rows(model, pairs, 0.3, proposal="random", seed=1)])
    assert not replaced[:, -1].any()
    free = replaced[:, :-1]
    assert stats.binomtest(int(free.sum()), free.size, 0.3).pvalue > 1e-3
    for a, b in itertools.pairwise(range(11)):
        assert abs(np.corrcoef(free[:, a], free[:, b])[0, 1]) < 0.08
    counts = np.bincount(free.sum(axis=1), minlength=12)[:8]
    assert (
        stats.chisquare(counts, stats.binom(11, 0.3).pmf(range(8)) * counts.sum() / stats.binom(11, 0.3).cdf(7)).pvalue
        > 1e-3
    )


def test_beta_may_be_given_for_each_position():
    model, pairs = _model(), _pairs(6, seed=9)
    longest = max(len(pair.target_ids) for pair in pairs)
    betas = [1.0 if t % 2 else 0.0 for t in range(longest)]
    for row, (pair, mixed) in enumerate(zip(pairs, mix_rows(model, pairs, betas, seed=2), strict=True)):
        assert (mixed.tokens, mixed.replaced) == literal(model, pair, betas, seed=2, row=row)


def test_random_tokens_are_uniform_over_what_is_not_protected_and_share_the_coins():
    model = _model()
    pairs = [EncodedPair((2,), (3,) * 30 + (1,))] * 400
    random = mix_rows(model, pairs, 0.5, seed=8, proposal="random", protected_ids=PROTECTED)
    drawn = [token for row in random for token, r in zip(row.tokens, row.replaced, strict=True) if r]
    counts = np.bincount(drawn, minlength=VOCABULARY)
    assert counts[list(PROTECTED)].sum() == 0
    assert stats.chisquare(counts[2:]).pvalue > 1e-3
    gold = mix_rows(model, pairs[:20], 0.5, seed=8, proposal="gold")
    assert [row.replaced for row in gold] == [row.replaced for row in random[:20]]


def test_a_rollout_is_taken_token_by_token_and_gold_stays_beyond_its_end():
    model = _model()
    pair = EncodedPair((2, 3), (4, 5, 6, 7, 8, 1))
    (row,) = mix_rows(model, [pair], 1.0, proposal="rollout", rollouts=[(9, 0, 11)], protected_ids=PROTECTED)
    assert row.tokens == (9, 5, 11, 7, 8, 1)
    assert row.replaced == (True, False, True, False, False, False)


def test_own_rollouts_of_one_prompt_differ_and_follow_the_model():
    model = _model().eval()
    pairs = [EncodedPair((2, 3), (4,) * 8 + (1,))] * 12 + [EncodedPair((5,), (4, 1))]
    rows = mix_rows(model, pairs, 1.0, proposal="rollout", temperature=1.0, protected_ids=PROTECTED)
    assert len({row.tokens for row in rows[:12]}) > 6
    greedy = mix_rows(model, pairs[:2], 1.0, proposal="rollout", temperature=0.0)
    with torch.no_grad():
        ids = [2, 3]
        for _ in range(8):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert [row.tokens for row in greedy] == [(*ids[2:], 1)] * 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rollouts_do_not_depend_on_the_size_of_the_files(temperature: float):
    # Equal prompts, in several files, with answers of several lengths.
    pairs = [EncodedPair((2, 3), (4,) * (4 + i % 5) + (1,)) for i in range(16)]
    one, eight = (
        bash_dataset(
            _model(), None, pairs, 0.8, proposal="rollout", temperature=temperature, seed=3, rows_per_file=size
        ).to_list()
        for size in (1, 8)
    )
    assert one == eight
    assert len({tuple(row["input_ids"][:6]) for row in one}) > (6 if temperature else 1)


def test_a_rollout_stops_before_its_first_protected_token():
    model, pairs = _model(), [EncodedPair((2, 3), (4,) * 12 + (1,))] * 30
    free, cut = (
        own_rollouts(model, pairs, engines.Proposal(seed=5, protected_ids=ids), row_ids=range(30))
        for ids in ((), PROTECTED)
    )
    assert any(len(row) < 12 for row in cut)
    for whole, row in zip(free, cut, strict=True):
        assert len(whole) == 12
        assert row == whole[: len(row)]
        assert not set(row) & set(PROTECTED)
        assert len(row) == 12 or whole[len(row)] in PROTECTED


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("pair", [EncodedPair((2, 40), (3, 1)), EncodedPair((2,), (3, 40, 1))])
def test_token_ids_of_another_vocabulary_are_refused(pair: EncodedPair, beta: float):
    with pytest.raises(InvalidInput, match=r"Row 1 of the pairs has the token 40; the vocabulary .* has 23 tokens"):
        mix_rows(_model(), [EncodedPair((2,), (3, 1)), pair], beta)


def test_rollouts_of_another_vocabulary_are_refused():
    pairs = [EncodedPair((2,), (3, 4, 1))]
    with pytest.raises(InvalidInput, match="Row 0 of the rollouts has the token 23"):
        mix_rows(_model(), pairs, 0.5, proposal="rollout", rollouts=[(5, 23)])


def test_the_modes_of_the_modules_come_back_also_after_an_error():
    model = _model()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    mix_rows(model, _pairs(2, seed=0), 0.5)
    assert [module.training for module in model.modules()] == before
    model.forward = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        mix_rows(model, _pairs(2, seed=0), 1.0)
    assert [module.training for module in model.modules()] == before


def test_half_precision_logits_are_drawn_as_their_single_precision_values():
    logits = torch.randn(50, 40).to(torch.bfloat16)
    proposal = engines.Proposal(seed=3)
    where = (torch.arange(50), torch.zeros(50, dtype=torch.long))
    assert torch.equal(proposal.draw(logits, *where), proposal.draw(logits.float(), *where))


def test_a_vocabulary_is_drawn_in_pieces_as_in_one(monkeypatch: pytest.MonkeyPatch):
    logits, where = torch.randn(50, 40), (torch.arange(50), torch.arange(50))
    whole = engines.Proposal(seed=3, top_p=0.9).draw(logits, *where)
    monkeypatch.setattr(engines, "_CHUNK", 120)
    assert torch.equal(engines.Proposal(seed=3, top_p=0.9).draw(logits, *where), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.2}, "from 0 to 1; got 1.2"),
        ({"beta": float("nan")}, "from 0 to 1"),
        ({"beta": [0.1, 0.2]}, "one for each position"),
        ({"beta": 0.1, "temperature": -1.0}, "temperature"),
        ({"beta": 0.1, "top_k": -2}, "top_k"),
        ({"beta": 0.1, "top_p": 0.0}, "top_p"),
        ({"beta": 0.1, "proposal": "mixd"}, "Did you mean mixed"),
        ({"beta": 0.1, "engine": "fast"}, "Unknown engine"),
        ({"beta": 0.1, "row_ids": [1]}, "row_ids"),
        ({"beta": 0.1, "proposal": "rollout", "rollouts": [(1,)]}, "rollouts has one answer for each row"),
        ({"beta": 0.1, "seed": -1}, "seed"),
    ],
)
def test_impossible_options_are_refused_before_any_work(options, message: str):
    with pytest.raises(InvalidInput, match=message):
        mix_rows(_model(), _pairs(3, seed=1), **options)
