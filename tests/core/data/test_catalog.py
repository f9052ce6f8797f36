"""Homes of data: what is loaded is what is there, and what is not there says what to do."""

from __future__ import annotations

import json

import datasets
import pandas as pd
import pytest

from core.data import catalog, corpus
from core.data.catalog import fingerprint, is_spec, load
from core.errors import DataUnavailable, InvalidInput


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PAPERS_DATA", str(tmp_path / "papers"))
    (tmp_path / "papers").mkdir()


@pytest.fixture
def wikitext(tmp_path):
    folder = tmp_path / "papers" / "wikitext2_small"
    folder.mkdir()
    (folder / "SOURCE.md").write_text("not data")
    (folder / "README.txt").write_text("not data")
    (folder / "train_part.txt").write_text(" = Title = \n\n Some text .\n")
    (folder / "valid.txt").write_text("valid\r\nlines")
    (folder / "test.txt").write_text("Held out é\n", encoding="utf-8")
    return folder


def test_a_raw_text_file_is_read_as_it_stands(wikitext):
    train = load("wikitext2_small", "train")
    assert train.text == " = Title = \n\n Some text .\n"
    assert train.documents == [" = Title = ", "", " Some text ."]
    assert load("wikitext2_small", "valid").text == "valid\r\nlines"
    assert load("wikitext2_small", "test").text == "Held out é\n"
    assert load(f"folder:{wikitext}", "test").content_hash == load("wikitext2_small", "test").content_hash


def test_the_layout_of_the_released_wikitext_is_known(tmp_path):
    for name in ("train", "valid", "test"):
        (tmp_path / f"wiki.{name}.tokens").write_text(name)
    assert [load(f"folder:{tmp_path}", name).text for name in ("train", "valid", "test")] == ["train", "valid", "test"]


def test_provenance_says_which_home_and_which_content(wikitext):
    data = load("wikitext2_small", "test")
    assert data.provenance == (
        "wikitext2_small [test] from the folder wikitext2_small of PAPERS_DATA, sha256 " + data.content_hash[:16]
    )


def test_hash_and_fingerprint_follow_the_content(wikitext):
    before, whole = load("wikitext2_small", "test").content_hash, fingerprint("wikitext2_small")
    (wikitext / "valid.txt").write_text("other")
    assert load("wikitext2_small", "test").content_hash == before
    assert fingerprint("wikitext2_small") != whole
    (wikitext / "test.txt").write_text("other")
    assert load("wikitext2_small", "test").content_hash != before


ROWS = [{"text": "one", "label": 1}, {"text": "two\nlines", "label": 2}]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_tables_load_through_datasets_into_a_private_cache(tmp_path, kind):
    folder = tmp_path / "tables"
    folder.mkdir()
    table = pd.DataFrame(ROWS)
    for split, part in (("train", table), ("dev", table[:1])):
        path = folder / f"{split}.{kind}"
        if kind == "parquet":
            part.to_parquet(path)
        elif kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in part.to_dict("records")))
        else:
            part.to_csv(path, index=False)
    data = load(f"folder:{folder}", "train")
    assert data.documents == ["one", "two\nlines"]
    assert data.text == "one\n\ntwo\nlines"
    assert data.table.to_dict("records") == ROWS
    assert data.dataset[1] == ROWS[1]
    assert load(f"folder:{folder}", "valid").documents == ["one"]
    assert (tmp_path / "cache" / "datasets").is_dir()


def test_a_single_file_is_a_set_without_splits(tmp_path):
    (tmp_path / "train_and_more.csv").write_text("name,size\na,1\n")
    data = load(f"folder:{tmp_path / 'train_and_more.csv'}")
    assert data.table.to_dict("records") == [{"name": "a", "size": 1}]
    with pytest.raises(InvalidInput, match=r"no column `text` but name, size; use `.table`"):
        _ = data.documents


@pytest.mark.parametrize(
    ("spec", "split", "message"),
    [
        ("wikitext2_smal", "test", "Did you mean wikitext2_small"),
        ("wikitext2_small", None, "splits train, valid, test; name one"),
        ("wikitext2_small", "tset", "no split 'tset'; it has the splits train, valid, test"),
        ("embedded:corpus", None, "splits train, valid, test; name one"),
        ("embedded:corpora", "test", "Did you mean corpus"),
        ("hub:wikitext", "test", r"hub:owner/name\[@revision\]\[:config\]"),
        ("hub:owner/name", None, "name a split"),
        ("c4", "test", "Known: train, valid"),
    ],
)
def test_specs_and_splits_that_do_not_exist_are_refused(monkeypatch, wikitext, spec, split, message):
    monkeypatch.setattr(corpus, "corpus", lambda: None)
    with pytest.raises(InvalidInput, match=message):
        load(spec, split)


def test_a_name_without_hub_home_needs_the_folder(monkeypatch):
    with pytest.raises(DataUnavailable, match=r"has no folder tinyshakespeare. Set PAPERS_DATA .* embedded:corpus"):
        load("tinyshakespeare")
    monkeypatch.delenv("PAPERS_DATA")
    with pytest.raises(DataUnavailable, match="PAPERS_DATA, which is not set"):
        load("tinyshakespeare")


def test_a_folder_that_is_missing_or_empty_is_unavailable(tmp_path):
    with pytest.raises(DataUnavailable, match="no such folder"):
        load(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(DataUnavailable, match="no data that can be read"):
        load(f"folder:{tmp_path / 'papers'}")


def test_a_folder_of_mixed_tables_is_refused(tmp_path):
    (tmp_path / "papers" / "a.csv").write_text("x\n1\n")
    (tmp_path / "papers" / "b.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(InvalidInput, match=r"mixes .csv, .jsonl"):
        load(f"folder:{tmp_path / 'papers'}")


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InvalidInput, match="must be UTF-8"):
        load(f"folder:{tmp_path / 'latin.txt'}")


@pytest.fixture
def hub(monkeypatch):
    """What `datasets.load_dataset` was asked for; it answers with two rows."""
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_the_hub_is_asked_for_what_the_spec_says(hub, tmp_path):
    data = load("hub:Salesforce/wikitext@main:wikitext-2-raw-v1", "valid")
    cache = str(tmp_path / "cache" / "datasets")
    assert hub == [
        (
            ("Salesforce/wikitext", "wikitext-2-raw-v1"),
            {"revision": "main", "cache_dir": cache, "split": "validation"},
        )
    ]
    assert data.text == "one\n\ntwo\nlines"
    assert data.home == "hub:Salesforce/wikitext@main:wikitext-2-raw-v1"
    assert data.content_hash == load("hub:other/name", "train").content_hash


def test_a_name_falls_back_on_its_declared_hub_home_and_says_so(hub, tmp_path):
    assert load("wikitext2", "test").home == "hub:Salesforce/wikitext:wikitext-2-raw-v1"
    (tmp_path / "papers" / "wikitext2").mkdir()
    (tmp_path / "papers" / "wikitext2" / "test.txt").write_text("here")
    assert load("wikitext2", "test").home == "the folder wikitext2 of PAPERS_DATA"
    assert len(hub) == 1


def test_only_the_declared_files_of_a_huge_set_are_asked_for(hub):
    load("c4", "valid")
    (arguments, options) = hub[0]
    assert arguments == ("allenai/c4", None)
    assert options["data_files"] == "en/c4-validation.00000-of-00008.json.gz"
    assert options["split"] == "train"


@pytest.mark.parametrize("error", [ConnectionError("no route"), datasets.exceptions.DatasetNotFoundError("gone")])
def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch, error):
    def load_dataset(*arguments, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataUnavailable, match=r"hf download allenai/c4 .* folder:DIR or PAPERS_DATA, or use embedded:corpus"
    ):
        load("c4", "train")


def test_the_hub_offline_is_unavailable(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataUnavailable, match="could not give hub:Salesforce/wikitext"):
        load("wikitext2", "test")


def test_the_fingerprint_of_a_hub_set_needs_no_network():
    assert fingerprint("hub:owner/name@abc:config") == "hub:owner/name@abc:config"
    assert fingerprint("wikitext2") == "hub:Salesforce/wikitext:wikitext-2-raw-v1"
    assert fingerprint("embedded:corpus") == corpus.manifest_hash()


def test_specs_are_told_from_other_texts():
    assert all(map(is_spec, ["c4", "hub:a/b", "folder:x", "embedded:corpus"]))
    assert not any(map(is_spec, ["c5", "http://x", "testbed:tiny_llama", ""]))
    assert set(catalog.CATALOG) >= {"wikitext2", "wikitext2_small", "tinyshakespeare", "c4"}


def test_the_world_is_a_catalog_spec_with_a_task_and_a_difficulty() -> None:
    sums = catalog.load("embedded:world:sums:2", "test")
    again = catalog.load("embedded:world:sums:2", "test")
    assert sums.content_hash == again.content_hash
    assert sums.content_hash != catalog.load("embedded:world:sums:3", "test").content_hash
    assert "####" in sums.documents[0]
    assert catalog.load("embedded:world", "train").documents
    for spec, message in (
        ("embedded:world:sumz", "sums"),
        ("embedded:world:sums:two", "a number"),
        ("embedded:worlds", "world"),
    ):
        with pytest.raises(InvalidInput, match=message):
            catalog.load(spec, "test")
    with pytest.raises(InvalidInput, match="splits"):
        catalog.load("embedded:world:sums")
