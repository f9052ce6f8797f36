"""Folders of safetensors in three layouts, read under the names of their dense tensors and written a shard at a time.

* *dense*: as transformers writes them.
* *packed*: `<name>.packed_values` and `<name>.packed_places`, in `packed.safetensors`, a name that no loader takes for a model.
* *sparse-24-bitmask*: `<module>.compressed`, `.bitmask` and `.shape`, as compressed-tensors up to 0.14 has them (reference 11).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from core.errors import InvalidInput, unknown_name
from core.files import write_atomic
from sparsity24.packing import DTYPES, Packed, pack, unpack
from sparsity24.pattern import TWO_FOUR, Pattern

Format = Literal["dense", "packed", "sparse-24-bitmask"]

VALUES, PLACES = ".packed_values", ".packed_places"
COMPRESSED, BITMASK, SHAPE = ".compressed", ".bitmask", ".shape"
_METADATA = "sparsity24"
_FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def as_format(name: str) -> Format:
    """The layout of that name. Raises `InvalidInput` for an unknown one."""
    for known in get_args(Format):
        if name == known:
            found: Format = known
            return found
    raise unknown_name("format", name, get_args(Format))


@dataclass(frozen=True)
class _Entry:
    """One dense tensor: the file that holds it, and how."""

    file: Path
    format: Format
    pattern: Pattern = TWO_FOUR
    transposed: bool = False


@dataclass(frozen=True)
class Folder:
    """The tensors of a saved model. Raises `InvalidInput` when files or tensors are missing or damaged."""

    path: Path

    @cached_property
    def entries(self) -> dict[str, _Entry]:
        """Every tensor by its dense name, file by file."""
        entries: dict[str, _Entry] = {}
        for file, keys in _keys_by_file(self.path).items():
            handle = self._open(file)
            lost = keys - set(handle.keys()) if keys else set()
            if lost:
                raise InvalidInput(
                    f"{file} lacks `{min(lost)}`, which the index places there. Save or download it again."
                )
            wanted = keys or set(handle.keys())
            header = _header(handle.metadata() or {}, file)
            for key in sorted(wanted):
                name, entry = _entry(key, wanted, file, header)
                if name in entries and entry is not None:
                    raise InvalidInput(f"{self.path} holds `{name}` twice. Keep the files of one model there.")
                if entry is not None:
                    entries[name] = entry
        return entries

    @property
    def format(self) -> Format:
        """The layout: dense when no tensor is packed."""
        return next((entry.format for entry in self.entries.values() if entry.format != "dense"), self._named_format)

    @property
    def _named_format(self) -> Format:
        return "packed" if any(entry.file.name.startswith("packed") for entry in self.entries.values()) else "dense"

    @property
    def shards(self) -> list[list[str]]:
        """The names of the tensors, file by file."""
        files: dict[Path, list[str]] = {}
        for name, entry in self.entries.items():
            files.setdefault(entry.file, []).append(name)
        return list(files.values())

    def transposed(self, name: str) -> bool:
        """Whether the tensor was packed along its last axis but one."""
        return self.entries[name].transposed

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the dense tensor, without reading it."""
        entry = self.entries[name]
        handle = self._open(entry.file)
        if entry.format == "dense":
            return tuple(handle.get_slice(name).get_shape())
        key = name + VALUES if entry.format == "packed" else name.removesuffix(".weight") + COMPRESSED
        *batch, rows, kept = handle.get_slice(key).get_shape()
        width = kept // entry.pattern.n * entry.pattern.m
        return (*batch, width, rows) if entry.transposed else (*batch, rows, width)

    def dtype(self, name: str) -> torch.dtype | None:
        """What the tensor is stored in, without reading it; None when it is not floating-point."""
        entry = self.entries[name]
        handle = self._open(entry.file)
        key = name if entry.format == "dense" else name + VALUES
        if entry.format == "sparse-24-bitmask":
            key = name.removesuffix(".weight") + COMPRESSED
        return _FLOATING.get(handle.get_slice(key).get_dtype())

    def tensor(self, name: str) -> Tensor:
        """The dense tensor, on the CPU."""
        entry = self.entries[name]
        read = self._open(entry.file).get_tensor
        if entry.format == "dense":
            dense: Tensor = read(name)
            return dense
        if entry.format == "packed":
            weight = unpack(Packed(read(name + VALUES), read(name + PLACES)), entry.pattern, name=f"`{name}`")
            return weight.mT.contiguous() if entry.transposed else weight
        module = name.removesuffix(".weight")
        weight = unpack(Packed(read(module + COMPRESSED), read(module + BITMASK)), name=f"`{name}`")
        if tuple(read(module + SHAPE).flatten().tolist()) != tuple(weight.shape):
            raise InvalidInput(f"`{name}` is damaged: its shape differs from that of its values. Save it again.")
        return weight

    def let_go(self) -> None:
        """Close the files that were read; they open again when they are needed."""
        self._handles.clear()

    @cached_property
    def _handles(self) -> dict[Path, Any]:
        return {}

    def _open(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InvalidInput(f"{file} cannot be read ({error}). Save or download it again.") from error
        return self._handles[file]


def _keys_by_file(folder: Path) -> dict[Path, set[str]]:
    """The files of a model with the tensors that the index places in each; an empty set means all of them."""
    for stem in ("model", "packed"):
        index = folder / f"{stem}.safetensors.index.json"
        if index.exists():
            return _read_index(index)
        if (folder / f"{stem}.safetensors").exists():
            return {folder / f"{stem}.safetensors": set()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InvalidInput(f"{folder} holds no *.safetensors. Give the folder of a saved model.")
    return {file: set() for file in files}


def _read_index(index: Path) -> dict[Path, set[str]]:
    files: dict[Path, set[str]] = {}
    try:
        for key, name in json.loads(index.read_text())["weight_map"].items():
            if Path(name).name != name:
                raise InvalidInput(f"{index} names the file {name}, which is not in its folder.")
            files.setdefault(index.parent / name, set()).add(key)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{index} is not an index of safetensors ({error}). Save or download it again.") from error
    lost = [file.name for file in files if not file.exists()]
    if lost:
        raise InvalidInput(f"{index.parent} lacks {lost[0]}, which its index names. Save or download it again.")
    return files


def _header(metadata: Mapping[str, str], file: Path) -> tuple[Pattern, frozenset[str]]:
    try:
        values = json.loads(metadata.get(_METADATA, "{}"))
        return Pattern.parse(values.get("pattern", "2:4")), frozenset(values.get("transposed", ()))
    except (ValueError, AttributeError, TypeError) as error:
        raise InvalidInput(f"The header of {file} is damaged ({error}). Save it again.") from error


def _entry(key: str, keys: set[str], file: Path, header: tuple[Pattern, frozenset[str]]) -> tuple[str, _Entry | None]:
    """The dense tensor that `key` is (the first part of); no entry for the other parts."""
    for suffix, mate, format_ in ((VALUES, PLACES, "packed"), (COMPRESSED, BITMASK, "sparse-24-bitmask")):
        name = key.removesuffix(suffix)
        if key.endswith(suffix) and name + mate in keys:
            dense = name if format_ == "packed" else f"{name}.weight"
            return dense, _Entry(file, as_format(format_), header[0], name in header[1])
        other = key.removesuffix(mate)
        if key.endswith(mate) and other + suffix in keys:
            return key, None
    if key.endswith(SHAPE) and key.removesuffix(SHAPE) + COMPRESSED in keys:
        return key, None
    return key, _Entry(file, "dense")


@dataclass(frozen=True)
class Written:
    """What was written: the zeros among all values, and the names of the tensors that stayed dense."""

    global_sparsity: float
    dense: tuple[str, ...]


def write_folder(source: Folder, output: Path, format: Format, sparse: Mapping[str, bool], pattern: Pattern) -> Written:
    """Write all tensors of `source` to `output`, one shard in memory at a time.

    `sparse` names the tensors to pack and says of each whether it is transposed. Raises `InvalidInput` on one that does not
    follow the pattern.
    """
    from safetensors.torch import save_file

    from core.progress import track

    stem, shards = ("packed" if format == "packed" else "model"), source.shards
    zeros = values = total_bytes = 0
    dense: list[str] = []
    weight_map: dict[str, str] = {}
    for number, names in enumerate(track(shards, f"Writing {format} weights"), 1):
        suffix = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"{stem}{suffix}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensor = source.tensor(name)
            zeros, values = zeros + tensor.numel() - int(tensor.count_nonzero()), values + tensor.numel()
            if format == "dense" or name not in sparse:
                dense.append(name)
                tensors[name] = tensor
            else:
                tensors.update(_encoded(name, tensor, format, sparse[name], pattern))
        header = json.dumps({"pattern": str(pattern), "transposed": [name for name in names if sparse.get(name)]})
        save_file(tensors, output / file, {"format": "pt", **({_METADATA: header} if format == "packed" else {})})
        source.let_go()
        weight_map |= dict.fromkeys(tensors, file)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_atomic(output / f"{stem}.safetensors.index.json", json.dumps(index, indent=1, sort_keys=True))
    return Written(zeros / max(values, 1), tuple(dense))


def _encoded(
    name: str, tensor: Float[Tensor, "..."], format: Format, transposed: bool, pattern: Pattern
) -> dict[str, Tensor]:
    packed = pack(tensor.mT if transposed else tensor, pattern, name=f"`{name}`")
    if format == "packed":
        return {name + VALUES: packed.values, name + PLACES: packed.positions}
    module = name.removesuffix(".weight")
    return {
        module + COMPRESSED: packed.values,
        module + BITMASK: packed.positions,
        module + SHAPE: torch.tensor(tensor.shape).view(-1, 1),
    }


def sparse_matrices(folder: Folder, pattern: Pattern) -> Iterator[tuple[str, float]]:
    """The matrices whose groups fit the pattern, with the share of groups along the last axis that follow it."""
    from core.progress import track

    for name in track(list(folder.entries), "Checking weights"):
        shape = folder.shape(name)
        if len(shape) == 2 and shape[1] % pattern.m == 0:
            weight = folder.tensor(name)
            if weight.dtype in DTYPES:
                yield name, pattern.share(weight)


def is_weight_file(name: str) -> bool:
    """Whether a file of a model's folder holds weights, or says where they are."""
    return re.search(r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx)(\.index\.json)?$", name) is not None
