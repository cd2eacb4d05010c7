"""What is evaluated: a training run, or a folder that `transformers` loads."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    def at(cls, path: Path) -> Target:
        """Raises UserError when there is neither."""
        if not (path / "config.json").is_file():
            raise UserError(
                f"{path} is no run directory and no Hugging Face folder (it has no config.json). "
                "Give a folder that yuriiformer train, yuriiformer export or save_pretrained wrote."
            )
        config = read_json(path / "config.json")
        if isinstance(config, dict) and "model_type" in config:
            if not any(file.suffix in WEIGHTS for file in path.iterdir()):
                raise UserError(f"{path} is half a Hugging Face folder: it has a config.json and no weights.")
            return cls(path, None)
        return cls(path, Run(path))

    @property
    def out(self) -> Path:
        return self.path / "evaluation"


def fingerprint(folder: Path) -> str:
    """One checksum of all files of a Hugging Face folder: the same model gives the same scores."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    return hashlib.sha256("".join(f"{file.name} {sha256(file)}\n" for file in files).encode()).hexdigest()


def offline() -> None:
    """Nothing asks the hub from here on. To be called before the hub's libraries are imported."""
    os.environ |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")


def same(finished: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result in a file, when it was measured with these settings."""
    result = read_json(finished) if finished.is_file() else {}
    return result if result.get("settings") == settings else None
