"""Watching a run with other tools: each adapter is fed the records of the log. `metrics.jsonl` stays the record."""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from .errors import EnvironmentFault, unknown
from .files import read_json, write_json
from .progress import console

Log = Callable[[int, dict[str, float]], None]
IDENTITY = "tracking.json"  # in the run directory: by what name the tools know the run
PROJECT = "yuriiformer"


class Tracking:
    """An observer that feeds the tools. They are opened with the first record, which says from which step on.

    A tool that fails is dropped with a warning: it cannot stop a run.
    """

    def __init__(self, names: Sequence[str], run: Path, settings: dict[str, Any]) -> None:
        self.run, self.settings = run, settings
        self._waiting = list(names)
        self._open: dict[str, tuple[AbstractContextManager[Log], Log]] = {}

    def __call__(self, record: dict[str, Any]) -> None:
        if "loss" not in record:  # a warning, a note
            return
        values = dict(record)
        step = values.pop("step")
        while self._waiting:
            name = self._waiting.pop(0)
            with self._dropping(name):
                opened = TOOLS[name](self.run, self.settings, step)
                self._open[name] = opened, opened.__enter__()
        for name, (_, log) in list(self._open.items()):
            with self._dropping(name):
                log(step, values)

    def close(self) -> None:
        for name, (opened, _) in list(self._open.items()):
            with self._dropping(name):
                opened.__exit__(None, None, None)
        self._open.clear()

    @contextmanager
    def _dropping(self, name: str) -> Iterator[None]:
        try:
            with redirect_stdout(console.file):  # standard output belongs to --json
                yield
        except Exception as error:
            self._open.pop(name, None)
            text = f"{self.run}: warning: {name} is dropped: {type(error).__name__}: {error}".split("\n")[0]
            console.print(text, soft_wrap=True, markup=False)


def chosen(text: str) -> list[str]:
    """The tools of a list such as "tensorboard,wandb". Raises UserError for an unknown one, EnvironmentFault for one
    that is not installed."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in TOOLS:
            raise unknown("tracker", name, TOOLS)
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise EnvironmentFault(
                f"this needs {error.name or name}, which is not installed: pip install 'yuriiformer[track]'"
            ) from None
    return names


def _identity(run: Path) -> dict[str, str]:
    """The same for every session of a run, and another one for another run in the same place."""
    if not (run / IDENTITY).is_file():
        write_json(run / IDENTITY, {"id": uuid.uuid4().hex[:12]})
    found = read_json(run / IDENTITY)["id"]
    return {"id": found, "name": f"{run.name}-{found[:6]}"}


@contextmanager
def tensorboard(run: Path, settings: dict[str, Any], step: int) -> Iterator[Log]:
    """Into RUN/tensorboard. What an earlier session wrote from this step on is purged by its reader."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / "tensorboard"), purge_step=step) as writer:

        def log(step: int, values: dict[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)
            writer.flush()  # a kill loses nothing

        yield log


@contextmanager
def trackio(run: Path, settings: dict[str, Any], step: int) -> Iterator[Log]:
    """Into trackio's own folder (TRACKIO_DIR). Steps that it has are not logged again."""
    import trackio

    project, name = os.environ.get("TRACKIO_PROJECT", PROJECT), _identity(run)["name"]
    quiet: dict[str, Any] = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
    tracked = trackio.init(project, name, group=str(run.parent), config=settings, resume="allow", **quiet)
    first = getattr(tracked, "_next_step", 0)
    yield lambda step, values: tracked.log(values, step) if step >= first else None
    tracked.finish()


@contextmanager
def wandb(run: Path, settings: dict[str, Any], step: int) -> Iterator[Log]:
    """Into wandb's project of WANDB_PROJECT; WANDB_MODE=offline keeps it in RUN/wandb. Steps that it has it ignores."""
    import wandb

    tracked = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT), group=str(run.parent), config=settings, dir=str(run),
        resume="allow", reinit="create_new", settings=wandb.Settings(console="off", silent=True), **_identity(run),
    )  # fmt: skip
    yield lambda step, values: tracked.log(values, step=step)
    tracked.finish()


TOOLS = {"tensorboard": tensorboard, "trackio": trackio, "wandb": wandb}
