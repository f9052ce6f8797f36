"""Shared set-up: annotations are checked at run time, and nothing reaches for a network."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest
from beartype import BeartypeConf, beartype
from hypothesis import settings
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The same examples on every machine, however slow it is.
settings.register_profile("tenfold", deadline=None, derandomize=True)
settings.load_profile("tenfold")

# The hook wants the dotted name of a checker; ours lets an int stand for a float, as type checkers do.
_typechecker = types.ModuleType("tenfold_typechecker")
_typechecker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # type: ignore[attr-defined]
sys.modules["tenfold_typechecker"] = _typechecker
install_import_hook(["core", "sched_sampling", "sparsity24", "papers"], "tenfold_typechecker.check")


@pytest.fixture(scope="session")
def papers_data() -> Path:
    """The folder of public data sets, or a skip that says why."""
    folder = os.environ.get("PAPERS_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("PAPERS_DATA is not set to a folder with the public data sets")
    return Path(folder)
