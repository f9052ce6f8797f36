"""The training loop: every training run of every package is `fit(step, fetch, batches, ...)`.

The loop owns iteration, the progress bar, evaluation, early stopping, checkpoints and resume, and calls the hooks. The
step owns the engine. The data order is a pure function of (seed, epoch, position), so a run that was killed and starts
again sees exactly the batches that it would have seen.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, SupportsFloat

import numpy as np
from jaxtyping import Int

from core.errors import CheckpointError, InvalidInput, TenfoldError
from core.progress import Bar, progress
from core.training.checkpoint import Checkpoint, load_checkpoint, lock, save_checkpoint


class TrainingDiverged(TenfoldError, ArithmeticError):
    """The loss became NaN or infinite at update `step` (the first is 1)."""

    def __init__(self, message: str, step: int = 0) -> None:
        super().__init__(message)
        self.step = step


class Step(ABC):
    """One parameter update on one engine. Subclass it: the attributes below have the values of a single process.

    `rank` and `world_size` say which part of every batch this process fetches; `identity` is what a checkpoint must
    agree with, as JSON values.
    """

    rank: int = 0
    world_size: int = 1
    identity: Mapping[str, Any] = {}

    @abstractmethod
    def step(self, batch: Any) -> Mapping[str, SupportsFloat]:
        """Update once on this process's part of a batch; metrics, among them `loss`, averaged over the processes.

        A metric may be lazy (an array still being computed): the loop turns it into a float only when it is shown.
        """

    @abstractmethod
    def state(self) -> Mapping[str, Any]:
        """A copy of everything that the next update depends on: numpy arrays and JSON values, by name.

        Called on every process; only what the first one returns is written.
        """

    @abstractmethod
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state()` returned."""

    def agree(self, number: int) -> int:
        """The first process's `number`, on every process, after all of them have come this far."""
        return number


@dataclass(frozen=True)
class Batches:
    """Which items make up batch number `position`: a new permutation of all items each epoch.

    A batch is *global*: what one update sees over all processes and accumulated micro-batches. `fit` hands each process
    an equal contiguous part of it. `drop_last` leaves out an epoch's shorter last batch (other items each epoch).
    """

    num_items: int
    batch_size: int
    seed: int = 0
    drop_last: bool = True
    _epoch: dict[int, Int[np.ndarray, " items"]] = field(
        default_factory=dict, init=False, repr=False, compare=False, hash=False
    )

    def __post_init__(self) -> None:
        """Refuse sizes that give no batch."""
        if self.batch_size < 1 or self.num_items < 1 or self.seed < 0:
            raise InvalidInput(
                f"num_items and batch_size are at least 1 and seed at least 0; got num_items={self.num_items}, "
                f"batch_size={self.batch_size}, seed={self.seed}."
            )
        if self.drop_last and self.num_items < self.batch_size:
            raise InvalidInput(
                f"{self.num_items} items do not fill one batch of {self.batch_size}. "
                f"Use a batch_size of at most {self.num_items}, or drop_last=False."
            )

    @property
    def batches_per_epoch(self) -> int:
        """How many updates one pass over the items takes."""
        return self.num_items // self.batch_size if self.drop_last else -(-self.num_items // self.batch_size)

    def indices(self, position: int) -> Int[np.ndarray, " batch"]:
        """The items of batch `position` (counted from 0 through all epochs)."""
        epoch, place = divmod(position, self.batches_per_epoch)
        if epoch not in self._epoch:
            self._epoch.clear()
            self._epoch[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.num_items)
        return self._epoch[epoch][place * self.batch_size : (place + 1) * self.batch_size]


@dataclass(frozen=True)
class EarlyStop:
    """Stop when `metric` of the evaluation has not improved by more than `min_delta` for `patience` evaluations."""

    metric: str = "loss"
    patience: int = 3
    min_delta: float = 0.0
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        """Refuse a rule that could never or always fire."""
        if self.patience < 1 or self.min_delta < 0 or self.mode not in ("min", "max"):
            raise InvalidInput(f"Early stopping needs patience >= 1, min_delta >= 0 and mode min or max; got {self}.")

    def improves(self, value: float, best: float | None) -> bool:
        """Whether `value` is better than `best` by more than `min_delta`; NaN never is."""
        if best is None:
            return not math.isnan(value)
        return value < best - self.min_delta if self.mode == "min" else value > best + self.min_delta


@dataclass
class History:
    """What happened: one row a log entry (the mean over the steps since the last one), one row an evaluation."""

    train: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    num_steps: int = 0
    stopped_early: bool = False
    best: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0


class Moment(StrEnum):
    """When a hook is called. At one step the order is step, log, evaluation, checkpoint."""

    START = "start"
    STEP = "step"
    LOG = "log"
    EVALUATION = "evaluation"
    CHECKPOINT = "checkpoint"
    END = "end"


@dataclass(frozen=True)
class Event:
    """What a hook learns: `step` updates are complete; `metrics` are lazy at `Moment.STEP`, floats otherwise.

    Hooks run on every process; `main` is true on the first, which is the one that writes files.
    """

    moment: Moment
    step: int
    metrics: Mapping[str, SupportsFloat]
    main: bool


Hook = Callable[[Event], None]


def fit(
    step: Step,
    fetch: Callable[[Int[np.ndarray, " part"]], Any],
    batches: Batches,
    *,
    num_steps: int,
    hooks: Sequence[Hook] = (),
    evaluate: Callable[[], Mapping[str, SupportsFloat]] | None = None,
    evaluate_every: int | None = None,
    early_stop: EarlyStop | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
    log_every: int = 10,
    identity: Mapping[str, Any] | None = None,
    description: str = "Training",
) -> History:
    """Train for `num_steps` updates in all, or until `early_stop`, and return what happened.

    `fetch` turns this process's item indices into a batch for `step`. `evaluate` is called on every process, every
    `evaluate_every` steps and after the last one, and returns the same metrics on each. With a `checkpoint_dir` the run
    is saved every `checkpoint_every` steps and at its end, and resumes by itself when started again; `identity` adds
    what else makes it this run (a data fingerprint, a config) as JSON values.

    Raises `TrainingDiverged` when the loss is not finite (seen at the next log entry; it is never checkpointed),
    `CheckpointError` when the folder holds another run or a damaged checkpoint, `RunInProgress` when another process
    trains into it, and `InvalidInput` before any work on options that do not fit together.
    """
    _check_options(
        step, batches, num_steps, evaluate, evaluate_every, early_stop, checkpoint_dir, checkpoint_every, log_every
    )
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    history, pending = History(), list[Mapping[str, SupportsFloat]]()
    whole_identity = {
        "num_steps": num_steps,
        **{f"batches.{key}": getattr(batches, key) for key in ("num_items", "batch_size", "seed", "drop_last")},
        "evaluate_every": evaluate_every,
        "early_stop": None if early_stop is None else asdict(early_stop),
        "log_every": log_every,
        **{f"step.{key}": value for key, value in step.identity.items()},
        **(identity or {}),
    }
    main = step.rank == 0

    def emit(moment: Moment, metrics: Mapping[str, SupportsFloat]) -> None:
        for hook in hooks:
            hook(Event(moment, history.num_steps, metrics, main))

    with ExitStack() as stack:
        if folder is not None:
            if main:
                stack.enter_context(lock(folder))
            saved = load_checkpoint(folder, whole_identity)
            position = 0 if saved is None else saved.position
            if step.agree(position) != position:
                raise CheckpointError(
                    f"{folder} must be one folder that every process sees; process {step.rank} does not."
                )
            if saved is not None:
                step.load_state(saved.state)
                history, pending = History(**saved.loop["history"]), list(saved.loop["pending"])
        bar = stack.enter_context(progress(description, num_steps) if main else _no_progress())
        bar.advance(history.num_steps)
        emit(Moment.START, {})
        note = ""
        while history.num_steps < num_steps and not history.stopped_early:
            metrics = step.step(fetch(_part(batches.indices(history.num_steps), step)))
            history.num_steps += 1
            pending.append(metrics)
            emit(Moment.STEP, metrics)
            last = history.num_steps == num_steps
            evaluating = evaluate is not None and (last or _due(history.num_steps, evaluate_every))
            if last or evaluating or _due(history.num_steps, log_every):
                row = _mean(_finite(pending, history.num_steps))
                pending.clear()
                history.train.append({"step": history.num_steps, **row})
                note = " ".join(f"{key} {value:.4g}" for key, value in row.items() if key == "loss")
                emit(Moment.LOG, row)
            if evaluate is not None and evaluating:
                scores = {key: float(value) for key, value in evaluate().items()}
                history.evaluations.append({"step": history.num_steps, **scores})
                if early_stop is not None:
                    _update_early_stop(history, early_stop, scores)
                emit(Moment.EVALUATION, scores)
            if folder is not None and (last or history.stopped_early or _due(history.num_steps, checkpoint_every)):
                pending = _finite(pending, history.num_steps)
                state = step.state()
                if main:
                    loop = {"history": asdict(history), "pending": pending}
                    save_checkpoint(folder, Checkpoint(history.num_steps, loop, state), whole_identity)
                step.agree(history.num_steps)
                emit(Moment.CHECKPOINT, {})
            bar.advance(note=note)
        emit(Moment.END, {})
    return history


class _NoBar:
    def advance(self, steps: float = 1, note: str = "") -> None:
        pass


@contextmanager
def _no_progress() -> Iterator[Bar]:
    yield _NoBar()


def _due(position: int, every: int | None) -> bool:
    return every is not None and position % every == 0


def _part(indices: Int[np.ndarray, " batch"], step: Step) -> Int[np.ndarray, " part"]:
    size = len(indices) // step.world_size
    return indices if step.world_size == 1 else indices[step.rank * size : (step.rank + 1) * size]


def _finite(pending: Sequence[Mapping[str, SupportsFloat]], position: int) -> list[Mapping[str, SupportsFloat]]:
    rows = [{key: float(value) for key, value in row.items()} for row in pending]
    for index, row in enumerate(rows):
        if not math.isfinite(row.get("loss", 0.0)):
            step = position - len(rows) + index + 1
            raise TrainingDiverged(
                f"The loss is {row['loss']} at step {step}. Lower learning_rate, clip with max_grad_norm, or look at that "
                "batch; the last checkpoint is from before it.",
                step,
            )
    return list(rows)


def _mean(rows: Sequence[Mapping[str, SupportsFloat]]) -> dict[str, float]:
    keys = dict.fromkeys(key for row in rows for key in row)
    return {
        key: math.fsum(values) / len(values)
        for key in keys
        if (values := [float(row[key]) for row in rows if key in row])
    }


def _update_early_stop(history: History, rule: EarlyStop, scores: Mapping[str, float]) -> None:
    if rule.metric not in scores:
        raise InvalidInput(f"Early stopping watches {rule.metric!r}, but the evaluation returned {sorted(scores)}.")
    if rule.improves(scores[rule.metric], history.best):
        history.best, history.best_step, history.evaluations_since_best = scores[rule.metric], history.num_steps, 0
    else:
        history.evaluations_since_best += 1
    history.stopped_early = history.evaluations_since_best >= rule.patience


def _check_options(
    step: Step,
    batches: Batches,
    num_steps: int,
    evaluate: object,
    evaluate_every: int | None,
    early_stop: EarlyStop | None,
    checkpoint_dir: object,
    checkpoint_every: int | None,
    log_every: int,
) -> None:
    counts = {
        "num_steps": num_steps,
        "evaluate_every": evaluate_every,
        "checkpoint_every": checkpoint_every,
        "log_every": log_every,
    }
    for name, value in counts.items():
        if value is not None and value < 1:
            raise InvalidInput(f"{name} counts steps and is at least 1; got {value}.")
    if evaluate is None and (evaluate_every is not None or early_stop is not None):
        raise InvalidInput("evaluate_every and early_stop need `evaluate`, a function that returns metrics.")
    if early_stop is not None and evaluate_every is None:
        raise InvalidInput("early_stop needs evaluate_every: how many steps lie between two evaluations.")
    if checkpoint_every is not None and checkpoint_dir is None:
        raise InvalidInput("checkpoint_every needs checkpoint_dir: the folder to save into.")
    if step.world_size > 1 and (batches.batch_size % step.world_size or not batches.drop_last):
        raise InvalidInput(
            f"Every one of {step.world_size} processes takes an equal part of each batch: batch_size must be a multiple "
            f"of {step.world_size} with drop_last=True; got batch_size={batches.batch_size}, drop_last={batches.drop_last}."
        )
