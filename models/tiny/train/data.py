"""Batches of training samples: generated, encoded and grouped by length, resumable by position."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor

from chat import segments
from corpus import sample
from tokenizer import CONTEXT, Encoder

POOL = 1536
"""Samples drawn at once, so that batches hold samples of like length."""


@dataclass
class Batch:
    """Right-padded ids, and the flat positions whose next token is to be learned."""

    ids: Tensor
    where: Tensor
    labels: Tensor


def encode(encoder: Encoder, messages: list, tools: list) -> tuple[list[int], list[int]]:
    """Token ids of a chat, and the indices of those the model is to write."""
    ids: list[int] = []
    learned: list[int] = []
    for text, wanted in segments(messages, tools):
        piece = encoder.encode(text)
        if wanted:
            learned += range(len(ids), len(ids) + len(piece))
        ids += piece
    return ids, learned


def _collate(rows: list[tuple[list[int], list[int]]], pad: int) -> Batch:
    width = max(len(ids) for ids, _ in rows)
    padded = torch.full((len(rows), width), pad)
    where: list[int] = []
    labels: list[int] = []
    for row, (ids, learned) in enumerate(rows):
        padded[row, : len(ids)] = torch.tensor(ids)
        where += [row * width + index - 1 for index in learned]
        labels += [ids[index] for index in learned]
    return Batch(padded, torch.tensor(where), torch.tensor(labels))


class Loader:
    """An endless stream of batches; ``position`` is (pool, batch within it)."""

    def __init__(self, tokenizer: Path, held_out: set[str], seed: int, tokens: int, position: tuple[int, int] = (0, 0)) -> None:
        self.encoder = Encoder(tokenizer)
        self.held_out, self.seed, self.tokens, self.position = held_out, seed, tokens, position
        self.pad = self.encoder.tokenizer.token_to_id("<|endoftext|>")
        self.mixture = "main"
        self._batches: list[Batch] = []

    def _fill(self, pool: int) -> None:
        rows = []
        for index in range(pool * POOL, (pool + 1) * POOL):
            item = sample(self.seed, index, self.mixture, self.held_out)
            row = encode(self.encoder, item.messages, item.tools)
            if len(row[0]) <= CONTEXT:
                rows.append(row)
        rows.sort(key=lambda row: len(row[0]))
        self._batches = [_collate(group, self.pad) for group in self._grouped(rows)]
        random.Random(f"{self.seed}/{pool}/order").shuffle(self._batches)

    def _grouped(self, rows: list[tuple[list[int], list[int]]]) -> Iterator[list[tuple[list[int], list[int]]]]:
        group: list[tuple[list[int], list[int]]] = []
        for row in rows:
            if group and (len(group) + 1) * len(row[0]) > self.tokens:
                yield group
                group = []
            group.append(row)
        yield group

    def next(self) -> Batch:
        """The next batch."""
        pool, index = self.position
        if not self._batches:
            self._fill(pool)
        batch = self._batches[index]
        if index + 1 < len(self._batches):
            self.position = (pool, index + 1)
        else:
            self.position, self._batches = (pool + 1, 0), []
        return batch
