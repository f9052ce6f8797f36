"""The command line, from mixing to the curves, on the small Llama of a world task; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from core.errors import InvalidInput, TenfoldError
from core.llm.causal import CausalLM
from sched_sampling.__main__ import app
from sched_sampling.storage import load_mixed, provenance

TASK = "world:questions:1"


def _run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
def test_mix_train_evaluate_and_bias(tmp_path: Path):
    said = _run("mix", TASK, TASK, "--output", tmp_path / "mixed", "--rows", 24, "--beta", 0.5)
    data = load_mixed(tmp_path / "mixed")
    share = sum(sum(row["replaced"]) for row in data) / sum(sum(t != -100 for t in row["labels"]) for row in data)
    assert f"{share:.1%} of the answer tokens" in said
    assert provenance(data)["beta"] == 0.5
    _run("train", TASK, f"folder:{tmp_path / 'mixed'}", "--output", tmp_path / "tuned", "--steps", 3)
    assert json.loads((tmp_path / "tuned" / "report.json").read_text())["rounds"][0]["loss"] > 0
    tuned = CausalLM.load(f"folder:{tmp_path / 'tuned'}")
    assert tuned.generate(["Question: What"], max_new_tokens=3)
    shown = _run(
        "evaluate",
        f"folder:{tmp_path / 'tuned'}",
        TASK,
        "--rows",
        8,
        "--corrections",
        1,
        "--output",
        tmp_path / "e.json",
    )
    assert "exact match" in shown
    scores = json.loads((tmp_path / "e.json").read_text())["scores"]
    assert [(row["answers"], row["corrections"]) for row in scores] == [
        (name, number) for name in ("greedy", "sampled") for number in (0, 1)
    ]
    _run(
        "bias",
        f"folder:{tmp_path / 'tuned'}",
        TASK,
        "--data",
        "world:dialogues:1",
        "--rows",
        4,
        "--output",
        tmp_path / "b",
    )
    assert (tmp_path / "b" / "curves.svg").read_text().startswith("<svg")
    found = json.loads((tmp_path / "b" / "bias.json").read_text())
    assert len(found["models"]) == 2
    assert all(0 <= row["recovery rate"] <= 1 for row in found["models"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bash", "rac", "sft", "random", "online", "two-pass", "neftune", "spin"])
def test_every_method_trains_and_goes_on_to_a_saved_model(tmp_path: Path, method: str):
    output = tmp_path / method
    options = ["--rounds", 2, "--steps", 2, "--rows", 12, "--batch-size", 4, "--learning-rate", 1e-3]
    _run("train", TASK, TASK, "--output", output, "--method", method, *options)
    report = json.loads((output / "report.json").read_text())
    assert report["method"] == method
    assert len(report["rounds"]) == 2
    assert not (output / "rounds").exists()
    assert CausalLM.load(f"folder:{output}").model.num_parameters() > 0
    with pytest.raises(InvalidInput, match="holds a trained model"):
        _run("train", TASK, TASK, "--output", output, "--method", method)


@pytest.mark.slow
def test_lora_adapters_are_merged_into_the_saved_model(tmp_path: Path):
    options = ["--rounds", 1, "--steps", 2, "--rows", 8, "--batch-size", 4, "--lora", 4, "--learning-rate", 1e-2]
    _run("train", TASK, TASK, "--output", tmp_path / "tuned", *options)
    before, after = CausalLM.load("folder:" + str(tmp_path / "tuned")), None
    from sched_sampling.world_models import world_llama

    after = world_llama(TASK)
    changed = {
        name
        for (name, a), (_, b) in zip(before.model.named_parameters(), after.model.named_parameters(), strict=True)
        if not a.equal(b)
    }
    assert changed
    assert all("proj" in name for name in changed)


@pytest.mark.slow
def test_corrections_are_written_line_by_line(tmp_path: Path):
    _run("correct", TASK, TASK, "--output", tmp_path / "answers.jsonl", "--rows", 5, "--corrections", 2)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert all(len(line["answers"]) == 3 for line in lines)


@pytest.mark.slow
def test_a_data_set_of_another_model_is_refused(tmp_path: Path):
    _run("mix", TASK, TASK, "--output", tmp_path / "mixed", "--rows", 4)
    with pytest.raises(InvalidInput, match="another model and tokenizer"):
        _run("train", "testbed:tiny_llama", f"folder:{tmp_path / 'mixed'}", "--output", tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mix", TASK, TASK, "--method", "spin", "--output", "x"], "bash or rac"),
        (
            ["mix", TASK, TASK, "--server", "openai:m@http://127.0.0.1:1/v1", "--output", "x"],
            "next-token probabilities",
        ),
        (["mix", TASK, TASK, "--beta", "1.5", "--output", "x", "--rows", "2"], "from 0 to 1; got 1.5"),
        (["mix", TASK, "world:chess:1", "--output", "x"], "task of the world"),
        (["train", TASK, TASK, "--method", "bsh", "--output", "x", "--rows", "2"], "Did you mean bash"),
        (["train", "nowhere:1", TASK, "--output", "x"], "home of a model"),
        (["correct", TASK, TASK, "--corrections", "-1", "--output", "x.jsonl", "--rows", "2"], "at least 0"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(tmp_path, monkeypatch, arguments, message: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TenfoldError, match=message):
        _run(*arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_a_mixed_data_set_has_decided_cannot_be_asked_for_again(tmp_path: Path):
    _run("mix", TASK, TASK, "--output", tmp_path / "mixed", "--rows", 4)
    with pytest.raises(InvalidInput, match="leave out --beta"):
        _run("train", TASK, f"folder:{tmp_path / 'mixed'}", "--output", tmp_path / "tuned", "--beta", 0.1)
