from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parent / "scripts" / "killed.py"


@pytest.mark.parametrize(("engine", "least_kills"), [("torch", 30), ("jax", 2)])
def test_a_run_killed_at_any_moment_resumes_bit_for_bit(tmp_path: Path, engine: str, least_kills: int) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # Each jax child would compile the same program again.
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    result = subprocess.run(
        [sys.executable, str(_SCRIPT), engine, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["different"] == []
    assert report["killed"] >= least_kills
    assert report["killed_from_outside"] >= 1
