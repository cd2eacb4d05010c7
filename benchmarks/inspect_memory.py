"""Peak memory and seconds of `yuriiformer inspect` at GPT-2's size: 12 layers, width 768, T = 1024, random weights.

    python benchmarks/inspect_memory.py

Writes results/inspect_memory.json.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from yuriiformer.config import Config, ModelConfig, TrainingConfig
from yuriiformer.data.prepare import prepare
from yuriiformer.training.checkpoint import save
from yuriiformer.training.device import describe
from yuriiformer.training.run import Run

MODEL = {"layers": 12, "heads": 12, "width": 768, "context": 1024, "vocabulary": 50304}

with tempfile.TemporaryDirectory() as name:
    text = Path(name, "text.txt")
    text.write_text("\n<|endoftext|>\n".join(p.read_text() for p in sorted(Path("src").rglob("*.py"))))
    corpus = prepare(str(text), Path(name, "corpus"), tokenizer="bpe:1024", fraction=0.3)
    model = ModelConfig(rule="nesterov", splitting="lie_trotter", **MODEL)
    training = TrainingConfig(steps=1, device="cpu", precision="fp32", compile="no")
    run = Run.create(Path(name, "run"), Config(corpus=str(corpus.path), model=model, training=training), corpus)
    built = run.build()
    parameters = sum(p.numel() for p in built.parameters())
    save(run.checkpoints, built)
    del built
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "yuriiformer", "inspect", str(run.path)], check=True)
    result = {
        "command": "python benchmarks/inspect_memory.py",
        "model": MODEL | {"rule": "nesterov", "parameters": parameters},
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6, 2),
        "machine": describe("cpu"),
    }
Path("results/inspect_memory.json").write_text(json.dumps(result, indent=1) + "\n")
print(json.dumps(result, indent=1))
