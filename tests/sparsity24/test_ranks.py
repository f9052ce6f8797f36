"""Two processes that share batches and rows prune as one does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from sparsity24.model import prune_model
from sparsity24.ranks import Ranks

SCRIPT = Path(__file__).parent / "scripts" / "ranks.py"


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sparsity24_ranks_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two gloo processes leave behind."""
    folder = tmp_path_factory.mktemp("ranks")
    _script().model().save_pretrained(folder / "dense")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    result = subprocess.run(
        [*command, str(SCRIPT), str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", _script().METHODS)
def test_two_processes_give_the_masks_of_one(folder: Path, method: str) -> None:
    script = _script()
    alone = script.model()
    prune_model(alone, script.batches(), method, target_mix=0.5 if method == "sparsegpt" else 0.0)
    first, second = (load_file(folder / f"{method}-{rank}.safetensors") for rank in (0, 1))
    for key, weight in alone.state_dict().items():
        assert torch.equal(first[key], second[key]), key
        assert torch.equal(first[key] != 0, weight != 0), key
        assert torch.allclose(first[key], weight, rtol=1e-2, atol=1e-3), key


@pytest.mark.slow
def test_two_processes_stream_one_checkpoint(folder: Path) -> None:
    script = _script()
    alone = script.model()
    prune_model(alone, script.batches(), "sparsegpt")
    streamed = LlamaForCausalLM.from_pretrained(folder / "streamed")
    for (key, one), other in zip(alone.state_dict().items(), streamed.state_dict().values(), strict=True):
        assert torch.equal(one != 0, other != 0), key


def test_rows_are_shared_out_whole_and_in_order() -> None:
    for size in (1, 2, 3, 7):
        rows = [row for rank in range(size) for row in range(10)[Ranks(rank, size).rows(10)]]
        assert rows == list(range(10))


def test_more_processes_than_batches_are_refused() -> None:
    batch: dict[str, Tensor] = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    with pytest.raises(ValueError, match="at least one batch"):
        Ranks(0, 3).share([batch, batch])
    assert Ranks(1, 2).share([batch, {}, batch]) == [{}]
