"""A model pruned from files to files is the model pruned in memory, in the memory of a block, and can be interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from core.errors import CheckpointError, RunInProgress
from sparsity24.export import verify
from sparsity24.methods import Magnitude, SparseGPT
from sparsity24.model import prune_model
from sparsity24.streaming import prune_checkpoint

VOCAB = 40


def _llama(layers: int = 3, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def _gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3))


def _t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8)
    )


def _ids(rows: int = 2, length: int = 20, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def _batches(model: Any) -> list[Any]:
    if isinstance(model, T5ForConditionalGeneration):
        return [{"input_ids": _ids(seed=s), "decoder_input_ids": _ids(2, 9, seed=s + 9)} for s in range(3)]
    return [_ids(seed=s) for s in range(3)]


MODELS = {
    "untied": _llama,
    "tied head": lambda: _llama(tied=True),
    "transposed weights": _gpt2,
    "two stacks": _t5,
}


@pytest.mark.parametrize("name", MODELS)
def test_streaming_gives_the_weights_that_pruning_in_memory_gives(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "dense", max_shard_size="8KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    streamed = prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", _batches(model), SparseGPT())
    report = prune_model(model, _batches(model), SparseGPT())
    again = type(model).from_pretrained(tmp_path / "sparse")
    for (key, one), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), key
    assert [layer.mask_digest for layer in streamed.layers] == [layer.mask_digest for layer in report.layers]
    assert streamed.mean_rel_loss == pytest.approx(report.mean_rel_loss, rel=1e-6)
    assert verify(tmp_path / "sparse").dense == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "sparse"]
    assert (tmp_path / "sparse" / "README.md").exists()


def test_a_bfloat16_checkpoint_stays_bfloat16_and_its_report_is_of_the_rounded_weights(tmp_path: Path) -> None:
    model = _llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", _batches(model), "prox-fast", device="cpu")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "sparse", dtype="auto")
    assert all(weight.dtype == torch.bfloat16 for weight in again.parameters())
    assert verify(tmp_path / "sparse").dense == ()


class _Breaks(Magnitude):
    """Fails at a given weight of the run."""

    calls = 0
    at = 10**9

    def prune(self, dense: Tensor, hessian: Tensor, context: Any = None) -> Any:
        type(self).calls += 1
        if type(self).calls == type(self).at:
            raise RuntimeError("killed here")
        return super().prune(dense, hessian)


@pytest.mark.parametrize("target_mix", [0.0, 0.5])
def test_an_interrupted_run_goes_on_after_the_last_finished_block(tmp_path: Path, target_mix: float) -> None:
    model = _llama()
    model.save_pretrained(tmp_path / "dense")
    prune_checkpoint(tmp_path / "dense", tmp_path / "whole", _batches(model), _Breaks(), target_mix=target_mix)
    # Four groups of weights a block: the seventh is in the second block.
    _Breaks.calls, _Breaks.at = 0, 7
    with pytest.raises(RuntimeError, match="killed"):
        prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", _batches(model), _Breaks(), target_mix=target_mix)
    assert not (tmp_path / "sparse").exists()
    _Breaks.calls, _Breaks.at = 0, 10**9
    report = prune_checkpoint(
        tmp_path / "dense", tmp_path / "sparse", _batches(model), _Breaks(), target_mix=target_mix
    )
    assert _Breaks.calls == 8
    assert len(report.layers) == 21
    one, other = (LlamaForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "sparse"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_that_dies_at_its_very_end_is_completed_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _llama()
    model.save_pretrained(tmp_path / "dense")
    replace = Path.replace

    def dies(self: Path, target: Path) -> Path:
        if Path(target) == tmp_path / "sparse":
            raise OSError("power lost")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dies)
    with pytest.raises(OSError, match="power"):
        prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", _batches(model), Magnitude())
    monkeypatch.undo()
    # What a kill in the middle of writing a block would have left.
    (tmp_path / ".sparse.unfinished" / "model.layers.9.partial").write_bytes(b"half")
    report = prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", _batches(model), Magnitude())
    assert len(report.layers) == 21
    assert not {"run.json", "model.layers.9.partial"} & {path.name for path in (tmp_path / "sparse").iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "sparse"]


def test_two_runs_into_one_folder_and_blocks_of_an_unknown_run_are_refused(tmp_path: Path) -> None:
    model = _llama()
    model.save_pretrained(tmp_path / "dense")
    with (
        FileLock(tmp_path / ".sparse.unfinished.lock"),
        pytest.raises(RunInProgress, match="Another process"),
    ):
        prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", _batches(model), Magnitude())
    (tmp_path / ".sparse.unfinished").mkdir()
    (tmp_path / ".sparse.unfinished" / "model.layers.0.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="unknown run"):
        prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", _batches(model), Magnitude())


def test_the_half_way_target_is_refused_where_a_decoder_would_see_the_pruned_encoder() -> None:
    model = _t5()
    with pytest.raises(ValueError, match="one stack"):
        prune_model(model, _batches(model), Magnitude(), target_mix=0.5)


def test_an_unfinished_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    model = _llama()
    model.save_pretrained(tmp_path / "dense")
    _Breaks.calls, _Breaks.at = 0, 7
    with pytest.raises(RuntimeError, match="killed"):
        prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", _batches(model), _Breaks())
    _Breaks.at = 10**9
    with pytest.raises(CheckpointError, match="calibration"):
        prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", _batches(model)[:2], _Breaks())
    with pytest.raises(CheckpointError, match="refine"):
        prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", _batches(model), _Breaks(), refine="none")


def test_pruning_in_memory_resumes_too_and_notices_other_weights(tmp_path: Path) -> None:
    whole = _llama()
    prune_model(whole, _batches(whole), Magnitude())
    model = _llama()
    _Breaks.calls, _Breaks.at = 0, 7
    with pytest.raises(RuntimeError, match="killed"):
        prune_model(model, _batches(model), _Breaks(), resume_dir=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), _llama().parameters(), strict=True))
    other = _llama()
    other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    _Breaks.calls, _Breaks.at = 0, 10**9
    with pytest.raises(CheckpointError, match="other weights"):
        prune_model(other, _batches(model), _Breaks(), resume_dir=tmp_path)
    prune_model(model, _batches(model), _Breaks(), resume_dir=tmp_path)
    assert _Breaks.calls == 8
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_bad_checkpoints_are_refused_before_any_work(tmp_path: Path) -> None:
    model = _llama()
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="exists"):
        prune_checkpoint(tmp_path / "dense", tmp_path / "dense", _batches(model))
    with pytest.raises(ValueError, match=r"config\.json"):
        prune_checkpoint(tmp_path, tmp_path / "sparse", _batches(model))
    config = tmp_path / "dense" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 4}))
    with pytest.raises(ValueError, match="other names"):
        prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", _batches(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


MEMORY = """
import resource, sys, threading, time
from pathlib import Path
import psutil, torch
from transformers import LlamaConfig, LlamaForCausalLM
from sparsity24.streaming import prune_checkpoint
from sparsity24.model import prune_model

torch.set_num_threads(1)
folder, out = map(Path, sys.argv[1:3])
ids = [torch.randint(64, (2, 64)) for _ in range(2)]
warm = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2))
warm.save_pretrained(out.with_name("warm"))
prune_checkpoint(out.with_name("warm"), out.with_name("warmed"), ids, "wanda", refine="none")
before = psutil.Process().memory_info().rss
peak, done = before, False
def watch():
    global peak
    while not done:
        peak = max(peak, psutil.Process().memory_info().rss)
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
prune_checkpoint(folder, out, ids, "wanda", refine="none")
done = True
thread.join()
print((peak - before) / 2**20)
"""


@pytest.mark.slow
def test_streaming_needs_the_memory_of_some_blocks_and_not_of_the_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=40,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "dense", max_shard_size="50MB")
    block = sum(weight.nbytes for weight in model.model.layers[0].parameters()) / 2**20
    whole = sum(weight.nbytes for weight in model.parameters()) / 2**20
    del model
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "dense"), str(tmp_path / "sparse")]
    # Freed memory goes back to the system at once, so that what is resident is what is needed.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    used = float(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout.split()[-1])
    # A block is in memory as read, as placed and as written, beside the Grams and working copies of its widest weight.
    assert used < 8 * block < whole / 4
