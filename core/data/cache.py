"""The cache folder, and how something is built into it once: under a lock, resumable, complete or absent.

folder = build_once("corpus/0f3a", lambda partial: write_everything_into(partial))
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock, Timeout

from core.progress import progress


def cache_dir() -> Path:
    """The folder for everything that can be made again: `TENFOLD_CACHE`, else the user's cache folder."""
    import platformdirs

    configured = os.environ.get("TENFOLD_CACHE")
    return Path(configured).expanduser() if configured else platformdirs.user_cache_path("tenfold")


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, made by `build(partial)` on first use.

    `build` fills a folder that is moved to its final name when `build` returns, so the final name is complete or
    absent. A build that was killed leaves the partial folder to the next one, which may go on from what it finds.
    Processes that want the same folder at the same time wait for the first.
    """
    target = cache_dir() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(f"{target.name}.lock"))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        with progress(f"Waiting for another process to build {name}"):
            lock.acquire()
    try:
        if not target.is_dir():
            partial = target.with_name(f"{target.name}.partial")
            partial.mkdir(exist_ok=True)
            build(partial)
            partial.replace(target)
    finally:
        lock.release()
    return target


def digest(parts: Iterable[str | bytes]) -> str:
    """The sha256 of a sequence of texts or bytes, in hex; where one part ends and the next begins counts."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


def files_digest(files: Iterable[Path]) -> str:
    """The sha256 of the names and contents of files, in the order given."""
    parts: list[str | bytes] = []
    for file in files:
        with file.open("rb") as stream:
            parts += [file.name, hashlib.file_digest(stream, "sha256").digest()]
    return digest(parts)
