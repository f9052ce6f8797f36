"""Train in forked children that are killed with SIGKILL; print, a scenario a line, whether the resumed run is identical.

Forking after the imports and before the first operation gives each child a fresh engine for the price of a fork.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from core.progress import set_sink
from core.training import Batches, EarlyStop, Event, MetricsFile, Moment, Step, fit

ENGINE = sys.argv[1]
set_sink(lambda event: None)
NUM_STEPS, CHECKPOINT_EVERY = 12, 6
INPUTS = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
TARGETS = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)

if ENGINE == "torch":
    import torch
    from torch import nn

    from core.training.torch import TorchStep

    def make_step() -> Step:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 3))

        def loss(model: nn.Module, batch: Any) -> torch.Tensor:
            inputs, targets = batch
            return ((model(inputs) - targets) ** 2).mean()

        return TorchStep(
            model,
            loss,
            learning_rate=0.01,
            num_steps=NUM_STEPS,
            warmup_steps=2,
            weight_decay=0.1,
            gradient_accumulation_steps=2,
            ema_decay=0.9,
            seed=3,
            device="cpu",
        )

    def fetch(indices: np.ndarray) -> Any:
        return torch.from_numpy(INPUTS[indices]), torch.from_numpy(TARGETS[indices])
else:
    import jax
    import jax.numpy as jnp
    import optax

    from core.training.jax import JaxStep

    def make_step() -> Step:
        random_numbers = np.random.default_rng(2)
        params = {
            "hidden": random_numbers.normal(size=(8, 16)).astype(np.float32),
            "output": random_numbers.normal(size=(16, 3)).astype(jnp.bfloat16),
        }

        def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
            hidden = jnp.tanh(batch["inputs"] @ params["hidden"])
            hidden = hidden * jax.random.bernoulli(key, 0.7, hidden.shape)
            return jnp.mean((hidden @ params["output"].astype(jnp.float32) - batch["targets"]) ** 2)

        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(0.01, NUM_STEPS))
        )
        return JaxStep(params, loss, optax.MultiSteps(optimizer, 3), seed=3)

    def fetch(indices: np.ndarray) -> Any:
        return {"inputs": INPUTS[indices], "targets": TARGETS[indices]}


def size_of(step: Step) -> float:
    arrays = [value for value in step.state().values() if isinstance(value, np.ndarray) and value.dtype == np.float32]
    return float(sum(np.abs(array).sum() for array in arrays))


def train(folder: Path, hook: Callable[[Event], None] | None = None) -> None:
    step = make_step()
    fit(
        step,
        fetch,
        Batches(len(INPUTS), 8, seed=1),
        num_steps=NUM_STEPS,
        hooks=[MetricsFile(folder / "metrics.jsonl"), *([hook] if hook else [])],
        evaluate=lambda: {
            "loss": float(
                np.sum(
                    [
                        np.abs(v).sum()
                        for v in step.state().values()
                        if isinstance(v, np.ndarray) and v.dtype == np.float32
                    ]
                )
            )
        },
        evaluate_every=3,
        early_stop=EarlyStop(patience=50),
        checkpoint_dir=folder,
        checkpoint_every=CHECKPOINT_EVERY,
        log_every=5,
    )


def fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def run(work: Callable[[], None]) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_step(step: int) -> Callable[[Event], None]:
    return lambda event: die() if event.moment is Moment.STEP and event.step == step else None


def train_and_die_before_file_operation(number: int, folder: Path) -> None:
    """Die just before the file operation `number` that the run does inside its folder."""
    count = 0

    def audit(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if name.split(".")[0] in ("open", "os", "shutil") and any(
            str(folder) in str(argument) for argument in arguments
        ):
            count += 1
            if count > number:
                die()

    sys.addaudithook(audit)
    train(folder)


def outcome(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def main(root: Path) -> None:
    assert run(lambda: train(root / "whole")) == 0
    expected = outcome(root / "whole")
    assert set(expected) == {
        "metrics.jsonl",
        *(f"step-{NUM_STEPS:08d}/{name}" for name in ("arrays.safetensors", "scalars.json")),
    }
    counts = {"killed": 0, "identical": 0}
    different: list[str] = []

    def check(name: str, work: Callable[..., None]) -> bool:
        """Do the work, which may be killed, then finish it; whether it was killed."""
        folder = root / name
        code = run(lambda: work(folder=folder))
        assert code in (0, -signal.SIGKILL), (name, code)
        assert run(lambda: train(folder)) == 0, name
        counts["killed"] += code != 0
        if outcome(folder) == expected:
            counts["identical"] += 1
        else:
            different.append(name)
        return code != 0

    numbers = random.Random(time.time_ns())
    for attempt in range(2 if ENGINE == "torch" else 1):
        step = numbers.randint(1, NUM_STEPS)
        check(f"step-{step}-{attempt}", partial(train, hook=die_at_step(step)))
    # A torch child is cheap, so it dies before every single file operation; a jax child compiles for a second.
    for number in itertools.count() if ENGINE == "torch" else (22,):
        if not check(f"operation-{number}", partial(train_and_die_before_file_operation, number)):
            break
    # From outside, at whatever moment it happens to be, later and later until it is through.
    folder, kills = root / "outside", 0
    longest = 0.05 if ENGINE == "torch" else 1.5
    while True:
        child = fork(lambda: train(folder))
        time.sleep(0.01 + numbers.uniform(0, longest) * kills)
        finished, status = os.waitpid(child, os.WNOHANG)
        if not finished:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, -signal.SIGKILL), code
        if code == 0:
            break
        kills += 1
    if outcome(folder) != expected:
        different.append("outside")
    print(json.dumps({"killed_from_outside": kills, "different": different, **counts}))


if __name__ == "__main__":
    main(Path(sys.argv[2]))
