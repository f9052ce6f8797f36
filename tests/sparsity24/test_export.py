"""Saved folders: three formats of the same bits, complete or absent, and verification that finds what does not hold."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compressed_tensors.compressors import ModelCompressor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from core.errors import InvalidInput
from sparsity24.export import convert, load_packed, save, verify
from sparsity24.folders import Folder
from sparsity24.model import LayerReport, PruneReport
from sparsity24.packing import mask_digest
from sparsity24.pattern import TWO_FOUR, Pattern
from sparsity24.places import on_disk
from sparsity24.weights import WeightRef

VOCAB = 40


class _Tokenizer:
    """The one method that saving calls."""

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def _llama(
    *, dtype: torch.dtype = torch.float32, tied: bool = False, hidden: int = 16, ffn: int = 24
) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


def _mixtral() -> PreTrainedModel:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    return MixtralForCausalLM(config)


def _gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def _gpt_oss() -> PreTrainedModel:
    """Its fused experts are stored transposed, and stay fused on disk."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=3,
    )
    return GptOssForCausalLM(config)


MODELS = {"llama": _llama, "mixtral": _mixtral, "gpt2": _gpt2, "gpt-oss": _gpt_oss}


def _refs(model: nn.Module) -> list[WeightRef]:
    """Every matrix of the blocks: Linear, Conv1D, and each expert of the fused parameters."""
    refs = []
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if ("layers." not in name and ".h." not in name) or "gate.weight" in name or "router" in name or "bias" in name:
            continue
        if parameter.ndim == 3:
            transposed = "GptOss" in type(module).__name__
            refs += [WeightRef(f"{name}[{expert}]", name, expert, transposed) for expert in range(len(parameter))]
        elif parameter.ndim == 2:
            refs.append(WeightRef(name.removesuffix(".weight"), name, transposed=type(module).__name__ == "Conv1D"))
    return refs


def _prune(model: nn.Module, pattern: Pattern = TWO_FOUR, refs: list[WeightRef] | None = None) -> PruneReport:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    layers = []
    for ref in refs if refs is not None else _refs(model):
        weight = ref.of(parameters[ref.parameter].data)
        weight.copy_(torch.where(pattern.mask(weight.abs()), weight, 0))
        layers.append(LayerReport(ref, tuple(weight.shape), 0.25, 0.125, 7, mask_digest(weight)))
    return PruneReport(
        "magnitude", {"order": 1}, str(pattern), "cg", 20, tuple(layers), ("model.layers.0.odd",), 512, 1.0, 0.5
    )


def _tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def _size(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in _tensors(folder).values())


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_dense_folder_loads_with_transformers_and_every_weight_verifies(build: Any, tmp_path: Path) -> None:
    model = build()
    report = _prune(model)
    save(model, _Tokenizer(), tmp_path / "out", report)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert _same(dict(loaded.state_dict()), dict(model.state_dict()))
    found = verify(tmp_path / "out")
    assert set(found.sparse) == {layer.name for layer in report.layers}
    assert found.dense == found.changed == ()


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("shard", ["5GB", 8000], ids=["whole", "sharded"])
def test_a_packed_folder_becomes_the_same_plain_one_again(build: Any, shard: int | str, tmp_path: Path) -> None:
    model = build()
    report = _prune(model)
    save(model, _Tokenizer(), tmp_path / "dense", report, max_shard_size=shard)
    save(model, _Tokenizer(), tmp_path / "packed", report, format="packed", max_shard_size=shard)
    convert(tmp_path / "packed", tmp_path / "again", "dense")
    assert _same(_tensors(tmp_path / "again"), _tensors(tmp_path / "dense"))
    assert (tmp_path / "again" / "model.safetensors.index.json").exists() == (shard != "5GB")
    for folder in ("packed", "again"):
        found = verify(tmp_path / folder)
        assert set(found.sparse) == {layer.name for layer in report.layers}
        assert found.dense == found.changed == ()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert _same(dict(loaded.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_load_packed_fills_a_fresh_model(build: Any, tmp_path: Path) -> None:
    model = build()
    save(model, _Tokenizer(), tmp_path / "packed", _prune(model), format="packed")
    torch.manual_seed(5)
    fresh = type(model)(model.config)
    assert not _same(dict(fresh.state_dict()), dict(model.state_dict()))
    load_packed(tmp_path / "packed", fresh)
    assert _same(dict(fresh.state_dict()), dict(model.state_dict()))


def test_load_packed_keeps_what_the_folder_holds_whatever_the_configuration_names(tmp_path: Path) -> None:
    model = _mixtral()
    save(model, _Tokenizer(), tmp_path / "packed", _prune(model), format="packed")
    model.config.dtype = "bfloat16"
    fresh = MixtralForCausalLM(model.config).float()
    load_packed(tmp_path / "packed", fresh)
    assert _same(dict(fresh.state_dict()), dict(model.state_dict()))


def test_load_packed_refuses_a_model_without_memory(tmp_path: Path) -> None:
    model = _llama()
    save(model, _Tokenizer(), tmp_path / "packed", _prune(model), format="packed")
    with torch.device("meta"):
        empty = LlamaForCausalLM(model.config)
    with pytest.raises(InvalidInput, match="on the meta device"):
        load_packed(tmp_path / "packed", empty)


def test_a_report_that_points_outside_its_tensors_is_refused(tmp_path: Path) -> None:
    model = _mixtral()
    save(model, _Tokenizer(), tmp_path / "out", _prune(model))
    path = tmp_path / "out" / "sparsity24.json"
    for change in ({"at": -1}, {"at": 5}, {"expert": 0}, {"count": -2}):
        told = json.loads(path.read_text())
        next(iter(told["stored"].values()))[0].update(change)
        shutil.rmtree(tmp_path / "told", ignore_errors=True)
        shutil.copytree(tmp_path / "out", tmp_path / "told")
        (tmp_path / "told" / path.name).write_text(json.dumps(told))
        with pytest.raises(InvalidInput, match="report"):
            verify(tmp_path / "told")


def test_load_packed_refuses_another_model_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    model = _llama()
    save(model, _Tokenizer(), tmp_path / "packed", _prune(model), format="packed")
    other = _llama(ffn=32)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(InvalidInput, match=r"\(16, 24\).*\(16, 32\)"):
        load_packed(tmp_path / "packed", other)
    assert _same(dict(other.state_dict()), dict(before))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_packed_takes_nine_sixteenths_of_its_dense_size(dtype: torch.dtype, tmp_path: Path) -> None:
    model = _llama(dtype=dtype, hidden=64, ffn=128)
    report = _prune(model)
    save(model, _Tokenizer(), tmp_path / "dense", report)
    save(model, _Tokenizer(), tmp_path / "packed", report, format="packed")
    pruned = sum(layer.shape[0] * layer.shape[1] for layer in report.layers) * 2
    assert _size(tmp_path / "dense") - _size(tmp_path / "packed") == pruned * 7 // 16
    files = [sum(file.stat().st_size for file in (tmp_path / f).glob("*.safetensors")) for f in ("dense", "packed")]
    # The headers of two tensors a weight are longer than those of one.
    assert (files[1] - (files[0] - pruned)) / pruned == pytest.approx(9 / 16, abs=0.03)


def test_from_pretrained_refuses_a_packed_folder_rather_than_making_up_weights(tmp_path: Path) -> None:
    model = _llama()
    save(model, _Tokenizer(), tmp_path / "packed", _prune(model), format="packed")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


@pytest.mark.filterwarnings("ignore:vLLM")
def test_compressed_tensors_reads_a_legacy_folder(tmp_path: Path) -> None:
    model = _llama(dtype=torch.bfloat16)
    report = _prune(model)
    save(model, _Tokenizer(), tmp_path / "old", report, format="sparse-24-bitmask", max_shard_size=8000)
    config = json.loads((tmp_path / "old" / "config.json").read_text())["quantization_config"]
    compressor = ModelCompressor.from_compression_config(config).sparsity_compressor
    theirs = dict(compressor.decompress(str(tmp_path / "old")))
    state = model.state_dict()
    for layer in report.layers:
        assert torch.equal(theirs[layer.weight.parameter], state[layer.weight.parameter]), layer.name
    stored = _tensors(tmp_path / "old")
    name = report.layers[0].name
    assert stored[f"{name}.shape"].tolist() == [[16], [16]]
    assert stored[f"{name}.shape"].dtype == torch.int64
    assert stored[f"{name}.compressed"].shape == (16, 8)
    assert stored[f"{name}.bitmask"].shape == (16, 2)
    zeros = sum(int((tensor == 0).sum()) for tensor in state.values())
    total = sum(tensor.numel() for tensor in state.values())
    assert config["sparsity_config"]["global_sparsity"] == pytest.approx(zeros / total)
    assert set(config["sparsity_config"]["ignore"]) == {"model.embed_tokens", "lm_head"}


@pytest.mark.filterwarnings("ignore:vLLM")
def test_a_legacy_folder_becomes_dense_and_packed_again(tmp_path: Path) -> None:
    model = _llama()
    report = _prune(model)
    save(model, _Tokenizer(), tmp_path / "dense", report)
    convert(tmp_path / "dense", tmp_path / "old", "sparse-24-bitmask")
    assert verify(tmp_path / "old").dense == ()
    convert(tmp_path / "old", tmp_path / "packed", "packed")
    convert(tmp_path / "old", tmp_path / "again", "dense")
    convert(tmp_path / "packed", tmp_path / "third", "dense")
    for folder in ("again", "third"):
        assert _same(_tensors(tmp_path / folder), _tensors(tmp_path / "dense"))
        assert json.loads((tmp_path / folder / "config.json").read_text()) == json.loads(
            (tmp_path / "dense" / "config.json").read_text()
        )


def test_the_legacy_format_warns_who_reads_it_no_longer_and_what_stays_dense(tmp_path: Path) -> None:
    model = _gpt2()
    with pytest.warns(UserWarning, match=r"vLLM 0\.19\.1.*0\.14.*transformer\.h\.0\.attn\.c_attn\.weight"):
        save(model, _Tokenizer(), tmp_path / "old", _prune(model), format="sparse-24-bitmask")
    assert not any(name.endswith(".bitmask") for name in _tensors(tmp_path / "old"))


def test_other_formats_raise_no_warning(tmp_path: Path) -> None:
    model = _mixtral()
    report = _prune(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(model, _Tokenizer(), tmp_path / "dense", report)
        convert(tmp_path / "dense", tmp_path / "packed", "packed")
    assert [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)] == []


def test_other_patterns_are_packed_and_refused_in_the_legacy_format(tmp_path: Path) -> None:
    model = _llama()
    report = _prune(model, Pattern(4, 8))
    save(model, _Tokenizer(), tmp_path / "packed", report, format="packed")
    assert verify(tmp_path / "packed").pattern == Pattern(4, 8)
    convert(tmp_path / "packed", tmp_path / "dense", "dense")
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in _tensors(tmp_path / "dense").items())
    assert 0 < verify(tmp_path / "dense", "2:4").shares["model.layers.0.mlp.up_proj"] < 1
    with pytest.raises(InvalidInput, match="these are 4:8"):
        save(model, _Tokenizer(), tmp_path / "old", report, format="sparse-24-bitmask")


def test_tied_embeddings_are_saved_once_in_every_format(tmp_path: Path) -> None:
    model = _llama(tied=True)
    save(model, _Tokenizer(), tmp_path / "packed", _prune(model), format="packed")
    convert(tmp_path / "packed", tmp_path / "dense", "dense")
    assert "lm_head.weight" not in _tensors(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert _same(dict(loaded.state_dict()), dict(model.state_dict()))
    fresh = LlamaForCausalLM(model.config)
    load_packed(tmp_path / "packed", fresh)
    assert _same(dict(fresh.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("skipped", [".experts.gate_up_proj[1]", ".experts.down_proj[2]"])
@pytest.mark.parametrize("build", [_mixtral, _gpt_oss])
def test_experts_left_dense_stay_bit_for_bit_in_a_packed_folder(build: Any, skipped: str, tmp_path: Path) -> None:
    model = build()
    report = _prune(model, refs=[ref for ref in _refs(model) if not ref.name.endswith(skipped)])
    save(model, _Tokenizer(), tmp_path / "packed", report, format="packed")
    assert verify(tmp_path / "packed").dense == ()
    fresh = type(model)(model.config)
    load_packed(tmp_path / "packed", fresh)
    assert _same(dict(fresh.state_dict()), dict(model.state_dict()))


def test_a_parameter_of_two_layers_is_found_under_the_name_that_was_saved(tmp_path: Path) -> None:
    model = _llama()
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    name = "model.layers.1.mlp.up_proj"
    model._tied_weights_keys = {f"{name}.weight": "model.layers.0.mlp.up_proj.weight"}
    report = _prune(model, refs=[WeightRef(name, f"{name}.weight")])
    save(model, _Tokenizer(), tmp_path / "out", report)
    assert f"{name}.weight" not in _tensors(tmp_path / "out")
    assert verify(tmp_path / "out").sparse == (name,)


def test_a_shard_is_let_go_before_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _llama(hidden=32, ffn=64)
    save(model, _Tokenizer(), tmp_path / "out", _prune(model), max_shard_size=10_000)
    alive: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
    most, num_open = [0], []
    read = Folder.tensor

    def counted(folder: Folder, name: str) -> Tensor:
        tensor = read(folder, name)
        alive[len(alive) + id(tensor)] = tensor
        num_open.append(len(folder._handles))
        most[0] = max(most[0], sum(held.nbytes for held in alive.values()))
        return tensor

    monkeypatch.setattr(Folder, "tensor", counted)
    convert(tmp_path / "out", tmp_path / "packed", "packed")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 5
    # One shard, and the last tensor of the one before.
    assert 0 < most[0] <= 20_000
    assert num_open[-1] == 1


def test_the_places_of_fused_experts_are_the_tensors_that_transformers_writes(tmp_path: Path) -> None:
    model = _mixtral()
    report = _prune(model)
    save(model, _Tokenizer(), tmp_path / "out", report)
    stored, state = _tensors(tmp_path / "out"), model.state_dict()
    places = on_disk(model, report)
    fused = next(layer for layer in report.layers if "gate_up_proj[1]" in layer.name)
    assert [(p.key.rpartition("experts.")[2], p.row, p.count) for p in places[fused.name]] == [
        ("1.w1.weight", 0, 24),
        ("1.w3.weight", 24, 24),
    ]
    for layer in report.layers:
        weight = torch.cat([place.of(stored[place.key]) for place in places[layer.name]])
        assert torch.equal(weight, layer.weight.of(state[layer.weight.parameter])), layer.name


@pytest.mark.parametrize("format", ["dense", "packed", "sparse-24-bitmask"])
@pytest.mark.filterwarnings("ignore:vLLM")
def test_a_failed_save_leaves_nothing(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(_Tokenizer):
        def save_pretrained(self, folder: Path) -> None:
            raise OSError("no space left")

    model = _llama()
    report = _prune(model)
    with pytest.raises(OSError, match="no space"):
        save(model, Full(), tmp_path / "out", report, format=format)
    assert list(tmp_path.iterdir()) == []
    model.model.layers[1].mlp.up_proj.weight.data.fill_(1)
    if format != "dense":
        with pytest.raises(InvalidInput, match=r"layers\.1\.mlp\.up_proj"):
            save(model, _Tokenizer(), tmp_path / "out", report, format=format)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_save_left_does_not_disturb_the_next_and_an_existing_folder_is_kept(tmp_path: Path) -> None:
    model = _llama()
    report = _prune(model)
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model-00001-of-00009.safetensors").write_text("half")
    save(model, _Tokenizer(), tmp_path / "out", report)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert verify(tmp_path / "out").dense == ()
    with pytest.raises(InvalidInput, match="exists"):
        save(model, _Tokenizer(), tmp_path / "out", report)
    with pytest.raises(InvalidInput, match="dense already"):
        convert(tmp_path / "out", tmp_path / "other", "dense")
    with pytest.raises(InvalidInput, match="Did you mean packed"):
        convert(tmp_path / "out", tmp_path / "other", "paked")


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    model = _llama()
    save(model, _Tokenizer(), tmp_path / "out", _prune(model), max_shard_size=8000)
    stored = _tensors(tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    file = tmp_path / "out" / index[name]
    save_file({key: torch.ones_like(stored[key]) for key, where in index.items() if where == file.name}, file)
    with pytest.raises(InvalidInput, match="Only pruned weights"):
        convert(tmp_path / "out", tmp_path / "packed", "packed")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_conversion_copies_the_other_files_and_no_weights_in_other_forms(tmp_path: Path) -> None:
    model = _llama()
    save(model, _Tokenizer(), tmp_path / "out", _prune(model))
    (tmp_path / "out" / "README.md").write_text("license: mine")
    (tmp_path / "out" / "pytorch_model.bin").write_bytes(b"\x80pickle")
    convert(tmp_path / "out", tmp_path / "packed", "packed")
    assert (tmp_path / "packed" / "README.md").read_text() == "license: mine"
    assert {path.name for path in (tmp_path / "packed").iterdir()} == {
        *(
            "README.md",
            "config.json",
            "generation_config.json",
            "packed.safetensors",
            "sparsity24.json",
            "tokenizer.json",
        )
    }


def test_verify_finds_a_weight_that_lost_its_pattern_and_one_whose_mask_moved(tmp_path: Path) -> None:
    model = _llama()
    report = _prune(model)
    save(model, _Tokenizer(), tmp_path / "out", report)
    file = tmp_path / "out" / "model.safetensors"
    stored = load_file(file)
    stored["model.layers.1.mlp.down_proj.weight"] += 1
    moved = "model.layers.0.self_attn.q_proj"
    stored[f"{moved}.weight"] = stored[f"{moved}.weight"].flip(1)
    save_file(stored, file, {"format": "pt"})
    found = verify(tmp_path / "out")
    assert found.dense == ("model.layers.1.mlp.down_proj",)
    assert found.shares["model.layers.1.mlp.down_proj"] < 0.5
    assert set(found.changed) == {"model.layers.1.mlp.down_proj", moved}


def test_a_report_of_another_model_is_refused(tmp_path: Path) -> None:
    save(_llama(), _Tokenizer(), tmp_path / "out", _prune(_llama()))
    wide = _prune(_llama(ffn=32))
    with pytest.raises(InvalidInput, match=r"mlp\.gate_proj|mlp\.down_proj"):
        verify(tmp_path / "out", report=wide)
    narrow = _prune(_llama(ffn=16))
    with pytest.raises(InvalidInput, match="it is of another model"):
        verify(_llama(), report=narrow)


def test_verify_of_a_model_compares_it_with_a_report() -> None:
    model = _mixtral()
    report = _prune(model)
    assert verify(model, report=report).changed == ()
    assert verify(model).dense == ()
    name = report.layers[-1].weight.parameter
    dict(model.named_parameters())[name].data[2, 0, :4] = 1
    assert verify(model, report=report).changed == (f"{name}[2]",)
    assert verify(model, report=report).dense == verify(model).dense or verify(model).dense == (name,)
    assert verify(model).either_axis == tuple(key for key, parameter in model.named_parameters() if parameter.ndim == 3)


def test_verify_of_a_model_looks_at_conv1d_along_its_inputs() -> None:
    model = _gpt2()
    assert max(verify(model).shares.values()) == 0
    _prune(model)
    found = verify(model)
    assert len(found.sparse) == 8
    assert found.dense == ()


def test_a_missing_weight_a_missing_shard_and_a_lying_index_are_errors(tmp_path: Path) -> None:
    model = _llama()
    save(model, _Tokenizer(), tmp_path / "out", _prune(model), max_shard_size=8000)
    index_file = tmp_path / "out" / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    name = "model.layers.1.mlp.down_proj.weight"

    def broken(change: Any) -> Path:
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        shutil.copytree(tmp_path / "out", tmp_path / "broken")
        told = copy.deepcopy(index)
        change(told["weight_map"])
        (tmp_path / "broken" / index_file.name).write_text(json.dumps(told))
        return tmp_path / "broken"

    with pytest.raises(InvalidInput, match=r"missing: model\.layers\.1\.mlp\.down_proj"):
        verify(broken(lambda weights: weights.pop(name)))
    with pytest.raises(InvalidInput, match="lacks model-9, which its index names"):
        verify(broken(lambda weights: weights.update({name: "model-9"})))
    with pytest.raises(InvalidInput, match="not in its folder"):
        verify(broken(lambda weights: weights.update({name: "../out/model.safetensors"})))
    elsewhere = next(file for file in index["weight_map"].values() if file != index["weight_map"][name])
    with pytest.raises(InvalidInput, match="which the index places there"):
        verify(broken(lambda weights: weights.update({name: elsewhere})))


def test_a_shard_that_the_index_does_not_name_is_left_alone(tmp_path: Path) -> None:
    model = _llama()
    save(model, _Tokenizer(), tmp_path / "out", _prune(model), max_shard_size=8000)
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(24, 16)}, tmp_path / "out" / "stray.safetensors")
    assert verify(tmp_path / "out").dense == ()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    model = _llama()
    save(model, _Tokenizer(), tmp_path / "out", _prune(model), format="packed")
    file = tmp_path / "out" / "packed.safetensors"
    stored = load_file(file)
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    stored["model.layers.0.mlp.up_proj.weight.packed_places"][3, 1] ^= 2
    save_file(stored, file, metadata)
    with pytest.raises(InvalidInput, match=r"up_proj\.weight` is damaged"):
        verify(tmp_path / "out")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InvalidInput, match="cannot be read"):
        verify(tmp_path / "out")
    (tmp_path / "out" / "sparsity24.json").write_text('{"layers": 3}')
    with pytest.raises(InvalidInput, match="not a report of ours"):
        verify(tmp_path / "out")


def test_a_strangers_folder_is_checked_along_the_inputs_of_every_matrix_that_fits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sparse = torch.randn(6, 8)
    sparse = torch.where(TWO_FOUR.mask(sparse.abs()), sparse, 0)
    tensors = {
        "a.weight": sparse,
        "b.weight": sparse.t().contiguous()[:, :4].contiguous(),
        "odd.weight": torch.randn(8, 6),
        "ids": torch.zeros(4, 4, dtype=torch.int64),
        "bias": torch.zeros(8),
        "experts": torch.stack([sparse.t()] * 3),
    }
    save_file(tensors, tmp_path / "weights.safetensors")
    found = verify(tmp_path)
    assert set(found.shares) == {"a", "b", "experts"}
    assert found.sparse == ("a", "experts")
    assert found.either_axis == ("experts",)
    assert set(verify(tmp_path, Pattern(1, 3)).shares) == {"odd", "experts"}
    with pytest.raises(InvalidInput, match="multiple of 7"):
        verify(tmp_path, "1:7")
    with pytest.raises(InvalidInput, match=r"no \*\.safetensors"):
        verify(tmp_path / "nowhere")


def test_a_strangers_sparse_folder_is_packed_where_it_is_two_of_four(tmp_path: Path) -> None:
    model = _llama()
    _prune(model)
    model.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "packed", "packed")
    stored = _tensors(tmp_path / "packed")
    assert sum(name.endswith(".packed_values") for name in stored) == 14
    convert(tmp_path / "packed", tmp_path / "again", "dense")
    assert _same(_tensors(tmp_path / "again"), _tensors(tmp_path / "theirs"))


def _card(model: PreTrainedModel, folder: Path) -> tuple[dict[str, Any], str]:
    save(model, _Tokenizer(), folder, _prune(model))
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_says_what_was_done_and_claims_no_license(tmp_path: Path) -> None:
    model = _llama()
    model.config._name_or_path = "someone/some-model"
    front, text = _card(model, tmp_path / "out")
    assert front["base_model"] == "someone/some-model"
    assert {"2:4", "magnitude", "sparse"} <= set(front["tags"])
    assert "license" not in front
    for said in ("14 weight matrices", "512 tokens", "0.1250", "order=1", "cg, at most 20", "`model.layers.0.odd`"):
        assert said in text


@pytest.mark.parametrize(
    "name", ["", "/somewhere/models/llama", "testbed:tiny_llama", "tests/sparsity24", "./mine/model"]
)
def test_the_card_names_no_base_model_that_is_not_on_the_hub(name: str, tmp_path: Path) -> None:
    model = _llama()
    model.config._name_or_path = name
    front, text = _card(model, tmp_path / "out")
    assert "base_model" not in front
    assert "huggingface.co" not in text
    assert not name or name not in text
