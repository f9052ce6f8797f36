"""Saving a pruned model with its report and its card, and changing the format of a saved one (reference 11)."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import InvalidInput
from core.files import write_atomic
from core.llm.causal import CausalLM, best_device
from core.progress import track
from sparsity24.card import model_card
from sparsity24.folders import Folder, Format, Written, as_format, is_weight_file, sparse_matrices, write_folder
from sparsity24.model import PruneReport
from sparsity24.pattern import TWO_FOUR, Pattern
from sparsity24.places import REPORT_NAME as REPORT_NAME
from sparsity24.places import Places, as_in_the_model, on_disk, read_report, write_report
from sparsity24.verification import Verification as Verification
from sparsity24.verification import verify as verify

_LEGACY = (
    "vLLM 0.19.1 and later and compressed-tensors after 0.14 no longer read sparse-24-bitmask: "
    "use it only for older versions."
)


def save(
    model: Any,
    tokenizer: Any,
    output_dir: Path,
    report: PruneReport,
    *,
    format: str = "dense",
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write the model, its tokenizer, its report `sparsity24.json` and its card `README.md`; returns the new folder.

    "dense" has explicit zeros and loads everywhere. "packed" keeps 9/16 of the 16-bit size of what was pruned; `load_packed`
    and `convert` read it. "sparse-24-bitmask" is for old versions of vLLM, and warns. The folder is complete or absent. Formats
    other than dense need room for a dense copy while they are written. Raises `InvalidInput` when `output_dir` exists.
    """
    layout = check_format(format, report.pattern)
    with _complete_or_absent(output_dir) as partial:
        dense = partial if layout == "dense" else partial / ".dense"
        places = _save_dense(model, dense, report, max_shard_size)
        tokenizer.save_pretrained(dense)
        write_report(dense, report, places)
        write_atomic(dense / "README.md", model_card(model, report))
        if layout != "dense":
            _convert_into(partial, Folder(dense), layout)
            shutil.rmtree(dense)
    return output_dir


def convert(folder: Path, output_dir: Path, format: str) -> Path:
    """Write a saved model to a new folder as "dense", "packed" or "sparse-24-bitmask"; returns the folder.

    One shard is in memory at a time; other files are copied, except weights in other forms. With a report its weights are
    packed, else every matrix that is 2:4 throughout. The folder is complete or absent. Raises `InvalidInput` when `output_dir`
    exists, when the folder has that format already, or when a weight of the report does not follow its pattern.
    """
    layout, source = as_format(format), Folder(folder)
    if source.format == layout:
        raise InvalidInput(f"{folder} is {layout} already.")
    with _complete_or_absent(output_dir) as partial:
        _convert_into(partial, source, layout)
    return output_dir


@torch.no_grad()
def load_packed(folder: Path, model: nn.Module) -> None:
    """Fill a model of the same architecture with the weights of a folder in any format, packed ones unpacked.

    Where transformers fuses tensors of the checkpoint into one parameter, all weights are held in memory once more.
    Raises `InvalidInput` when names or shapes do not fit; the model is then unchanged.
    """
    source = Folder(folder)
    state = model.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        raise InvalidInput(
            "The model is on the meta device and has nothing to fill. Give it memory with to_empty() first."
        )
    if set(source.entries) - set(state):
        loaded = _through_transformers(source, model)
        _check_fit({name: tuple(tensor.shape) for name, tensor in loaded.items()}, state, folder)
        for name, tensor in loaded.items():
            state[name].copy_(tensor)
        return
    shapes = {name: source.shape(name) for name in source.entries}
    _check_fit(shapes, state, folder)
    for name in track(list(shapes), "Loading weights"):
        state[name].copy_(source.tensor(name))


def load_model(spec: str, *, device: str | None = None) -> CausalLM:
    """The model that `CausalLM.load` would give for `spec`, from a folder in any of our formats too."""
    home, _, rest = spec.partition(":")
    folder = Path(rest).expanduser()
    if home != "folder" or not (folder / "config.json").is_file() or (kind := Folder(folder).format) == "dense":
        return CausalLM.load(spec, device=device)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # What only compressed-tensors understands is unpacked here.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config, trust_remote_code=False, dtype=torch.float32)
    load_packed(folder, model)
    lm = CausalLM(
        model, AutoTokenizer.from_pretrained(folder), provenance=f"the folder {folder.name}, {kind}, unpacked"
    )
    lm.model.to(device or best_device())
    return lm


def _through_transformers(source: Folder, model: nn.Module) -> Mapping[str, Tensor]:
    loader: Any = type(model)
    if not hasattr(loader, "from_pretrained"):
        raise InvalidInput(f"{source.path} holds tensors that {loader.__name__} does not have.")
    tensors = {name: source.tensor(name) for name in track(list(source.entries), "Loading weights")}
    # The widest of the folder: what the model's configuration names may be narrower.
    dtype = max(
        (tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), key=lambda kind: kind.itemsize
    )
    loaded: nn.Module = loader.from_pretrained(None, config=model.config, state_dict=tensors, dtype=dtype)
    return loaded.state_dict()


def _check_fit(shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor], folder: Path) -> None:
    filled = {state[name].data_ptr() for name in shapes if name in state}
    lost = [name for name, tensor in state.items() if tensor.data_ptr() not in filled]
    if lost:
        raise InvalidInput(f"{folder} lacks {', '.join(lost[:3])}, which the model has.")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise InvalidInput(f"`{name}` is {shape} in {folder} and {tuple(state[name].shape)} in the model.")


def _save_dense(model: Any, folder: Path, report: PruneReport, max_shard_size: int | str) -> Places:
    """Save as transformers does, and say where the weights went."""
    try:
        places, original = on_disk(model, report), True
    except InvalidInput as error:
        warnings.warn(f"Saved with the names that the model has in memory: {error}", stacklevel=3)
        places, original = as_in_the_model(report), False
    model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=original)
    return _of_shared(places, model, Folder(folder))


def _of_shared(places: Places, model: nn.Module, folder: Folder) -> Places:
    """The places with the one name under which a parameter with several was saved."""
    state = model.state_dict()

    def name_of(key: str) -> str:
        if key in folder.entries or key not in state:
            return key
        same = (name for name in folder.entries if name in state and state[name].data_ptr() == state[key].data_ptr())
        return next(same, key)

    return {name: tuple(replace(p, key=name_of(p.key)) for p in found) for name, found in places.items()}


def _convert_into(output: Path, source: Folder, layout: Format) -> None:
    found = read_report(source.path)
    pattern = Pattern.parse(found[0].pattern) if found is not None else TWO_FOUR
    check_format(layout, str(pattern))
    sparse = {} if layout == "dense" else _to_pack(source, found, pattern)
    if layout != "dense" and not sparse:
        raise InvalidInput(
            f"No matrix of {source.path} is {pattern} throughout: packing would save nothing. Prune it first."
        )
    if layout == "sparse-24-bitmask":
        sparse = _legacy_only(source, sparse)
    shutil.copytree(source.path, output, ignore=_weight_files, dirs_exist_ok=True)
    written = write_folder(source, output, layout, sparse, pattern)
    _edit_config(output / "config.json", layout, source, written)


def _to_pack(source: Folder, found: tuple[PruneReport, Places] | None, pattern: Pattern) -> dict[str, bool]:
    """The tensors to pack, and whether each is transposed."""
    if found is None:
        packed = {name: entry.transposed for name, entry in source.entries.items() if entry.format != "dense"}
        return packed or {name: False for name, share in sparse_matrices(source, pattern) if share == 1}
    covered: dict[str, int] = {}
    transposed: dict[str, bool] = {}
    for layer in found[0].layers:
        for place in found[1][layer.name]:
            if place.key not in source.entries:
                raise InvalidInput(f"{source.path} lacks `{place.key}`, which its report names.")
            covered[place.key] = covered.get(place.key, 0) + place.count * layer.shape[1]
            transposed[place.key] = place.transposed
    # A tensor of which only some experts were pruned stays dense.
    return {key: transposed[key] for key, size in covered.items() if size == prod(source.shape(key))}


def _legacy_only(source: Folder, sparse: Mapping[str, bool]) -> dict[str, bool]:
    """Those that the legacy layout can hold, with its warnings."""
    held = {
        name: False
        for name, transposed in sparse.items()
        if not transposed and len(source.shape(name)) == 2 and name.endswith(".weight")
    }
    others = [name for name in sparse if name not in held]
    more = f" and {len(others) - 5} more" if len(others) > 5 else ""
    left = f" It has no place for stacked or transposed matrices, which stay dense: {', '.join(others[:5])}{more}."
    warnings.warn(_LEGACY + (left if others else ""), stacklevel=4)
    return held


def check_format(format: str, pattern: str) -> Format:
    """The layout of that name. Raises `InvalidInput` on an unknown one, and on one that cannot hold the pattern."""
    layout = as_format(format)
    if layout == "sparse-24-bitmask" and Pattern.parse(pattern) != TWO_FOUR:
        raise InvalidInput(f"sparse-24-bitmask holds 2:4 weights; these are {pattern}. Use packed or dense.")
    return layout


def _edit_config(path: Path, layout: Format, source: Folder, written: Written) -> None:
    """Write the entry by which compressed-tensors knows the legacy layout, or take it out."""
    if not path.exists():
        return
    config = json.loads(path.read_text())
    if layout == "sparse-24-bitmask":
        ignored = [
            n.removesuffix(".weight") for n in written.dense if n.endswith(".weight") and len(source.shape(n)) == 2
        ]
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "sparsity_config": {
                "format": "sparse-24-bitmask",
                "sparsity_structure": "2:4",
                "global_sparsity": written.global_sparsity,
                "targets": ["Linear"],
                "ignore": ignored,
            },
        }
    elif source.format == "sparse-24-bitmask":
        config.pop("quantization_config", None)
    write_atomic(path, json.dumps(config, indent=2))


def _weight_files(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if is_weight_file(name) or name == ".dense"]


@contextmanager
def _complete_or_absent(output_dir: Path) -> Iterator[Path]:
    """A folder beside `output_dir` that becomes it at the end, and goes on any failure."""
    if output_dir.exists():
        raise InvalidInput(f"{output_dir} exists. Choose another folder, or remove it first.")
    partial = output_dir.with_name(f".{output_dir.name}.partial")
    # What a killed run left.
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
