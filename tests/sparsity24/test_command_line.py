"""The command line, the demo and the import of the package, as a user meets them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
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
    assert "14 layers pruned by wanda" in said
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


@pytest.mark.parametrize("words", [[], ["prune"], ["evaluate"], ["verify"]])
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
    subprocess.run([sys.executable, "-c", code], check=True)
