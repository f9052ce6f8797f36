"""The runner against claims that misbehave, kills, damaged records, a second writer and a full disk."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from rich.console import Console

from core.errors import InvalidInput, RunInProgress, TenfoldError
from core.records import Record, load_records
from core.report import PaperCard
from core.runner import RunSummary, run_claims, select, write_report

PRESETS = """
    from dataclasses import dataclass
    from core.experiment import Preset

    @dataclass(frozen=True, kw_only=True)
    class Toy(Preset):
        width: int = 4
        text: str = "folder:{data}"

    QUICK = Toy(name="quick")
    REAL = Toy(name="real", width=8)
    ENVIRONMENT = {{"TOY_FLAG": "set", "OMP_NUM_THREADS": "1"}}
"""

CLAIMS = """
    import os, time
    import pandas as pd
    from core.errors import NeedsHardware
    from core.experiment import Control, Evidence, Verdict, claim, verdict
    from core.progress import track

    CONTROL = Control("nothing at all", Verdict.INCONCLUSIVE)
    LOADED = os.getpid()

    @claim("toymethod", 1, kind="exact", statement="Two and two are four.")
    def addition(preset):
        assert os.environ["TOY_FLAG"] == "set"
        headline = f"width {preset.width}, pid {os.getpid()}, page {os.path.exists('{out}/index.html')}"
        return Evidence(verdict=Verdict.of(2 + 2 == 4), headline=headline, seeds=preset.seeds)

    @claim("toymethod", 2, kind="measured", statement="It raises.")
    def it_raises(preset):
        raise RuntimeError("on purpose")

    @claim("toymethod", 3, kind="measured", statement="It hangs.", time_limit=2)
    def it_hangs(preset):
        time.sleep(600)

    @claim("toymethod", 4, kind="measured", statement="It aborts.")
    def it_aborts(preset):
        os.abort()

    @claim("toymethod", 5, kind="measured", statement="It forgets its control.")
    def no_control(preset):
        return Evidence(verdict=Verdict.HOLDS, headline="")

    @claim("toymethod", 6, kind="measured", statement="Its number is NaN.")
    def not_a_number(preset):
        return Evidence(verdict=Verdict.HOLDS, headline="", control=CONTROL, table=pd.DataFrame({"x": [float("nan")]}))

    @claim("toymethod", 7, kind="measured", statement="It needs a GPU.")
    def needs_a_gpu(preset):
        raise NeedsHardware("It needs a GPU.")

    @claim("toymethod", 8, kind="measured", statement="It comes out the other way.")
    def contradicts(preset):
        found = verdict([-1.0, -1.1, -0.9, -1.0, -1.2], label="gain")
        return Evidence(verdict=found.verdict, headline="-1", comparisons=(found,), control=CONTROL, seeds=preset.seeds)

    @claim("toymethod", 9, kind="measured", statement="It takes a while.", isolated=True)
    def slow(preset):
        for _ in track(range(4), "Waiting"):
            time.sleep(0.1)
        return Evidence(verdict=Verdict.INCONCLUSIVE, headline=f"pid {os.getpid()}", control=CONTROL)
"""

CARDS = [PaperCard("toymethod", "A Toy", "Nowhere 2026", "0000.00000", "A toy.", True)]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A method package in a folder of its own, importable here and in workers; the results folder beside it."""
    package = tmp_path / "code" / "toymethod"
    package.mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.txt").write_text("some text\n")
    (package / "__init__.py").write_text("")
    (package / "presets.py").write_text(textwrap.dedent(PRESETS).format(data=tmp_path / "data"))
    (package / "claims.py").write_text(textwrap.dedent(CLAIMS).replace("{out}", str(tmp_path / "results")))
    monkeypatch.syspath_prepend(package.parent)
    yield tmp_path / "results"
    for name in [name for name in sys.modules if name.split(".")[0] == "toymethod"]:
        del sys.modules[name]


def run(out: Path, *names: str, preset: str = "quick", again: bool = False, **settings: str) -> RunSummary:
    selections = select(names, ["toymethod"], preset, settings)
    return run_claims(selections, CARDS, out=out, again=again, console=Console(file=io.StringIO()))


def by_number(summary: RunSummary) -> dict[int, Record]:
    return {record.number: record for record in summary.records}


def test_every_claim_is_recorded_with_what_is_known_whatever_the_others_do(toy: Path):
    summary = run(toy)
    records = by_number(summary)
    assert {n: r.status for n, r in records.items()} == {
        1: "done", 2: "raised", 3: "timed out", 4: "died", 5: "raised", 6: "raised", 7: "done", 8: "done", 9: "done",
    }  # fmt: skip
    assert "RuntimeError: on purpose" in records[2].error
    assert f"signal {int(signal.SIGABRT)}" in records[4].error
    assert "needs a negative control" in records[5].error
    assert "column 'x', row 0 is nan" in records[6].error
    assert records[7].verdict == "not run"
    assert records[7].evidence["not_run_reason"] == "It needs a GPU."
    assert [record.number for record in summary.contradictions] == [8]
    assert not summary.ok
    assert records[1].evidence["headline"].endswith("page True"), "the page exists before the first claim has ended"
    assert records[9].evidence["headline"] != records[1].evidence["headline"].split(",")[1].strip()
    assert records[1].versions["numpy"]
    assert records[1].cpu_s >= 0
    page = (toy / "index.html").read_text()
    assert "It comes out the other way." in page
    on_disk = json.loads((toy / "toymethod" / "8.json").read_text())
    assert on_disk["evidence"]["comparisons"][0]["interval"]["num_seeds"] == 5


def test_a_second_run_skips_what_is_unchanged_and_a_change_of_anything_runs_it_again(toy: Path):
    assert run(toy, "toymethod/1", "toymethod/9").skipped == 0
    assert run(toy, "toymethod/1", "toymethod/9").skipped == 2
    assert run(toy, "toymethod/1", again=True).skipped == 0
    assert run(toy, "toymethod/1", width="5").skipped == 0
    assert run(toy, "toymethod/1", width="5").skipped == 1
    (toy.parent / "data" / "train.txt").write_text("other text\n")
    assert run(toy, "toymethod/1", width="5").skipped == 0
    claims = toy.parent / "code" / "toymethod" / "claims.py"
    claims.write_text(claims.read_text() + "\n")
    assert run(toy, "toymethod/1", width="5").skipped == 0
    assert by_number(run(toy, "toymethod/1", preset="real"))[1].evidence["headline"].startswith("width 8")


def test_a_verdict_that_is_still_true_is_shown_as_such_by_a_run_about_another_claim(toy: Path):
    run(toy, "toymethod/8")
    run(toy, "toymethod/1")
    assert "an earlier run" not in (toy / "index.html").read_text()
    run(toy, "toymethod/1", width="5")
    assert "an earlier run" in (toy / "index.html").read_text()


def test_a_package_named_whole_is_run_whole_whatever_stands_beside_it(toy: Path):
    (selection,) = select(["toymethod/1", "toymethod"], ["toymethod"], "quick", {})
    assert selection.numbers == ()


def test_what_could_not_run_is_tried_again(toy: Path):
    assert run(toy, "toymethod/7").skipped == 0
    assert run(toy, "toymethod/7").skipped == 0


def test_a_run_killed_in_the_middle_loses_only_what_was_running(toy: Path):
    script = (
        "from pathlib import Path; from core.report import PaperCard; from core.runner import run_claims, select\n"
        f"run_claims(select(['toymethod/1', 'toymethod/3'], ['toymethod'], 'quick', {{}}), [], out=Path({str(toy)!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(toy.parent / "code")}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (toy / "toymethod" / "1.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert [record.number for record in load_records(toy)] == [1]
    summary = run(toy, "toymethod/1", "toymethod/9")
    assert summary.skipped == 1
    assert by_number(summary)[9].status == "done"


def test_a_corrupt_or_foreign_record_is_set_aside_and_its_claim_runs(toy: Path):
    folder = toy / "toymethod"
    folder.mkdir(parents=True)
    (folder / "1.json").write_text('{"schema": "tenfold.rec')
    (folder / "9.json").write_text('{"schema": "somebody else", "verdict": "holds"}')
    (folder / "notes.json").write_text("not ours")
    summary = run(toy, "toymethod/1", "toymethod/9")
    assert [record.status for record in summary.records] == ["done", "done"]
    assert (folder / "1.json.unreadable").read_text() == '{"schema": "tenfold.rec'
    assert (folder / "9.json.unreadable").exists()
    assert (folder / "notes.json").read_text() == "not ours"


def test_a_second_run_into_the_same_folder_is_refused_while_the_first_goes_on(toy: Path):
    script = (
        "import sys; from pathlib import Path; from core.runner import _sole_writer\n"
        f"with _sole_writer(Path({str(toy)!r})):\n    print('locked', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    try:
        with pytest.raises(RunInProgress, match=f"Process {other.pid} .* is writing"):
            run(toy, "toymethod/1")
    finally:
        other.communicate("")
    assert run(toy, "toymethod/1").records[0].status == "done"


def test_a_full_disk_stops_the_run_with_one_sentence_and_leaves_nothing_half_written(toy: Path):
    run(toy, "toymethod/1")
    before = (toy / "toymethod" / "1.json").read_text()
    script = (
        "import resource, signal, sys; from pathlib import Path; from core.runner import run_claims, select\n"
        "from core.errors import TenfoldError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))\n"
        "import core.report; core.report.write_page = lambda *a, **k: None\n"
        f"selections = select(['toymethod/1'], ['toymethod'], 'quick', {{'width': '6'}})\n"
        f"try: run_claims(selections, [], out=Path({str(toy)!r}))\n"
        "except TenfoldError as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": str(toy.parent / "code")}
    said = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert "Cannot write" in said.stdout, said.stderr
    assert "start again to resume" in said.stdout
    assert (toy / "toymethod" / "1.json").read_text() == before
    assert not list(toy.rglob("*.tmp"))


def test_requests_that_make_no_sense_are_refused_before_any_work_with_the_close_names(toy: Path):
    with pytest.raises(InvalidInput, match="Did you mean toymethod"):
        select(["toymethud"], ["toymethod"], "quick", {})
    with pytest.raises(InvalidInput, match="Did you mean width"):
        select([], ["toymethod"], "quick", {"widht": "3"})
    with pytest.raises(InvalidInput, match=r"preset of toymethod 'quik'\. Did you mean quick"):
        select([], ["toymethod"], "quik", {})
    with pytest.raises(InvalidInput, match="at least 5 seeds, all different"):
        select([], ["toymethod"], "quick", {}, num_seeds=3)
    for name in ("toymethod/addition", "toymethod/", "toymethod/²"):
        with pytest.raises(InvalidInput, match="toymethod/1"):
            select([name], ["toymethod"], "quick", {})
    with pytest.raises(InvalidInput, match="claim of toymethod '77'"):
        run(toy, "toymethod/77")


def test_claims_that_cannot_be_loaded_break_their_package_and_say_why(toy: Path):
    (toy.parent / "code" / "toymethod" / "claims.py").write_text("import nothing_of_this_name\n")
    summary = run(toy)
    assert summary.broken == ("toymethod",)
    assert not summary.ok


def test_the_page_can_be_written_again_from_the_records(toy: Path):
    run(toy, "toymethod/1")
    (toy / "index.html").unlink()
    assert "Two and two are four." in write_report(CARDS, toy).read_text()


def test_an_output_folder_that_cannot_be_made_is_an_error(toy: Path):
    toy.write_text("a file where the folder should be")
    with pytest.raises(TenfoldError, match="Choose a folder with --out"):
        run(toy, "toymethod/1")
