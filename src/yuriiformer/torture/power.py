"""The power fails: the states in which a disk may be found after it, at every instant of saving a checkpoint.

What was written is on the disk for certain only once it was synced: a file's contents by a sync of the file, a name that
comes or goes by a sync of its folder. All else may be there or not, each for itself and in any order, and what was
written into a file only in part.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors.torch

from .. import files
from ..errors import UserError
from ..training.checkpoint import MODEL, OPTIMIZER, Progress, commit, newest_whole
from .disk import state_of
from .subject import INTERVAL, STEPS, Bench, demand

SECTOR = 512  # bytes that reach the disk together
STATES = 40  # drawn for each instant, beside the two extremes
NEW, OLD = f"step_{STEPS}", f"step_{STEPS - INTERVAL}"

Tree = dict[int, dict[str, int] | bytes]  # by inode: a folder's names, or a file's contents


@dataclass(frozen=True)
class Names:
    """Names of a folder that come (with the inode they stand for) or go (None), together."""

    inode: int
    changed: dict[str, int | None]

    def apply(self, tree: Tree) -> None:
        held = tree[self.inode]
        assert isinstance(held, dict)
        tree[self.inode] = {n: i for n, i in {**held, **self.changed}.items() if i is not None}


@dataclass(frozen=True)
class Bytes:
    """Bytes that are written into a file."""

    inode: int
    at: int
    data: bytes

    def apply(self, tree: Tree) -> None:
        held = tree[self.inode]
        assert isinstance(held, bytes)
        tree[self.inode] = held[: self.at].ljust(self.at, b"\0") + self.data + held[self.at + len(self.data) :]


@dataclass(frozen=True)
class Sync:
    """All that was changed of this file or folder before is certain."""

    inode: int


Trace = list[Names | Bytes | Sync]


def power(bench: Bench, seed: int) -> dict[str, Any]:
    """The power fails after the event number `seed` of saving a checkpoint over an older one: one of the two is found
    whole, the new one as soon as it was once certain."""
    tree, trace, root = _trace(bench)
    chance = random.Random(f"power {seed}")
    old, new = (state_of(bench.whole / "checkpoints" / name) for name in (OLD, NEW))
    certain = _certain(trace[:seed])
    found: dict[str, int] = {}
    for kept in [lambda event: event, lambda event: None, *[_drawn(chance)] * STATES]:
        folder = bench.folder / f"power-{seed}"
        _lay_out(_after(tree, trace[:seed], certain, kept), root, folder)
        try:
            checkpoint, _, _ = newest_whole(folder, required=True)
        except UserError as error:
            demand(False, f"after event {seed} of {len(trace)} no checkpoint is whole: {error}")
        assert checkpoint is not None
        state = state_of(checkpoint)
        demand(state in (old, new), f"after event {seed} of {len(trace)} there is a mix of two checkpoints")
        which = "states with the new checkpoint" if state == new else "states with the old one"
        found[which] = found.get(which, 0) + 1
        shutil.rmtree(folder)
    demand(seed < len(trace) or "states with the old one" not in found, "a checkpoint that was saved is lost")
    return found


def _certain(trace: Trace) -> set[int]:
    """The numbers of the events that a later sync has made certain."""
    return {
        number
        for number, event in enumerate(trace)
        if not isinstance(event, Sync) and Sync(event.inode) in trace[number:]
    }


def instants(bench: Bench) -> int:
    return len(_trace(bench)[1]) + 1


def _drawn(chance: random.Random) -> Callable[[Names | Bytes], Names | Bytes | None]:
    """Of an event that is not certain: all, nothing, or of bytes a part."""

    def kept(event: Names | Bytes) -> Names | Bytes | None:
        if chance.random() < 0.4:
            return event
        if isinstance(event, Names) or chance.random() < 0.5:
            return None
        return Bytes(event.inode, event.at, event.data[: SECTOR * chance.randint(0, len(event.data) // SECTOR)])

    return kept


def _after(tree: Tree, trace: Trace, certain: set[int], kept: Callable[[Names | Bytes], Names | Bytes | None]) -> Tree:
    tree = dict(tree)
    for number, event in enumerate(trace):
        if isinstance(event, Sync):
            continue
        if left := event if number in certain else kept(event):
            left.apply(tree)
    return tree


def _lay_out(tree: Tree, inode: int, path: Path) -> None:
    held = tree[inode]
    if isinstance(held, bytes):
        path.write_bytes(held)
    else:
        path.mkdir()
        for name, inside in held.items():
            _lay_out(tree, inside, path / name)


@lru_cache(maxsize=1)
def _trace(bench: Bench) -> tuple[Tree, Trace, int]:
    """A folder with the older checkpoint, and what saving the newer one, the last to be kept, changes; its inode."""
    folder, saved = bench.folder / "power", bench.whole / "checkpoints" / NEW
    shutil.copytree(bench.whole / "checkpoints" / OLD, folder / OLD)
    tensors = {name: safetensors.torch.load_file(saved / name) for name in (MODEL, OPTIMIZER)}
    record = files.read_json(saved / "state.json")
    with _recorded(folder) as (tree, trace):
        commit(folder, Progress(**record["progress"]), record["validation"], tensors, keep=1, keep_best=False)
    return tree, trace, folder.stat().st_ino


@contextmanager
def _recorded(root: Path) -> Iterator[tuple[Tree, Trace]]:
    """The folder as it is, and a list that fills with what is changed in it."""
    tree: Tree = {}
    trace: Trace = []
    for place, _, inside in os.walk(root):
        tree[_inode(place)] = {entry.name: entry.inode() for entry in os.scandir(place)}
        tree |= {_inode(Path(place, name)): Path(place, name).read_bytes() for name in inside}

    def note(path: Path, inode: int | None) -> None:
        trace.append(Names(_inode(path.parent), {path.name: inode}))

    def perform(call: Callable[..., Any], *arguments: Any) -> Any:
        first = arguments[0]
        if call is shutil.rmtree:
            for place, _, inside in os.walk(first, topdown=False):
                for name in inside:
                    note(Path(place, name), None)
                note(Path(place), None)
            return call(*arguments)
        if call is os.write:
            at = os.lseek(first, 0, os.SEEK_CUR)
            written = call(*arguments)
            trace.append(Bytes(os.fstat(first).st_ino, at, bytes(arguments[1][:written])))
            return written
        came = call in (os.open, os.makedirs) and not Path(first).exists()
        result = call(*arguments)
        if call is os.fsync:
            trace.append(Sync(os.fstat(first).st_ino))
        elif call in (os.rename, os.replace):
            source, target = map(Path, arguments)
            assert source.parent == target.parent
            trace.append(Names(_inode(source.parent), {source.name: None, target.name: _inode(target)}))
        elif came:
            tree.setdefault(_inode(first), {} if call is os.makedirs else b"")
            note(Path(first), _inode(first))
        return result

    before, files.perform = files.perform, perform
    try:
        yield tree, trace
    finally:
        files.perform = before


def _inode(path: Path | str) -> int:
    return os.stat(path).st_ino
