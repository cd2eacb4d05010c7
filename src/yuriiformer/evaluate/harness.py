"""lm-eval's tasks on a Hugging Face folder: each number is the one that lm-eval's own command line gives."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..config import TrainingConfig
from ..errors import Interrupted, UserError
from ..files import write_json, write_text
from ..progress import Meter
from ..training.device import resolve
from .target import fingerprint, same
from .tasks import Task, first_line, manager

SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
NO_METRICS = ("name", "alias", "sample_len")
VERSIONS = ("lm_eval", "transformers", "torch", "datasets", "tokenizers")


class Harness:
    """A model and how it is asked. It is loaded when the first task needs it."""

    def __init__(self, folder: Path, trust: bool, *, batch: int, limit: int | None) -> None:
        self.folder, self.limit = folder, limit
        self.options: dict[str, Any] = {
            "batch_size": batch,
            "device": resolve(TrainingConfig())[0].device,
            "trust_remote_code": trust,
        }
        self.fingerprint = fingerprint(folder)
        self._model: Any = None

    def run(self, task: Task, out: Path) -> dict[str, Any]:
        """Write OUT/TASK.json and, a line each, the documents to OUT/TASK.jsonl, unless they are there.

        Raises Interrupted at Ctrl-C: the batches that were answered are kept.
        """
        settings = {
            "model": self.fingerprint, "task": task.lm_eval_name, "shots": task.shots, "limit": self.limit, "data": task.data,
            "batch": self.options["batch_size"], "device": self.options["device"], "versions": _versions(),
        }  # fmt: skip
        if done := same(out / f"{task.name}.json", settings):
            return done
        from .remembering import Memory

        memory = Memory(out / f"{task.name}.partial.jsonl", settings)
        started = time.monotonic()
        try:
            with Meter(task.name, None) as meter:
                found = self._ask(task, memory, meter)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped in task {task.name}; {len(memory.answers)} answers are kept.") from None
        result = {
            "settings": settings,
            "results": {name: _metrics(numbers) for name, numbers in found["results"].items()},
            "documents": {name: counts["effective"] for name, counts in found["n-samples"].items()},
            "shots": found["n-shot"],
            "task_versions": found["versions"],
            "truncated": {"prompts": sum(memory.cut.values()), "of": len(memory.cut)},
            "differs": task.differs,
            "seeds": SEEDS,
            "dtype": str(self._model.model.dtype).removeprefix("torch."),
            "context": self._model.max_length,
            "seconds": time.monotonic() - started,
            "lm_eval": self.command(task),
        }
        lines = [_document(name, sample) for name, samples in found["samples"].items() for sample in samples]
        write_text(out / f"{task.name}.jsonl", "".join(json.dumps(line, default=str) + "\n" for line in lines))
        write_json(out / f"{task.name}.json", result)
        memory.path.unlink(missing_ok=True)
        return result

    def _ask(self, task: Task, memory: Any, meter: Meter) -> dict[str, Any]:
        from lm_eval import evaluator

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        evaluator.get_git_commit_hash = str  # git answers on our terminal, about whatever folder this is
        model = self.model()
        model.memory, model.meter = memory, meter
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                found = evaluator.simple_evaluate(
                    model, tasks=[task.lm_eval_name], num_fewshot=task.shots, limit=self.limit, log_samples=True,
                    task_manager=manager(task.folder), batch_size=self.options["batch_size"], **SEEDS,
                )  # fmt: skip
        except UserError:
            raise
        except Exception as error:  # data sets, templates and metrics each have errors of their own kind
            raise task.fault(error) from error
        return dict(found)

    def model(self) -> Any:
        """Raises UserError when transformers cannot load the folder."""
        if self._model is None:
            from .remembering import RememberingModel

            try:
                self._model = RememberingModel(pretrained=str(self.folder), **self.options)
            except Exception as error:  # whatever a damaged file makes transformers raise
                raise UserError(f"{self.folder} cannot be loaded by transformers: {first_line(error)}") from error
        return self._model

    def command(self, task: Task) -> str:
        """lm-eval's own command line for the same numbers."""
        trust = ",trust_remote_code=True" if self.options["trust_remote_code"] else ""
        words = [
            "lm_eval",
            "run",
            "--model",
            "hf",
            "--model_args",
            f"pretrained={self.folder}{trust}",
            "--tasks",
            task.lm_eval_name,
        ]
        words += ["--include_path", str(task.folder)] if task.files else []
        words += ["--num_fewshot", str(task.shots)] if task.shots is not None else []
        words += ["--limit", str(self.limit)] if self.limit is not None else []
        return shlex.join([*words, "--batch_size", str(self.options["batch_size"]), "--device", self.options["device"]])


def _versions() -> dict[str, str]:
    return {name: version(name) for name in VERSIONS}


def _metrics(numbers: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's `acc,none` as `acc`; the names of other filters stay."""
    return {key.removesuffix(",none"): value for key, value in numbers.items() if key not in NO_METRICS}


def _document(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a document: who it is, what the model said, and how that was scored."""
    said = [answer[0] if isinstance(answer, list | tuple) else answer for answer in sample["filtered_resps"]]
    return {
        "task": task, "filter": sample["filter"], "id": sample["doc_id"], "document": sample["doc_hash"],
        "prompt": sample["prompt_hash"], "target": sample["target"], "answers": said,
        **{metric: sample[metric] for metric in sample["metrics"]},
    }  # fmt: skip
