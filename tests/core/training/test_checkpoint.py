from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from core.errors import CheckpointError
from core.training import checkpoint as module
from core.training.checkpoint import Checkpoint, load_checkpoint, lock, save_checkpoint

_IDENTITY = {"seed": 0, "sizes": (1, 2)}


def make(position: int) -> Checkpoint:
    state = {
        "weights": np.arange(6.0).reshape(2, 3).T,
        "bits": np.array([1, 65535], dtype=np.uint16),
        "scalar": np.array(3.5),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "learning_rate": 0.1 + 0.2,
        "nested": {"names": ["a", None]},
    }
    return Checkpoint(position=position, loop={"rows": [{"loss": 1e-300}]}, state=state)


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(3), _IDENTITY)
    loaded = load_checkpoint(tmp_path, _IDENTITY)
    assert loaded is not None
    assert (loaded.position, loaded.loop) == (3, make(3).loop)
    assert loaded.state.keys() == make(3).state.keys()
    for name, value in make(3).state.items():
        if isinstance(value, np.ndarray):
            assert loaded.state[name].dtype == value.dtype
            assert np.array_equal(loaded.state[name], value)
            assert loaded.state[name].shape == value.shape
        else:
            assert loaded.state[name] == value


def test_an_empty_or_absent_folder_holds_no_checkpoint(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path, {}) is None
    assert load_checkpoint(tmp_path / "absent", {}) is None


def test_only_the_newest_checkpoint_stays(tmp_path: Path) -> None:
    for position in (1, 2, 10):
        save_checkpoint(tmp_path, make(position), _IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_leftovers_of_a_killed_writer_are_ignored_and_removed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(1), _IDENTITY)
    (tmp_path / "step-00000001").rename(tmp_path / "kept")
    save_checkpoint(tmp_path, make(2), _IDENTITY)
    (tmp_path / "kept").rename(tmp_path / "step-00000001")
    leftover = tmp_path / ".unfinished-step-00000003"
    leftover.mkdir()
    (leftover / "arrays.safetensors").write_bytes(b"half")
    loaded = load_checkpoint(tmp_path, _IDENTITY)
    assert loaded is not None
    assert loaded.position == 2
    with lock(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step-00000002"]


@pytest.mark.parametrize("name", ["arrays.safetensors", "scalars.json"])
@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing", "empty"])
def test_a_damaged_checkpoint_is_refused_by_the_name_of_its_file(tmp_path: Path, name: str, damage: str) -> None:
    path = save_checkpoint(tmp_path, make(1), _IDENTITY) / name
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-9])
    elif damage == "one bit":
        content[-2 if name.endswith(".safetensors") else 2] ^= 128
        path.write_bytes(content)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(tmp_path, _IDENTITY)


def test_a_full_disk_leaves_the_previous_checkpoint_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, make(1), _IDENTITY)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_flush", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(tmp_path, make(2), _IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    loaded = load_checkpoint(tmp_path, _IDENTITY)
    assert loaded is not None
    assert loaded.position == 1
