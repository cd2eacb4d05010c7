"""A prepared corpus, and batches of it as a pure function of (seed, step)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..files import read_json, sha256

FORMAT = 1
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
VERIFY_BELOW = 1 << 30  # larger files are not hashed at every start

Ids = NDArray[np.int64]


def dtype_for(vocabulary: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if vocabulary <= 1 << 16 else np.uint32


class Corpus:
    """Tokens on disk. Raises UserError when the folder is no corpus, or not as its manifest says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / MANIFEST).is_file():
            raise UserError(
                f"{path} is no corpus (it has no {MANIFEST}); make one with: yuriiformer prepare SOURCE --out {path}"
            )
        self.manifest = read_json(path / MANIFEST)
        try:
            if self.manifest["format"] != FORMAT:
                raise UserError(f"{path} has corpus format {self.manifest['format']}; this version reads {FORMAT}.")
            self.vocabulary = int(self.manifest["vocabulary"])
            dtype = np.dtype(self.manifest["dtype"])
            self.tokens = {name: self._open(name, dtype, entry) for name, entry in self.manifest["splits"].items()}
            if sha256(path / TOKENIZER) != self.manifest["tokenizer_sha256"]:
                raise UserError(
                    f"{path / TOKENIZER} is damaged: its sha256 is not the manifest's. Prepare the corpus again."
                )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path / MANIFEST} is damaged: {error!r}. Prepare the corpus again.") from None
        except FileNotFoundError as error:
            raise UserError(f"{error.filename} is missing. Prepare the corpus again.") from None

    def _open(self, split: str, dtype: np.dtype[Any], entry: dict[str, Any]) -> NDArray[Any]:
        file = self.path / f"{split}.bin"
        size, expected = file.stat().st_size, entry["tokens"] * dtype.itemsize
        if size != expected:
            raise UserError(
                f"{file} has {size} bytes, its manifest says {expected}: cut short or changed. Prepare the corpus again."
            )
        if size < VERIFY_BELOW and sha256(file) != entry["sha256"]:
            raise UserError(f"{file} is damaged: its sha256 is not the manifest's. Prepare the corpus again.")
        return np.memmap(file, dtype=dtype, mode="r")

    @property
    def identity(self) -> dict[str, str]:
        """Where it came from, and the checksum of its tokens."""
        splits = self.manifest["splits"]
        sha = hashlib.sha256("".join(splits[name]["sha256"] for name in ("train", "validation")).encode()).hexdigest()
        return {"source": self.manifest["source"], "tokenizer": self.manifest["tokenizer"], "sha256": sha}

    @property
    def bytes_per_token(self) -> float:
        """Of the validation text: turns nats per token into bits per byte."""
        entry = self.manifest["splits"]["validation"]
        return float(entry["bytes"] / entry["tokens"])

    def batch_at(
        self, step: int, *, seed: int, batch: int, context: int, rank: int = 0, world: int = 1
    ) -> tuple[Ids, Ids]:
        """Inputs and targets of a training step, each (batch / world, context).

        An epoch visits every non-overlapping block of `context` tokens once, in an order and from an offset that
        depend on (seed, epoch) alone: the same for every rule, and for every number of ranks together.
        """
        tokens = self.tokens["train"]
        blocks = self._blocks("train", context)
        starts = []
        for sample in range(step * batch + rank, (step + 1) * batch, world):
            offset, order = _epoch(seed, sample // blocks, blocks, context)
            starts.append(offset + order[sample % blocks] * context)
        return self._cut(tokens, starts, context)

    def validation_batches(self, *, sequences: int, batch: int, context: int) -> list[tuple[Ids, Ids]]:
        """The fixed validation set: whole batches of blocks spread evenly over the held-out tokens."""
        blocks = self._blocks("validation", context)
        count = max(1, min(sequences, blocks) // batch)
        chosen = np.linspace(0, blocks - 1, count * batch).round().astype(int) * context
        return [self._cut(self.tokens["validation"], part, context) for part in chosen.reshape(count, batch)]

    def whole_validation(self, *, batch: int, context: int) -> Iterator[tuple[Ids, Ids]]:
        """All held-out tokens in order: batches of blocks side by side, at last the shorter rest."""
        tokens = self.tokens["validation"]
        whole, rest = divmod(len(tokens) - 1, context)
        for first in range(0, whole, batch):
            yield self._cut(tokens, np.arange(first, min(first + batch, whole)) * context, context)
        if rest:
            yield self._cut(tokens, [whole * context], rest)

    def _blocks(self, split: str, context: int) -> int:
        tokens = len(self.tokens[split])
        blocks = (tokens - context) // context  # room for any offset below `context`, and the last target
        if blocks < 1:
            raise UserError(
                f"context {context} is too long for {self.path}: its {split} split has {tokens} tokens and "
                f"{2 * context} are needed. Lower model.context or prepare more text."
            )
        return blocks

    def _cut(self, tokens: NDArray[Any], starts: Any, context: int) -> tuple[Ids, Ids]:
        rows = np.stack([tokens[s : s + context + 1] for s in starts]).astype(np.int64)
        if rows.max() >= self.vocabulary:
            raise UserError(
                f"{self.path} holds token id {rows.max()}; its vocabulary has {self.vocabulary}. Prepare the corpus again."
            )
        return rows[:, :-1], rows[:, 1:]


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, blocks: int, context: int) -> tuple[int, NDArray[np.int64]]:
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
    return int(generator.integers(context)), generator.permutation(blocks)
