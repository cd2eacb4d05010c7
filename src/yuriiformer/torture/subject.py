"""The run that is tortured: two small layers on made-up text, by the real command line, in processes that start at once.

As a program (`python -m yuriiformer.torture.subject NOTES STOP ARGUMENT ...`) it is `yuriiformer ARGUMENT ...`, with the
samples it reads written down.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import safetensors.numpy

from ..data.corpus import Corpus
from ..presets import DEMO_ARMS
from ..training.checkpoint import STATE, newest_whole
from ..training.run import MEASURED, Run

STEPS, INTERVAL = 40, 5  # of training, and between checkpoints
LIMIT = 120.0  # seconds after which a process counts as hung
CLOCKS = {*MEASURED, "tokens_per_second"}  # what may differ between two equal runs
TEXT = "Once upon a time {} grey cats lived by the sea, and {} of them asked the moon for milk.\n"
SETTINGS = {
    "model": {"layers": 2, "heads": 2, "width": 16, "context": 16},
    "training": {
        "steps": STEPS, "batch": 4, "evaluate_every": 10, "evaluate_sequences": 8, "checkpoint_every": INTERVAL,
        "adamw_lr": 1e-3, "muon_lr": 1e-3, "device": "cpu", "precision": "fp32", "compile": "no",
    },
}  # fmt: skip


class Broken(Exception):
    """A promise was not kept."""


def demand(kept: bool, broken: str) -> None:
    if not kept:
        raise Broken(broken)


class Child:
    """`yuriiformer ARGUMENT ...` in a process of its own."""

    def __init__(self, arguments: list[str], output: Path, before: Callable[[], None] | None = None) -> None:
        self.output = output
        self._process = _server().Process(target=_child, args=(arguments, output, before))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def ready(self) -> bool:
        """Whether it catches SIGTERM by now, or has ended."""
        with suppress(OSError):
            status = Path(f"/proc/{self.pid}/status").read_text()
            caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
            return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1) or not self._process.is_alive()
        return True

    def send(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, minus the signal's number where one ended it."""
        self._process.join(LIMIT)
        if self._process.exitcode is None:
            self._process.kill()
            raise Broken(f"it hung: no end after {LIMIT:.0f} s")
        demand("Traceback" not in self.said, f"it ended in a traceback: {self.said[-300:]}")
        return self._process.exitcode

    @property
    def said(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""


def _server() -> ForkServerContext:
    """Torch is imported once; every process is then forked from one that has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "yuriiformer.training.loop", "yuriiformer.compare", __name__])
    return context


def _child(arguments: list[str], output: Path, before: Callable[[], None] | None) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if before:
        before()
    _command_line(arguments)


def _command_line(arguments: list[str]) -> None:
    sys.argv = ["yuriiformer", *arguments]
    runpy.run_module("yuriiformer", run_name="__main__", alter_sys=True)


class Bench:
    """A folder with a corpus, a run that has not begun, and what it comes to when nobody disturbs it."""

    def __init__(self, folder: Path) -> None:
        for name, value in {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
            os.environ[name] = value
        self.folder, self.corpus, self.fresh = folder, folder / "corpus", folder / "fresh"
        folder.mkdir(parents=True)
        (folder / "text.txt").write_text("".join(TEXT.format(i, i % 7) for i in range(300)))
        (folder / "config.json").write_text(json.dumps(SETTINGS))
        self._do("prepare", folder / "text.txt", "--out", self.corpus, "--tokenizer", "bytes")
        took = []
        for name in ("first", "second", "whole"):
            began = time.monotonic()
            self._do(
                "train",
                DEMO_ARMS[-1],
                "--config",
                folder / "config.json",
                "--corpus",
                self.corpus,
                "--out",
                folder / name,
            )
            took.append(time.monotonic() - began)
        self.seconds = sorted(took)[1]  # of a whole run, from start to exit
        self.whole = folder / "whole"
        self.expected = fingerprint(self.whole)
        shutil.copytree(
            self.whole, self.fresh, ignore=shutil.ignore_patterns("step_*", "metrics.jsonl", "summary.json")
        )

    def _do(self, *arguments: object) -> None:
        child = Child([str(a) for a in arguments], self.folder / "output.txt")
        demand(child.wait() == 0, f"undisturbed, it failed: {child.said[-300:]}")

    def copy(self, name: str) -> Path:
        """A run that has not begun."""
        return Path(shutil.copytree(self.fresh, self.folder / name))

    def train(self, run: Path, before: Callable[[], None] | None = None) -> Child:
        """Go on with a run."""
        return Child(["train", "--resume", str(run)], run / "output.txt", before)

    def finish(self, run: Path) -> None:
        """Go on to the end without disturbance; the end must be the undisturbed run's, bit for bit."""
        if not Run(run).complete:
            child = self.train(run)
            code = child.wait()
            demand(code == 0, f"going on ended with exit code {code}: {child.said[-300:]}")
        self.check(run, self.expected)

    @staticmethod
    def check(run: Path, expected: dict[str, str]) -> None:
        found = fingerprint(run)
        differ = [name for name in expected if found[name] != expected[name]]
        demand(not differ, f"{', '.join(differ)} differ from the undisturbed run's")
        left = [path.name for path in run.rglob("*.partial")]
        demand(not left, f"{left} were left behind")


def fingerprint(run: Path) -> dict[str, str]:
    """SHA-256 of the last checkpoint's tensors, of the log and of the summary, without what a clock says."""
    checkpoint, state, _ = newest_whole(run / "checkpoints", required=True)
    assert checkpoint is not None
    parts: dict[str, Any] = {file.name: tensors(file) for file in sorted(checkpoint.glob("*.safetensors"))}
    parts[STATE] = _without_clocks(state["progress"])
    parts["metrics.jsonl"] = [_without_clocks(record) for record in Run(run).records()]
    summary = run / "summary.json"
    parts["summary.json"] = _without_clocks(json.loads(summary.read_text())) if summary.exists() else None
    return {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in parts.items()}


def tensors(file: Path) -> dict[str, str]:
    """The SHA-256 of each tensor of a file."""
    held = safetensors.numpy.load_file(file)
    return {name: hashlib.sha256(held[name].tobytes()).hexdigest() for name in sorted(held)}


def _without_clocks(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in CLOCKS}


def note_batches(notes: Path, stop: int = -1) -> None:
    """Have this process write down what it reads: a line a step, with a checksum of each sample. At step `stop` the
    last process of the world sends itself a SIGTERM."""
    real, descriptor = Corpus.batch_at, os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def noting(corpus: Corpus, step: int, **share: Any) -> Any:
        batch = real(corpus, step, **share)
        rank, world = share.get("rank", 0), share.get("world", 1)
        samples = [zlib.crc32(row.tobytes()) for row in batch[0]]
        line = {"step": step, "rank": rank, "world": world, "samples": samples}
        os.write(descriptor, json.dumps(line).encode() + b"\n")
        if step == stop and rank == world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    setattr(Corpus, "batch_at", noting)  # noqa: B010


def noted(notes: Path) -> list[dict[str, Any]]:
    """The whole lines of `note_batches`."""
    return [json.loads(line) for line in notes.read_text().split("\n")[:-1]] if notes.exists() else []


if __name__ == "__main__":
    note_batches(Path(sys.argv[1]), int(sys.argv[2]))
    _command_line(sys.argv[3:])
