"""A jax run sharded over four devices of one process, or over two processes, cut and resumed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from core.training import Batches, Event, Moment, fit
from core.training.jax import JaxStep

INPUTS = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)


class Cut(Exception):
    pass


def cut(event: Event) -> None:
    if event.moment is Moment.STEP and event.step == 13:
        raise Cut


def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
    noise = 0.1 * jax.random.normal(key, (16,))
    return jnp.mean((batch @ params["weight"] + params["bias"] + noise) ** 2)


def train(mesh: Mesh | None, folder: Path, *hooks: Any) -> JaxStep:
    generator = np.random.default_rng(1)
    params: dict[str, Any] = {"weight": generator.normal(size=(8, 16)), "bias": generator.normal(size=16)}
    params = {name: value.astype(np.float32) for name, value in params.items()}
    if mesh is not None:
        specs = {"weight": PartitionSpec("data"), "bias": PartitionSpec()}
        params = {
            name: jax.make_array_from_callback(
                value.shape, NamedSharding(mesh, specs[name]), lambda index, value=value: value[index]
            )
            for name, value in params.items()
        }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01))
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec("data"))
    step = JaxStep(params, loss, optimizer, seed=3, batch_sharding=sharding)
    fit(
        step,
        lambda indices: INPUTS[indices],
        Batches(64, 8),
        num_steps=20,
        checkpoint_dir=folder,
        checkpoint_every=5,
        hooks=hooks,
    )
    return step


def main(kind: str, rank: int, root: Path) -> None:
    if kind == "mesh":
        jax.config.update("jax_num_cpu_devices", 4)
    else:
        jax.distributed.initialize(coordinator_address(root, rank), 2, rank)
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    whole = train(mesh, root / kind / "whole")
    try:
        train(mesh, root / kind / "cut", cut)
    except Cut:
        pass
    resumed = train(mesh, root / kind / "cut")
    before, after = whole.state(), resumed.state()
    report = {
        "devices": len(jax.devices()),
        "processes": jax.process_count(),
        "resumed_identical": all(np.array_equal(before[name], after[name]) for name in before),
        "sharded": before["params/weight"].tolist(),
        "sharded_moments": all(
            not leaf.is_fully_replicated for leaf in jax.tree.leaves(resumed.optimizer_state) if leaf.ndim == 2
        ),
        "torch": "torch" in sys.modules,
    }
    if kind == "mesh":
        report["single"] = train(None, root / kind / "single").state()["params/weight"].tolist()
    if rank == 0:
        (root / f"{kind}.json").write_text(json.dumps(report))


def coordinator_address(root: Path, rank: int) -> str:
    """An address with a free port that the first process chose."""
    import socket
    import time

    file = root / "address"
    if rank == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        temporary = root / ".address"
        temporary.write_text(address)
        temporary.rename(file)
    while not file.exists():
        time.sleep(0.02)
    return file.read_text()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
