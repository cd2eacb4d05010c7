"""Checkpoints: safetensors and JSON in a folder that is there whole or not at all, vouched for by checksums.

Training waits for a copy in host memory; writing, syncing, renaming and reading back happen in a thread beside it.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import EnvironmentFault, UserError
from ..files import digest, new_folder, read_json, remove_folder, remove_partials, sha256, write_bytes, write_json
from .distributed import placed_like, whole

FORMAT = 2
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
MISSES = 3  # checkpoints in a row that may fail to be written before training stops
ROOM = 2.2  # free space asked for at the start, in checkpoints: the one being written and a newest one


@dataclass(frozen=True)
class Progress:
    """Where training stands, beside weights and optimiser state. The step is the data cursor."""

    step: int = 0
    seconds: float = 0.0  # of training so far
    loss_sum: float = 0.0  # training losses since the last line of the log, and how many
    loss_count: int = 0
    norm_mean: float = 0.0  # what the step guard knows
    norm_count: int = 0
    skipped: int = 0
    micro_batch: int = 0  # sequences a pass, and the kernel of attention: with others the last bits may differ
    attention: str = ""


class NotFinite(Exception):
    """Weights or optimiser state hold what is no number: no state to keep."""


class Writer:
    """Commits checkpoints one at a time, in a thread, and keeps the newest `keep` and, if asked, the best.

    warn: told when the disk refuses one; training goes on.
    """

    def __init__(self, folder: Path, keep: int, keep_best: bool, warn: Callable[[str], None]) -> None:
        self.folder, self.keep, self.keep_best, self.warn = folder, max(1, keep), keep_best, warn
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[None] | None = None
        self._commit: Callable[[], None]
        self._host: dict[str, dict[str, Tensor]] = {}
        self._misses = 0
        self._poisoned: str | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()  # what is being written is finished, whatever ended the training

    def submit(self, progress: Progress, validation: float | None, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy the tensors and let the thread write them; waits for a checkpoint still being written."""
        if self._running:
            self._running.exception()
            self.poll()
        for name, state in tensors.items():
            host = self._host.setdefault(name, {})
            for key, tensor in state.items():
                if key not in host:
                    host[key] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                host[key].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._commit = lambda: commit(self.folder, progress, validation, self._host, self.keep, self.keep_best)
        self._running = self._thread.submit(self._commit)

    def poll(self) -> str | None:
        """Look whether the checkpoint in work is done; why the last one was not worth writing, where that was so.

        Raises EnvironmentFault when the disk has refused MISSES in a row.
        """
        if not (self._running and self._running.done()):
            return self._poisoned
        error, self._running = self._running.exception(), None
        if error is None:
            self._misses = 0
        elif isinstance(error, NotFinite):
            self._poisoned = str(error)
        elif not isinstance(error, EnvironmentFault):
            raise error
        else:
            self._misses += 1
            if self._misses >= MISSES:
                raise error
            self.warn(f"checkpoint not written: {error}")
        return self._poisoned

    def finish(self) -> str | None:
        """Wait for the checkpoint in work, and try again where the disk refuses it; returns and raises as `poll`."""
        while self._running:
            self._running.exception()
            misses = self._misses
            self.poll()
            if self._misses > misses:
                time.sleep(self._misses)
                self._running = self._thread.submit(self._commit)
        return self._poisoned


def commit(
    folder: Path,
    progress: Progress,
    validation: float | None,
    tensors: Mapping[str, Mapping[str, Tensor]],
    keep: int,
    keep_best: bool,
) -> None:
    """Write a checkpoint, read it back, and only then delete what is not kept.

    Raises NotFinite, EnvironmentFault; nothing is lost by either.
    """
    for name, state in tensors.items():
        if bad := [key for key, tensor in state.items() if not tensor.isfinite().all()]:
            raise NotFinite(f"{name} of step {progress.step} would hold what is no number, in {bad[0]}")
    target = folder / f"step_{progress.step}"
    remove_partials(folder)
    remove_folder(target)  # one that was found damaged
    with new_folder(target) as partial:
        files = {}
        for name, state in tensors.items():
            data = safetensors.torch.save(dict(state))
            write_bytes(partial / name, data)
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        record = {"format": FORMAT, "progress": asdict(progress), "validation": validation, "files": files}
        write_json(partial / STATE, record | {"sha256": digest(record)})
    _verify(target)
    kept = [path for _, path in newest_first(folder)]
    best = best_of(kept) if keep_best else None
    for old in kept[keep:]:
        if old != best:
            remove_folder(old)


def require_room(folder: Path, size: int) -> None:
    """Raises EnvironmentFault where the disk has no room for checkpoints of that many bytes."""
    if (free := shutil.disk_usage(folder).free) < ROOM * size:
        raise EnvironmentFault(
            f"{folder} has {free / 1e9:.1f} GB left; checkpoints of {size / 1e9:.1f} GB need {ROOM * size / 1e9:.1f}. "
            "Free some, or choose another --out."
        )


def best_of(checkpoints: Sequence[Path]) -> Path | None:
    """The one with the lowest validation loss, of those at which it was measured."""
    losses = {}
    for checkpoint in checkpoints:
        try:
            losses[checkpoint] = float(read_json(checkpoint / STATE)["validation"])
        except (UserError, KeyError, TypeError, ValueError):
            continue
    return min(losses, key=losses.__getitem__, default=None)


def snapshot(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint, by file. Shards are put together: every process of a world must call it."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    optimizer = {
        f"{names[p]}|{key}": whole(value.detach())
        for o in optimizers
        for p, state in o.state.items()
        for key, value in state.items()
    }
    return {MODEL: {name: whole(t.detach()) for name, t in model.state_dict().items()}, OPTIMIZER: optimizer}


def save(folder: Path, model: nn.Module) -> None:
    """A checkpoint of step 0, without optimiser state."""
    with Writer(folder, keep=1, keep_best=False, warn=lambda text: None) as writer:
        writer.submit(Progress(), None, snapshot(model, []))
        writer.finish()


def restore(folder: Path, model: nn.Module, *, best: bool = False) -> tuple[Progress, list[str]]:
    """Load the newest (or the best) whole checkpoint; also return a line for each damaged one passed over.

    Raises UserError when there is none.
    """
    checkpoint, state, complaints = newest_whole(folder, required=True, best=best)
    assert checkpoint is not None
    load_model(checkpoint, model)
    return Progress(**state["progress"]), complaints


def load_model(checkpoint: Path, model: nn.Module) -> None:
    """Raises UserError when the checkpoint is another model's."""
    tensors = safetensors.torch.load_file(checkpoint / MODEL)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if {name: tuple(t.shape) for name, t in tensors.items()} != expected:
        raise UserError(f"{checkpoint / MODEL} holds other tensors than the run's config describes.")
    model.load_state_dict(tensors)


def load_optimizers(checkpoint: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    parameters = dict(model.named_parameters())
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, value in safetensors.torch.load_file(checkpoint / OPTIMIZER).items():
        parameter, _, key = name.partition("|")
        p = parameters[parameter]
        owner[p].state[p][key] = placed_like(value, p) if value.shape == p.shape else value.to(p.device)


def newest_whole(
    folder: Path, *, required: bool = False, best: bool = False
) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest checkpoint that is whole (or the best one), its state.json, and a line for each damaged one passed over.

    Without any checkpoint there is none (or, where one is required, UserError).
    Raises UserError when there are checkpoints and none is whole.
    """
    complaints: list[str] = []
    found = [path for _, path in newest_first(folder)]
    if best and (first := best_of(found)):
        found = [first, *(path for path in found if path != first)]
    for candidate in found:
        try:
            return candidate, _verify(candidate), complaints
        except UserError as error:
            complaints.append(str(error))
    if complaints:
        raise UserError(f"no checkpoint in {folder} is whole: {complaints[0]}")
    if required:
        raise UserError(f"{folder.parent} has no checkpoint yet; train it first.")
    return None, {}, []


def newest_first(folder: Path) -> list[tuple[int, Path]]:
    """The committed checkpoints with their steps."""
    names = [(p.name.removeprefix("step_"), p) for p in folder.glob("step_*")]
    return sorted(((int(step), p) for step, p in names if step.isdigit()), reverse=True)


def _verify(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = read_json(checkpoint / STATE)
    try:
        if state["format"] != FORMAT:
            raise UserError(f"{checkpoint} has checkpoint format {state['format']}; this version reads {FORMAT}.")
        if state.pop("sha256") != digest(state):
            raise UserError(f"{checkpoint / STATE} is damaged: its sha256 is not the one it was written with.")
        for name in (MODEL, OPTIMIZER):
            entry, file = state["files"][name], checkpoint / name
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                raise UserError(f"{file} is cut short or missing.")
            if sha256(file) != entry["sha256"]:
                raise UserError(f"{file} is damaged: its sha256 is not the one it was written with.")
        Progress(**state["progress"])
        return state
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{checkpoint / STATE} is damaged: {error!r}") from None
