"""Two processes of a torchrun build the same data set and train to the same weights as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sched_sampling.storage import load_mixed

SCRIPT = Path(__file__).parent / "scripts" / "two_processes.py"


def _run(folder: Path, processes: int) -> None:
    folder.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_share_the_files_and_end_in_the_weights_of_one(tmp_path: Path):
    _run(tmp_path / "one", 1)
    _run(tmp_path / "two", 2)
    assert (tmp_path / "two" / "rank-1.txt").read_text().startswith("2 ")
    assert load_mixed(tmp_path / "two" / "data").to_list() == load_mixed(tmp_path / "one" / "data").to_list()
    one, two = (load_file(tmp_path / name / "final.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        # Half batches are summed in another order.
        assert (tensor - two[name]).abs().max() < 1e-5, name
