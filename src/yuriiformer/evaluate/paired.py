"""Two evaluated models on the same blocks of text and the same documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_json
from ..report.statistics import mean, paired_blocks, paired_documents

Key = tuple[Any, ...]


def compare(a: Path, b: Path) -> dict[str, Any]:
    """b - a wherever both were asked the same. Raises UserError where that is nothing."""
    folders = [_evaluated(path) for path in (a, b)]
    both = set.intersection(*({file.stem for file in folder.glob("*.json")} for folder in folders))
    names = sorted(both, key=lambda name: (name != "validation", name))
    rows = [row for name in names for row in _rows(name, *folders)]
    if not rows:
        raise UserError(f"{a} and {b} were not asked the same: evaluate both on one corpus, or with the same --tasks.")
    return {"a": str(a), "b": str(b), "rows": rows}


def _evaluated(path: Path) -> Path:
    """The folder with the results, given as such or as what it belongs to."""
    for folder in (path / "evaluation", path):
        if any((folder / f"{file.stem}.json").is_file() for file in folder.glob("*.jsonl")):
            return folder
    raise UserError(f"{path} was not evaluated yet; do it with: yuriiformer evaluate {path}")


def _rows(name: str, a: Path, b: Path) -> list[dict[str, Any]]:
    """One row for each number that both measured."""
    if name != "validation":
        return _documents(name, a, b)
    first, second = (read_json(folder / f"{name}.json") for folder in (a, b))
    if any(first["settings"][key] != second["settings"][key] for key in ("corpus", "context")):
        return []
    blocks, others = _lines(a / f"{name}.jsonl"), _lines(b / f"{name}.jsonl")
    test = paired_blocks([x["loss"] for x in blocks], [x["loss"] for x in others], [x["tokens"] for x in blocks])
    return [{"task": name, "metric": "loss", "n": len(blocks), "a": first["loss"], "b": second["loss"]} | test]


def _documents(name: str, a: Path, b: Path) -> list[dict[str, Any]]:
    """Documents count as the same when their contents and the whole prompt, few-shot examples included, are."""
    first, second = ({_key(line): line for line in _lines(folder / f"{name}.jsonl")} for folder in (a, b))
    both: dict[Key, list[Key]] = {}
    for key in first.keys() & second.keys():
        both.setdefault(key[:2], []).append(key)
    rows = []
    for (task, kind), keys in sorted(both.items()):
        keys.sort(key=str)
        for metric in sorted(first[keys[0]].keys() & second[keys[0]].keys() - IDENTITY):
            x, y = ([lines[key][metric] for key in keys] for lines in (first, second))
            if all(isinstance(value, int | float) for value in (*x, *y)):
                label = metric if kind == "none" else f"{metric}, {kind}"
                means = {"a": mean(x), "b": mean(y)}
                rows.append({"task": task, "metric": label, "n": len(keys)} | means | paired_documents(x, y))
    return rows


IDENTITY = {"task", "filter", "id", "document", "prompt", "target", "answers"}


def _key(line: dict[str, Any]) -> Key:
    return tuple(line[key] for key in ("task", "filter", "id", "document", "prompt"))


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is missing or damaged: {error}") from None
