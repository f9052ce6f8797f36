"""Checkpoints: one folder `step-XXXXXXXX` with `arrays.safetensors` and `scalars.json`, replaced atomically.

A checkpoint is written under a temporary name, flushed to the disk and renamed; only then does its predecessor go. A
process that is killed at any moment leaves a checkpoint that loads.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from core.errors import CheckpointError, RunInProgress

_ARRAYS, _SCALARS = "arrays.safetensors", "scalars.json"
_UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stood: completed steps, the loop's own record, and the step's state (arrays and JSON values)."""

    position: int
    loop: Mapping[str, Any]
    state: Mapping[str, Any]


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process, rid of what a killed writer left; raises `RunInProgress` when another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            _tidy(folder)
            yield
    except Timeout as error:
        raise RunInProgress(
            f"Another process is training into {folder}. Wait for it, or give this run its own checkpoint_dir."
        ) from error


def save_checkpoint(folder: Path, checkpoint: Checkpoint, identity: Mapping[str, Any]) -> Path:
    """The new checkpoint's folder; older ones are removed once it is safely on the disk.

    `identity` is what makes the run this run; `load_checkpoint` compares it. Raises `CheckpointError` when it cannot be
    written, and leaves the previous checkpoint as it was.
    """
    final = folder / f"step-{checkpoint.position:08d}"
    unfinished = folder / f"{_UNFINISHED}{final.name}"
    try:
        unfinished.mkdir(parents=True)
        arrays = {
            name: np.asarray(value, order="C")
            for name, value in checkpoint.state.items()
            if isinstance(value, np.ndarray)
        }
        save_file(arrays, unfinished / _ARRAYS)
        scalars = {
            "position": checkpoint.position,
            "identity": identity,
            "arrays_sha256": _sha256(unfinished / _ARRAYS),
            "loop": checkpoint.loop,
            "state": {name: value for name, value in checkpoint.state.items() if name not in arrays},
        }
        (unfinished / _SCALARS).write_text(json.dumps(scalars))
        for path in (unfinished / _ARRAYS, unfinished / _SCALARS, unfinished):
            _flush(path)
        unfinished.rename(final)
        _flush(folder)
        _tidy(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(
            f"The checkpoint {final} could not be written ({error}). The one before it is untouched; "
            "make room and start the run again, it resumes from there."
        ) from error
    return final


def load_checkpoint(folder: Path, identity: Mapping[str, Any]) -> Checkpoint | None:
    """The newest checkpoint in `folder`, or None when there is none.

    Raises `CheckpointError` naming the damaged file, or saying in what the checkpoint's run differs from `identity`.
    """
    finished = _finished(folder)
    if not finished:
        return None
    newest = finished[-1]
    try:
        scalars = json.loads((newest / _SCALARS).read_text())
        position, loop, state = int(scalars["position"]), scalars["loop"], scalars["state"]
        saved_identity, digest = scalars["identity"], scalars["arrays_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(newest / _SCALARS, error) from error
    _compare(newest, saved_identity, json.loads(json.dumps(identity)))
    try:
        if _sha256(newest / _ARRAYS) != digest:
            raise ValueError("its SHA-256 is not the recorded one")
        arrays = load_file(newest / _ARRAYS)
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(newest / _ARRAYS, error) from error
    return Checkpoint(position=position, loop=loop, state={**state, **arrays})


def _compare(folder: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    differences = [
        f"{key} was {saved.get(key, 'absent')!r} and is now {current.get(key, 'absent')!r}"
        for key in sorted({*saved, *current})
        if saved.get(key) != current.get(key)
    ]
    if differences:
        raise CheckpointError(
            f"{folder} belongs to a different run: {'; '.join(differences)}. "
            "Give this run its own checkpoint_dir, or delete that folder to start afresh."
        )


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint file {path} is damaged ({error}). Delete {path.parent} to train from the start."
    )


def _tidy(folder: Path) -> None:
    for old in _finished(folder)[:-1]:
        # Renamed first: a folder called step-* is always whole, even when the removal is interrupted.
        old.rename(folder / f"{_UNFINISHED}{old.name}")
    for leftover in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover)


def _finished(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
