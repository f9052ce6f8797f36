from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from core import report
from core.experiment import Control, Evidence, Verdict, verdict
from core.plots import figure, to_svg
from core.report import ClaimRow, PaperCard, RunState, Section, evidence_to_json, render, write_page
from core.typeset import number, numbers

STARTED = datetime(2026, 11, 24, 8, 0, tzinfo=UTC)
RUNNING = RunState("quick", STARTED)
ENDED = RunState("quick", STARTED, STARTED + timedelta(minutes=14, seconds=3))
PACKAGES = (
    *("sdc", "omg", "sparsity24", "autog", "sched_sampling"),
    *("cic_mtl", "agentoccam", "uncurl", "inference_opt", "citations_fcm"),
)


def a_plot():
    fig, ax = figure()
    ax.plot([1, 2, 3], label="prox")
    ax.legend()
    return fig


def some_evidence() -> Evidence:
    gain = verdict([0.08, 0.09, 0.07, 0.085, 0.081], label="Wanda + GD", unit="log perplexity")
    null = verdict([0.001, -0.002, 0.0, 0.001, -0.001], label="zero steps", unit="log perplexity")
    table = pd.DataFrame(
        {
            "method": ["dense", "magnitude, which has a long name on a phone"],
            "perplexity": np.array([41.26, 49.6], dtype=np.float32),
            "loss": pd.array([pd.NA, 0.0795], dtype="Float64"),
            "groups": np.array([0, 12345]),
            "2:4": [False, True],
            "calibration set of this method": ["none", "wikitext2_small, train part, first 256 windows of 64 tokens"],
        }
    )
    return Evidence(
        verdict=Verdict.HOLDS,
        headline="Perplexity falls by 8 %.",
        table=table,
        comparisons=(gain,),
        control=Control("Zero refinement steps.", Verdict.INCONCLUSIVE, (null,)),
        figures={"Loss by iteration": a_plot()},
        seeds=(0, 1, 2, 3, 4),
        provenance=("wikitext2_small from a folder, content 90c1e5a2",),
    )


RECORD = json.loads(json.dumps(evidence_to_json(some_evidence())))


def row(num: int, status: str = "done", **changes) -> ClaimRow:
    values = {
        "number": num,
        "name": "masked gradients improve every mask",
        "statement": f"Statement {num}.",
        "explanation": "How.\n\nWhy we expect it.",
        "kind": "measured",
        "expected": "holds",
        "status": status,
        "evidence": RECORD if status == "done" else None,
        "error": "",
        "wall_s": 12.3,
        "cpu_s": 200.0,
        "versions": {"torch": "2.13.0"},
        "machine": {"cores": "2"},
        "preset": "quick",
        "contradicts": False,
    }
    return ClaimRow(**{**values, **changes})


def papers(rows) -> list[tuple[PaperCard, list[ClaimRow]]]:
    return [
        (PaperCard(name, f"Title of {name}", "ICML 2025", "2501.18015", "What it does.", name == "sparsity24"), rows)
        if name == "sparsity24"
        else (PaperCard(name, f"Title of {name}", "ICML 2025", "", "What it does.", False), [])
        for name in PACKAGES
    ]


ROWS = [
    row(1),
    row(2, "running"),
    row(3, "raised", error="Traceback (most recent call last):\n  File\nValueError: " + "a long line " * 30),
    row(4, "timed out", error="Time limit of 600 s reached."),
    row(5, "waiting"),
    row(6, "stale", evidence=RECORD),
    row(7, evidence=evidence_to_json(Evidence.not_run("Needs 70B weights."))),
    row(8, evidence={**RECORD, "verdict": "fails"}, contradicts=True),
]


def test_evidence_becomes_plain_json_with_null_for_a_missing_cell():
    assert set(RECORD) == {
        *("verdict", "headline", "table", "comparisons", "control", "figures", "seeds", "provenance", "not_run_reason")
    }
    assert RECORD["table"]["rows"][0] == ["dense", pytest.approx(41.26, abs=1e-4), None, 0, False, "none"]
    (comparison,) = RECORD["comparisons"]
    assert comparison["label"] == "Wanda + GD"
    assert comparison["interval"]["num_seeds"] == 5
    assert comparison["interval"]["low"] < comparison["interval"]["estimate"] < comparison["interval"]["high"]
    assert RECORD["control"]["verdict"] == "inconclusive"
    assert RECORD["figures"][0]["svg"].startswith("<svg")


def test_a_named_index_becomes_columns():
    table = pd.DataFrame({"loss": [1.5]}, index=pd.MultiIndex.from_tuples([("prox", 0)], names=["method", "seed"]))
    made = evidence_to_json(Evidence(verdict=Verdict.HOLDS, headline="", table=table))["table"]
    assert made == {"columns": ["method", "seed", "loss"], "rows": [["prox", 0, 1.5]]}


def test_the_page_has_a_card_a_paper_and_a_row_a_claim():
    page = render(papers(ROWS), RUNNING)
    for name in PACKAGES:
        assert f'id="{name}"' in page
    assert page.count('<section class="paper unbuilt"') == 9
    assert page.count('<details class="claim"') == len(ROWS)
    for status in ("running", "raised", "timed out", "waiting", "stale", "not run", "holds", "fails"):
        assert f">{status}</span>" in page
    assert "papers reproduce sparsity24/4 --preset full" in page
    assert "Needs 70B weights." in page
    assert "This contradicts what we expect." in page
    assert "<b>5</b> of <b>7</b> claims" in page  # the stale one is not of this run


def test_a_missing_cell_is_an_en_dash_and_numbers_stand_right():
    page = render(papers(ROWS[:1]), ENDED)
    assert '<td class="n">–</td><td class="n">0</td><td>no</td>' in page
    assert '<td class="n">41.26</td>' in page
    assert '<td class="n">12\u202f345</td>' in page


def test_the_page_refreshes_itself_only_while_the_run_is_on():
    assert "data-refresh=" in render(papers(ROWS), RUNNING).split("<style>")[0]
    ended = render(papers(ROWS), ENDED)
    assert "data-refresh=" not in ended.split("<style>")[0]
    assert 'http-equiv="refresh"' not in ended
    assert "14 min 03 s" in ended
    assert ended == render(papers(ROWS), ENDED)


def test_a_page_exists_before_anything_is_known():
    assert "<b>0</b> of <b>0</b> claims" in render(papers([]), RUNNING)


class Outline(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    return parser


HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"


def test_nothing_in_a_record_becomes_markup():
    evidence = {
        **RECORD,
        "headline": HOSTILE,
        "provenance": [HOSTILE],
        "table": {"columns": [HOSTILE], "rows": [[HOSTILE]]},
        "figures": [
            {"caption": HOSTILE, "svg": HOSTILE},
            {"caption": "", "svg": "<svg><script>alert(1)</script></svg>"},
        ],
        "control": {**RECORD["control"], "description": HOSTILE},
        "comparisons": [{**RECORD["comparisons"][0], "label": HOSTILE, "unit": HOSTILE}],
    }
    text = dict.fromkeys(("name", "statement", "explanation", "kind", "expected", "error", "preset"), HOSTILE)
    hostile = row(1, evidence=evidence, versions={HOSTILE: HOSTILE}, machine={HOSTILE: HOSTILE}, **text)
    card = PaperCard(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, True)
    page = render([(card, [hostile, row(2, HOSTILE)])], RunState(HOSTILE, STARTED, None, HOSTILE))
    found = outline(page)
    assert found.tags.count("script") == 1
    assert "img" not in found.tags
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert "{{ 7 * 7 }}" in page
    assert not [value for name, value in found.attributes if name == "href" and "arxiv.org" in (value or "")]


def test_backticks_mark_code_in_prose_and_nothing_else_gets_through():
    page = render(papers([row(1, statement="`prox24` beats <b>all</b> `<i>`")]), ENDED)
    assert "<code>prox24</code> beats &lt;b&gt;all&lt;/b&gt; <code>&lt;i&gt;</code>" in page


def test_a_control_that_holds_takes_the_trust_from_the_evidence():
    evidence = {**RECORD, "control": {**RECORD["control"], "verdict": "holds"}}
    assert "not to be trusted" in render(papers([row(1, evidence=evidence)]), ENDED)
    assert "not to be trusted" not in render(papers([row(1)]), ENDED)


@pytest.mark.parametrize(
    "damage",
    [
        {"verdict": "perhaps"},
        {"comparisons": [{"label": "no interval"}]},
        {"comparisons": [{**RECORD["comparisons"][0], "margin": float("nan")}]},
        {"table": {"columns": ["a"], "rows": [[{}]]}},
        {"figures": "none"},
    ],
)
def test_a_damaged_record_is_said_to_be_damaged_and_hides_no_other(damage):
    page = render(papers([row(1, evidence={**RECORD, **damage}), row(2)]), ENDED)
    assert "The record of this claim is damaged" in page
    assert '<span class="chip raised">raised</span>' in page
    assert "Statement 2." in page


def test_a_table_with_rows_of_unequal_length_still_renders():
    table = {"columns": ["a", "b"], "rows": [[1], [1, 2, 3], []]}
    assert "Statement 1." in render(papers([row(1, evidence={**RECORD, "table": table})]), ENDED)


def test_a_failed_write_leaves_the_old_page_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "index.html"
    write_page(path, papers(ROWS), RUNNING)
    before = path.read_text()

    def refuse(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        write_page(path, papers(ROWS), ENDED)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["index.html"]


def test_ids_are_unique_even_when_claims_show_the_same_figure():
    ids = re.findall(r' id="([^"]+)"', render(papers([row(i) for i in range(1, 5)]), ENDED))
    assert len(ids) == len(set(ids)) > 40


MANY = """
import json, sys, time
from datetime import datetime
from core.report import ClaimRow, PaperCard, RunState, render

record = json.load(open(sys.argv[1]))
rows = [ClaimRow(i, "", "S", "", "exact", "holds", "done", record, "", 1.0, 1.0, {}, {}, "quick", False) for i in range(161)]
card, state = PaperCard("sdc", "T", "V", "", "", True), RunState("quick", datetime.now())
render([(card, rows[:1])], state)
start = time.process_time()
page = render([(card, rows[1:])], state)
print(page.count("<figure>"), time.process_time() - start)
"""


def test_a_page_of_160_claims_with_figures_takes_less_than_a_second_of_this_processor(tmp_path):
    # In an interpreter of its own: here, every annotation is checked at run time.
    (tmp_path / "record.json").write_text(json.dumps(RECORD))
    command = [sys.executable, "-c", MANY, str(tmp_path / "record.json")]
    figures, seconds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert int(figures) == 160
    assert float(seconds) < 1


def test_the_interval_plot_places_estimate_zero_and_margin_in_order():
    comparison = {**RECORD["comparisons"][0], "margin": 0.05}
    (plot,) = report._interval_plots(report._Evidence.model_validate({**RECORD, "comparisons": [comparison]}))
    gain, null = plot["rows"]
    assert 0 < plot["zero"] < gain["x_margin"] < gain["x_low"] < gain["x"] < gain["x_high"] < 100
    assert null["control"]
    assert null["x_low"] < plot["zero"] < null["x_high"]
    assert [x for x, _ in plot["ticks"]] == sorted(x for x, _ in plot["ticks"])


def test_an_interval_without_width_at_zero_has_an_axis():
    interval = {**RECORD["comparisons"][0]["interval"], "estimate": 0, "low": 0, "high": 0}
    comparison = {**RECORD["comparisons"][0], "interval": interval}
    assert 'cx="50.0%"' in render(
        papers([row(1, evidence={**RECORD, "control": None, "comparisons": [comparison]})]), ENDED
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0, "0"),
        (41.2649, "41.26"),
        (-0.02948, "−0.02948"),
        (2511.3, "2511"),
        (12345, "12\u202f345"),
        (4.4e-16, "4.4 × 10⁻¹⁶"),
        (2e17, "2 × 10¹⁷"),
        (9.99999e5, "999\u202f999"),
        (1.0, "1"),
    ],
)
def test_numbers_are_typeset(value, text):
    assert number(value) == text


def test_a_column_shares_its_decimals_where_that_loses_nothing():
    assert numbers([41.3, 2511.3, None]) == ["41.3", "2511.3", "–"]
    assert numbers([0.0, 0.21, 1.4]) == ["0.00", "0.21", "1.40"]
    assert numbers([1.2e-7, 3e-11]) == ["1.2 × 10⁻⁷", "3 × 10⁻¹¹"]
    assert numbers([1, 20000]) == ["1", "20\u202f000"]


def test_a_package_makes_its_own_page():
    table = pd.DataFrame({"layer": ["q_proj"], "loss": [0.0233]})
    section = Section("Loss <by> layer", "One.\n\nTwo.", table, {"A plot": to_svg(a_plot())})
    page = report.render_page("Pruning", "Intro.", [section, Section("Only text", "Three.")])
    assert "<h2>Loss &lt;by&gt; layer</h2>" in page
    assert '<td class="n">0.0233</td>' in page
    assert page.count("<svg") == 1
    assert "data-refresh=" not in page.split("<style>")[0]


def palettes() -> list[dict[str, str]]:
    blocks = re.findall(r"\{([^{}]*--page:[^{}]*)\}", (report.TEMPLATES / "style.css").read_text())
    return [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})\b", block)) for block in blocks]


def contrast(one: str, other: str) -> float:
    def luminance(color: str) -> float:
        channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return float(
            np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
            @ [0.2126, 0.7152, 0.0722]
        )

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_every_text_colour_reads_on_its_ground_in_both_themes():
    light, dark, dark_by_system = palettes()
    assert dark == dark_by_system
    for colors in (light, dark):
        grounds = [colors["page"], colors["card"], colors["code"]]
        pairs = [(colors[text], ground) for text in ("ink", "muted", "accent") for ground in grounds]
        pairs += [(colors[tone], colors["card"]) for tone in ("holds", "fails", "inconclusive", "neutral")]
        pairs += [(colors[tone], colors[f"{tone}-tint"]) for tone in ("holds", "fails", "inconclusive", "neutral")]
        pairs += [(colors["accent"], colors["neutral-tint"])]
        assert min(contrast(*pair) for pair in pairs) >= 4.5  # WCAG 2.2, AA


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra [dev])")
    quiet = [f"--disable-{name}" for name in ("background-networking", "component-update", "sync", "quic")]
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=chromium, args=quiet)
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Open HTML from a file; whatever the console or the network saw fails the test at its end."""
    contexts, complaints = [], []

    def opened(html: str, width: int = 1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        path = tmp_path / "index.html"
        path.write_text(html)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda sent: sent.url.startswith(("file:", "data:")) or complaints.append(sent.url))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


OPEN_ALL = "for (const row of document.querySelectorAll('details')) row.open = true"


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_scrolls_sideways(open_page, width):
    page = open_page(render(papers(ROWS), ENDED), width)
    for action in ("0", OPEN_ALL):
        page.evaluate(action)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    sticking_out = """[...document.querySelectorAll('.body *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
        && e.getBoundingClientRect().right > e.closest('.claim').getBoundingClientRect().right + 1).map(e => e.className)"""
    assert page.evaluate(sticking_out) == []


def test_rows_open_by_keyboard_with_a_visible_focus(open_page):
    page = open_page(render(papers(ROWS), ENDED))
    for key in ("Enter", " "):
        page.locator("#sparsity24-3 summary").focus()
        page.keyboard.press("Tab")
        page.keyboard.press("Shift+Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press(key)
        assert page.evaluate("document.getElementById('sparsity24-3').open")
        page.keyboard.press(key)
        assert not page.evaluate("document.getElementById('sparsity24-3').open")
    page.get_by_role("button", name="Open all").press("Enter")
    assert page.locator("details:not([open])").count() == 0


@pytest.mark.parametrize("system", ["light", "dark"])
def test_the_theme_toggle_persists(open_page, system):
    page = open_page(render(papers(ROWS), ENDED), color_scheme=system)
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(ground)
    page.locator("#theme").click()
    after = page.evaluate(ground)
    assert before != after
    page.reload()
    assert page.evaluate(ground) == after


def test_a_running_page_reloads_and_keeps_open_rows_scroll_and_focus(open_page, tmp_path):
    quick = render(papers(ROWS), RunState("quick", datetime.now(UTC))).replace('data-refresh="4"', 'data-refresh="0.4"')
    page = open_page(quick)
    page.locator("#sparsity24-1 summary").click()
    page.locator("#sparsity24-6 summary").click()
    page.evaluate("scrollTo(0, 700)")
    (tmp_path / "index.html").write_text(render(papers(ROWS), ENDED))
    page.get_by_text("Ended", exact=True).wait_for(timeout=5000)
    assert page.evaluate("[...document.querySelectorAll('details[open]')].map(row => row.id)") == [
        "sparsity24-1",
        "sparsity24-6",
    ]
    assert page.evaluate("scrollY") == 700
    assert page.evaluate("document.activeElement.closest('details')?.id") == "sparsity24-6"


def test_an_ended_page_does_not_reload(open_page):
    page = open_page(render(papers(ROWS), ENDED))
    page.evaluate("window.mark = 1")
    page.wait_for_timeout(700)
    assert page.evaluate("window.mark") == 1


def test_print_shows_every_detail_on_white(open_page):
    page = open_page(render(papers(ROWS), ENDED), color_scheme="dark")
    hidden = page.locator("#sparsity24-1 .facts")
    assert not hidden.is_visible()
    page.emulate_media(media="print")
    assert hidden.is_visible()
    assert hidden.bounding_box()["height"] > 100
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(30, 33, 36)"


def test_no_script_of_a_record_could_run_even_if_it_got_into_the_page(browser, tmp_path):
    injected = render(papers(ROWS), ENDED).replace("<main", "<script>window.hacked = 1</script><main", 1)
    path = tmp_path / "index.html"
    path.write_text(injected)
    page = browser.new_page()
    page.goto(path.as_uri())
    assert page.evaluate("window.hacked") is None
    page.close()
