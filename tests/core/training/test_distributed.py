from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

_SCRIPT = Path(__file__).parent / "scripts" / "distributed.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave behind: one torchrun for all of these tests, because starting it is what costs."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    result = subprocess.run(
        [*command, str(_SCRIPT), str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("distributed_script", _SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["ddp", "ddp_accumulated", "fsdp", "fsdp_untied", "fsdp_accumulated"])
def test_two_processes_give_what_one_process_gives(report: dict[str, Any], name: str) -> None:
    assert report["world_size"] == 2
    for quantity in ("weights", "average", "losses"):
        assert report[name][quantity] < 1e-4, (name, quantity)


def test_fully_shard_shards_every_parameter_and_ddp_none(report: dict[str, Any]) -> None:
    assert report["fsdp"]["sharded"] == report["fsdp"]["parameters"] > 10
    assert report["ddp"]["sharded"] == 0


def test_sharded_bfloat16_stays_near_the_float32_losses(report: dict[str, Any]) -> None:
    assert 0 < report["fsdp_bf16"]["losses"] < 0.05


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_interrupted_processes_resume_bit_for_bit(report: dict[str, Any], name: str) -> None:
    assert report[f"{name}_resumed_identical"]


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_one_process_finishes_what_two_began(folder: Path, script: ModuleType, name: str) -> None:
    expected, expected_average, _ = script.by_hand(script.llama())
    step, losses = script.train(script.llama(seed=9), folder / f"{name}_unfinished")
    assert len(losses) == script.NUM_STEPS
    for name_, parameter in step.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name_], rtol=0, atol=1e-4)
    with step.averaged_weights() as averaged:
        for name_, parameter in averaged.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected_average[name_], rtol=0, atol=1e-4)
