"""Durable writes: a file or folder is there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from .errors import EnvironmentFault, UserError

T = TypeVar("T")
LOCK = ".lock"


def perform(call: Callable[..., T], *arguments: Any) -> T:
    """Whatever changes the disk is done here, so that `torture` can refuse it, cut it short or write it down."""
    return call(*arguments)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError):  # not the disk's
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise EnvironmentFault(
                f"no space left to write {path}: {error.strerror}. Free some and run it again."
            ) from None
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            raise UserError(f"cannot write {path}: a file is in the way.") from None
        raise EnvironmentFault(f"{error.filename or path}: {error.strerror}.") from None


@contextmanager
def lock(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder against a second process, which is told who holds it. A kill frees it, so a lock is never stale."""
    with disk_errors(folder), (folder / LOCK).open("a") as file:
        for attempt in range(10):  # who only asks, in `locked_by`, holds it for a moment
            if _hold(file, alone=True):
                break
            time.sleep(0.02 * attempt)
        else:
            raise UserError(f"{what} {folder} is in use by {locked_by(folder) or 'another process'}.")
        write_bytes(folder / LOCK, f"process {os.getpid()} on {platform.node()}".encode())
        yield


def locked_by(folder: Path) -> str | None:
    """Who holds a folder, as "process 123 on HOST"; None when nobody does."""
    try:
        with (folder / LOCK).open() as file:
            return None if _hold(file, alone=False) else file.read() or "another process"
    except FileNotFoundError:
        return None


def _hold(file: IO[str], *, alone: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows has no flock; two processes are then the user's care
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def sync(path: Path) -> None:
    """Make a file's contents, or a folder's entries, survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        perform(os.fsync, descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it appears under its name, synced, only when the block ends well."""
    partial = path.with_name(path.name + ".partial")
    with disk_errors(path):
        shutil.rmtree(partial, ignore_errors=True)
        perform(os.makedirs, partial)
        try:
            yield partial
            for file in partial.iterdir():
                sync(file)
            sync(partial)
            perform(os.rename, partial, path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def remove_folder(path: Path) -> None:
    """Delete a folder that may not be there; cut short, it leaves a `.partial`, never half a folder under its name."""
    partial = path.with_name(path.name + ".partial")
    with disk_errors(path):
        if path.exists():
            shutil.rmtree(partial, ignore_errors=True)
            perform(os.rename, path, partial)
            perform(shutil.rmtree, partial)


@contextmanager
def writer(path: Path, mode: int = os.O_TRUNC) -> Iterator[Callable[[bytes], None]]:
    """A function that writes to a file, and goes on where the system takes only a part."""
    descriptor = perform(os.open, path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0) | mode, 0o666)

    def write(data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[perform(os.write, descriptor, rest) :]

    try:
        yield write
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file of a folder that `new_folder` makes whole."""
    with disk_errors(path), writer(path) as write:
        write(data)


def append_line(path: Path, line: str) -> None:
    """Add a whole line to a log. One cut short by a kill has no newline, and readers leave it out."""
    with disk_errors(path), writer(path, os.O_APPEND) as write:
        before = path.stat().st_size
        try:
            write(f"{line}\n".encode())
        except OSError:
            with suppress(OSError):
                os.truncate(path, before)  # the next line must not follow half of this one
            raise


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step."""
    partial = path.with_name(path.name + ".partial")
    with disk_errors(path):
        try:
            with writer(partial) as write:
                write(text.encode())
            sync(partial)
            perform(os.replace, partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Raises UserError when the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
