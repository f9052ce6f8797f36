from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.errors import MissingExtra
from core.training import Event, MetricsFile, Moment, tensorboard


def log(step: int, loss: float, *, main: bool = True) -> Event:
    return Event(Moment.LOG, step, {"loss": loss}, main)


def start(step: int) -> Event:
    return Event(Moment.START, step, {}, True)


def test_the_metrics_file_has_one_json_object_a_line(tmp_path: Path) -> None:
    hook = MetricsFile(tmp_path / "deep" / "metrics.jsonl")
    for event in (
        start(0),
        Event(Moment.STEP, 1, {"loss": 9.0}, True),
        log(10, 2.5),
        Event(Moment.EVALUATION, 10, {"accuracy": float("nan")}, True),
        log(20, 1.0, main=False),
    ):
        hook(event)
    rows = [json.loads(line) for line in (tmp_path / "deep" / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": 10, "moment": "log", "loss": 2.5},
        {"step": 10, "moment": "evaluation", "accuracy": None},
    ]


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    hook = MetricsFile(path)
    for event in (start(0), log(10, 3.0), log(20, 2.0), log(30, 1.5)):
        hook(event)
    whole = path.read_text()
    path.write_text(whole + '{"step": 40, "mom')
    hook(start(20))
    assert path.read_text() == "".join(whole.splitlines(keepends=True)[:2])
    hook(log(30, 1.5))
    assert path.read_text() == whole


def test_tensorboard_reads_back_what_the_hook_wrote(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    hook = tensorboard(tmp_path)
    for event in (
        start(0),
        log(10, 3.0),
        Event(Moment.EVALUATION, 10, {"loss": 4.0}, True),
        log(20, 2.0),
        Event(Moment.END, 20, {}, True),
    ):
        hook(event)
    events = accumulator.EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    events.Reload()
    assert set(events.Tags()["tensors"]) == {"train/loss", "evaluation/loss"}
    points = [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors("train/loss")]
    assert points == [(10, 3.0), (20, 2.0)]


def test_without_tensorboard_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name, name=name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(MissingExtra, match=r"tenfold\[trackers\]"):
        tensorboard(tmp_path)
