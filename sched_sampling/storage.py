"""Built data sets on the disk: Arrow files that appear one by one, and the stamp of what they were made with.

A file is complete or absent, so that a build that was killed goes on with the next one; the processes of a `torchrun` take
the files in turn. Rows are found by their number, never by the order in which they arrived.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.errors import DataUnavailable, InvalidInput
from core.files import write_atomic
from core.progress import track
from sched_sampling.processes import processes
from sched_sampling.provenance import check_provenance

_STAMP = "provenance.json"
Build = Callable[[Sequence[int]], list[dict[str, Any]]]


def build_dataset(
    build: Build,
    num_items: int,
    stamp: Mapping[str, Any],
    output_dir: str | Path | None,
    *,
    rows_per_file: int = 1024,
) -> Any:
    """Build the rows of items 0 to `num_items` - 1 in parts and return them as a `datasets.Dataset`.

    `build(numbers)` gives the rows of some items. `stamp` says what the data set is made with; it is the `description` of
    the data set's info, and a folder that holds another is refused (`InvalidInput`).
    """
    import datasets

    if rows_per_file < 1:
        raise InvalidInput(f"rows_per_file is at least 1; got {rows_per_file}.")
    wanted = json.loads(json.dumps(stamp))
    parts = [range(start, min(start + rows_per_file, num_items)) for start in range(0, num_items, rows_per_file)]
    if output_dir is None:
        data = datasets.Dataset.from_list([row for part in parts for row in build(part)])
        data.info.description = json.dumps(wanted)
        return data
    folder = Path(output_dir)
    group = processes()
    if group.rank == 0:
        _claim(folder, wanted, len(parts))
    group.wait()
    check_provenance(_stamp(folder), wanted, f"The data set in {folder}")
    mine = [number for number in range(len(parts)) if number % group.world_size == group.rank]
    missing = [number for number in mine if not _file(folder, number).exists()]
    for number in track(missing, f"Building {len(missing)} files") if len(missing) > 1 else missing:
        _write(_file(folder, number), build(parts[number]))
    group.wait()
    return load_mixed(folder)


def load_mixed(folder: str | Path, expected: Mapping[str, Any] | None = None) -> Any:
    """The data set that was built into `folder`, as a `datasets.Dataset` that reads from the disk.

    `expected` names what it must have been made with, such as `{"tokenizer": tokenizer_digest(tokenizer)}`. Raises
    `DataUnavailable` when it is not there or not complete, and `InvalidInput` when it was made with something else.
    """
    import datasets

    home = Path(folder)
    if not (home / _STAMP).exists():
        raise DataUnavailable(f"{home} holds no data set that `mix` or `correct` wrote ({_STAMP} is missing).")
    stamp = _stamp(home)
    check_provenance(stamp, expected or {}, f"The data set in {home}")
    files = [_file(home, number) for number in range(stamp["num_files"])]
    missing = sum(not file.exists() for file in files)
    if missing:
        raise DataUnavailable(f"{home} lacks {missing} of {len(files)} files. Run the command that built it again.")
    data = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    data.info.description = json.dumps(stamp)
    return data


def is_built(folder: str | Path) -> bool:
    """Whether a data set was built, or begun, in `folder`."""
    return (Path(folder) / _STAMP).is_file()


def provenance(data: Any) -> dict[str, Any]:
    """The stamp of a data set that this package built; empty for any other."""
    try:
        return dict(json.loads(data.info.description))
    except (AttributeError, TypeError, ValueError):
        return {}


def _claim(folder: Path, stamp: Mapping[str, Any], num_files: int) -> None:
    if (folder / _STAMP).exists():
        return
    if folder.exists() and any(folder.iterdir()):
        raise InvalidInput(f"{folder} is not empty and holds no data set of ours. Choose another folder.")
    write_atomic(folder / _STAMP, json.dumps({**stamp, "num_files": num_files}, indent=1))


def _stamp(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / _STAMP).read_text()))


def _file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.arrow"


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    import io

    import datasets
    import pyarrow as pa

    table = datasets.Dataset.from_list(rows).data.table
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    write_atomic(path, sink.getvalue())
