"""Folders written under one version of transformers, loaded under another, both ways, for every rule x splitting.

    python benchmarks/versions.py OTHER_PYTHON

OTHER_PYTHON: the interpreter of an environment with yuriiformer and another transformers. Writes results/versions.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from yuriiformer.config import ModelConfig
from yuriiformer.data.tokenizer import make_tokenizer
from yuriiformer.export import check, write_model
from yuriiformer.model import LanguageModel
from yuriiformer.rule import all_rules
from yuriiformer.splitting import legal_splittings

ARMS = [(rule.name, splitting) for rule in all_rules().values() for splitting in legal_splittings(rule)]


def write(folder: Path) -> tuple[list[LanguageModel], list[Path]]:
    """The same models in every environment: their weights depend on names and a seed alone."""
    cores, folders = [], []
    for rule, splitting in ARMS:
        size = {"layers": 2, "heads": 2, "width": 32, "context": 64, "vocabulary": 320}
        core = LanguageModel(ModelConfig(rule=rule, splitting=splitting, **size))
        target = folder / f"{rule}-{splitting}"
        if not target.exists():
            write_model(core, make_tokenizer("bytes", []), target)
        cores.append(core)
        folders.append(target)
    return cores, folders


def main(other: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        here, there = Path(name, "here"), Path(name, "there")
        subprocess.run([other, __file__, "--write", str(there)], check=True)
        found = {
            "written here, loaded there": check(*write(here), python=other),
            "written there, loaded here": check(*write(there)),
        }
    import transformers

    result = {
        "command": "python benchmarks/versions.py OTHER_PYTHON",
        "here": {"transformers": transformers.__version__, "torch": torch.__version__},
        "combinations": len(ARMS),
    }
    for way, checks in found.items():
        result[way] = {
            "by": {k: checks[0][k] for k in ("transformers", "torch")},
            "largest difference of logits": max(c["logits"] for c in checks),
            "largest difference by left padding": max(c["left_padded"] for c in checks),
            "cached equals uncached": sum(c["cached_equals_uncached"] for c in checks),
        }
    Path("results/versions.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    if sys.argv[1] == "--write":
        write(Path(sys.argv[2]))
    else:
        main(sys.argv[1])
