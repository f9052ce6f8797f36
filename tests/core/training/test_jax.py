from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from core.errors import CheckpointError
from core.training import Batches, Event, Moment, fit
from core.training.jax import JaxStep

_SCRIPT = Path(__file__).parent / "scripts" / "mesh.py"
_INPUTS = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
_TARGETS = np.random.default_rng(1).normal(size=32).astype(np.float32)


def params() -> dict[str, Any]:
    return {"weight": jnp.zeros(4), "bias": jnp.zeros((), jnp.bfloat16)}


def loss(params: Any, batch: Any, key: Any) -> Any:
    return jnp.mean((batch["inputs"] @ params["weight"] + params["bias"] - batch["targets"]) ** 2)


def fetch(indices: np.ndarray) -> dict[str, np.ndarray]:
    return {"inputs": _INPUTS[indices], "targets": _TARGETS[indices]}


def test_the_updates_are_those_of_optax_by_hand() -> None:
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.05))
    step = JaxStep(params(), loss, optimizer)
    batches, expected = Batches(32, 8, seed=1), params()
    fit(step, fetch, batches, num_steps=9)
    state = optimizer.init(expected)

    @jax.jit
    def update(current: Any, state: Any, batch: Any) -> Any:
        gradients = jax.grad(loss)(current, batch, None)
        updates, state = optimizer.update(gradients, state, current)
        return optax.apply_updates(current, updates), state

    for position in range(9):
        expected, state = update(expected, state, fetch(batches.indices(position)))
    for name, value in expected.items():
        assert jnp.array_equal(step.params[name], value), name


def test_the_callers_parameters_survive_the_donation() -> None:
    given = params()
    step = JaxStep(given, loss, optax.sgd(0.1))
    step.step(fetch(np.arange(8)))
    assert np.array_equal(given["weight"], np.zeros(4))
    assert not np.array_equal(step.params["weight"], np.zeros(4))


def test_random_numbers_are_a_function_of_seed_and_step() -> None:
    def noise(params: Any, batch: Any, key: Any) -> Any:
        value = jax.random.normal(key, ())
        return loss(params, batch, key), {"noise": value}

    def draws(seed: int) -> list[float]:
        step = JaxStep(params(), noise, optax.sgd(0.1), seed=seed)
        return [float(step.step(fetch(np.arange(8)))["noise"]) for _ in range(3)]

    assert draws(0) == draws(0)
    assert len({*draws(0), *draws(1)}) == 6


def test_an_optimizer_with_its_own_key_resumes_bit_for_bit(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def cut(event: Event) -> None:
        if event.moment is Moment.STEP and event.step == 8:
            raise Stop

    def run(folder: str, *hooks: Any) -> JaxStep:
        optimizer = optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(3)), optax.adam(0.05))
        step = JaxStep(params(), loss, optimizer)
        fit(
            step,
            fetch,
            Batches(32, 8),
            num_steps=12,
            hooks=hooks,
            checkpoint_dir=tmp_path / folder,
            checkpoint_every=3,
        )
        return step

    whole = run("whole").state()
    with pytest.raises(Stop):
        run("cut", cut)
    resumed = run("cut").state()
    assert resumed.keys() == whole.keys()
    for name, value in whole.items():
        assert np.array_equal(resumed[name], value), name


def test_a_state_of_other_parameters_is_refused_by_name() -> None:
    state = JaxStep(params(), loss, optax.sgd(0.1)).state()
    other = JaxStep({**params(), "weight": jnp.zeros(5)}, loss, optax.sgd(0.1))
    with pytest.raises(CheckpointError, match="for params/weight"):
        other.load_state(state)


def test_on_a_mesh_of_four_devices_and_over_two_processes_the_result_is_the_same(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    children = [
        subprocess.Popen([sys.executable, str(_SCRIPT), *arguments, str(tmp_path)], env=environment)
        for arguments in (["mesh", "0"], ["processes", "0"], ["processes", "1"])
    ]
    assert [child.wait(timeout=200) for child in children] == [0, 0, 0]
    mesh, processes = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("mesh", "processes"))
    assert mesh["devices"] == 4
    assert mesh["sharded_moments"]
    assert mesh["resumed_identical"]
    assert not mesh["torch"]
    assert processes["processes"] == 2
    assert processes["resumed_identical"]
    np.testing.assert_allclose(mesh["sharded"], mesh["single"], atol=1e-5)
    np.testing.assert_allclose(processes["sharded"], mesh["single"], atol=1e-5)
