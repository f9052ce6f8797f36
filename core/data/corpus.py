"""The embedded corpus: English technical prose that every install carries, the docstrings of the base dependencies.

Docstrings are read from the installed sources with `ast`; nothing is imported and nothing is redistributed. Paragraphs
that repeat earlier ones are removed before the split, and whole modules go to one split, so held-out text is new text.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.data.cache import build_once, digest
from core.errors import DataUnavailable
from core.progress import progress

if TYPE_CHECKING:
    import pyarrow

# Base dependencies of this project that hold prose; all of them are installed wherever `core` is.
DOMAINS = (
    "datasets",
    "filelock",
    "jinja2",
    "matplotlib",
    "numpy",
    "pandas",
    "platformdirs",
    "psutil",
    "pyarrow",
    "pydantic",
    "rich",
    "scipy",
    "tqdm",
    "typer",
)
SPLITS = ("train", "valid", "test")

# A change of how the corpus is made must not meet an old cache.
_RECIPE = "3"
_SKIPPED_FOLDERS = {"tests", "testing", "_vendor", "vendored", "externals", "array_api_compat", "array_api_extra"}
_SHINGLE = 8


def corpus() -> pyarrow.Table:
    """Every docstring with its `domain`, `module`, `name`, `split` and `text`; extracted on first use, then cached."""
    from pyarrow import parquet

    return parquet.read_table(corpus_path() / "corpus.parquet")


def corpus_path() -> Path:
    """The cached folder with `corpus.parquet` and `manifest.json`."""
    return build_once(f"corpus/{manifest_hash()[:16]}", _build)


@cache
def manifest_hash() -> str:
    """The sha256 of what determines the corpus: recipe, versions, and the hash of every source file read."""
    return digest([json.dumps(_manifest(), sort_keys=True)])


def versions() -> dict[str, str]:
    """The installed version of each library whose docstrings are read."""
    return {domain: metadata.version(domain) for domain in DOMAINS}


@cache
def _manifest() -> dict[str, Any]:
    files = {
        domain: [[str(file), file.hash.value if file.hash else ""] for file in _sources(domain)] for domain in DOMAINS
    }
    return {"recipe": _RECIPE, "versions": versions(), "files": files}


def _sources(domain: str) -> list[metadata.PackagePath]:
    try:
        files = metadata.files(domain)
    except metadata.PackageNotFoundError:
        files = None
    if not files:
        raise DataUnavailable(
            f"The embedded corpus reads the docstrings of {domain}, which is not installed with a list of its files. "
            f"Install it with pip: pip install {domain}"
        )
    return sorted(
        file
        for file in files
        if file.suffix == ".py" and not _SKIPPED_FOLDERS & set(file.parts) and file.parts[0] != ".."
    )


def _build(partial: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = list(_without_repetitions(_docstrings()))
    columns = ("domain", "module", "name", "split", "text")
    parquet.write_table(
        pyarrow.table({column: [row[i] for row in rows] for i, column in enumerate(columns)}),
        partial / "corpus.parquet",
    )
    (partial / "manifest.json").write_text(json.dumps(_manifest(), indent=1))


def split_of(module: str) -> str:
    """The split that a module belongs to: 8 % test, 4 % valid, by the hash of its dotted name."""
    share = int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "big") / 2**32
    return "test" if share < 0.08 else "valid" if share < 0.12 else "train"


def _docstrings() -> Iterator[tuple[str, str, str, str, str]]:
    sources = [
        (SPLITS.index(split_of(_module(file))), domain, _module(file), file)
        for domain in DOMAINS
        for file in _sources(domain)
    ]
    # Train first: what is held out is compared with all of train, so none of it is hidden in a longer text there.
    sources.sort(key=lambda source: source[:3])
    with progress("Reading docstrings for the embedded corpus (about 12 s, once)", total=len(sources)) as bar:
        for split, domain, module, file in sources:
            for name, text in module_docstrings(Path(str(file.locate())).read_text(encoding="utf-8")):
                yield domain, module, name, SPLITS[split], text
            bar.advance(note=module)


def _module(file: metadata.PackagePath) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def module_docstrings(source: str) -> Iterator[tuple[str, str]]:
    """The dotted name inside its module (empty for the module) and text of each docstring of a source file."""
    with warnings.catch_warnings():
        # Invalid escapes in other people's docstrings are none of our user's business.
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    yield from _docstrings_below(tree, "")


def _docstrings_below(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[str, str]]:
    text = ast.get_docstring(node)
    if text:
        yield name, text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings_below(child, f"{name}.{child.name}".lstrip("."))


def _without_repetitions(
    docstrings: Iterator[tuple[str, str, str, str, str]],
) -> Iterator[tuple[str, str, str, str, str]]:
    seen: set[int] = set()
    for domain, module, name, split, text in docstrings:
        kept = [paragraph for paragraph in prose_paragraphs(text) if _is_new(paragraph, seen)]
        if kept:
            yield domain, module, name, split, "\n\n".join(kept)


def prose_paragraphs(docstring: str) -> list[str]:
    """The paragraphs of a docstring that are prose: no sessions, tables, formulas, directives or bare headings."""
    return [
        paragraph
        for paragraph in (part.strip("\n") for part in re.split(r"\n\s*\n", docstring))
        if _is_prose(paragraph)
    ]


def _is_prose(paragraph: str) -> bool:
    if len(paragraph) < 40 or ">>>" in paragraph or paragraph.lstrip().startswith(".. "):
        return False
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return letters > 0.8 * len(paragraph)


def normalised_words(paragraph: str) -> list[str]:
    """What two paragraphs have in common when they say the same: words in lower case, every number alike."""
    return re.findall(r"[a-z]+|0", re.sub(r"\d+", "0", paragraph.lower()))


def shingles(paragraph: str) -> set[int]:
    """A hash of each run of eight normalised words, or of the whole paragraph when it is shorter."""
    words = normalised_words(paragraph)
    runs = (" ".join(words[i : i + _SHINGLE]) for i in range(max(1, len(words) - _SHINGLE + 1)))
    return {int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "big") for run in runs}


def _is_new(paragraph: str, seen: set[int]) -> bool:
    # New is a paragraph of which at least half is not in what is kept. This is stricter than MinHash's resemblance of
    # pairs (the other half may come from many places), and exact.
    own = shingles(paragraph)
    new = len(own - seen) > 0.5 * len(own)
    if new:
        seen |= own
    return new
