"""`compare`: its numbers against pruning and measuring by hand, resumption, refusals, tables and the page."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from core.errors import CheckpointError, InvalidInput, RunInProgress
from core.llm.causal import CausalLM
from sparsity24 import comparison as module
from sparsity24.calibration import random_sequences
from sparsity24.comparison import DEFAULT_RECIPES, Comparison, Recipe, compare
from sparsity24.comparison_page import block_of, kind_of
from sparsity24.evaluation import cloze
from sparsity24.model import prune_model

RECIPES = ("sparsegpt", "wanda", "wanda+gd:3")
SIZES: dict[str, Any] = {"num_sequences": 4, "calibration_window": 16, "window": 16, "max_windows": 6}


@pytest.fixture(scope="module")
def lm() -> CausalLM:
    characters = [chr(code) for code in range(32, 127)]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["?", *characters[1:], " "])}, unk_token="?"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    config = LlamaConfig(
        vocab_size=len(characters) + 1,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=48,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return CausalLM(
        LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=tokenizer), provenance="a random model"
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text("The loss of a layer is relative to that of the zero weight, mean over the layers. " * 12)
    return file


def run(lm: CausalLM, text: Path, folder: Path, **changes: Any) -> Comparison:
    settings = {
        "recipes": RECIPES,
        "draws": (0, 1, 2),
        "texts": (f"folder:{text}",),
        "cloze_items": 5,
        **SIZES,
        **changes,
    }
    return compare(lambda: lm, folder, calibration=f"folder:{text}", **settings)


@pytest.fixture(scope="module")
def found(lm: CausalLM, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return run(lm, text, tmp_path_factory.mktemp("found"))


def test_a_run_is_pruning_and_measuring_by_hand(lm: CausalLM, text: Path, found: Comparison) -> None:
    ids = torch.tensor(lm.encode(text.read_text()))
    by_hand = copy.copy(lm)
    by_hand.model = copy.deepcopy(lm.model)
    report = prune_model(
        by_hand.model, random_sequences(ids, num_sequences=4, window=16, seed=2), "wanda", refine="gd", steps=3
    )
    (kept,) = [run for run in found.runs if (run.recipe, run.draw) == ("wanda+gd:3", 2)]
    assert kept.nll[f"folder:{text}"] == pytest.approx(
        math.log(by_hand.perplexity(ids.tolist(), window=16, max_windows=6).value)
    )
    assert kept.report is not None
    assert [layer.mask_digest for layer in kept.report.layers] == [layer.mask_digest for layer in report.layers]
    assert [layer.rel_loss for layer in kept.report.layers] == pytest.approx(
        [layer.rel_loss for layer in report.layers]
    )
    items = cloze(by_hand, ids, 5)
    assert kept.cloze == pytest.approx((items.correct.mean(), items.log_likelihood.mean()))


def test_the_dense_model_is_left_as_it_was_and_measured(lm: CausalLM, text: Path, found: Comparison) -> None:
    assert all(bool((parameter != 0).any()) for parameter in lm.model.parameters())
    assert not bool((lm.model.model.layers[0].mlp.up_proj.weight == 0).any())
    dense = lm.perplexity(text.read_text(), window=16, max_windows=6).value
    assert math.exp(found.dense.nll[f"folder:{text}"]) == pytest.approx(dense)


def test_the_table_holds_the_paired_t_interval_of_scipy(text: Path, found: Comparison) -> None:
    name = f"folder:{text}"
    nll = {recipe: np.array([run.nll[name] for run in found.of(recipe)]) for recipe in RECIPES}
    differences = nll["wanda"] - nll["sparsegpt"]
    wanted = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    row = found.table().set_index("recipe").loc["wanda"]
    assert row[f"log ratio {name}"] == pytest.approx(differences.mean())
    assert (row[f"low {name}"], row[f"high {name}"]) == pytest.approx((wanted.low, wanted.high))
    assert row[f"perplexity {name}"] == pytest.approx(stats.gmean(np.exp(nll["wanda"])))


def test_the_reference_and_the_dense_model_are_not_compared(text: Path, found: Comparison) -> None:
    table = found.table().set_index("recipe")
    assert table[f"log ratio folder:{text}"].isna().tolist() == [True, True, False, False]
    assert found.reference == "sparsegpt"


def test_two_draws_give_no_interval(lm: CausalLM, text: Path, tmp_path: Path) -> None:
    table = run(lm, text, tmp_path, draws=(0, 1), recipes=RECIPES[:2]).table()
    assert f"low folder:{text}" not in table
    assert np.isfinite(table[f"log ratio folder:{text}"][2])


def test_the_layer_table_has_every_layer_and_the_means_of_the_draws(found: Comparison) -> None:
    table = found.layer_table()
    assert len(table) == 14
    assert table["layer"][0] == "model.layers.0.self_attn.q_proj"
    reports = [run.report for run in found.of("sparsegpt") if run.report is not None]
    assert table["sparsegpt"][3] == pytest.approx(np.mean([report.layers[3].rel_loss for report in reports]))


def test_an_interrupted_comparison_goes_on(
    lm: CausalLM, text: Path, tmp_path: Path, found: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned: list[str] = []

    def watched(model: Any, batches: Any, method: Any, **options: Any) -> Any:
        if len(pruned) == 4:
            raise KeyboardInterrupt
        pruned.append(method.name)
        return prune_model(model, batches, method, **options)

    monkeypatch.setattr(module, "prune_model", watched)
    with pytest.raises(KeyboardInterrupt):
        run(lm, text, tmp_path)
    assert len(list((tmp_path / "runs").glob("*.json"))) == 5
    monkeypatch.setattr(
        module, "prune_model", lambda *args, **options: pruned.append("again") or prune_model(*args, **options)
    )
    whole = run(lm, text, tmp_path)
    assert pruned.count("again") == 5
    assert [run.nll for run in whole.runs] == [run.nll for run in found.runs]
    assert [(run.recipe, run.draw) for run in whole.runs] == [(run.recipe, run.draw) for run in found.runs]


def test_recipes_and_draws_may_be_added(
    lm: CausalLM, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(lm, text, tmp_path, recipes=["wanda"], draws=[0])
    pruned: list[str] = []
    monkeypatch.setattr(
        module, "prune_model", lambda *args, **options: pruned.append(args[2].name) or prune_model(*args, **options)
    )
    run(lm, text, tmp_path, recipes=["wanda", "magnitude"], draws=[0, 1])
    assert sorted(pruned) == ["Wanda", "magnitude", "magnitude"]


@pytest.mark.parametrize("change", [{"num_sequences": 5}, {"window": 12}, {"skip": ["*.up_proj"]}, {"cloze_items": 0}])
def test_other_settings_in_the_same_folder_are_refused(
    lm: CausalLM, text: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    run(lm, text, tmp_path, recipes=["wanda"], draws=[0])
    with pytest.raises(InvalidInput, match=f"{next(iter(change))} was .* and is"):
        run(lm, text, tmp_path, recipes=["wanda"], draws=[0], **change)


def test_a_damaged_run_is_named(lm: CausalLM, text: Path, tmp_path: Path) -> None:
    run(lm, text, tmp_path, recipes=["wanda"], draws=[0])
    (tmp_path / "runs" / "wanda-0.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"wanda-0\.json"):
        run(lm, text, tmp_path, recipes=["wanda"], draws=[0])


def test_two_processes_do_not_write_to_one_folder(lm: CausalLM, text: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    with FileLock(tmp_path / ".lock"), pytest.raises(RunInProgress, match="Another comparison"):
        run(lm, text, tmp_path)


def test_skipped_layers_stay_dense(lm: CausalLM, text: Path, tmp_path: Path) -> None:
    layers = run(lm, text, tmp_path, recipes=["wanda"], draws=[0], skip=["*.up_proj"]).layer_table()["layer"]
    assert len(layers) == 12
    assert not layers.str.endswith("up_proj").any()


def test_random_masks_differ_between_draws(lm: CausalLM, text: Path, tmp_path: Path) -> None:
    runs = run(lm, text, tmp_path, recipes=["random"], draws=[0, 1]).runs
    digests = [{layer.mask_digest for layer in run.report.layers} for run in runs if run.report is not None]
    assert not digests[0] & digests[1]


@pytest.mark.parametrize(
    ("written", "recipe"),
    [
        ("sparsegpt", Recipe("sparsegpt")),
        ("sparsegpt+cg", Recipe("sparsegpt", "cg", 20)),
        ("wanda+gd:7", Recipe("wanda", "gd", 7)),
        ("wanda+exact", Recipe("wanda", "exact", 0)),
    ],
)
def test_recipes_are_read_and_written_alike(written: str, recipe: Recipe) -> None:
    assert Recipe.parse(written) == recipe
    assert str(recipe) == written


def test_steps_that_are_the_default_need_no_saying() -> None:
    assert str(Recipe.parse("wanda+gd:100")) == "wanda+gd"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("sparsegtp", "sparsegpt"),
        ("wanda+cgg", "cg"),
        ("wanda+", "such as wanda"),
        ("wanda+gd:", "such as wanda"),
        ("wanda+gd:many", "such as wanda"),
        ("wanda+none", "refinement"),
        ("", "such as wanda"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_refused(written: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Recipe.parse(written)


def test_every_default_recipe_can_be_read() -> None:
    assert [str(Recipe.parse(recipe)) for recipe in DEFAULT_RECIPES] == list(DEFAULT_RECIPES)


@pytest.mark.parametrize(
    "changes",
    [
        {"recipes": []},
        {"draws": []},
        {"draws": [-1]},
        {"num_sequences": 0},
        {"reference": "magnitude"},
        {"window": 49},
        {"calibration_window": 1},
        {"recipes": ["wanda", "nothing"]},
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_run(
    lm: CausalLM, text: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInput):
        run(lm, text, tmp_path, **changes)
    assert not (tmp_path / "runs").exists()


def test_the_page_says_the_window_the_model_and_every_recipe(found: Comparison, tmp_path: Path) -> None:
    page = found.write(tmp_path).read_text()
    assert "Windows of 16 tokens" in page
    assert "a random model" in page
    assert all(f">{recipe}<" in page for recipe in RECIPES)
    # perplexity, two of layer losses, time
    assert page.count("<svg") == 4
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)


def test_the_tables_are_written_as_csv_and_markdown(found: Comparison, text: Path, tmp_path: Path) -> None:
    found.write(tmp_path)
    table = pd.read_csv(tmp_path / "table.csv")
    pd.testing.assert_frame_equal(table, found.table(), check_dtype=False)
    assert len(pd.read_csv(tmp_path / "layers.csv")) == 14
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0].startswith("| recipe | perplexity, ")
    assert len({line.count("|") for line in lines[:6]}) == 1
    ratio = 100 * math.expm1(found.table()[f"log ratio folder:{text}"][2])
    assert f"{ratio:+.1f}".replace("-", "−") in lines[4]


@pytest.mark.parametrize(
    ("layer", "kind", "block"),
    [
        ("model.layers.11.self_attn.q_proj", "q_proj", "11"),
        ("model.layers.3.mlp.experts.down_proj[7]", "down_proj", "3"),
        ("transformer.h.0.attn.c_attn", "c_attn", "0"),
    ],
)
def test_layers_are_grouped_by_kind_and_block(layer: str, kind: str, block: str) -> None:
    assert (kind_of(layer), block_of(layer)) == (kind, block)


def test_the_runs_on_disk_are_plain_json(lm: CausalLM, text: Path, tmp_path: Path) -> None:
    run(lm, text, tmp_path, recipes=["wanda+gd:3"], draws=[0])
    values = json.loads((tmp_path / "runs" / "wanda+gd-3-0.json").read_text())
    assert values["report"]["method"] == "Wanda"
    assert values["num_windows"] == {f"folder:{text}": 6}
