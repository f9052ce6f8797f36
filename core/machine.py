"""What a result was computed on: versions of the libraries that matter, and the processor."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

# Those that can change a number; the rest of the environment cannot.
DISTRIBUTIONS = (
    "torch", "transformers", "tokenizers", "accelerate", "jax", "jaxlib", "optax", "torch-geometric",
    "numpy", "scipy", "scikit-learn", "pandas", "datasets",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Installed versions, by distribution; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            # The local label (+cpu) is kept: another build may give other bits.
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str]:
    """Processor, cores, threads, instruction sets that change low-precision speed, and GPUs."""
    info = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count() or 1),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
    }
    flags = _cpu_flags() & {"amx_tile", "avx512_bf16", "avx512_vnni", "avx512f", "avx2"}
    if flags:
        info["instructions"] = " ".join(sorted(flags))
    gpus = _gpus()
    if gpus:
        info["gpus"] = gpus
    return info


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or "unknown"


def _cpu_flags() -> set[str]:
    return set(_cpuinfo("flags").split())


def _gpus() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return "; ".join(answer.stdout.strip().splitlines()) if answer.returncode == 0 else ""
