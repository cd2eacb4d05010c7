"""What is evaluated: a training run, or a folder that `transformers` loads."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UserError
from ..files import read_json, sha256
from ..training.run import Run

WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class Target:
    """A run, or (where `run` is None) a Hugging Face folder."""

    path: Path
    run: Run | None

    @classmethod
    def at(cls, path: Path, unfinished: bool = False, best: bool = False) -> Target:
        """Raises UserError when there is neither, or half of one."""
        if not (path / "config.json").is_file():
            raise UserError(
                f"{path} is no run directory and no Hugging Face folder (it has no config.json). "
                "Give a folder that yuriiformer train, yuriiformer export or save_pretrained wrote."
            )
        if "model_type" in read_json(path / "config.json"):
            if not any(file.suffix in WEIGHTS for file in path.iterdir()):
                raise UserError(f"{path} is half a Hugging Face folder: it has a config.json and no weights.")
            return cls(path, None)
        run = Run(path, best)
        run.require_complete(unfinished)
        return cls(path, run)

    def folder(self, trust_remote_code: bool) -> tuple[Path, bool]:
        """The Hugging Face folder, and whether its own code is run: a run's is exported to RUN/export where that is
        missing or of other weights."""
        if self.run is None:
            if "auto_map" in read_json(self.path / "config.json") and not trust_remote_code:
                raise UserError(
                    f"{self.path} brings code of its own; look at it, then add --trust-remote-code to run it."
                )
            return self.path, trust_remote_code
        from ..export import export

        out, model = self.path / "export", self.run.load()[0]
        if not _holds(out, model.state_dict()):
            shutil.rmtree(out, ignore_errors=True)
            export(self.run, out, unfinished=True)
        return out, True


def _holds(folder: Path, weights: dict[str, Tensor]) -> bool:
    """Whether an exported folder has exactly these weights."""
    files = list(folder.glob("*.safetensors")) if (folder / "config.json").is_file() else []
    found = {name.removeprefix("model.core."): t for file in files for name, t in load_file(file).items()}
    return found.keys() == weights.keys() and all(torch.equal(found[name], t) for name, t in weights.items())


def fingerprint(folder: Path) -> str:
    """One checksum of the files that decide what a Hugging Face folder computes."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.suffix != ".md" and f.name != "checks.json")
    return hashlib.sha256("".join(f"{file.name} {sha256(file)}\n" for file in files).encode()).hexdigest()


def same(finished: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result in a file, when it was measured with these settings."""
    result = read_json(finished) if finished.is_file() else {}
    return result if result.get("settings") == settings else None
