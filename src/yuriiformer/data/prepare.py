"""Text to a corpus: a folder with tokens, a tokenizer and a manifest that vouches for both."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer

from ..errors import UserError
from ..files import new_folder, sha256, write_json, write_text, writer
from .corpus import FORMAT, MANIFEST, TOKENIZER, Corpus, dtype_for
from .sources import Progress, Source
from .tokenizer import END_OF_TEXT, check_name, make_tokenizer

T = TypeVar("T")
TRAINING_TEXT = 32 << 20  # characters a new tokenizer is trained on
PIECE = 1 << 20  # characters a worker encodes at once
FEW = 100  # with fewer documents, validation is the end of each instead of some of them
WORTH_PROCESSES = 16 << 20  # bytes of source below which starting workers costs more than it saves


def passes(tokenizer: str) -> int:
    """How often `prepare` reads the source: once more where a tokenizer is trained."""
    return 2 if tokenizer.startswith("bpe:") else 1


def prepare(
    source: str, out: Path, *, tokenizer: str = "bpe:1024", validation: str | None = None,
    fraction: float = 0.05, workers: int | None = None, progress: Progress = lambda read: None,
) -> Corpus:  # fmt: skip
    """Tokenise `source` into the new folder `out`.

    validation: a source of its own; without it, `fraction` of the documents (by a hash of their number) is held out,
    or the end of each document where there are fewer than 100.
    progress: called with source bytes read, `passes(tokenizer)` times the source's size in all.
    Raises UserError for a source, tokenizer or folder that cannot be used; nothing is left behind then.
    """
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out or delete it.")
    if not 0 < fraction < 1:
        raise UserError(f"the validation fraction must be between 0 and 1; got {fraction}.")
    check_name(tokenizer)
    text = Source(source)
    held_out = Source(validation) if validation else text.validation

    def labelled(progress: Progress) -> Iterator[tuple[str, str]]:
        documents = text.documents(progress)
        if held_out is not None:
            yield from (("train", d) for d in documents)
            yield from (("validation", d) for d in held_out.documents())
        else:
            yield from _held_out(documents, fraction)

    with new_folder(out) as folder:
        training = (piece for split, d in labelled(progress) if split == "train" for piece in pieces(d))
        made = make_tokenizer(tokenizer, _first(training, TRAINING_TEXT))
        if made.token_to_id(END_OF_TEXT) is None:
            raise UserError(
                f"tokenizer {tokenizer!r} has no token {END_OF_TEXT}, which ends each document of a corpus."
            )
        write_text(folder / TOKENIZER, made.to_str(pretty=True))
        vocabulary = made.get_vocab_size()
        dtype = dtype_for(vocabulary)
        splits = {name: {"documents": 0, "bytes": 0, "tokens": 0} for name in ("train", "validation")}
        hashes = {name: hashlib.sha256() for name in splits}
        small = text.size is not None and text.size < WORTH_PROCESSES
        with writer(folder / "train.bin") as train, writer(folder / "validation.bin") as valid:
            write = {"train": train, "validation": valid}
            batches = _batches(labelled(progress))
            for split, documents, size, ids in _encode(batches, folder / TOKENIZER, 1 if small else workers):
                data = np.asarray(ids, dtype=dtype).tobytes()
                write[split](data)
                hashes[split].update(data)
                splits[split]["documents"] += documents
                splits[split]["bytes"] += size
                splits[split]["tokens"] += len(ids)
        for name, counts in splits.items():
            if counts["tokens"] < 2:
                raise UserError(f"source {source!r} gives {counts['tokens']} {name} tokens; it is too short.")
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "source": source,
            "source_bytes": text.size,
            "validation": validation or (held_out.name if held_out else f"{fraction} held out"),
            "tokenizer": tokenizer,
            "tokenizer_sha256": sha256(folder / TOKENIZER),
            "vocabulary": vocabulary,
            "dtype": np.dtype(dtype).name,
            "splits": {name: counts | {"sha256": hashes[name].hexdigest()} for name, counts in splits.items()},
        }
        write_json(folder / MANIFEST, manifest)
    return Corpus(out)


def _held_out(documents: Iterator[str], fraction: float) -> Iterator[tuple[str, str]]:
    first = list(itertools.islice(documents, FEW))
    if len(first) < FEW:
        for document in first:
            cut = _boundary(document, int(len(document) * (1 - fraction)))
            yield "train", document[:cut]
            if document[cut:].strip():
                yield "validation", document[cut:]
        return
    for number, document in enumerate(itertools.chain(first, documents)):
        chosen = zlib.crc32(number.to_bytes(8, "big")) < fraction * 2**32
        yield "validation" if chosen else "train", document


def pieces(document: str, size: int = PIECE) -> Iterator[str]:
    """A long document in parts that encode to the same tokens as the whole."""
    start = 0
    while len(document) - start > size:
        cut = _boundary(document, start + size)
        yield document[start:cut]
        start = cut
    if start < len(document):
        yield document[start:]


_GAP = re.compile(r"(?<=\S)\s")


def _boundary(text: str, at: int) -> int:
    """The first place from `at` on before a white space that follows a non-space: no token of a byte-level BPE crosses it."""
    found = _GAP.search(text, at)
    return found.start() if found else len(text)


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


Batch = tuple[str, list[tuple[str, bool]]]  # a split, and its pieces with whether a document ends there


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[Batch]:
    """Consecutive pieces of one split, about PIECE characters together."""
    split, size = "", 0
    batch: list[tuple[str, bool]] = []
    for name, document in documents:
        parts = list(pieces(document))
        for i, part in enumerate(parts):
            if batch and (name != split or size + len(part) > PIECE):
                yield split, batch
                batch, size = [], 0
            split = name
            batch.append((part, i == len(parts) - 1))
            size += len(part)
    if batch:
        yield split, batch


def _encode(
    batches: Iterator[Batch], tokenizer: Path, workers: int | None
) -> Iterator[tuple[str, int, int, list[int]]]:
    """(split, documents, bytes, ids) of each batch, in order, by as many processes as there are cores."""
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        _start_worker(str(tokenizer))
        yield from map(_encode_batch, batches)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (str(tokenizer),)) as pool:
        waiting: deque[Future[tuple[str, int, int, list[int]]]] = deque()
        for batch in batches:
            waiting.append(pool.submit(_encode_batch, batch))
            if len(waiting) > 2 * workers:  # bounded: the source may be larger than memory
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)


_tokenizer: Tokenizer  # each worker's own


def _start_worker(path: str) -> None:
    global _tokenizer
    _tokenizer = Tokenizer.from_file(path)
    _tokenizer.encode_special_tokens = True  # a mark inside the text is text; only we end documents


def _encode_batch(batch: Batch) -> tuple[str, int, int, list[int]]:
    split, parts = batch
    end = _tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None
    ids: list[int] = []
    for encoding, (_, ends) in zip(_tokenizer.encode_batch_fast([p for p, _ in parts]), parts, strict=True):
        ids += encoding.ids
        if ends:
            ids.append(end)
    return split, sum(ends for _, ends in parts), sum(len(p.encode()) for p, _ in parts), ids
