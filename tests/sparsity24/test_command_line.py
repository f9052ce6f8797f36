"""The command line, the demo and the import of the package, as a user meets them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from sparsity24 import __main__ as command
from sparsity24.demo import demo


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return folder


def _run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["sparsity24", *map(str, arguments)])
    code = 0
    try:
        command.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    output = capsys.readouterr()
    return code, " ".join((output.out + output.err).split())


def test_prune_then_verify_then_evaluate(
    dense_folder: Path,
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "sparse"
    data = ("--split", "train", "--sequences", 8, "--window", 32)
    code, said = _run(
        monkeypatch, capsys, "prune", f"folder:{dense_folder}", "--calibration", f"folder:{text_folder}", *data,
        "--method", "wanda", "--output", output,
    )  # fmt: skip
    assert code == 0, said
    assert "14 matrices pruned by Wanda" in said
    assert json.loads((output / "sparsity24.json").read_text())["num_tokens"] == 256
    code, said = _run(monkeypatch, capsys, "verify", output)
    assert (code, "14 of 14" in said) == (0, True)
    code, said = _run(
        monkeypatch, capsys, "evaluate", f"folder:{output}", "--data", f"folder:{text_folder}", "--window", 32
    )
    assert code == 0, said
    assert "windows of 32 tokens (non-overlapping)" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prune", "nowhere:x", "--output", "OUT"), "nowhere"),
        (("prune", "folder:/no/such/folder", "--output", "OUT"), "/no/such/folder"),
        (("prune", "DENSE", "--calibration", "TEXT", "--method", "wandaa", "--output", "OUT"), "wanda"),
        (("prune", "DENSE", "--calibration", "TEXT", "--skip", "*.nothing", "--output", "OUT"), "nothing"),
        (("prune", "DENSE", "--calibration", "no_such_data", "--output", "OUT"), "no_such_data"),
        (("evaluate", "DENSE", "--data", "TEXT", "--split", "tset"), "tset"),
        (("prune", "DENSE", "--calibration", "TEXT", "--method", "prox", "--pattern", "4:8", "--output", "OUT"), "4:8"),
        (("prune", "DENSE", "--calibration", "TEXT", "--pattern", "50%", "--output", "OUT"), "Unstructured"),
        (("prune", "DENSE", "--calibration", "TEXT", "--format", "zip", "--output", "OUT"), "zip"),
        (("prune", "DENSE", "--calibration", "TEXT", "--method", "learned", "--output", "OUT"), "--no-stream"),
        (("prune", "testbed:tiny_llama", "--stream", "--output", "OUT"), "--no-stream"),
        (("convert", "/no/such/folder", "--output", "OUT"), "/no/such/folder"),
        (("compare", "DENSE", "--recipe", "wanda+xx", "--output", "OUT"), "xx"),
        (("verify", "/no/such/folder"), "safetensors"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_two(
    arguments: tuple[str, ...],
    message: str,
    dense_folder: Path,
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"DENSE": f"folder:{dense_folder}", "TEXT": f"folder:{text_folder}", "OUT": str(tmp_path / "out")}
    code, said = _run(monkeypatch, capsys, *(places.get(word, word) for word in arguments))
    assert code == 2, said
    assert message in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_both_ways_of_pruning_save_the_same_packed_model_and_it_converts_back(
    stream: str,
    dense_folder: Path,
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        f"folder:{dense_folder}", "--calibration", f"folder:{text_folder}", "--sequences", 8, "--window", 32,
        "--method", "sparsegpt", "--pattern", "1:4", stream,
    ]  # fmt: skip
    code, said = _run(monkeypatch, capsys, "prune", *arguments, "--output", tmp_path / "plain")
    assert code == 0, said
    code, said = _run(monkeypatch, capsys, "prune", *arguments, "--format", "packed", "--output", tmp_path / "packed")
    assert code == 0, said
    code, said = _run(monkeypatch, capsys, "convert", tmp_path / "packed", "--output", tmp_path / "back")
    assert code == 0, said
    one, other = (LlamaForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("plain", "back"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    code, said = _run(monkeypatch, capsys, "verify", tmp_path / "packed")
    assert (code, "14 of 14 weights are 1:4" in said) == (0, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "packed", "plain"]


def test_a_packed_model_is_evaluated_as_it_is(
    dense_folder: Path,
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = {}
    _run(
        monkeypatch, capsys, "prune", f"folder:{dense_folder}", "--calibration", f"folder:{text_folder}", "--sequences", 8,
        "--window", 32, "--method", "wanda", "--output", tmp_path / "plain",
    )  # fmt: skip
    for format in ("packed", "sparse-24-bitmask"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            _run(monkeypatch, capsys, "convert", tmp_path / "plain", "--format", format, "--output", tmp_path / format)
    for name in ("plain", "packed", "sparse-24-bitmask"):
        code, line = _run(
            monkeypatch, capsys, "evaluate", f"folder:{tmp_path / name}", "--data", f"folder:{text_folder}", "--cloze", 5,
            "--window", 32,
        )  # fmt: skip
        assert code == 0, line
        assert "Cloze accuracy" in line
        said[name] = line.split("Perplexity ")[1].split(" ")[0]
    assert len(set(said.values())) == 1


def test_verify_and_convert_say_no_to_a_dense_model(
    dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = _run(monkeypatch, capsys, "verify", dense_folder)
    assert (code, "is not 2:4" in said) == (1, True)
    code, said = _run(
        monkeypatch, capsys, "convert", dense_folder, "--format", "packed", "--output", tmp_path / "packed"
    )
    assert (code, "save nothing" in said) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_learned_masks_are_pruned_and_saved(
    dense_folder: Path,
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, said = _run(
        monkeypatch, capsys, "prune", f"folder:{dense_folder}", "--calibration", f"folder:{text_folder}", "--no-stream",
        "--sequences", 8, "--window", 32, "--method", "learned", "--learning-steps", 3, "--output", tmp_path / "sparse",
    )  # fmt: skip
    assert code == 0, said
    assert json.loads((tmp_path / "sparse" / "sparsity24.json").read_text())["method_params"]["num_steps"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["sparse"]


def test_compare_prints_a_table_and_leaves_a_page(
    dense_folder: Path,
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, said = _run(
        monkeypatch, capsys, "compare", f"folder:{dense_folder}", "--calibration", f"folder:{text_folder}", "--recipe",
        "magnitude", "--recipe", "sparsegpt+cg", "--draws", 2, "--sequences", 8, "--calibration-window", 32, "--window", 32,
        "--text", f"folder:{text_folder}", "--output", tmp_path / "compared",
    )  # fmt: skip
    assert code == 0, said
    assert "magnitude" in said
    assert "sparsegpt+cg" in said
    assert list((tmp_path / "compared").glob("*.html"))


@pytest.mark.parametrize("words", [[], ["prune"], ["evaluate"], ["compare"], ["convert"], ["verify"]])
def test_help_explains_itself(words: list[str]) -> None:
    result = CliRunner().invoke(command.app, [*words, "--help"])
    assert result.exit_code == 0
    assert "model" in result.output.lower()


def test_the_demo_shows_the_path_and_every_method_within_fifteen_seconds() -> None:
    shown = io.StringIO()
    start = time.process_time()
    demo(Console(file=shown, width=100))
    assert time.process_time() - start < 15
    for word in ("lambda", "magnitude", "wanda", "sparsegpt", "prox", "random"):
        assert word in shown.getvalue()


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, sparsity24; assert 'torch' not in sys.modules; sparsity24.prox24; assert 'torch' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
