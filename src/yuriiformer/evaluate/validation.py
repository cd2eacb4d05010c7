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

LOGITS = 1 << 26  # the most numbers that the logits of one batch hold


class Validation:
    """A run's newest weights and its corpus. Raises UserError when either is not to be had."""

    def __init__(self, run: Run) -> None:
        self.corpus, self.model = run.corpus(), run.build()
        progress, self.complaints = restore(run.checkpoints, self.model, best=run.best)
        self.step = progress.step
        state = read_json(run.checkpoints / f"step_{self.step}" / STATE)
        self.settings = {
            "weights_sha256": state["files"][MODEL]["sha256"],
            "corpus": self.corpus.identity,
            "context": run.config.model.context,
        }

    def measure(self, out: Path) -> dict[str, Any]:
        """Write OUT/validation.json and the loss of each block to OUT/validation.jsonl, unless they are there.

        The split is cut into blocks of `context` tokens side by side, the last one shorter; each token but the first is
        predicted once, from the tokens before it in its block. The standard error takes the blocks for independent.
        fp32, by the model of the run itself.
        """
        if done := same(out / "validation.json", self.settings):
            return done
        started = time.monotonic()
        losses, counts, device = self._blocks()
        loss, error = weighted_mean(losses, counts)
        result = {
            "settings": self.settings,
            "step": self.step,
            "tokens": sum(counts),
            "blocks": len(losses),
            "loss": loss,
            "standard_error": error,
            "perplexity": math.exp(loss),
            "bits_per_byte": loss / math.log(2) / self.corpus.bytes_per_token,
            "seconds": time.monotonic() - started,
            "device": device,
            "torch": torch.__version__,
        }
        lines = [json.dumps({"block": i, "tokens": counts[i], "loss": loss}) for i, loss in enumerate(losses)]
        write_text(out / "validation.jsonl", "\n".join(lines) + "\n")
        write_json(out / "validation.json", result)
        return result

    @torch.inference_mode()
    def _blocks(self) -> tuple[list[float], list[int], str]:
        """The mean loss of each block, its tokens, and the device."""
        losses: list[float] = []
        counts: list[int] = []
        device = resolve(TrainingConfig(precision="fp32", compile="no"))[0].device
        model, context = self.model.to(device).eval(), self.model.config.context
        batch = max(1, LOGITS // (context * self.model.config.vocabulary))
        with Meter("validation", len(self.corpus.tokens["validation"]) - 1) as meter:
            for complaint in self.complaints:
                meter.line(f"warning: {complaint}")
            for inputs, targets in self.corpus.whole_validation(batch=batch, context=context):
                logits = model(torch.from_numpy(inputs).to(device)).transpose(1, 2)
                each = F.cross_entropy(logits, torch.from_numpy(targets).to(device), reduction="none").double()
                losses += each.mean(1).tolist()
                counts += [inputs.shape[1]] * len(inputs)
                meter.advance(inputs.size)
        return losses, counts, device
