"""Whole models: block by block against a literal implementation with full forward passes, and what must not be disturbed."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparsity24 import blocks
from sparsity24.blocks import block_skips, find_blocks
from sparsity24.calibration import excerpt, random_sequences
from sparsity24.export import verify
from sparsity24.layer import prune_layer, relative_loss
from sparsity24.methods import Magnitude, ProxPruner, SparseGPT, Wanda
from sparsity24.model import dense_grams, prune_model
from sparsity24.prox import is_24, project24

VOCAB = 40
LINEARS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def _llama(seed: int = 0, *, hidden: int = 16, ffn: int = 24, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        use_cache=True,
    )
    return LlamaForCausalLM(config)


def _batches(num: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (2, 20), generator=generator) for _ in range(num)]


def _padded(batches: list[Tensor]) -> list[dict[str, Tensor]]:
    masks = [torch.ones_like(batch) for batch in batches]
    for mask in masks:
        mask[0, 13:] = 0
    return [{"input_ids": batch, "attention_mask": mask} for batch, mask in zip(batches, masks, strict=True)]


def _literal_inputs(model: nn.Module, name: str, batches: list[dict[str, Tensor]]) -> Tensor:
    """The inputs of one layer over all tokens that count, from full forward passes of the model as it is."""
    seen: list[Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    handle.remove()
    kept = [x[batch["attention_mask"].bool()] for x, batch in zip(seen, batches, strict=True)]
    return torch.cat(kept).double()


def _literal_prune(
    model: LlamaForCausalLM, batches: list[dict[str, Tensor]], method: Any, refine: str
) -> dict[str, float]:
    """Reference 3.5 with a full forward pass for every layer: Grams of a block before any of its layers is pruned."""
    model.eval()
    losses = {}
    for block in range(len(model.model.layers)):
        names = [[f"model.layers.{block}.{name}" for name in group] for group in LINEARS]
        grams = []
        for group in names:
            x = _literal_inputs(model, group[0], batches)
            grams.append((x.T @ x / len(x)).float())
        for group, hessian in zip(names, grams, strict=True):
            layers = [model.get_submodule(name) for name in group]
            dense = torch.cat([layer.weight.detach() for layer in layers])
            weight = prune_layer(dense, hessian, method, refine).weight
            for name, layer, part in zip(group, layers, weight.split([len(x.weight) for x in layers]), strict=True):
                losses[name] = relative_loss(part, layer.weight.detach(), hessian)
                layer.weight.data.copy_(part)
    return losses


@pytest.mark.parametrize("method", [Wanda(), SparseGPT(), ProxPruner(beta=1.2)], ids=lambda method: method.name)
@pytest.mark.parametrize("refine", ["none", "cg"])
def test_block_by_block_equals_full_forward_passes(method: Any, refine: str) -> None:
    ours, literal = _llama(), _llama()
    batches = _padded(_batches())
    report = prune_model(ours, batches, method, refine=refine)
    expected = _literal_prune(literal, batches, method, refine)
    assert {layer.name for layer in report.layers} == set(expected)
    for layer in report.layers:
        assert layer.rel_loss == pytest.approx(expected[layer.name], rel=1e-3, abs=1e-6)
    for (name, one), other in zip(ours.named_parameters(), literal.parameters(), strict=True):
        assert torch.equal(one == 0, other == 0), name
        # Twenty CG steps on 99 tokens amplify rounding where the Gram is nearly singular; the losses above do not move.
        assert torch.allclose(one, other, atol=1e-4 if refine == "none" else 1e-2), name


def test_every_linear_layer_of_a_block_is_two_of_four_and_nothing_else_changes() -> None:
    model = _llama()
    dense = copy.deepcopy(model)
    report = prune_model(model, _batches(), "prox-fast")
    pruned = {layer.name for layer in report.layers}
    assert len(pruned) == 14
    for (name, weight), before in zip(model.named_parameters(), dense.parameters(), strict=True):
        if name.removesuffix(".weight") in pruned:
            assert is_24(weight.detach())
        else:
            assert torch.equal(weight, before), name
    assert report.num_tokens == 120
    assert 0 < report.mean_rel_loss < 1
    assert json.loads(json.dumps(report.to_dict()))["method"] == "prox-fast"


def test_layers_that_share_an_input_share_a_gram() -> None:
    grams = dense_grams(_llama(), _batches(), num_blocks=1)
    assert [gram.name.removeprefix("model.layers.0.") for gram in grams] == [n for group in LINEARS for n in group]
    by_name = {gram.name.removeprefix("model.layers.0."): gram.hessian for gram in grams}
    for group in LINEARS:
        assert all(by_name[name] is by_name[group[0]] for name in group)
    assert len({id(hessian) for hessian in by_name.values()}) == 4


def test_grams_are_means_over_tokens_and_padding_is_no_token() -> None:
    model, batches = _llama().eval(), _padded(_batches())
    for gram in dense_grams(model, batches):
        x = _literal_inputs(model, gram.name, batches)
        assert len(x) == 3 * 33
        assert torch.allclose(gram.hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        assert torch.equal(gram.hessian, gram.hessian.T)


def test_what_stands_in_padded_places_has_no_effect() -> None:
    one, other = _llama(), _llama()
    batches = _padded(_batches())
    prune_model(one, batches, "sparsegpt")
    for batch in batches:
        batch["input_ids"] = torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"])
    prune_model(other, batches, "sparsegpt")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_skipped_layers_stay_dense_and_are_listed() -> None:
    model = _llama()
    report = prune_model(model, _batches(), Magnitude(), refine="none", skip=["*.down_proj", "model.layers.1.*"])
    assert len(report.layers) == 6
    assert set(report.skipped) >= {"model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"}
    assert verify(model).dense == tuple(
        name for name in verify(model).shares if "down_proj" in name or "layers.1." in name
    )
    with pytest.raises(ValueError, match="no_such"):
        prune_model(_llama(), _batches(), skip=["*.no_such"])


def test_block_skips_leave_the_later_blocks() -> None:
    model = _llama(layers=3)
    report = prune_model(model, _batches(), Magnitude(), refine="none", skip=block_skips(model, 1))
    assert {layer.name.split(".")[2] for layer in report.layers} == {"0"}
    assert block_skips(model, None) == []


def test_a_width_that_does_not_fit_is_left_dense_with_one_warning_or_refused_when_strict() -> None:
    model = _llama(ffn=26)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="down_proj has 26 inputs"):
        prune_model(model, _batches(), strict=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.warns(UserWarning, match="multiple of 4") as caught:
        report = prune_model(model, _batches(), Magnitude())
    assert sum("multiple of 4" in str(warning.message) for warning in caught) == 1
    assert set(report.skipped) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert len(report.layers) == 12


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 5, dtype=torch.long)]])
def test_empty_calibration_is_refused(batches: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="empty"):
        prune_model(_llama(), batches)


def test_calibration_that_is_all_padding_is_refused() -> None:
    batch = {"input_ids": torch.zeros(1, 5, dtype=torch.long), "attention_mask": torch.zeros(1, 5, dtype=torch.long)}
    with pytest.raises(ValueError, match="padding"):
        prune_model(_llama(), [batch])


def _break_weight(model: LlamaForCausalLM) -> None:
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")


def _break_activations(model: LlamaForCausalLM) -> None:
    model.model.layers[1].post_attention_layernorm.weight.data[3] = float("inf")


def _break_later_batch(model: LlamaForCausalLM) -> None:
    # Only the token 39, which the first batch lacks, has a broken embedding.
    model.model.embed_tokens.weight.data[VOCAB - 1] = float("nan")


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_break_weight, "layers.1.mlp.up_proj"), (_break_activations, "activations"), (_break_later_batch, "q_proj")],
)
def test_nan_in_weights_or_activations_is_refused_and_leaves_the_model_as_it_was(
    damage: Callable[[LlamaForCausalLM], None], message: str
) -> None:
    model = _llama()
    damage(model)
    before = copy.deepcopy(model.state_dict())
    batches = [batch.clamp_max(VOCAB - 2) for batch in _batches()]
    batches[-1][0, 0] = VOCAB - 1
    with pytest.raises(ValueError, match=message):
        prune_model(model, batches)
    for key, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), before[key].nan_to_num(7.0)), key


def test_an_error_in_the_middle_restores_weights_hooks_and_modes() -> None:
    class Breaks(Magnitude):
        calls = 0

        def prune(self, dense: Tensor, hessian: Tensor, context: Any = None) -> Any:
            type(self).calls += 1
            if type(self).calls == 6:
                raise RuntimeError("the sixth")
            return super().prune(dense, hessian)

    model = _llama()
    model.train()
    model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="the sixth"):
        prune_model(model, _batches(), Breaks())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.config.use_cache is True


def test_no_gradients_and_no_mode_are_left_behind() -> None:
    model = _llama()
    model.train()
    prune_model(model, _batches(), "wanda")
    assert all(module.training for module in model.modules())
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert torch.is_grad_enabled()


def test_an_already_sparse_model_stays_bit_for_bit() -> None:
    model = _llama()
    prune_model(model, _batches(), "magnitude", refine="none")
    before = copy.deepcopy(model.state_dict())
    report = prune_model(model, _batches(), "prox")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert report.mean_rel_loss == 0


def test_layers_that_share_a_parameter_are_pruned_once() -> None:
    model = _llama()
    block = model.model.layers[0]
    block.mlp.up_proj.weight = block.mlp.gate_proj.weight
    report = prune_model(model, _batches(), "wanda")
    assert len(report.layers) == 13
    assert block.mlp.up_proj.weight is block.mlp.gate_proj.weight
    assert is_24(block.mlp.up_proj.weight.detach())


def test_a_layer_tied_to_the_embedding_is_refused() -> None:
    model = _llama(hidden=16, ffn=40)
    model.model.layers[0].mlp.up_proj.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="tied to an embedding"):
        prune_model(model, _batches())


def test_meta_and_quantised_weights_are_refused() -> None:
    with torch.device("meta"):
        model = _llama()
    with pytest.raises(ValueError, match="meta"):
        prune_model(model, _batches())


def test_integer_weights_are_refused_by_name() -> None:
    model = _llama()
    layer = model.model.layers[1].mlp.gate_proj
    layer.weight = nn.Parameter(layer.weight.detach().mul(100).to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate_proj.*int8"):
        prune_model(model, _batches())


def test_weights_sharded_over_devices_are_refused_by_name() -> None:
    from torch import distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        model = _llama()
        layer = model.model.layers[0].self_attn.q_proj
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Replicate()]))
        with pytest.raises(ValueError, match=r"q_proj.*DTensor"):
            prune_model(model, _batches())
    finally:
        dist.destroy_process_group()


def test_every_token_counts_the_same_however_long_its_sequence_is() -> None:
    generator = torch.Generator().manual_seed(5)
    long, short = (torch.randint(VOCAB, (1, length), generator=generator) for length in (40, 8))
    model = _llama()
    padded = torch.zeros(2, 40, dtype=torch.long)
    padded[0], padded[1, :8] = long, short
    mask = torch.zeros_like(padded)
    mask[0], mask[1, :8] = 1, 1
    separate = dense_grams(model, [long, short])
    together = dense_grams(model, [{"input_ids": padded, "attention_mask": mask}])
    whole = _literal_inputs(
        model, separate[0].name, [{"input_ids": x, "attention_mask": x >= 0} for x in (long, short)]
    )
    assert torch.allclose(separate[0].hessian.double(), whole.T @ whole / 48, rtol=1e-4, atol=1e-6)
    for one, other in zip(separate, together, strict=True):
        assert torch.allclose(one.hessian, other.hessian, rtol=1e-4, atol=1e-6), one.name


def test_padding_on_the_left_is_taken_off_and_holes_are_refused() -> None:
    batch = _batches(1)[0]
    left = torch.cat([torch.full((2, 6), 3), batch], 1)
    mask = torch.cat([torch.zeros(2, 6, dtype=torch.long), torch.ones_like(batch)], 1)
    plain = dense_grams(_llama(), [batch])
    padded = dense_grams(_llama(), [{"input_ids": left, "attention_mask": mask}])
    assert all(torch.equal(a.hessian, b.hessian) for a, b in zip(plain, padded, strict=True))
    mask[0, 10] = 0
    with pytest.raises(ValueError, match="holes"):
        prune_model(_llama(), [{"input_ids": left, "attention_mask": mask}])


def test_too_little_calibration_is_said_once() -> None:
    with pytest.warns(UserWarning, match="fewer tokens than they have inputs") as caught:
        prune_model(_llama(), [_batches(1)[0][:1, :5]], "sparsegpt")
    assert sum("fewer tokens" in str(warning.message) for warning in caught) == 1


def test_a_model_that_changes_the_state_between_its_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _llama()
    run = blocks.Call.run
    # Replay that sees another state than the model's own pass, as when something happens between two blocks.
    monkeypatch.setattr(blocks.Call, "run", lambda call, block, hidden: run(call, block, 1.01 * hidden))
    with pytest.raises(ValueError, match="one by one does not reproduce"):
        prune_model(model, _batches())


def test_adapters_are_refused_with_a_way_out() -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge_lora"):
        prune_model(adapted, _batches())


def test_rows_that_are_sparse_already_stay_bit_for_bit_in_a_stack_that_is_not() -> None:
    model = _llama()
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight.data.copy_(project24(attention.q_proj.weight.data))
    before = attention.q_proj.weight.detach().clone()
    prune_model(model, _batches(), "sparsegpt")
    assert torch.equal(attention.q_proj.weight, before)
    assert is_24(attention.k_proj.weight.detach())


def test_positions_that_come_once_for_all_rows_go_with_padded_batches() -> None:
    ids = _batches(1)[0]
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    plain = dense_grams(_llama(), [batch])
    placed = dense_grams(_llama(), [{**batch, "position_ids": torch.arange(20)[None]}])
    assert all(torch.allclose(a.hessian, b.hessian, atol=1e-6) for a, b in zip(plain, placed, strict=True))


def test_the_report_says_how_far_refinement_got() -> None:
    few = prune_model(_llama(), _batches(), "wanda", steps=2)
    many = prune_model(_llama(), _batches(), "wanda", refine="exact")
    none = prune_model(_llama(), _batches(), "wanda", refine="none")
    assert all(layer.relative_residual > 1e-4 for layer in few.layers if layer.relative_residual is not None)
    assert max(layer.relative_residual or 0 for layer in many.layers) < 1e-4
    assert {layer.relative_residual for layer in none.layers} == {None}
    loose = prune_model(_llama(), _batches(), "wanda", tol=0.5)
    assert loose.mean_rel_loss > many.mean_rel_loss


def test_the_same_call_gives_the_same_masks() -> None:
    one, other = _llama(), _llama()
    for model in (one, other):
        prune_model(model, _batches(), "prox-fast")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_bfloat16_models_keep_their_dtype_and_end_two_of_four() -> None:
    model = _llama().to(torch.bfloat16)
    prune_model(model, _batches(), "prox-fast")
    assert verify(model).dense == ()
    assert all(weight.dtype == torch.bfloat16 for weight in model.parameters())


def test_blocks_are_found_by_what_transformers_calls_a_block() -> None:
    assert list(find_blocks(_llama(layers=3))) == [f"model.layers.{i}" for i in range(3)]
    plain = nn.Module()
    plain.stack = nn.ModuleList([nn.Linear(4, 4) for _ in range(5)])
    assert list(find_blocks(plain)) == [f"stack.{i}" for i in range(5)]
    with pytest.raises(ValueError, match="prune_layer"):
        find_blocks(nn.Linear(4, 4))


def test_an_excerpt_is_a_part_of_a_long_text_that_the_seed_places_and_a_short_text_is_whole() -> None:
    text = "".join(chr(0x4E00 + i % 20000) for i in range(50000))
    part = excerpt(text, num_tokens=100, seed=3)
    assert len(part) == 6400
    assert part in text
    assert part == excerpt(text, num_tokens=100, seed=3) != excerpt(text, num_tokens=100, seed=4)
    assert excerpt(text, num_tokens=1000) is text


def test_random_sequences_are_windows_of_the_text_and_a_short_text_is_refused() -> None:
    ids = list(range(100))
    batches = random_sequences(ids, num_sequences=5, window=10, seed=1)
    rows = torch.cat(batches)
    assert rows.shape == (5, 10)
    assert bool((rows.diff(dim=1) == 1).all())
    assert torch.equal(rows, torch.cat(random_sequences(ids, num_sequences=5, window=10, seed=1)))
    with pytest.raises(ValueError, match="100"):
        random_sequences(ids, num_sequences=1, window=101)


def test_pruning_raises_no_warning_of_its_own() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prune_model(_llama(), _batches(), "prox-fast")
    assert [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)] == []


def test_recorded_calls_hold_no_hidden_state() -> None:
    model = _llama(layers=3).eval()
    inputs = [{"input_ids": batch} for batch in _batches()]
    with torch.no_grad(), blocks.calm(model):
        seen = blocks.survey(model, blocks.InMemory(), inputs[0])
        stack = blocks.record(model, blocks.InMemory(), seen, 0, inputs)
        for call in (call for calls in stack.calls for call in calls):
            held = [*call.args, *call.kwargs.values()]
            assert not any(isinstance(value, Tensor) and value.shape == stack.hidden[0].shape for value in held)
        for index in range(3):
            stack.advance(index)
        expected = [model.model(batch).last_hidden_state for batch in _batches()]
    for hidden, final in zip(stack.hidden, expected, strict=True):
        assert torch.allclose(model.model.norm(hidden), final, atol=1e-5)
