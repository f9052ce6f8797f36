"""Every claim of every built package, at quick scale, with its negative control; and the part of REAL that CI can pay."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from core.experiment import Kind, Verdict
from core.records import Record
from core.runner import describe, run_claims, select
from papers import PAPERS

BUILT = [paper.package for paper in PAPERS if paper.built]
CLAIMS = [(package, entry.number) for package in BUILT for entry in describe(package)]

# What of REAL fits into CI, by package: the claims, and the settings that shrink them. The rest of REAL runs under
# `make reproduce PRESET=real`.
REAL_IN_CI = {
    "sparsity24": (["sparsity24/7"], {"num_blocks": "1", "layer_pattern": "'*.self_attn.[qkv]_proj'"}),
    "sched_sampling": (["sched_sampling/12"], {"text_pairs": "8"}),
}
# A claim whose whole is expected to be inconclusive still has parts that must hold.
MUST_HOLD = {"sparsity24/7": ("model: Wanda / prox",)}


@pytest.fixture(scope="session")
def record_of(tmp_path_factory: pytest.TempPathFactory):
    """The record of a claim; a package's claims run together, once, in the runner's own worker."""
    out = tmp_path_factory.mktemp("results")

    @cache
    def run(package: str) -> dict[int, Record]:
        summary = run_claims(select([package], BUILT, "quick", {}), [paper.card for paper in PAPERS], out=Path(out))
        return {record.number: record for record in summary.records}

    return lambda package, number: run(package)[number]


def check(record: Record) -> None:
    assert record.status == "done", record.error
    assert not record.contradicts, f"{record.verdict}, expected {record.expected}: {record.evidence['headline']}"
    if record.verdict is Verdict.NOT_RUN:
        assert record.evidence["not_run_reason"]
        return
    control = record.evidence["control"]
    if record.kind != Kind.EXACT:
        assert control, "an empirical claim names its negative control"
    if control:
        assert control["verdict"] != Verdict.HOLDS, f"the control holds: {control['description']}"


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("package", "number"), CLAIMS, ids=[f"{package}-{number}" for package, number in CLAIMS])
def test_a_claim_is_as_expected_and_its_negative_control_does_not_hold(record_of, package: str, number: int):
    check(record_of(package, number))


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("package", [package for package in BUILT if package in REAL_IN_CI])
def test_the_part_of_real_that_ci_can_pay(papers_data: Path, tmp_path: Path, package: str):
    names, settings = REAL_IN_CI[package]
    summary = run_claims(select(names, BUILT, "real", settings), [paper.card for paper in PAPERS], out=tmp_path)
    assert [f"{record.package}/{record.number}" for record in summary.records] == names
    for record in summary.records:
        check(record)
        parts = {part["label"]: part["verdict"] for part in record.evidence["comparisons"]}
        for label in MUST_HOLD.get(f"{record.package}/{record.number}", ()):
            assert parts[label] == Verdict.HOLDS
