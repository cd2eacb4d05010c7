"""The loss over the whole validation split."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ..config import TrainingConfig
from ..files import read_json, write_json, write_text
from ..progress import Meter
from ..report.statistics import weighted_mean
from ..training.checkpoint import MODEL, STATE, restore
from ..training.device import resolve
from ..training.run import Run
from .target import same

NAME = "validation"
LOGITS = 1 << 26  # the most numbers that the logits of one batch hold


def validate(run: Run, out: Path) -> dict[str, Any]:
    """Write OUT/validation.json and the loss of each block to OUT/validation.jsonl, unless they are there.

    The split is cut into blocks of `context` tokens side by side, the last one shorter; each token but the first is
    predicted once, from the tokens before it in its block. The standard error takes the blocks for independent.
    fp32, by the model of the run itself.
    """
    corpus, context = run.corpus(), run.config.model.context
    model = run.build()
    progress, complaints = restore(run.checkpoints, model, required=True)
    state = read_json(run.checkpoints / f"step_{progress.step}" / STATE)
    settings = {"weights_sha256": state["files"][MODEL]["sha256"], "corpus": corpus.identity, "context": context}
    if done := same(out / f"{NAME}.json", settings):
        return done
    started = time.monotonic()
    device = resolve(TrainingConfig(precision="fp32", compile="no"))[0].device
    model = model.to(device).eval()
    tokens = len(corpus.tokens[NAME]) - 1
    losses: list[float] = []
    counts: list[int] = []
    batch = max(1, LOGITS // (context * model.config.vocabulary))
    with Meter(NAME, tokens) as meter, torch.inference_mode():
        for complaint in complaints:
            meter.line(f"warning: {complaint}")
        for inputs, targets in corpus.whole_validation(batch=batch, context=context):
            logits = model(torch.from_numpy(inputs).to(device)).float().transpose(1, 2)
            each = F.cross_entropy(logits, torch.from_numpy(targets).to(device), reduction="none").double()
            losses += each.mean(1).tolist()
            counts += [inputs.shape[1]] * len(inputs)
            meter.advance(inputs.size)
    loss, error = weighted_mean(losses, counts)
    result = {
        "settings": settings,
        "step": progress.step,
        "tokens": tokens,
        "blocks": len(losses),
        "loss": loss,
        "standard_error": error,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) / corpus.bytes_per_token,
        "seconds": time.monotonic() - started,
        "device": device,
        "torch": torch.__version__,
    }
    lines = [{"block": i, "tokens": n, "loss": x} for i, (n, x) in enumerate(zip(counts, losses, strict=True))]
    write_text(out / f"{NAME}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_json(out / f"{NAME}.json", result)
    return result

