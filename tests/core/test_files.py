"""Atomic writing and the errors that name what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import CannotRunHere, MissingExtra, require, unknown_name
from core.files import write_atomic


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "deep" / "record.json"
    write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("core.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]


def test_bytes_and_text_are_written_as_they_are(tmp_path: Path):
    write_atomic(tmp_path / "a", b"\x00\xff")
    write_atomic(tmp_path / "b", "Größe\n")
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b").read_bytes() == "Größe\n".encode()


def test_a_missing_extra_is_one_sentence_with_the_command_that_installs_it():
    with pytest.raises(MissingExtra, match=r"`no_such_library`.*pip install 'tenfold\[ray\]'") as caught:
        require("no_such_library", extra="ray")
    assert isinstance(caught.value, CannotRunHere), "inside a claim it becomes the verdict not run"
    assert require("json", extra="ray").dumps({}) == "{}"


def test_a_library_that_is_there_but_broken_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_library.py").write_text("import another_missing_thing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="another_missing_thing") as caught:
        require("broken_library", extra="ray")
    assert not isinstance(caught.value, MissingExtra)


def test_an_unknown_name_offers_the_close_ones_or_all_of_them():
    assert "Did you mean wanda?" in str(unknown_name("method", "wonda", ["wanda", "prox"]))
    assert "Known: prox, wanda." in str(unknown_name("method", "qqqq", ["wanda", "prox"]))
