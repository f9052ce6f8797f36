"""Data sets by name, each with an explicit home: embedded, a folder, or the Hugging Face Hub.

    load("embedded:corpus", "train").text           # embedded:corpus:scipy is one of its domains
    load("embedded:world:sums:2", "test").table     # a task of the world, and its difficulty (1 when not given)
    load("folder:/data/my_text", "test").documents
    load("hub:Salesforce/wikitext:wikitext-2-raw-v1", "test").provenance
    load("wikitext2_small", "test")    # the folder in PAPERS_DATA

A name means the folder of that name in `PAPERS_DATA` when it is there, else the Hub home declared in `CATALOG`; which one
it was is in the provenance. A home that cannot be reached is an error, never a reason to take another.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from core.data import corpus
from core.data.cache import cache_dir, digest, files_digest
from core.data.world import SPLITS as WORLD_SPLITS
from core.data.world import TASKS, World
from core.errors import DataUnavailable, InvalidInput, unknown_name

__all__ = ["CATALOG", "HubHome", "LoadedData", "cache_dir", "fingerprint", "is_spec", "load"]


@dataclass(frozen=True)
class HubHome:
    """Where a data set lives on the Hub; `files` picks single files of a set that is too large to take whole."""

    repository: str
    config: str | None = None
    revision: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> HubHome:
        """The home written as `owner/name[@revision][:config]`."""
        name, _, config = text.partition(":")
        repository, _, revision = name.partition("@")
        if repository.count("/") != 1 or not all(repository.split("/")):
            raise InvalidInput(f"A Hub spec is `hub:owner/name[@revision][:config]`; got `hub:{text}`.")
        return cls(repository, config or None, revision or None)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hub:{self.repository}{revision}" + (f":{self.config}" if self.config else "")


# The names of data sets, and the Hub home of those that have one.
CATALOG: dict[str, HubHome | None] = {
    "c4": HubHome(
        "allenai/c4",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "valid": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    "dialogsum": HubHome("knkarthick/dialogsum"),
    "gsm8k": HubHome("openai/gsm8k", "main"),
    "tinyshakespeare": None,
    "wikitext2": HubHome("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext2_small": None,
}

_RAW_TEXT = (".txt", ".tokens", ".raw")
_BUILDERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".json.gz": "json",
    ".jsonl.gz": "json",
    ".csv": "csv",
}
_SPLIT_PREFIXES = {"train": ("train",), "valid": ("valid", "val", "dev"), "test": ("test",)}
_HUB_SPLITS = {"valid": "validation"}


@dataclass(frozen=True)
class LoadedData:
    """One split of a data set, where it came from, and the sha256 of its content."""

    spec: str
    split: str | None
    home: str
    content_hash: str
    # A `datasets.Dataset` or a `pyarrow.Table`: typed loosely so that neither library is imported before it is needed.
    _rows: Any = field(repr=False)
    _raw_text: str | None = field(default=None, repr=False)

    @property
    def provenance(self) -> str:
        """One line for `Evidence.provenance`."""
        part = f" [{self.split}]" if self.split else ""
        return f"{self.spec}{part} from {self.home}, sha256 {self.content_hash[:16]}"

    @cached_property
    def dataset(self) -> Any:
        """The rows as a `datasets.Dataset`."""
        import datasets

        return self._rows if isinstance(self._rows, datasets.Dataset) else datasets.Dataset(self._rows)

    @cached_property
    def table(self) -> Any:
        """The rows as a pandas table."""
        return self._rows.to_pandas()

    @cached_property
    def documents(self) -> list[str]:
        """The column `text`: one document a row; the lines of a raw-text file.

        Raises `InvalidInput` when there is no such column, naming the ones there are.
        """
        if "text" not in self._rows.column_names:
            raise InvalidInput(
                f"{self.spec} has no column `text` but {', '.join(self._rows.column_names)}; use `.table` or `.dataset`."
            )
        column = self._rows["text"]
        return column.to_pylist() if hasattr(column, "to_pylist") else list(column)

    @cached_property
    def text(self) -> str:
        """All the text: a raw-text file as it stands, else the documents joined by an empty line."""
        return self._raw_text if self._raw_text is not None else "\n\n".join(self.documents)


def is_spec(text: str) -> bool:
    """Whether `text` names data: a catalog name, or a spec with one of the homes."""
    return text in CATALOG or text.partition(":")[0] in ("embedded", "folder", "hub")


def load(spec: str, split: str | None = None) -> LoadedData:
    """One split of the data set `spec` (see the module's head for what a spec is).

    `split` is `train`, `valid`, `test` or a name of the Hub's; None means the whole of a set that has no splits.
    Raises `InvalidInput` on a spec or split that does not exist and `DataUnavailable` when the home is not there.
    """
    home = _resolve(spec)
    if isinstance(home, HubHome):
        return _load_hub(spec, home, split)
    if isinstance(home, Path):
        return _load_folder(spec, home, split)
    return _load_world(spec, split) if _is_world(spec) else _load_corpus(spec, split)


def fingerprint(spec: str) -> str:
    """The identity of a data set, quickly and without a network, for the key under which results are kept.

    Embedded data is identified by its manifest, a folder by its content, a set on the Hub by its name and revision.
    """
    home = _resolve(spec)
    if isinstance(home, HubHome):
        return str(home)
    if isinstance(home, Path):
        return files_digest(_data_files(home))
    return World().content_hash if _is_world(spec) else corpus.manifest_hash()


def _is_world(spec: str) -> bool:
    return spec.split(":")[1] == "world"


def _resolve(spec: str) -> HubHome | Path | None:
    home, _, rest = spec.partition(":")
    if home == "embedded":
        name, _, domain = rest.partition(":")
        if name == "world":
            _world_task(spec)
            return None
        if name != "corpus":
            raise unknown_name("embedded data set", name, ["corpus", "world"])
        if domain and domain not in corpus.DOMAINS:
            raise unknown_name("domain of embedded:corpus", domain, corpus.DOMAINS)
        return None
    if home == "hub":
        return HubHome.parse(rest)
    if home == "folder":
        path = Path(rest).expanduser()
        if not path.exists():
            raise DataUnavailable(f"`{spec}`: there is no such folder or file. Give the path of one that exists.")
        return path
    if spec not in CATALOG:
        if Path(spec).expanduser().exists():
            raise InvalidInput(f"Data in a file or folder are written folder:{spec}.")
        raise unknown_name("data set", spec, [*CATALOG, "embedded:corpus", "hub:owner/name", "folder:PATH"])
    return _resolve_name(spec)


def _resolve_name(name: str) -> HubHome | Path:
    configured = os.environ.get("PAPERS_DATA")
    if configured and (Path(configured) / name).is_dir():
        return Path(configured) / name
    declared = CATALOG[name]
    if declared is None:
        held = f"is {configured}, which has no folder {name}" if configured else "is not set"
        raise DataUnavailable(
            f"The data set {name} lives in the folder PAPERS_DATA, which {held}. Set PAPERS_DATA to the folder that holds "
            "it, or use embedded:corpus."
        )
    return declared


def _load_corpus(spec: str, split: str | None) -> LoadedData:
    rows = corpus.corpus()
    if split is None:
        raise InvalidInput(f"{spec} has the splits {', '.join(corpus.SPLITS)}; name one.")
    if split not in corpus.SPLITS:
        raise unknown_name(f"split of {spec}", split, corpus.SPLITS)
    import pyarrow.compute as pc

    rows = rows.filter(pc.equal(rows["split"], split))
    domain = spec.removeprefix("embedded:corpus").removeprefix(":")
    if domain:
        rows = rows.filter(pc.equal(rows["domain"], domain))
    which = domain or f"{len(corpus.DOMAINS)} installed libraries"
    return LoadedData(
        spec,
        split,
        home=f"the docstrings of {which} (manifest {corpus.manifest_hash()[:16]})",
        content_hash=digest(rows["text"].to_pylist()),
        _rows=rows,
    )


def _world_task(spec: str) -> tuple[str, int]:
    task, _, difficulty = spec.removeprefix("embedded:world").removeprefix(":").partition(":")
    if task and task not in ("passages", *TASKS):
        raise unknown_name("task of embedded:world", task, ["passages", *TASKS])
    if difficulty and not difficulty.isdecimal():
        raise InvalidInput(f"The world is `embedded:world[:task[:difficulty]]`, the difficulty a number; got `{spec}`.")
    return task or "passages", int(difficulty or 1)


def _load_world(spec: str, split: str | None) -> LoadedData:
    if split is None:
        raise InvalidInput(f"{spec} has the splits {', '.join(WORLD_SPLITS)}; name one.")
    world = World()
    task, difficulty = _world_task(spec)
    rows = world.table(task, split, difficulty)
    return LoadedData(
        spec,
        split,
        home=f"the generated world of seed {world.seed} (content {world.content_hash[:16]})",
        content_hash=digest(rows["text"].to_pylist()),
        _rows=rows,
    )


def _load_folder(spec: str, path: Path, split: str | None) -> LoadedData:
    files = _files_of_split(spec, path, split)
    suffixes = {_kind(file) for file in files}
    if not suffixes <= set(_RAW_TEXT) and len(suffixes) > 1:
        raise InvalidInput(f"{spec} mixes {', '.join(sorted(suffixes))} files; name one file with folder:PATH.")
    home = f"the file {path.name}" if path.is_file() else f"the folder {path.name}"
    if os.environ.get("PAPERS_DATA") and path.parent == Path(os.environ["PAPERS_DATA"]):
        home += " of PAPERS_DATA"
    content_hash = files_digest(files)
    if suffixes <= set(_RAW_TEXT):
        import pyarrow

        try:
            text = "".join(file.read_bytes().decode() for file in files)
        except UnicodeDecodeError as error:
            raise InvalidInput(f"{spec}: a raw-text file must be UTF-8 ({error}).") from error
        rows = pyarrow.table({"text": text.removesuffix("\n").split("\n")})
        return LoadedData(spec, split, home, content_hash, rows, text)
    import datasets

    rows = datasets.load_dataset(
        _BUILDERS[suffixes.pop()],
        data_files=[str(file) for file in files],
        split="train",
        cache_dir=str(cache_dir() / "datasets"),
    )
    return LoadedData(spec, split, home, content_hash, rows)


def _kind(file: Path) -> str:
    """The ending that says how a file is read: .csv, .json.gz, ..."""
    return "".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix


def _data_files(path: Path) -> list[Path]:
    if path.is_file():
        files = [path] if _kind(path) in (*_RAW_TEXT, *_BUILDERS) else []
    else:
        files = [
            file
            for file in sorted(path.iterdir())
            if _kind(file) in (*_RAW_TEXT, *_BUILDERS)
            and not file.stem.upper().startswith(("README", "LICENSE", "SOURCE"))
        ]
    if not files:
        raise DataUnavailable(
            f"{path} holds no data that can be read: {', '.join((*_RAW_TEXT, *_BUILDERS))} files are wanted."
        )
    return files


def _files_of_split(spec: str, path: Path, split: str | None) -> list[Path]:
    files = _data_files(path)
    splits = {
        name: found
        for name, prefixes in _SPLIT_PREFIXES.items()
        if (found := [file for file in files if file.stem.lower().split("wiki.")[-1].startswith(prefixes)])
    }
    if path.is_file():
        splits = {}
    if split is None and not splits:
        return files
    if split is None:
        raise InvalidInput(f"{spec} has the splits {', '.join(splits)}; name one.")
    if split not in splits:
        held = f"the splits {', '.join(splits)}" if splits else "no splits (load it with split=None)"
        raise InvalidInput(f"{spec} has no split {split!r}; it has {held}.")
    return splits[split]


def _load_hub(spec: str, home: HubHome, split: str | None) -> LoadedData:
    if split is None:
        raise InvalidInput(f"{spec} is on the Hub; name a split, for example split='train'.")
    if home.files and split not in home.files:
        raise unknown_name(f"split of {spec}", split, home.files)
    import datasets

    # One declared file is loaded as a set of its own, whose only split is called train.
    options: dict[str, Any] = (
        {"data_files": home.files[split], "split": "train"} if home.files else {"split": _HUB_SPLITS.get(split, split)}
    )
    try:
        rows = datasets.load_dataset(
            home.repository, home.config, revision=home.revision, cache_dir=str(cache_dir() / "datasets"), **options
        )
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise DataUnavailable(
            f"`{spec}` lives on the Hugging Face Hub, which could not give {home} ({type(error).__name__}: {error}). "
            f"Without a network: fetch it elsewhere (hf download {home.repository} --repo-type dataset --local-dir DIR) and "
            "use folder:DIR or PAPERS_DATA, or use embedded:corpus."
        ) from error
    except ValueError as error:
        # `datasets` names a config or a split that does not exist this way, and lists those that do.
        raise InvalidInput(f"`{spec}` [{split}]: {error}") from error
    return LoadedData(spec, split, home=str(home), content_hash=_rows_digest(rows), _rows=rows)


def _rows_digest(rows: Any) -> str:
    # Slices of fixed length: the hash must not depend on how a version of `datasets` cuts its batches.
    arrow = rows.data.table
    slices = (arrow.slice(start, 4096).combine_chunks() for start in range(0, arrow.num_rows, 4096))
    return digest(batch.serialize().to_pybytes() for piece in slices for batch in piece.to_batches())
