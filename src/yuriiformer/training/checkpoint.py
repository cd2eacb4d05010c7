"""Checkpoints: safetensors and JSON in a folder that is there whole or not at all, vouched for by checksums."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..files import new_folder, read_json, sha256, write_bytes, write_json

FORMAT = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Progress:
    """Where training stands, beside weights and optimiser state. The step is the data cursor."""

    step: int = 0
    seconds: float = 0.0  # of training so far
    loss_sum: float = 0.0  # training losses since the last line of the log


def save(
    folder: Path, progress: Progress, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], keep: int
) -> None:
    """Commit a checkpoint, then delete all but the newest `keep`."""
    target = folder / f"step_{progress.step}"
    shutil.rmtree(target, ignore_errors=True)  # one that restore() found damaged
    tensors = {MODEL: model.state_dict(), OPTIMIZER: _optimizer_state(model, optimizers)}
    with new_folder(target) as partial:
        files = {}
        for name, state in tensors.items():
            data = safetensors.torch.save({k: t.detach().cpu().contiguous() for k, t in state.items()})
            write_bytes(partial / name, data)
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write_json(partial / STATE, {"format": FORMAT, "progress": asdict(progress), "files": files})
    for _, old in newest_first(folder)[max(1, keep) :]:
        shutil.rmtree(old)


def restore(
    folder: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = (), *, required: bool = False
) -> tuple[Progress, list[str]]:
    """Load the newest checkpoint that is whole; also return a line for each damaged one passed over.

    Without any checkpoint, training starts at step 0 (or, where one is required, UserError).
    Raises UserError when there are checkpoints and none is whole.
    """
    checkpoint, state, complaints = newest_whole(folder, required=required)
    if checkpoint is None:
        return Progress(), []
    tensors = safetensors.torch.load_file(checkpoint / MODEL)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if {name: tuple(t.shape) for name, t in tensors.items()} != expected:
        raise UserError(f"{checkpoint / MODEL} holds other tensors than the run's config describes.")
    model.load_state_dict(tensors)
    if optimizers:
        _load_optimizer_state(model, optimizers, safetensors.torch.load_file(checkpoint / OPTIMIZER))
    return Progress(**state["progress"]), complaints


def newest_whole(folder: Path, *, required: bool = False) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest checkpoint that is whole, its state.json, and a line for each damaged one passed over."""
    complaints: list[str] = []
    for _, candidate in newest_first(folder):
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
        for name, entry in state["files"].items():
            file = checkpoint / name
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                raise UserError(f"{file} is cut short or missing.")
            if sha256(file) != entry["sha256"]:
                raise UserError(f"{file} is damaged: its sha256 is not the one it was written with.")
        Progress(**state["progress"])
        return state
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{checkpoint / STATE} is damaged: {error!r}") from None


def _optimizer_state(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {
        f"{names[p]}|{key}": value for o in optimizers for p, state in o.state.items() for key, value in state.items()
    }


def _load_optimizer_state(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], tensors: dict[str, Tensor]
) -> None:
    parameters = dict(model.named_parameters())
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, value in tensors.items():
        parameter, _, key = name.partition("|")
        p = parameters[parameter]
        owner[p].state[p][key] = value.to(p.device)
