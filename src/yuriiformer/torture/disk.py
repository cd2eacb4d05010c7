"""A disk that refuses, files that are damaged, a power that fails."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from .. import files
from ..data import corpus as corpora
from ..data.corpus import TOKENIZER, Corpus
from ..errors import UserError
from ..training.checkpoint import MODEL, OPTIMIZER, STATE, newest_first, newest_whole
from ..training.run import Run
from .subject import INTERVAL, STEPS, Bench, demand, tensors

# What a call that changes the disk may come to. A short write is none: what was not taken is written again.
REFUSALS = {"ENOSPC": errno.ENOSPC, "EDQUOT": errno.EDQUOT, "EIO": errno.EIO, "short write": 0, "full from then on": -1}


def refuse(at: int, kind: str) -> None:
    """Have this process's disk refuse the call number `at` (from 0), by a kind of REFUSALS."""
    calls = itertools.count()

    def perform(call: Callable[..., Any], *arguments: Any) -> Any:
        number = next(calls)
        if kind == "full from then on" and number >= at and call is not shutil.rmtree:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if number != at or kind == "full from then on":
            return call(*arguments)
        if kind != "short write":
            raise OSError(REFUSALS[kind], os.strerror(REFUSALS[kind]))
        if call is os.write:
            descriptor, data = arguments
            return os.write(descriptor, data[: (len(data) + 1) // 2])
        return call(*arguments)

    files.perform = perform


def note_calls(notes: Path) -> None:
    """Have this process write down the calls that change the disk."""
    descriptor = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def perform(call: Callable[..., Any], *arguments: Any) -> Any:
        os.write(descriptor, call.__name__.encode() + b"\n")
        return call(*arguments)

    files.perform = perform


def _few_saves(bench: Bench, name: str) -> Path:
    """A run with three checkpoints, for which the first has to go; it comes to the same end."""
    run = bench.copy(name)
    config = json.loads((run / "config.json").read_text())
    config["training"] |= {"checkpoint_every": 3 * INTERVAL, "keep_best": False}
    (run / "config.json").write_text(json.dumps(config))
    return run


@lru_cache(maxsize=1)
def calls(bench: Bench) -> int:
    """How many calls of an undisturbed run change the disk."""
    run, notes = _few_saves(bench, "calls"), bench.folder / "calls.txt"
    demand(bench.train(run, partial(note_calls, notes)).wait() == 0, "undisturbed, it failed")
    shutil.rmtree(run)
    return len(notes.read_text().split())


def refusal(bench: Bench, seed: int) -> dict[str, Any]:
    """The call number seed // 5 is refused, in each of five ways; then go on with a disk that does not."""
    at = seed // len(REFUSALS)
    kind = list(REFUSALS)[(seed + at) % len(REFUSALS)]  # so that every tenth seed takes turns with them
    run = _few_saves(bench, f"disk-{seed}")
    child = bench.train(run, partial(refuse, at, kind))
    code = child.wait()
    demand(code in (0, 3), f"{kind} at call {at}: exit code {code}: {child.said[-300:]}")
    demand(code == 0 or kind != "short write", f"a short write at call {at} ended the run")
    if newest_first(run / "checkpoints"):
        newest_whole(run / "checkpoints")
    if code == 0:
        demand(Run(run).complete, f"{kind} at call {at}: exit code 0, and the run is not complete")
    told = "warning" in child.said
    bench.finish(run)
    return {"stopped, exit code 3" if code else "went on, with a warning" if told else "went on": 1}


# --- damage


def flip(bench: Bench, seed: int) -> dict[str, Any]:
    """One damage to a checkpoint's or the corpus's files: refused, passed over, or without any effect."""
    chance = random.Random(f"flip {seed}")
    if chance.random() < 0.7:
        return _damaged_checkpoint(bench, chance)
    return _damaged_corpus(bench, chance)


@lru_cache(maxsize=1)
def _good(bench: Bench) -> tuple[list[Any], Any]:
    """The states of its checkpoints, and its corpus, undamaged."""
    return [state_of(path) for _, path in newest_first(bench.whole / "checkpoints")], _contents(bench.corpus)


def _damaged_checkpoint(bench: Bench, chance: random.Random) -> dict[str, Any]:
    folder, good = bench.whole / "checkpoints", _good(bench)[0]
    held = [path for _, path in newest_first(folder)]
    names = [path / name for path in held for name in (MODEL, OPTIMIZER, STATE)]
    with _damage(chance, names[: 3 if chance.random() < 0.8 else None], names) as kind:
        try:
            found, state, _ = newest_whole(folder, required=True)
        except UserError as error:
            demand(any(name.name in str(error) for name in names), f"{kind}: the refusal names no file: {error}")
            return {kind: 1, "refused": 1}
        assert found is not None
        demand(state["progress"]["step"] <= STEPS and state_of(found) in good, f"{kind}: loaded all the same")
        return {kind: 1, "without effect" if found == held[0] else "the one before was used": 1}


def state_of(checkpoint: Path) -> tuple[Any, ...]:
    progress = json.loads((checkpoint / STATE).read_text())["progress"]
    return progress, tensors(checkpoint / MODEL), tensors(checkpoint / OPTIMIZER)


def _damaged_corpus(bench: Bench, chance: random.Random) -> dict[str, Any]:
    folder, good = bench.corpus, _good(bench)[1]
    names = [folder / name for name in sorted(os.listdir(folder))]
    large = chance.random() < 0.5  # as a file that is too large to be looked through at every start
    with _damage(chance, names, names) as kind:
        limit, corpora.VERIFY_BELOW = corpora.VERIFY_BELOW, 0 if large else corpora.VERIFY_BELOW
        try:
            found = _contents(folder)
        except UserError as error:
            demand(str(folder) in str(error), f"{kind}: the refusal names no file: {error}")
            return {kind: 1, "refused": 1}
        finally:
            corpora.VERIFY_BELOW = limit
        demand(found == good, f"{kind} of a corpus: loaded all the same")
        return {kind: 1, "without effect": 1}


def _contents(folder: Path) -> tuple[Any, ...]:
    """All that a run takes from a corpus: its description, its tokenizer, every token as batches bring them."""
    corpus = Corpus(folder)
    context = 16
    hashed = hashlib.sha256()
    for step in range(len(corpus.tokens["train"]) // context // 64):
        hashed.update(corpus.batch_at(step, seed=0, batch=64, context=context)[0].tobytes())
    for batch in corpus.whole_validation(batch=64, context=context):
        hashed.update(batch[1].tobytes())
    return corpus.manifest, (folder / TOKENIZER).read_bytes(), hashed.hexdigest()


@contextmanager
def _damage(chance: random.Random, names: list[Path], others: list[Path]) -> Iterator[str]:
    """Damage one file, or two; all is whole again after the block."""
    one = chance.choice(names)
    other = chance.choice([path for path in others if path != one])
    before = {one: one.read_bytes(), other: other.read_bytes()}
    data = bytearray(before[one])
    at = chance.randrange(len(data))
    kind = chance.choices(
        ["bit flipped", "cut short", "zeroed", "swapped", "copied over", "missing"], [70, 10, 5, 5, 5, 5]
    )[0]
    try:
        match kind:
            case "bit flipped":
                data[at] ^= 1 << chance.randrange(8)
                one.write_bytes(data)
            case "cut short":
                one.write_bytes(data[:at])
            case "zeroed":
                end = min(len(data), at + chance.choice([1, 512, 4096]))
                one.write_bytes(data[:at] + bytes(end - at) + data[end:])
            case "swapped":
                one.write_bytes(before[other])
                other.write_bytes(before[one])
            case "copied over":
                one.write_bytes(before[other])
            case "missing":
                one.unlink()
        yield kind
    finally:
        for path, whole in before.items():
            path.write_bytes(whole)
