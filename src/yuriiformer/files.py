"""Durable writes: a file or folder is there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import EnvironmentFault, UserError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise EnvironmentFault(
                f"no space left to write {path}: {error.strerror}. Free some and run it again."
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise EnvironmentFault(f"{error.filename or path}: {error.strerror}.") from None
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            raise UserError(f"cannot write {path}: a file is in the way.") from None
        raise


@contextmanager
def lock(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder against a second process. A kill frees it, so a lock is never stale."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock; two processes are then the user's care
        yield
        return
    with disk_errors(folder), (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{what} {folder} is in use by another process.") from None
        yield


def sync(path: Path) -> None:
    """Make a file's contents, or a folder's entries, survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it appears under its name, synced, only when the block ends well."""
    partial = path.with_name(path.name + ".partial")
    with disk_errors(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for file in partial.iterdir():
                sync(file)
            sync(partial)
            partial.rename(path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file of a folder that `new_folder` makes whole."""
    path.write_bytes(data)


def append_line(path: Path, line: str) -> None:
    """Add a line to a log; one cut short by a kill has no newline, and readers leave it out."""
    with disk_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step."""
    partial = path.with_name(path.name + ".partial")
    with disk_errors(path):
        try:
            partial.write_text(text, encoding="utf-8")
            sync(partial)
            partial.replace(path)
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
