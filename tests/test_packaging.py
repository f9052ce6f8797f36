"""The wheel, what importing costs and pulls in, and that every extra of every package is declared."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from papers import PAPERS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"core", *(paper.package for paper in PAPERS)}


def modules_after(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `statement`."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_papers_imports_no_method_and_no_engine():
    loaded = modules_after("import papers; [paper.built for paper in papers.PAPERS]")
    assert not loaded & ({"torch", "jax", "transformers", "pandas", "matplotlib"} | (PACKAGES - {"core"}))


@pytest.mark.parametrize("paper", [paper for paper in PAPERS if paper.built], ids=lambda paper: paper.package)
def test_importing_a_package_and_its_presets_loads_no_engine(paper):
    loaded = modules_after(f"import {paper.package}, {paper.package}.presets")
    assert not loaded & {"torch", "jax", "transformers", "accelerate", "sklearn"}
    assert loaded & PACKAGES == {"core", paper.package}


def test_a_torch_package_never_loads_jax():
    loaded = modules_after("import sparsity24.claims, core.testbed, core.llm.causal, core.training.torch")
    assert "torch" in loaded
    assert "jax" not in loaded


def test_the_jax_step_never_loads_torch():
    loaded = modules_after("import core.training.jax, core.runner, core.data.catalog, core.metrics.language_modeling")
    assert "jax" in loaded
    assert not loaded & {"torch", "transformers", "accelerate"}


def test_importing_papers_takes_less_than_a_third_of_a_second():
    # The best of three: what else the machine does may only add to it.
    times = []
    for _ in range(3):
        command = [sys.executable, "-X", "importtime", "-c", "import papers"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        times.append(int(done.stderr.splitlines()[-1].split("|")[1]) / 1e6)
    assert min(times) <= 0.3


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_nothing_else_and_works_outside_the_checkout(tmp_path: Path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    built = {paper.package for paper in PAPERS if paper.built}
    assert tops == {"papers.py", "core", *built}
    for package in ("core", *built):
        sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
        assert sources <= set(names)
        assert f"{package}/py.typed" in names
    assert any(name.startswith("core/templates/") for name in names)
    assert all(f"{package}/README.md" in names for package in built)
    target = tmp_path / "installed"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(target), str(wheel)], check=True
    )
    code = (
        "import core.report, papers, sparsity24, sparsity24.presets; print(papers.__file__); print(sparsity24.prox24); "
        "print([paper.package for paper in papers.PAPERS if paper.built])"
    )
    environment = {"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith(str(target))
    assert lines[-1] == str([paper.package for paper in PAPERS if paper.built])
