"""lm-eval's own `hf` model, which writes its answers down batch by batch, so that an interrupted task goes on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM

from ..errors import UserError
from ..files import append_line, write_text
from ..progress import Meter


class Memory:
    """The answers of a task so far: JSON lines of whole batches behind a line of settings.

    Whole batches, because what is asked together decides the last bits of a loglikelihood: a task that goes on then
    forms the batches it would have formed, and ends with the same numbers.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.answers: dict[str, Any] = {}
        self.cut: dict[str, bool] = {}  # whether a prompt was longer than the model sees
        self.batch: list[tuple[str, Any, bool | None]] = []
        self.header = json.dumps(settings)
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        if lines[:1] == [self.header]:
            for line in lines[1:]:
                self._keep(json.loads(line))
            write_text(path, "".join(line + "\n" for line in lines))  # without a last line that a kill cut short
        else:
            path.unlink(missing_ok=True)

    @staticmethod
    def key(kind: str, arguments: Any) -> str:
        return hashlib.sha256(json.dumps([kind, *arguments], default=str).encode()).hexdigest()[:24]

    def add(self, kind: str, arguments: Any, answer: Any) -> None:
        key = self.key(kind, arguments)
        self.batch.append((key, answer, self.cut.get(key)))

    def flush(self) -> int:
        """Write a finished batch down; return how many answers it had."""
        batch, self.batch = self.batch, []
        if batch:
            if not self.path.exists():
                write_text(self.path, self.header + "\n")
            append_line(self.path, json.dumps(batch))
            self._keep(batch)
        return len(batch)

    def _keep(self, batch: list[Any]) -> None:
        for key, answer, cut in batch:
            self.answers[key] = tuple(answer) if isinstance(answer, list) else answer
            if cut is not None:
                self.cut[key] = cut


class RememberingModel(HFLM):
    """Changes nothing in what lm-eval computes: it counts, writes down, and leaves out what is written down."""

    memory: Memory
    meter: Meter

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        return self._ask("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        return self._ask("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        return self._ask("generate_until", requests)

    def _ask(self, kind: str, requests: list[Any]) -> list[Any]:
        known = {
            i: self.memory.answers[key]
            for i, request in enumerate(requests)
            if (key := Memory.key(kind, request.args)) in self.memory.answers
        }
        self.meter.total = len(requests)
        self.meter.skip(len(known))
        rest = [request for i, request in enumerate(requests) if i not in known]
        answers = iter(getattr(super(), kind)(rest, disable_tqdm=True) if rest else [])
        self._flush()
        return [known[i] if i in known else next(answers) for i in range(len(requests))]

    @property
    def cache_hook(self) -> RememberingModel:
        """lm-eval tells each answer to its cache's hook."""
        return self

    @cache_hook.setter
    def cache_hook(self, hook: Any) -> None: ...

    def add_partial(self, kind: str, arguments: Any, answer: Any) -> None:
        if not (kind == "generate_until" and arguments[1].get("do_sample")):  # drawn anew each time it is asked
            self.memory.add(kind, arguments, answer)

    def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[Any]:
        for arguments, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"an answer has {len(continuation)} tokens and the model sees {self.max_length}; "
                    "this task needs a model with a longer context."
                )
            if arguments is not None:  # lm-eval's own condition: the last token is predicted, never read
                length = len(context) + len(continuation) - 1
                self.memory.cut[Memory.key("loglikelihood", arguments)] = length > self.max_length
        return super()._loglikelihood_tokens(requests, **options)

    def _model_call(self, *arguments: Any, **options: Any) -> Any:
        self._flush()  # the next batch begins: the one before is whole
        return super()._model_call(*arguments, **options)

    def _model_generate(self, *arguments: Any, **options: Any) -> Any:
        self._flush()
        return super()._model_generate(*arguments, **options)

    def _flush(self) -> None:
        self.meter.advance(self.memory.flush())
