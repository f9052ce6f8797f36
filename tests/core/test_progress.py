"""Progress: complete, in order, throttled, and never silent where there is no terminal."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from core import progress
from core.progress import ProgressEvent


@pytest.fixture
def events() -> Iterator[list[ProgressEvent]]:
    seen: list[ProgressEvent] = []
    progress.set_sink(seen.append)
    yield seen
    progress.set_sink(None)


def test_a_sink_sees_the_start_and_the_end_and_not_a_thousand_events_between(events: list[ProgressEvent]):
    assert list(progress.track(range(1000), "Counting")) == list(range(1000))
    assert events[0] == ProgressEvent("Counting", 0, 1000, "")
    assert events[-1].completed == 1000
    assert len(events) < 50


def test_work_of_unknown_length_has_no_total(events: list[ProgressEvent]):
    assert list(progress.track(iter("ab"), "Reading")) == ["a", "b"]
    assert events[0].total is None


def test_the_note_of_a_step_is_passed_on(events: list[ProgressEvent]):
    with progress.progress("Training", total=1) as bar:
        bar.advance(note="loss 2.31")
    assert events[-1].note == "loss 2.31"


def test_without_a_terminal_one_line_says_what_is_going_on(capsys: pytest.CaptureFixture[str]):
    assert list(progress.track([1, 2], "Pruning")) == [1, 2]
    assert capsys.readouterr().err.strip() == "Pruning ..."
