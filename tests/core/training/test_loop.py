from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import CheckpointError, InvalidInput, RunInProgress
from core.training import Batches, EarlyStop, Event, Moment, Step, TrainingDiverged, fit
from core.training.checkpoint import lock

_RANDOM = np.random.default_rng(0)
_INPUTS, _TARGETS = _RANDOM.normal(size=(32, 4)), _RANDOM.normal(size=32)


class LeastSquares(Step):
    """Gradient descent with momentum in numpy: an engine that needs no engine."""

    def __init__(self, learning_rate: float = 0.05) -> None:
        self.identity: Mapping[str, Any] = {"learning_rate": learning_rate}
        self.weights, self.velocity = np.zeros(4), np.zeros(4)
        self.seen: list[list[int]] = []

    def step(self, batch: Any) -> Mapping[str, float]:
        self.seen.append(batch.tolist())
        error = _INPUTS[batch] @ self.weights - _TARGETS[batch]
        self.velocity = 0.9 * self.velocity + _INPUTS[batch].T @ error / len(batch)
        self.weights = self.weights - self.identity["learning_rate"] * self.velocity
        return {"loss": float(np.mean(error**2))}

    def state(self) -> Mapping[str, Any]:
        return {"weights": self.weights.copy(), "velocity": self.velocity.copy(), "note": "here"}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.weights, self.velocity = state["weights"], state["velocity"]


class Stopped(Exception):
    pass


def stop_at(step: int) -> Any:
    def hook(event: Event) -> None:
        if event.moment is Moment.STEP and event.step == step:
            raise Stopped

    return hook


def fetch(indices: np.ndarray) -> np.ndarray:
    return indices


def full_loss(step: LeastSquares) -> dict[str, float]:
    return {"loss": float(np.mean((_INPUTS @ step.weights - _TARGETS) ** 2))}


@given(
    num_items=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    seed=st.integers(0, 2**32),
    drop_last=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_batches_are_a_pure_function_of_seed_epoch_and_position(
    num_items: int, batch_size: int, seed: int, drop_last: bool, order: Any
) -> None:
    batch_size = min(batch_size, num_items)
    one = Batches(num_items, batch_size, seed=seed, drop_last=drop_last)
    count = one.batches_per_epoch
    forward = [one.indices(position).tolist() for position in range(3 * count)]
    positions = list(range(3 * count))
    order.shuffle(positions)
    other = Batches(num_items, batch_size, seed=seed, drop_last=drop_last)
    shuffled = {position: other.indices(position).tolist() for position in positions}
    assert [shuffled[position] for position in range(3 * count)] == forward
    for epoch in range(3):
        items = [item for batch in forward[epoch * count : (epoch + 1) * count] for item in batch]
        assert len(set(items)) == len(items)
        assert len(items) == (count * batch_size if drop_last else num_items)
        assert set(items) <= set(range(num_items))


def test_epochs_and_seeds_give_other_orders() -> None:
    batches = Batches(100, 100, seed=0)
    assert batches.indices(0).tolist() != batches.indices(1).tolist()
    assert batches.indices(0).tolist() != Batches(100, 100, seed=1).indices(0).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_each_batch_in_equal_parts(world_size: int) -> None:
    batches = Batches(32, 8, seed=3)
    parts = []
    for rank in range(world_size):
        step = LeastSquares()
        step.rank, step.world_size = rank, world_size
        fit(step, fetch, batches, num_steps=5)
        parts.append(step.seen)
    for position in range(5):
        assert [item for part in parts for item in part[position]] == batches.indices(position).tolist()
        assert {len(part[position]) for part in parts} == {8 // world_size}


def test_hooks_see_every_moment_in_order() -> None:
    events: list[tuple[str, int]] = []
    step = LeastSquares()
    fit(
        step,
        fetch,
        Batches(32, 8),
        num_steps=5,
        hooks=[lambda event: events.append((event.moment.value, event.step))],
        evaluate=lambda: full_loss(step),
        evaluate_every=2,
        log_every=3,
    )
    assert events == [
        ("start", 0),
        ("step", 1),
        *(("step", 2), ("log", 2), ("evaluation", 2)),
        *(("step", 3), ("log", 3)),
        *(("step", 4), ("log", 4), ("evaluation", 4)),
        *(("step", 5), ("log", 5), ("evaluation", 5)),
        ("end", 5),
    ]


def test_checkpoints_come_after_the_evaluation_of_their_step(tmp_path: Path) -> None:
    moments: list[str] = []
    step = LeastSquares()
    fit(
        step,
        fetch,
        Batches(32, 8),
        num_steps=2,
        hooks=[lambda event: moments.append(event.moment.value)],
        evaluate=lambda: full_loss(step),
        checkpoint_dir=tmp_path,
    )
    assert moments == ["start", "step", "step", "log", "evaluation", "checkpoint", "end"]


def test_a_log_row_is_the_mean_of_the_steps_since_the_last_one() -> None:
    losses: list[float] = []
    history = fit(
        LeastSquares(),
        fetch,
        Batches(32, 8),
        num_steps=7,
        log_every=3,
        hooks=[lambda event: losses.append(float(event.metrics["loss"])) if event.moment is Moment.STEP else None],
    )
    expected = [np.mean(losses[0:3]), np.mean(losses[3:6]), losses[6]]
    assert [row["step"] for row in history.train] == [3, 6, 7]
    np.testing.assert_allclose([row["loss"] for row in history.train], expected, rtol=1e-15)


def test_metrics_stay_lazy_until_they_are_logged() -> None:
    conversions: list[int] = []

    class Lazy:
        def __init__(self, position: int) -> None:
            self.position = position

        def __float__(self) -> float:
            conversions.append(self.position)
            return 1.0

    class LazyStep(LeastSquares):
        def step(self, batch: Any) -> Mapping[str, Any]:
            super().step(batch)
            return {"loss": Lazy(len(self.seen))}

    at_step: list[int] = []

    def count(event: Event) -> None:
        if event.moment is Moment.STEP:
            at_step.append(len(set(conversions)))

    fit(LazyStep(), fetch, Batches(32, 8), num_steps=8, log_every=4, hooks=[count])
    assert at_step == [0, 0, 0, 0, 4, 4, 4, 4]


def scripted(values: list[float]) -> Any:
    remaining = iter(values)
    return lambda: {"accuracy": next(remaining)}


@pytest.mark.parametrize(
    ("rule", "values", "steps", "best_step"),
    [
        (EarlyStop("accuracy", patience=2, mode="max"), [0.1, 0.3, 0.2, 0.3, 0.9], 8, 4),
        (EarlyStop("accuracy", patience=2, mode="min"), [0.5, 0.4, 0.3, 0.2, 0.1], 10, 10),
        (EarlyStop("accuracy", patience=1, mode="min", min_delta=0.05), [0.5, 0.4, 0.38, 0.1, 0.0], 6, 4),
        (EarlyStop("accuracy", patience=2, mode="max"), [float("nan")] * 5, 4, None),
    ],
)
def test_early_stopping_waits_for_its_patience(
    rule: EarlyStop, values: list[float], steps: int, best_step: int | None
) -> None:
    history = fit(
        LeastSquares(),
        fetch,
        Batches(32, 8),
        num_steps=10,
        evaluate=scripted(values),
        evaluate_every=2,
        early_stop=rule,
    )
    assert (history.num_steps, history.best_step) == (steps, best_step)
    assert history.stopped_early == (steps < 10)


def test_early_stopping_names_a_metric_that_is_missing() -> None:
    with pytest.raises(InvalidInput, match=r"'f1'.*\['accuracy'\]"):
        fit(
            LeastSquares(),
            fetch,
            Batches(32, 8),
            num_steps=2,
            evaluate=scripted([0.0] * 9),
            evaluate_every=1,
            early_stop=EarlyStop("f1"),
        )


@pytest.mark.parametrize("interruption", [1, 4, 5, 9, 13, 19])
def test_an_interrupted_run_ends_as_if_nothing_had_happened(tmp_path: Path, interruption: int) -> None:
    def run(folder: Path, step: LeastSquares, **options: Any) -> Any:
        return fit(
            step,
            fetch,
            Batches(32, 8, seed=1),
            num_steps=20,
            evaluate=lambda: full_loss(step),
            evaluate_every=3,
            early_stop=EarlyStop(patience=5),
            checkpoint_dir=folder,
            checkpoint_every=4,
            **options,
        )

    whole = LeastSquares()
    expected = run(tmp_path / "whole", whole)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", LeastSquares(), hooks=[stop_at(interruption)])
    resumed = LeastSquares()
    assert run(tmp_path / "cut", resumed) == expected
    assert np.array_equal(resumed.weights, whole.weights)
    assert len(resumed.seen) == 20 - (interruption - 1) // 4 * 4


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first = fit(LeastSquares(), fetch, Batches(32, 8), num_steps=6, checkpoint_dir=tmp_path)
    step = LeastSquares()
    assert fit(step, fetch, Batches(32, 8), num_steps=6, checkpoint_dir=tmp_path) == first
    assert step.seen == []


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    class Diverging(LeastSquares):
        def step(self, batch: Any) -> Mapping[str, float]:
            metrics = super().step(batch)
            return {"loss": float("nan")} if len(self.seen) == 7 else metrics

    with pytest.raises(TrainingDiverged, match="nan at step 7"):
        fit(Diverging(), fetch, Batches(32, 8), num_steps=20, checkpoint_dir=tmp_path, checkpoint_every=2, log_every=5)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000006"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 9}, "num_steps was 6 and is now 9"),
        ({"batches": Batches(32, 8, seed=5)}, "batches.seed was 0 and is now 5"),
        ({"step": LeastSquares(0.01)}, "step.learning_rate was 0.05 and is now 0.01"),
        ({"identity": {"data": "b"}}, "data was 'a' and is now 'b'"),
        ({"identity": {}}, "data was 'a' and is now 'absent'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    run = {"step": LeastSquares(), "batches": Batches(32, 8), "num_steps": 6, "identity": {"data": "a"}}
    fit(fetch=fetch, checkpoint_dir=tmp_path, **run)
    with pytest.raises(CheckpointError, match="different run") as caught:
        fit(fetch=fetch, checkpoint_dir=tmp_path, **{**run, **change})
    assert message in str(caught.value)


def test_two_processes_cannot_train_into_one_folder(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(RunInProgress, match=str(tmp_path)):
        fit(LeastSquares(), fetch, Batches(32, 8), num_steps=6, checkpoint_dir=tmp_path)


def test_processes_that_see_different_folders_are_told(tmp_path: Path) -> None:
    step = LeastSquares()
    step.rank, step.world_size = 1, 2
    step.agree = lambda number: 40  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="one folder that every process sees; process 1"):
        fit(step, fetch, Batches(32, 8), num_steps=6, checkpoint_dir=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps .* at least 1; got 0"),
        ({"log_every": 0}, "log_every"),
        ({"evaluate_every": 2}, "need `evaluate`"),
        ({"evaluate": dict, "early_stop": EarlyStop()}, "needs evaluate_every"),
        ({"checkpoint_every": 2}, "needs checkpoint_dir"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_any_work(options: dict[str, Any], message: str) -> None:
    step = LeastSquares()
    with pytest.raises(InvalidInput, match=message):
        fit(step, fetch, Batches(32, 8), **{"num_steps": 5, **options})
    assert step.seen == []


@pytest.mark.parametrize(("batch_size", "drop_last"), [(7, True), (8, False)])
def test_batches_that_do_not_divide_over_the_processes_are_refused(batch_size: int, drop_last: bool) -> None:
    step = LeastSquares()
    step.world_size = 2
    with pytest.raises(InvalidInput, match="multiple of 2 with drop_last=True"):
        fit(step, fetch, Batches(32, batch_size, drop_last=drop_last), num_steps=5)


@pytest.mark.parametrize("sizes", [(0, 1), (5, 0), (3, 4)])
def test_batch_sizes_that_give_no_batch_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(InvalidInput):
        Batches(*sizes)


def test_importing_the_package_imports_no_engine() -> None:
    code = "import sys, json, core.training; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "jax", "accelerate", "transformers", "tensorboard"} & set(json.loads(result.stdout))
