"""lm-eval's tasks: from the hub, or from local files by task files of our own, which include lm-eval's."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..data.sources import COMPRESSED, decode, needs, reachable, unpacked
from ..errors import UserError, unknown
from ..files import disk_errors, sha256, write_text

# The shots that are usual for a task; every other task has its own default.
SHOTS = {"hellaswag": 10, "arc_easy": 25, "arc_challenge": 25}
# Where lm-eval keeps the tasks that need no search through all of its 10,000 files (some seconds).
FILES = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
}
COLUMNS = {
    "hellaswag": {"activity_label", "ctx_a", "ctx_b", "endings", "label"},
    "arc_easy": {"question", "choices", "answerKey"},
    "arc_challenge": {"question", "choices", "answerKey"},
}
ROLES = ("training_split", "validation_split", "test_split", "fewshot_split")
SPLITS = {"train": {"train", "training"}, "validation": {"validation", "valid", "val", "dev"}, "test": {"test"}}
FORMATS = (".jsonl", ".json", ".parquet", ".txt")
Row = dict[str, Any]


@dataclass
class Task:
    """A task as lm-eval is to run it."""

    name: str  # as the user wrote it
    lm_eval_name: str
    shots: int | None  # None: the task's own
    folder: Path | None  # where its task file is; None: lm-eval has to search
    files: dict[str, str] = field(default_factory=dict)  # what is written there: contents by name
    data: dict[str, str] = field(default_factory=dict)  # local data: sha256 by name
    differs: list[str] = field(default_factory=list)  # from the stock task on the stock data

    def write(self) -> None:
        for name, text in self.files.items():
            folder = self.folder or Path()
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text:
                write_text(folder / name, text)  # a new date would have `datasets` read it all anew

    def load(self) -> None:
        """Raises UserError for a task whose data are not to be had."""
        try:
            manager(self.folder).load([self.lm_eval_name])
        except Exception as error:  # data sets, templates and the hub each have errors of their own
            raise self.fault(error) from error

    def fault(self, error: Exception) -> UserError:
        reason = f"{type(error).__name__}: {first_line(error)}"
        if not self.files and os.environ.get("HF_HUB_OFFLINE") == "1":
            return UserError(
                f"task {self.name!r} needs its data from the Hugging Face hub, which cannot be reached, and they are not in "
                "the local cache. Give files with --data FOLDER, or set HF_ENDPOINT to a mirror or HF_HOME to a cache."
            )
        return UserError(f"task {self.name!r} does not run{' on these files' if self.files else ''}: {reason}")


def read(names: Sequence[str], shots: int | None, data: Path | None, folder: Path) -> list[Task]:
    """The tasks by name: from the hub, or from local data by task files for `folder`.

    Raises UserError for a task that is not known or whose data are not there.
    """
    if data and not data.is_dir():
        raise UserError(f"--data {data} is no folder.")
    # Where the hub is not wanted or not reached, its libraries are told so before they are imported: a cached copy
    # serves, and a missing one is reported at once.
    alone = data or not reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if alone:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    tasks = []
    for name in dict.fromkeys(names):
        stock = _entry(name)
        task = Task(name, name, SHOTS.get(name) if shots is None else shots, stock.parent if name in FILES else None)
        if data:
            _read_files(task, stock, data, folder)
        elif alone:
            task.load()
        tasks.append(task)
    return tasks


def _read_files(task: Task, stock: Path, data: Path, folder: Path) -> None:
    """Make it a task on local data: `folder`/NAME_local.yaml, with the data as JSON lines beside it.

    The task file includes lm-eval's own and replaces nothing but the data; rows of another layout are turned into the
    columns that it reads.
    """
    name = task.name
    task.folder, task.lm_eval_name = folder, f"{name}_local"
    roles = _roles(name, stock)
    found = {split: files for split in roles.values() if split and (files := _find(name, split, data))}
    evaluated = roles["test_split"] or roles["validation_split"]
    examples = roles["fewshot_split"] or roles["training_split"]
    if evaluated not in found:
        raise UserError(
            f"--data {data} holds no {evaluated} split of task {name!r}; a file is found by both names, such as "
            f"{name}_{evaluated}.jsonl ({', '.join(FORMATS)}, also {', '.join(COMPRESSED)})."
        )
    for split, files in found.items():
        rows = [row for file in files for row in _rows(file)]
        if split == evaluated and any("query" in row for row in rows):
            task.differs.append(
                "ctx_b, the second part of a context, does not begin with a capital letter, as lm-eval makes it: "
                "the file does not say where it begins"
            )
        rows = [_stock_columns(row) for row in rows]
        _check(name, rows, files)
        task.files[f"{name}_{split}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
        task.data |= {file.name: sha256(file) for file in files}
    task.differs.append("the few-shot examples depend on the order of the documents, which is that of the files")
    lines = {role: split if split in found else None for role, split in roles.items() if split}
    if examples not in found:
        # lm-eval leaves the evaluated document out of its own examples only where test_split names their split.
        lines = dict.fromkeys(ROLES) | {"test_split": evaluated, "fewshot_split": evaluated}
        task.differs.append(
            f"there is no {examples} split: the few-shot examples come from the {evaluated} split, without the document "
            "that is asked"
        )
    paths = {split: str((folder / f"{name}_{split}.jsonl").resolve()) for split in found}
    settings = {
        "include": str(stock), "task": task.lm_eval_name, "tag": None, "dataset_path": "json", "dataset_name": None,
        "dataset_kwargs": {"data_files": paths, "cache_dir": str((folder / "cache").resolve())}, **lines,
    }  # fmt: skip
    task.files[f"{task.lm_eval_name}.yaml"] = json.dumps(settings, indent=1) + "\n"  # JSON is YAML


def _entry(name: str) -> Path:
    """lm-eval's own file of a task, or of a group of tasks. Raises UserError when it has none."""
    import lm_eval.tasks

    if name in FILES:
        return Path(lm_eval.tasks.__file__).parent / FILES[name]
    index = manager(None).task_index
    if name not in index:
        raise unknown("task", name, index)
    return index[name].yaml_path or Path()


@cache
def manager(include_path: Path | None) -> Any:
    """lm-eval's list of tasks: all of its own, or those of a folder."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_path is None)


def _roles(name: str, stock: Path) -> dict[str, str | None]:
    """Which split of the data does what in a task."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(stock, resolve_func=False) if stock.is_file() else {}
    if not (config.get("test_split") or config.get("validation_split")):
        raise UserError(
            f"task {name!r} cannot be read from local files: lm-eval has no single task file of its splits."
        )
    return {role: config.get(role) for role in ROLES}


def _find(name: str, split: str, folder: Path) -> list[Path]:
    """The files whose path names the task and whose own name names the split; several are one split only as the hub's
    numbered parts."""

    def named(text: str, words: set[str]) -> bool:
        return any(f"_{_words(word)}_" in f"_{_words(text)}_" for word in words)

    found = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and _format(file) in FORMATS and named(file.name, SPLITS.get(split, {split}))
        if named(f"{folder.resolve().name}/{file.relative_to(folder)}", {name})
    ]
    if len(found) > 1 and not all(re.search(r"-\d+-of-\d+\.", file.name) for file in found):
        raise UserError(
            f"--data {folder} holds more than one {split} split of task {name!r}: {', '.join(f.name for f in found)}. Leave one."
        )
    return found


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _words(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower())


def _format(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix


def _rows(file: Path) -> Iterator[Row]:
    """The rows of a data file. Raises UserError when it cannot be read."""
    if _format(file) == ".parquet":
        needs("pyarrow", file)
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(file).to_pylist()
        return
    with disk_errors(file), file.open("rb") as raw:
        try:
            text = decode(unpacked(raw, file).read(), file, 0)
        except (EOFError, ValueError) as error:
            raise UserError(f"{file} cannot be unpacked: {error}") from None
    if _format(file) == ".txt":
        yield from _six_lines(text.split("\n"), file)
        return
    try:
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(x) for x in text.split("\n") if x.strip()]
        )
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    for row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{file} must hold one JSON object a line; got {str(row)[:40]!r}.")
        yield row


def _six_lines(lines: list[str], file: Path) -> Iterator[Row]:
    """HellaSwag as text: activity and context, the number of the right ending, four endings."""
    if lines[-1] == "":
        lines.pop()
    for at in range(0, len(lines), 6):
        query, label, *endings = lines[at : at + 6]
        if label not in ("0", "1", "2", "3") or len(endings) != 4:
            raise UserError(
                f"{file}, line {at + 2}: six lines make a document: the context, the number of the right ending (0 to 3) "
                "and four endings."
            )
        yield {"query": query, "label": label, "endings": endings}


def _stock_columns(row: Row) -> Row:
    """A row of one of the reduced layouts in the columns of the hub."""
    if "query" in row and "endings" in row:
        activity, _, context = row["query"].partition(": ")
        return {"activity_label": activity, "ctx_a": context, "ctx_b": ""} | {k: row[k] for k in ("endings", "label")}
    if isinstance(row.get("choices"), list) and isinstance(row.get("answer"), int):
        labels = [chr(ord("A") + i) for i in range(len(row["choices"]))]
        choices = {"text": row["choices"], "label": labels}
        return {"question": row["question"], "choices": choices, "answerKey": labels[row["answer"]]}
    return row


def _check(name: str, rows: list[Row], files: list[Path]) -> None:
    if not rows:
        raise UserError(f"{files[0]} is empty.")
    missing = COLUMNS.get(name, set()) - rows[0].keys()
    if missing:
        raise UserError(
            f"{files[0]} has the columns {', '.join(map(repr, rows[0]))}; task {name!r} reads {', '.join(sorted(COLUMNS[name]))}."
        )
