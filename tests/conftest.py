"""Shared set-up: annotations are checked at run time, and nothing reaches for a network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

install_import_hook(["core", "sparsity24"], "beartype.beartype")


@pytest.fixture(scope="session")
def papers_data() -> Path:
    """The folder of public data sets, or a skip that says why."""
    folder = os.environ.get("PAPERS_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("PAPERS_DATA is not set to a folder with the public data sets")
    return Path(folder)
