"""The jax step: one jitted optax update, for `core.training.loop.fit`, on one device, a `Mesh`, or many processes.

Arrays stay where they are: shard `params` over a `Mesh` before they come here and give the batch its `batch_sharding`;
the compiled update keeps both. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten

from core.errors import CheckpointError, InvalidInput
from core.training.loop import Step

Loss = Callable[[Any, Any, jax.Array], jax.Array | tuple[jax.Array, Mapping[str, jax.Array]]]


class JaxStep(Step):
    """One update of the pytree `params` by the gradient of `loss(params, batch, key)`.

    `loss` is traceable and returns the mean over the batch, or it and a dictionary of more scalars. `key` is a function
    of (seed, step): dropout and noise need no other state, and a resumed run draws the same. Clipping, schedules and
    accumulation are optax's (`optax.chain`, `optax.MultiSteps`). The given `params` are copied; the step's own buffers are
    donated to every update, so read them from `step.params` and do not keep them over an update.

    `batch_sharding` places each process's part of a batch (all leaves alike); None leaves it to jax.
    """

    def __init__(
        self,
        params: Any,
        loss: Loss,
        optimizer: optax.GradientTransformation,
        *,
        seed: int = 0,
        batch_sharding: jax.sharding.Sharding | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.rank, self.world_size = jax.process_index(), jax.process_count()
        if self.world_size > 1 and batch_sharding is None:
            raise InvalidInput(
                f"{self.world_size} processes each fetch their part of a batch; say how the parts lie on the mesh with "
                "batch_sharding=NamedSharding(mesh, PartitionSpec('data'))."
            )
        self.params = jax.tree.map(partial(jnp.array, copy=True), params)
        # Not under jit: an eager `zeros_like` gives each moment the sharding of its parameter.
        self.optimizer_state = optimizer.init(self.params)
        self._batch_sharding, self._position = batch_sharding, 0
        root = jax.random.key(seed)

        def update(params: Any, state: Any, batch: Any, position: jax.Array) -> tuple[Any, Any, dict[str, jax.Array]]:
            def objective(params: Any) -> tuple[jax.Array, Mapping[str, jax.Array]]:
                result = loss(params, batch, jax.random.fold_in(root, position))
                return result if isinstance(result, tuple) else (result, {})

            (value, metrics), gradients = jax.value_and_grad(objective, has_aux=True)(params)
            updates, state = optimizer.update(gradients, state, params)
            shown = {"loss": value, **metrics, "grad_norm": optax.global_norm(gradients)}
            return optax.apply_updates(params, updates), state, shown

        self._update = jax.jit(update, donate_argnums=(0, 1))
        self.identity = {
            "seed": seed,
            "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(self.params)),
            **(identity or {}),
        }

    def step(self, batch: Any) -> Mapping[str, jax.Array]:
        """Update once; `loss`, the caller's metrics and the gradient's global norm, all lazy."""
        if self._batch_sharding is not None:
            place = partial(jax.make_array_from_process_local_data, self._batch_sharding)
            batch = jax.tree.map(lambda leaf: place(np.asarray(leaf)), batch)
        self.params, self.optimizer_state, metrics = self._update(
            self.params, self.optimizer_state, batch, np.uint32(self._position)
        )
        self._position += 1
        return metrics

    def state(self) -> Mapping[str, Any]:
        """Parameters (`params/<path>`) and optimizer state (`optimizer/<path>`), whole, and the position."""
        return {"position": self._position, **{name: _to_numpy(leaf) for name, leaf in self._leaves()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`; every array gets the sharding that it has now, whatever it was saved with."""
        restored = [_restored(name, state.get(name), leaf) for name, leaf in self._leaves()]
        structure = jax.tree.structure((self.params, self.optimizer_state))
        self.params, self.optimizer_state = tree_unflatten(structure, restored)
        self._position = int(state["position"])

    def agree(self, number: int) -> int:
        """The first process's `number`, on every process, after all of them have come this far."""
        return number if self.world_size == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))

    def _leaves(self) -> list[tuple[str, jax.Array]]:
        return [
            (f"{part}/{keystr(path, simple=True, separator='/')}", leaf)
            for part, tree in (("params", self.params), ("optimizer", self.optimizer_state))
            for path, leaf in tree_flatten_with_path(tree)[0]
        ]


def _plain(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _saved_dtype(dtype: np.dtype) -> np.dtype:
    # safetensors' numpy reader knows no bfloat16 and no float8: keep their bits.
    return dtype if dtype.kind in "biufc" else np.dtype(f"u{dtype.itemsize}")


def _to_numpy(leaf: jax.Array) -> np.ndarray:
    plain = _plain(leaf)
    whole = np.array(plain if plain.is_fully_addressable else multihost_utils.process_allgather(plain, tiled=True))
    return whole.view(_saved_dtype(whole.dtype))


def _restored(name: str, array: np.ndarray | None, like: jax.Array) -> jax.Array:
    plain = _plain(like)
    wanted = f"{_saved_dtype(plain.dtype)}{list(plain.shape)}"
    found = "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
    if array is None or found != wanted:
        raise CheckpointError(
            f"The checkpoint holds {found} for {name}, and this run needs {wanted}. "
            "It was saved with other parameters or another optimizer."
        )
    whole = array.view(plain.dtype)
    # A counter that no device was asked for must stay free, or it could not meet arrays on a mesh.
    placed = (
        jax.make_array_from_callback(plain.shape, plain.sharding, lambda index: whole[index])
        if plain.committed
        else jnp.asarray(whole)
    )
    return placed if plain is like else jax.random.wrap_key_data(placed, impl=jax.random.key_impl(like))
