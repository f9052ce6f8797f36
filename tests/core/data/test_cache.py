"""Building once: complete or absent, whoever else builds, whatever kills it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from core.data import cache
from core.data.cache import build_once, cache_dir, digest, files_digest


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))


def test_the_cache_is_where_the_environment_says_else_the_users(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("TENFOLD_CACHE")
    assert cache_dir().name == "tenfold"


def test_a_folder_is_built_on_first_use_only():
    built = []

    def build(partial):
        built.append(partial)
        (partial / "file").write_text("content")

    first, second = build_once("some/name", build), build_once("some/name", build)
    assert first == second == cache_dir() / "some/name"
    assert (first / "file").read_text() == "content"
    assert len(built) == 1
    assert not built[0].exists()


def test_a_failed_build_leaves_no_folder_and_its_part_to_the_next():
    def fail(partial):
        (partial / "half").write_text("kept")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        build_once("name", fail)
    assert not (cache_dir() / "name").exists()
    found = []
    folder = build_once("name", lambda partial: found.append((partial / "half").read_text()))
    assert found == ["kept"]
    assert folder.is_dir()


def test_those_who_come_while_it_is_built_wait_and_do_not_build(monkeypatch):
    started, built = threading.Event(), []

    def build(partial):
        built.append(partial)
        started.wait(1.5)

    monkeypatch.setattr(cache, "progress", _announce(started))
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(lambda _: build_once("name", build), range(3)))
    assert len(set(folders)) == 1
    assert len(built) == 1


def _announce(event):
    from contextlib import contextmanager

    @contextmanager
    def progress(description):
        assert description == "Waiting for another process to build name"
        event.set()
        yield

    return progress


def test_a_digest_knows_where_parts_end():
    assert digest(["ab", "c"]) != digest(["a", "bc"])
    assert digest(["ab"]) == digest([b"ab"])
    assert len(digest([])) == 64


def test_the_digest_of_files_depends_on_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    first = files_digest([tmp_path / "a"])
    (tmp_path / "b").write_text("1")
    assert files_digest([tmp_path / "b"]) != first
    (tmp_path / "a").write_text("2")
    assert files_digest([tmp_path / "a"]) != first
