"""The embedded corpus: enough text, no imports, and nothing held out that train holds."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from core.data import corpus
from core.data.catalog import load


@pytest.fixture(scope="module")
def table():
    return corpus.corpus().to_pandas()


def paragraphs(table, split):
    return [part for text in table.text[table.split == split] for part in text.split("\n\n")]


def test_every_library_read_is_a_base_dependency():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    required = {re.match(r"[A-Za-z0-9_-]+", line).group().lower() for line in project["dependencies"]}
    assert set(corpus.DOMAINS) <= required


def test_the_corpus_is_several_megabytes_in_three_splits(table):
    size = table.text.str.len().groupby(table.split).sum()
    assert size["train"] > 5e6
    assert 0.05 < size["test"] / size.sum() < 0.12
    assert 0.01 < size["valid"] / size.sum() < 0.06
    assert set(table.domain) == set(corpus.DOMAINS)


def test_no_held_out_paragraph_occurs_in_train(table):
    train = {tuple(corpus.normalised_words(part)) for part in paragraphs(table, "train")}
    held_out = paragraphs(table, "test") + paragraphs(table, "valid")
    assert len(held_out) > 1000
    assert not [part for part in held_out if tuple(corpus.normalised_words(part)) in train]


def test_at_most_half_of_a_held_out_paragraph_is_found_in_train(table):
    train = set().union(*map(corpus.shingles, paragraphs(table, "train")))
    shares = [len(own & train) / len(own) for own in map(corpus.shingles, paragraphs(table, "test"))]
    assert max(shares) <= 0.5
    assert sum(shares) / len(shares) < 0.1


def test_a_module_is_in_one_split_whatever_else_is_installed(table):
    assert (table.groupby("module").split.nunique() == 1).all()
    assert corpus.split_of("scipy.stats._distn_infrastructure") == corpus.split_of("scipy.stats._distn_infrastructure")
    shares = [corpus.split_of(f"package.module_{i}") for i in range(5000)]
    assert shares.count("test") / 5000 == pytest.approx(0.08, abs=0.012)


def test_the_splits_load_by_the_catalog_with_the_manifest_in_the_provenance(table):
    data = load("embedded:corpus", "test")
    assert data.documents == table.text[table.split == "test"].tolist()
    assert corpus.manifest_hash()[:16] in data.provenance
    assert set(data.table.columns) == {"domain", "module", "name", "split", "text"}


def test_docstrings_are_found_without_running_the_source():
    source = '''
"""Of the module."""
raise SystemExit("this must not run")
class Outer:
    """Of the class."""
    def method(self):
        """Of the method."""
    async def other(self):
        "Not only triple quotes."
def bare(): ...
'''
    assert list(corpus.module_docstrings(source)) == [
        ("", "Of the module."),
        ("Outer", "Of the class."),
        ("Outer.method", "Of the method."),
        ("Outer.other", "Not only triple quotes."),
    ]


def test_only_prose_is_kept():
    prose = "Return the arithmetic mean along the given axis of the array."
    docstring = f"""{prose}

Returns
-------

>>> import numpy as np
>>> np.mean([1, 2, 3]) # a long line that would otherwise be long enough

.. versionadded:: 1.2 with a text that is long enough to be a paragraph

==== ==== ==== ==== ==== ==== ==== ==== ====
 1.0  2.0  3.0  4.0  5.0  6.0  7.0  8.0  9.0
"""
    assert corpus.prose_paragraphs(docstring) == [prose]
