"""What a built data set was made with, so that it is never continued, or trained on, with something else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from core.data.cache import digest
from core.errors import InvalidInput
from core.llm.examples import EncodedPair

_NOT_COMPUTED = ("transformers_version", "architectures", "use_cache", "dtype")


def model_digest(model: Any) -> str:
    """The sha256 (first 16 hex digits) of a model's weights and of what its configuration says about computing."""
    total = hashlib.sha256()
    config = model.config.to_dict()
    # Where a model lies and which library saved it is not what it computes.
    said = {key: value for key, value in config.items() if not key.startswith("_") and key not in _NOT_COMPUTED}
    total.update(json.dumps(said, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return total.hexdigest()[:16]


def tokenizer_digest(tokenizer: Any) -> str:
    """The sha256 (first 16 hex digits) of a tokenizer's vocabulary, merges, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inside = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return digest([inside, special, str(getattr(tokenizer, "chat_template", None))])[:16]


def pairs_digest(pairs: Sequence[EncodedPair]) -> str:
    """The sha256 (first 16 hex digits) of demonstrations, in their order."""
    return ids_digest([ids for pair in pairs for ids in (pair.prompt_ids, pair.target_ids)])


def ids_digest(rows: Sequence[Sequence[int]]) -> str:
    """The sha256 (first 16 hex digits) of rows of token ids."""
    return digest(np.asarray(ids, dtype=np.int64).tobytes() for ids in rows)[:16]


def describe_method(method: Any) -> dict[str, Any]:
    """A method's class and settings as JSON values; a function by its name, its defaults and what it encloses."""
    return {"name": type(method).__name__, **{f.name: _plain(getattr(method, f.name)) for f in fields(method)}}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    if callable(value):
        code = getattr(value, "__code__", None)
        inside = [] if code is None else [code.co_code.hex(), _plain(code.co_consts)]
        enclosed = [_plain(cell.cell_contents) for cell in getattr(value, "__closure__", None) or ()]
        return [f"{value.__module__}.{getattr(value, '__qualname__', type(value).__name__)}", *inside, *enclosed]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def check_provenance(stamp: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Raise `InvalidInput` when `stamp` differs from `expected` in anything that `expected` names, and say in what."""
    different = [name for name in expected if stamp.get(name) != expected[name]]
    if different:
        details = "; ".join(f"{name}: {stamp.get(name)!r} there, {expected[name]!r} here" for name in different)
        raise InvalidInput(f"{what} was made with another {' and '.join(different)} ({details}).")
