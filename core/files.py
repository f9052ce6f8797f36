"""Writing so that a reader, a crash or a full disk never leaves half a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import RunInProgress


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` under a temporary name beside `path`, flush it to the disk and move it there.

    On any failure the old file stays as it was and the temporary one is removed; `OSError` reaches the caller.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def sole_writer(lock: Path, busy: str) -> Iterator[None]:
    """Hold the lock file `lock`, or raise `RunInProgress`, saying `busy`, when another process holds it."""
    # It brings asyncio along, which nothing that only writes needs.
    from filelock import FileLock, Timeout

    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise RunInProgress(busy) from None
    try:
        yield
    finally:
        held.release()
