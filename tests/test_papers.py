"""The `papers` command as a stranger would type it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from papers import PAPERS


def papers(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "papers", *arguments]
    settings = {**os.environ, "COLUMNS": "120", **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=settings, timeout=300)


def test_ten_papers_are_listed_with_their_state():
    done = papers("list")
    assert done.returncode == 0
    assert all(paper.package in done.stdout for paper in PAPERS)
    assert done.stdout.count("not built yet") == sum(not paper.built for paper in PAPERS)


def test_help_names_every_command_and_says_what_the_exit_code_means():
    text = papers("--help").stdout
    assert all(command in text for command in ("list", "show", "reproduce", "report", "doctor", "demo"))
    assert "Exit code" in papers("reproduce", "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("show", "sparsity42"), "Did you mean sparsity24"),
        (("reproduce", "sparsity24", "--set", "sedes=3"), "Did you mean seeds"),
        (("reproduce", "sparsity24", "--set", "seeds"), "KEY=VALUE"),
        (("reproduce", "sparsity24/99"), "claim of sparsity24 '99'"),
        (("reproduce", "sparsity24", "--seeds", "3"), "at least 5 seeds, all different"),
        (("reproduce", "omg"), "omg is not built yet"),
        (("demo", "omg"), "omg is not built yet"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_sentence_and_exit_code_2(
    tmp_path: Path, arguments: tuple[str, ...], said: str
):
    done = papers(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_one_claim_is_reproduced_shown_and_reported(tmp_path: Path):
    done = papers("reproduce", "sparsity24/1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "holds" in done.stdout
    assert "1 holds" in done.stdout
    assert "skipped: 1" in papers("reproduce", "sparsity24/1", cwd=tmp_path).stdout
    assert "holds (quick)" in papers("show", "sparsity24", cwd=tmp_path).stdout
    (tmp_path / "results" / "index.html").unlink()
    assert papers("report", cwd=tmp_path).returncode == 0
    assert (tmp_path / "results" / "index.html").exists()


def test_a_claim_that_contradicts_what_is_expected_gives_exit_code_1(tmp_path: Path):
    patch = (
        "import sys, papers\n"
        "import core.records as records; records.contradicts = lambda kind, expected, found: True\n"
        "sys.argv = ['papers', 'reproduce', 'sparsity24/1']\n"
        "papers.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", patch], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "expected holds" in done.stdout


def test_doctor_names_what_is_here_and_what_is_missing():
    done = papers("doctor", PAPERS_DATA="")
    assert done.returncode == 0
    assert "PAPERS_DATA" in done.stdout
    assert "sparsity24" in done.stdout
    assert "Python" in done.stdout


@pytest.mark.slow
def test_the_demo_shows_something_within_seconds():
    done = papers("demo", "sparsity24")
    assert done.returncode == 0, done.stderr
    assert "prox" in done.stdout


def test_a_hub_preset_without_a_network_is_not_run_and_says_why(tmp_path: Path):
    done = papers(
        "reproduce", "sparsity24/8", "--set", "model=hub:nobody/no-such-model", cwd=tmp_path, HF_HUB_OFFLINE="1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not run" in done.stdout
    assert "fetch it elsewhere" in " ".join(done.stdout.split())
