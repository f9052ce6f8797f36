"""Where a model comes from: specs, homes that are not there, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from core import testbed
from core.errors import DataUnavailable, InvalidInput
from core.llm.causal import CausalLM


@pytest.fixture
def saved(llama, tmp_path):
    llama.model.save_pretrained(tmp_path / "tiny")
    llama.tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_saved_model_loads_from_its_folder_with_the_hash_of_its_weights(llama, saved):
    lm = CausalLM.load(f"folder:{saved}", device="cpu")
    text = "return the value of the array " * 5
    assert lm.perplexity(text, window=16).value == llama.perplexity(text, window=16).value
    assert lm.provenance.startswith("the folder tiny, sha256 of its weights ")
    assert lm.device.type == "cpu"
    again = CausalLM.load(f"folder:{saved}", device="cpu")
    assert again.provenance == lm.provenance


def test_a_half_precision_checkpoint_is_read_as_float32_on_a_cpu(llama, saved):
    half = transformers.LlamaForCausalLM.from_pretrained(saved, dtype=torch.float16)
    half.save_pretrained(saved)
    assert json.loads((saved / "config.json").read_text())["dtype"] == "float16"
    assert CausalLM.load(f"folder:{saved}", device="cpu").model.dtype == torch.float32
    assert CausalLM.load(f"folder:{saved}", device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_float16_on_a_cpu_is_refused_before_anything_is_loaded(llama, tmp_path):
    with pytest.raises(InvalidInput, match="float16 on a CPU"):
        CausalLM.load(f"folder:{tmp_path / 'nothing'}", device="cpu", dtype="float16")
    half = transformers.LlamaForCausalLM(llama.model.config).half()
    with pytest.raises(InvalidInput, match="float16 on a CPU"):
        CausalLM(half, llama.tokenizer, provenance="half")


def test_a_folder_without_safetensors_is_unavailable(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(DataUnavailable, match=r"config.json and \*.safetensors"):
        CausalLM.load(f"folder:{saved}")


def test_the_hub_without_a_network_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(DataUnavailable, match=r"hf download nobody/nothing .* use folder:DIR") as caught:
        CausalLM.load("hub:nobody/nothing@main", device="cpu")
    assert isinstance(caught.value.__cause__, OSError)


def test_the_hub_is_asked_for_safetensors_and_never_for_code(monkeypatch, llama):
    asked = {}

    def load(name, **options):
        asked[name] = options
        return llama.model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name, **options: llama.tokenizer)
    lm = CausalLM.load("hub:owner/name@v1", device="cpu")
    assert asked["owner/name"] == {
        "dtype": torch.float32,
        "use_safetensors": True,
        "trust_remote_code": False,
        "revision": "v1",
    }
    assert lm.provenance == "hub:owner/name@v1, torch.float32"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hub:name", "hub:owner/name"),
        ("hubb:owner/name", "Did you mean hub"),
        ("testbed:tiny_lama", "testbed:tiny_llama"),
        ("testbed:tiny_llama?seed=x", r"seed=3"),
        ("testbed:tiny_llama?sed=3", r"seed=3"),
        ("pretrained:smollm3", "Did you mean smollm2-135m"),
    ],
)
def test_malformed_specs_are_refused_with_the_right_form(spec, message):
    with pytest.raises(InvalidInput, match=message):
        CausalLM.load(spec, device="cpu")


def test_an_unknown_dtype_is_refused(saved):
    with pytest.raises(InvalidInput, match="Did you mean float32"):
        CausalLM.load(f"folder:{saved}", device="cpu", dtype="flaot32")


def test_testbed_specs_pass_the_seed_on(monkeypatch, llama):
    seeds = []
    monkeypatch.setattr(testbed, "tiny_llama", lambda seed: seeds.append(seed) or llama)
    assert CausalLM.load("testbed:tiny_llama", device="cpu") is llama
    assert CausalLM.load("testbed:tiny_llama?seed=3", device="cpu") is llama
    assert seeds == [0, 3]
