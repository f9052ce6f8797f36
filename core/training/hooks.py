"""Hooks that write what happens: a JSON-lines file, TensorBoard.

A tracker of another kind (W&B, MLflow) is three lines of its own: a function of an `Event` that logs at `Moment.LOG` and
`Moment.EVALUATION` when `event.main`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from core.errors import require
from core.files import write_atomic
from core.training.loop import Event, Hook, Moment


class MetricsFile:
    """A hook that keeps one JSON object a line: `step`, `moment`, and the metrics (null where not finite).

    A run that resumes drops the lines after its checkpoint first, so the file ends as if nothing had happened.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def __call__(self, event: Event) -> None:
        """Write one line at a log entry or an evaluation."""
        if not event.main:
            return
        if event.moment is Moment.START:
            self._rewind(event.step)
        elif event.moment in (Moment.LOG, Moment.EVALUATION):
            values = {key: float(value) for key, value in event.metrics.items()}
            row = {"step": event.step, "moment": event.moment.value}
            finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
            with self._path.open("a") as file:
                file.write(json.dumps({**row, **finite}) + "\n")

    def _rewind(self, step: int) -> None:
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        # A killed run may have left half a last line.
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        write_atomic(self._path, "".join(f"{line}\n" for line in kept))


def tensorboard(log_dir: str | Path) -> Hook:
    """A hook that writes `train/*` and `evaluation/*` scalars for TensorBoard; raises `MissingExtra` without it."""
    summary = require("tensorboard.summary", extra="trackers")
    writer = None

    def hook(event: Event) -> None:
        nonlocal writer
        if not event.main:
            return
        if event.moment in (Moment.LOG, Moment.EVALUATION):
            writer = writer or summary.Writer(str(log_dir))
            part = "train" if event.moment is Moment.LOG else "evaluation"
            for name, value in event.metrics.items():
                writer.add_scalar(f"{part}/{name}", float(value), event.step)
        elif event.moment is Moment.END and writer is not None:
            writer.close()
            writer = None

    return hook
