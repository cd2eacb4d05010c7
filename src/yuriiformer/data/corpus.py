"""A prepared corpus, and batches of it as a pure function of (seed, step)."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..files import digest, read_json, sha256

FORMAT, UNSEALED = 2, 1  # the older one has no checksums of its manifest and of pages
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
VERIFY_BELOW = 1 << 30  # larger files are not hashed at every start
PAGE = 4096  # bytes with a checksum of their own, looked at whenever one of them is read

Ids = NDArray[np.int64]


def dtype_for(vocabulary: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if vocabulary <= 1 << 16 else np.uint32


class Tokens:
    """The tokens of a file by slices; a page that is not as it was written is an error, when it is read."""

    def __init__(self, file: Path, dtype: np.dtype[Any], size: int, sums: NDArray[np.uint32] | None) -> None:
        self.file, self.dtype, self.size, self.sums = file, dtype, size, sums

    def __len__(self) -> int:
        return self.size // self.dtype.itemsize

    def __getitem__(self, where: slice) -> NDArray[Any]:
        """Read, not mapped: a file that shrinks while it is in use is an error, not the end of the process."""
        first, last, _ = (bound * self.dtype.itemsize for bound in where.indices(len(self)))
        start, stop = first // PAGE, -(-last // PAGE)
        try:
            data = np.fromfile(self.file, np.uint8, (stop - start) * PAGE, offset=start * PAGE)
        except FileNotFoundError:
            raise UserError(f"{self.file} is gone.") from None
        if len(data) != min(stop * PAGE, self.size) - start * PAGE:
            raise UserError(f"{self.file} was cut short while it was in use. Prepare the corpus again.")
        if self.sums is not None and (found := page_sums(data)) != (expected := self.sums[start:stop].tolist()):
            page = next(
                page for page, sums in enumerate(zip(found, expected, strict=True), start) if len(set(sums)) > 1
            )
            raise UserError(
                f"{self.file} is damaged in the {PAGE} bytes from {page * PAGE} on. Prepare the corpus again."
            )
        return data[first - start * PAGE : last - start * PAGE].view(self.dtype)


def page_sums(data: NDArray[np.uint8]) -> list[int]:
    """The CRC-32 of every page."""
    return [zlib.crc32(data[at : at + PAGE].data) for at in range(0, len(data), PAGE)]


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
            seal, format = self.manifest.pop("sha256", None), self.manifest["format"]
            if format not in (UNSEALED, FORMAT):
                raise UserError(f"{path} has corpus format {format}; this version reads {UNSEALED} and {FORMAT}.")
            if seal != digest(self.manifest) and not (seal is None and format == UNSEALED):
                raise UserError(f"{path / MANIFEST} is damaged: its sha256 is not its own. Prepare the corpus again.")
            self.vocabulary = int(self.manifest["vocabulary"])
            dtype = np.dtype(self.manifest["dtype"])
            splits = self.manifest["splits"]
            self.tokens = {name: self._open(name, dtype, splits[name]) for name in ("train", "validation")}
            if sha256(path / TOKENIZER) != self.manifest["tokenizer_sha256"]:
                raise UserError(
                    f"{path / TOKENIZER} is damaged: its sha256 is not the manifest's. Prepare the corpus again."
                )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path / MANIFEST} is damaged: {error!r}. Prepare the corpus again.") from None
        except FileNotFoundError as error:
            raise UserError(f"{error.filename} is missing. Prepare the corpus again.") from None

    def _open(self, split: str, dtype: np.dtype[Any], entry: dict[str, Any]) -> Tokens:
        file = self.path / f"{split}.bin"
        size, expected = file.stat().st_size, entry["tokens"] * dtype.itemsize
        if size != expected:
            raise UserError(
                f"{file} has {size} bytes, its manifest says {expected}: cut short or changed. Prepare the corpus again."
            )
        sums = self.path / f"{split}.crc"
        for checked, key in ((sums, "crc_sha256"), (file, "sha256")):
            looked_through = checked == sums or size < VERIFY_BELOW
            if key in entry and looked_through and sha256(checked) != entry[key]:
                raise UserError(f"{checked} is damaged: its sha256 is not the manifest's. Prepare the corpus again.")
        return Tokens(file, dtype, size, np.fromfile(sums, np.uint32) if "crc_sha256" in entry else None)

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

    def _cut(self, tokens: Tokens, starts: Any, context: int) -> tuple[Ids, Ids]:
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
