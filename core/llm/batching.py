"""Batches of sequences of like length, and how sequences are padded without changing what the model computes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from core.progress import track

T = TypeVar("T")


def length_buckets(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Indices into `lengths`, longest first, in batches whose padded size is at most `max_batch_tokens`.

    A sequence that is longer than the budget makes a batch of its own.
    """
    batches: list[list[int]] = []
    # Longest first: a machine too small for the work says so at the start.
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def pad_right(rows: Sequence[Sequence[int]]) -> Int[Tensor, "rows width"]:
    """Rows of token ids filled up at the end with id 0.

    A causal model never looks ahead, so no token of a row can see the filling, and positions count from 0 as they do for
    a row alone: no mask and no pad token are needed.
    """
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "rows width"], Bool[Tensor, "rows width"]]:
    """Rows of token ids filled up at the front with id 0, so that all end together, and the mask of the real tokens."""
    width = max(map(len, rows))
    ids = torch.tensor([[*[0] * (width - len(row)), *row] for row in rows])
    mask = torch.arange(width)[None, :] >= torch.tensor([[width - len(row)] for row in rows])
    return ids, mask


def patiently(batches: Sequence[T], description: str) -> Iterator[T]:
    """Yield the batches, under a progress bar when the first one says that all take more than two seconds."""
    start = time.monotonic()
    yield from batches[:1]
    remaining = batches[1:]
    long = (time.monotonic() - start) * len(remaining) > 2
    yield from track(remaining, description) if long else remaining
