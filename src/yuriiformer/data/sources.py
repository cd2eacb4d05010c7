"""Where text comes from: the standard library's own source, files and folders, or a named data set."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import socket
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast
from urllib.parse import urlparse
from urllib.request import getproxies

from ..errors import EnvironmentFault, UserError
from .tokenizer import END_OF_TEXT

TEXT = (".txt", ".md", ".py")
RECORDS = (".jsonl", ".parquet")
COMPRESSED = (".xz", ".gz", ".bz2", ".zst")
HUB = {  # name: (repository, revision, validation split or None)
    "tinystories": ("roneneldan/TinyStories", None, "validation"),
    "openwebtext": ("Skylion007/openwebtext", "refs/convert/parquet", None),
}
MARK = END_OF_TEXT.encode()
CHUNK = 1 << 22

Progress = Callable[[int], None]  # called with the number of source bytes read since the last call


class Source:
    """A named text source: how large it is, and its documents in a fixed order."""

    def __init__(self, name: str, split: str = "train") -> None:
        """Raises UserError when there is no such source."""
        self.name, self.split = name, split
        self.files: list[Path] = []
        if name in HUB:
            return
        if name == "stdlib":
            self.files = _standard_library()
            return
        path = Path(name)
        if path.is_dir():
            self.files = sorted(f for f in path.rglob("*") if f.is_file() and _format(f) and f.stat().st_size)
            if not self.files:
                raise UserError(
                    f"folder {name!r} holds no text; allowed: {', '.join(TEXT + RECORDS)}, also {', '.join(COMPRESSED)}"
                )
        elif path.is_file():
            if not _format(path):
                raise UserError(
                    f"{name!r} has a format that is not known. Allowed: {', '.join(TEXT + RECORDS)}, also {', '.join(COMPRESSED)}"
                )
            self.files = [path]
        else:
            raise UserError(f"source {name!r} is no file, no folder and no name. Names: stdlib, {', '.join(HUB)}")

    @property
    def validation(self) -> Source | None:
        """The source's own validation split, where it has one."""
        split = HUB[self.name][2] if self.name in HUB else None
        return Source(self.name, split) if split else None

    @property
    def size(self) -> int | None:
        """Bytes on disk, or None when not known."""
        return sum(f.stat().st_size for f in self.files) if self.files else None

    def documents(self, progress: Progress = lambda read: None) -> Iterator[str]:
        """Every document that is not blank."""
        texts = (text for f in self.files for text in _read(f, progress)) if self.files else _hub(self.name, self.split)
        empty = True
        for text in texts:
            if text.strip():
                empty = False
                yield text
        if empty:
            raise UserError(f"source {self.name!r} is empty.")


def _standard_library() -> list[Path]:
    """The running interpreter's own source: without tests (not every machine has them), installed packages,
    and `encodings`, which is tables of characters more than text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
    files = [f for f in root.rglob("*.py") if not left_out & set(f.relative_to(root).parts)]
    return sorted(f for f in files if f.stat().st_size)


def _format(path: Path) -> str:
    """The suffix that says what is inside, behind a compression's; empty when not known."""
    stem = Path(path.stem) if path.suffix in COMPRESSED else path
    return stem.suffix if stem.suffix in TEXT + RECORDS else ""


def _read(path: Path, progress: Progress) -> Iterator[str]:
    told = 0
    with path.open("rb") as raw:
        try:
            for text in _parquet(raw, path) if _format(path) == ".parquet" else _split(raw, path):
                progress(raw.tell() - told)
                told = raw.tell()
                yield text
        except (*_DAMAGED, *_zstd_error(path)) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise UserError(f"{path} cannot be unpacked: {error or 'it is cut short'}") from None


def _split(raw: IO[bytes], path: Path) -> Iterator[str]:
    """Documents of a text file, cut at the end-of-text mark, or of a file of JSON lines."""
    lines = _format(path) == ".jsonl"
    for number, (offset, part) in enumerate(_parts(unpacked(raw, path), b"\n" if lines else MARK), 1):
        text = decode(part, path, offset)
        if text.strip():
            yield _record(text, path, number) if lines else text.strip("\n") + "\n"


def _parts(stream: IO[bytes], mark: bytes) -> Iterator[tuple[int, bytes]]:
    """The bytes between marks, each with its offset; every byte is searched once."""
    buffer, offset = bytearray(), 0
    while chunk := stream.read(CHUNK):
        searched = max(0, len(buffer) - len(mark) + 1)
        buffer += chunk
        while (at := buffer.find(mark, searched)) >= 0:
            yield offset, bytes(buffer[:at])
            del buffer[: at + len(mark)]
            offset += at + len(mark)
            searched = 0
    yield offset, bytes(buffer)


def unpacked(raw: IO[bytes], path: Path) -> IO[bytes]:
    match path.suffix:
        case ".xz":
            return lzma.open(raw)
        case ".gz":
            return cast(IO[bytes], gzip.open(raw))
        case ".bz2":
            return cast(IO[bytes], bz2.open(raw))
        case ".zst":
            return needs("zstandard", path).ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        case _:
            return raw


_DAMAGED: tuple[type[Exception], ...] = (lzma.LZMAError, zlib.error, EOFError, OSError)


def _zstd_error(path: Path) -> tuple[type[Exception], ...]:
    return (needs("zstandard", path).ZstdError,) if path.suffix == ".zst" else ()


def needs(module: str, path: Path):  # type: ignore[no-untyped-def]
    try:
        return __import__(module)
    except ImportError:
        raise EnvironmentFault(f"reading {path} needs {module}: pip install 'yuriiformer[data]'") from None


def decode(data: bytes, path: Path, offset: int) -> str:
    if b"\0" in data:
        raise UserError(f"{path} is binary: a zero byte at offset {offset + data.index(0)}. Give UTF-8 text.")
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at offset {offset + error.start}: {error.reason}.") from None


def _record(line: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise UserError(f'{path}, line {number}: each line must be a JSON object with a "text" field.')
    return text


def _parquet(raw: IO[bytes], path: Path) -> Iterator[str]:
    needs("pyarrow", path)
    import pyarrow
    import pyarrow.parquet

    source = raw if path.suffix == ".parquet" else io.BytesIO(unpacked(raw, path).read())
    try:
        table = pyarrow.parquet.ParquetFile(source)
        if "text" not in table.schema_arrow.names:
            raise UserError(f'{path} has columns {table.schema_arrow.names}; a column "text" is needed.')
        for batch in table.iter_batches(columns=["text"]):
            yield from (str(text) for text in batch.column(0).to_pylist() if text)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a parquet file: {error}") from None


def _hub(name: str, split: str) -> Iterator[str]:
    """A named data set through the `datasets` extra; without a network, from its local cache."""
    repository, revision, _ = HUB[name]
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if not reachable(endpoint):
        os.environ["HF_HUB_OFFLINE"] = "1"  # a cached copy serves, and a missing one is told at once
    try:
        import datasets
    except ImportError:
        raise EnvironmentFault(f"source {name!r} needs the datasets library: pip install 'yuriiformer[data]'") from None
    try:
        for row in datasets.load_dataset(repository, revision=revision, split=split, streaming=True):
            yield row["text"]
    except Exception as error:  # the library, its hub client and its transport each have errors of their own
        raise EnvironmentFault(
            f"{repository} could not be read from {endpoint} ({type(error).__name__}: no network, or offline mode). "
            "Ways on: prepare a local .txt, .jsonl or .parquet file; set HF_ENDPOINT to a mirror or HF_HOME to a "
            "cache that has it; or try the built-in source stdlib."
        ) from None


def reachable(endpoint: str) -> bool:
    if getproxies():  # the way out is the proxy's, and cannot be tried like this
        return True
    address = urlparse(endpoint)
    port = address.port or {"http": 80}.get(address.scheme, 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=3).close()
        return True
    except OSError:
        return False
