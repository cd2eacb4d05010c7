"""Everything that is asked about one model, into one folder; what is there already is not asked again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import disk_errors, lock
from ..progress import console
from .harness import Harness
from .target import Target
from .tasks import read
from .validation import Validation


def evaluate(
    path: Path, *, tasks: Sequence[str] = (), data: Path | None = None, limit: int | None = None,
    shots: int | None = None, batch: int = 8, out: Path | None = None, unfinished: bool = False,
    trust_remote_code: bool = False, best: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The validation of a run (its newest checkpoint, or its best), and lm-eval's tasks on its export or on a Hugging Face folder.

    Raises UserError for what cannot be evaluated, before anything is written; Interrupted when stopped within a task.
    """
    target, out = Target.at(path, unfinished, best), out or path / "evaluation"
    if not tasks:
        if target.run is None:
            raise UserError(f"{path} is a Hugging Face folder: it has no validation text of its own. Name --tasks.")
        if data or limit is not None or shots is not None:
            raise UserError("--data, --limit and --shots belong to --tasks; name some.")
    asked = read(tasks, shots, data, out / "tasks") if tasks else []
    validation = None
    if target.run:
        try:
            validation = Validation(target.run)
        except UserError as error:
            if not tasks:
                raise
            console.print(f"no validation: {error}", soft_wrap=True, markup=False)  # such as an imported model's
    harness = Harness(*target.folder(trust_remote_code), batch=batch, limit=limit) if asked else None

    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with lock(out, "evaluation"):
        for task in asked:
            task.write()
        return {
            "path": str(path),
            "validation": validation and validation.measure(out),
            "tasks": {task.name: harness.run(task, out) for task in asked} if harness else {},
        }
