"""Models larger than memory: one block at a time from sharded safetensors to sharded safetensors (reference 14).

Only the embeddings, norms and head of the model are loaded as a whole. A block's weights are read when it runs, pruned,
written to a file of their own and let go; an interrupted run goes on after the last block that was written.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from core.errors import DataUnavailable, InvalidInput
from core.files import sole_writer, write_atomic
from sparsity24.blocks import Blocks, calm, find_blocks, survey
from sparsity24.calibration import Batch, as_inputs
from sparsity24.card import model_card
from sparsity24.folders import Folder
from sparsity24.methods import Method, as_method, pattern_of
from sparsity24.model import Job, PruneReport, one_sequence, prune_blocks
from sparsity24.places import REPORT_NAME, Place, write_report
from sparsity24.ranks import Ranks
from sparsity24.resume import KEY_NAME, FinishedBlocks, unfinished
from sparsity24.weights import select

INDEX_NAME = "model.safetensors.index.json"
# A file of what lies outside the blocks is closed when it has grown to this.
_SHARD_BYTES = 2 << 30


def prune_checkpoint(
    folder: Path,
    output_dir: Path,
    batches: Sequence[Batch],
    method: Method | str = "prox",
    *,
    refine: str = "cg",
    steps: int = 20,
    tol: float = 1e-4,
    skip: Sequence[str] = (),
    strict: bool = False,
    target_mix: float = 0.0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    calibration: str = "",
) -> PruneReport:
    """Prune the saved model in `folder` into the new folder `output_dir`, one block in memory at a time.

    The arguments are those of `prune_model`. A block is computed on `device` in `dtype` (None: float32 on a CPU, else as it
    is stored) and written in the dtype that it was stored in. `calibration` says in words where the batches
    came from, for the report and the card. The result holds the source's other files too, and our report
    and card. Until it is complete it lies in a hidden folder beside `output_dir`, from which the same call goes on after an
    interruption. Raises `InvalidInput` when `output_dir` exists, when the model's weights go by other names in the files
    (such checkpoints are loaded and pruned by `prune_model`), and as `prune_model` does.
    """
    if output_dir.exists():
        raise InvalidInput(f"{output_dir} exists. Choose another folder, or remove it first.")
    job = Job(as_method(method), refine, steps, tol, target_mix)
    started = time.perf_counter()
    if not (folder / "config.json").is_file():
        raise InvalidInput(f"{folder} is no saved model: it has no config.json.")
    source = Folder(folder)
    device = torch.device(device)
    model = _empty_model(folder)
    names = _stored_names(model, source)
    stored_dtypes = _dtypes(source, names)
    compute = dtype or (torch.float32 if device.type == "cpu" else next(iter(stored_dtypes.values())))
    blocks = find_blocks(model)
    _load_outside(model, blocks, names, source, compute)
    inputs = as_inputs(model, batches)
    work = unfinished(output_dir)
    key = {**job.key(inputs, skip), "computed in": str(compute)}
    finished = FinishedBlocks(work, key, lambda name, _: (names[name], stored_dtypes[name]))
    home = Streamed(blocks, names, source, finished, device, compute)
    work.parent.mkdir(parents=True, exist_ok=True)
    lock = work.with_name(f"{work.name}.lock")
    ranks = Ranks.current()
    with ExitStack() as opened:
        opened.enter_context(torch.no_grad())
        opened.enter_context(calm(model))
        if ranks.rank == 0:
            # The first process of a torchrun holds it for all.
            opened.callback(lock.unlink, missing_ok=True)
            busy = f"Another process is pruning into {work}. Wait for it, or choose another folder."
            opened.enter_context(sole_writer(lock, busy))
        seen = survey(model, home, one_sequence(inputs))
        selection = select(model, blocks, seen.groups, pattern=pattern_of(job.method), skip=skip, strict=strict)
        run = prune_blocks(model, home, seen, selection, inputs, job, finished=finished, dtypes=stored_dtypes)
        report = replace(run.report(job, selection, time.perf_counter() - started), calibration=calibration)
        if ranks.rank == 0:
            pruned = [name for name, groups in selection.groups.items() if groups]
            _complete(source, finished, pruned)
            places = {
                layer.name: (Place(names[w.parameter], w.expert, w.transposed, 0, 0, layer.shape[0]),)
                for layer in report.layers
                for w in [layer.weight]
            }
            write_report(work, report, places)
            write_atomic(work / "README.md", model_card(model, report))
            for left in work.glob("*.partial"):
                left.unlink()
            # The key goes last: without it the folder could not be told from another run's, and would not be gone on with.
            work.replace(output_dir)
            (output_dir / KEY_NAME).unlink()
        ranks.total(torch.zeros(1))
    return report


def local_folder(spec: str) -> Path:
    """The folder of a `folder:PATH` model, or of a `hub:OWNER/NAME[@REVISION]` one after fetching its files.

    Raises `DataUnavailable` when the Hub cannot be reached and the files are not in its cache.
    """
    home, _, rest = spec.partition(":")
    if home == "folder":
        folder = Path(rest).expanduser()
        if not (folder / "config.json").is_file():
            raise InvalidInput(f"{folder} is no saved model: it has no config.json.")
        return folder
    from huggingface_hub import snapshot_download

    name, _, revision = rest.partition("@")
    wanted = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except OSError as error:
        raise DataUnavailable(
            f"The Hugging Face Hub could not give {spec} ({type(error).__name__}). Without a network: fetch it elsewhere "
            f"(hf download {name} --local-dir DIR) and use folder:DIR."
        ) from error


class Streamed:
    """The blocks' weights lie in files: those that are finished in ours, the others in the source."""

    def __init__(
        self,
        blocks: Blocks,
        names: Mapping[str, str],
        source: Folder,
        finished: FinishedBlocks,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._blocks, self._names, self._source = blocks, names, source
        self._finished, self._device, self._dtype = finished, device, dtype

    @contextmanager
    def resident(self, name: str, *, dense: bool) -> Iterator[None]:
        """The weights of a block, as they were if `dense`, else pruned where that is done; afterwards they are let go."""
        from accelerate.utils import set_module_tensor_to_device

        block = self._blocks[name]
        own = {key: f"{name}.{key}" for key, _ in [*block.named_parameters(), *block.named_buffers()]}
        own = {key: full for key, full in own.items() if full in self._names}
        stored = _read(self._source, [self._names[full] for full in own.values()])
        if not dense and self._finished.path(name).exists():
            with safe_open(self._finished.path(name), framework="pt") as file:
                stored.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 - not a dict
        for key, full in own.items():
            value = stored.pop(self._names[full])
            kind = self._dtype if value.is_floating_point() else value.dtype
            set_module_tensor_to_device(block, key, self._device, value=value, dtype=kind)
        try:
            yield
        finally:
            for key in own:
                set_module_tensor_to_device(block, key, "meta")


def _empty_model(folder: Path) -> Any:
    """The model of a folder without weights: parameters on the meta device, buffers as its code computes them."""
    import transformers
    from accelerate import init_empty_weights

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    with init_empty_weights(include_buffers=False):
        if named and named[0] is not None:
            return named[0](config)
        auto: Any = transformers.AutoModelForCausalLM
        return auto.from_config(config, trust_remote_code=False)


def _stored_names(model: Any, source: Folder) -> dict[str, str]:
    """By parameter or buffer, its name in the files: as the model calls it, with or without the prefix of its body."""
    prefix = f"{model.base_model_prefix}."
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    names, missing = {}, []
    for key in model.state_dict():
        stored = next((name for name in (key, key.removeprefix(prefix), prefix + key) if name in source.entries), None)
        if stored is not None:
            names[key] = stored
        elif key not in tied:
            missing.append(key)
    if missing:
        raise InvalidInput(
            f"{source.path} stores {len(missing)} weights under other names than the model has ({missing[0]}, ...). Load it "
            "as a whole and use prune_model."
        )
    return names


def _dtypes(source: Folder, names: Mapping[str, str]) -> dict[str, torch.dtype]:
    stored = {name: source.dtype(key) for name, key in names.items()}
    strange = [name for name, kind in stored.items() if kind is None and name.endswith("weight")]
    if strange:
        raise InvalidInput(
            f"`{strange[0]}` is stored in a type that is not floating-point: prune a checkpoint that is not quantised."
        )
    return {name: kind for name, kind in stored.items() if kind is not None}


def _read(source: Folder, keys: Sequence[str]) -> dict[str, Tensor]:
    # Copies, since the pages of the files would otherwise stay mapped.
    found = {key: source.tensor(key).clone() for key in keys}
    source.let_go()
    return found


def _load_outside(
    model: nn.Module, blocks: Blocks, names: Mapping[str, str], source: Folder, dtype: torch.dtype
) -> None:
    from accelerate.utils import set_module_tensor_to_device

    outside = [key for key in names if not any(key.startswith(f"{name}.") for name in blocks)]
    values = _read(source, [names[key] for key in outside])
    for key in outside:
        value = values.pop(names[key])
        kind = dtype if value.is_floating_point() else value.dtype
        set_module_tensor_to_device(model, key, "cpu", value=value, dtype=kind)
    model.tie_weights()  # type: ignore[operator]


def _complete(source: Folder, finished: FinishedBlocks, pruned: Sequence[str]) -> None:
    """Add to the finished blocks the other tensors, the index and the files that lie beside the source's weights."""
    work = finished.folder
    weight_map: dict[str, str] = {}
    for name in pruned:
        with safe_open(finished.path(name), framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), finished.path(name).name)
    rest: dict[str, Tensor] = {}
    left = [key for key in source.entries if key not in weight_map]
    for number, key in enumerate(left):
        rest |= _read(source, [key])
        if number == len(left) - 1 or sum(tensor.nbytes for tensor in rest.values()) > _SHARD_BYTES:
            name = f"rest-{number:05d}.safetensors"
            save_file(rest, work / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(rest, name)
            rest = {}
    size = sum((work / name).stat().st_size for name in set(weight_map.values()))
    write_atomic(work / INDEX_NAME, json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1))
    for path in source.path.iterdir():
        if (
            path.is_file()
            and path.suffix in (".json", ".txt", ".model", ".jinja")
            and path.name not in (INDEX_NAME, REPORT_NAME)
        ):
            shutil.copyfile(path, work / path.name)
