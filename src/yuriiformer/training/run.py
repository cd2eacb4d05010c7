"""A run directory: what was asked, on what machine, what was measured, and the weights.

config.json      the whole configuration, nothing left at `auto`
env.json         versions, machine, checksums of the corpus, of a rule file and of the weights it starts from
tokenizer.json   a copy, so that the run can generate text without its corpus
rule.py          a copy of a rule file from outside the package, for the record
metrics.jsonl    one line per logged step
checkpoints/     the newest few, and the best
summary.json     written last: its presence means the run is complete
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .. import __version__
from ..config import Config, as_dict, from_dict
from ..data.corpus import TOKENIZER, Corpus
from ..data.tokenizer import read_tokenizer
from ..errors import UserError
from ..files import new_folder, read_json, sha256, write_bytes, write_json, write_text
from ..model import LanguageModel, checked
from ..rule import find_rule
from .checkpoint import MODEL, newest_first, newest_whole, restore
from .device import describe, resolve

MEASURED = ("seconds", "memory", "mfu")  # of metrics.jsonl: what differs when the same run is done again


def padded_vocabulary(tokens: int) -> int:
    """A tokenizer's vocabulary, rounded up to 64 as nanoGPT pads 50,257 to 50,304."""
    return -(-tokens // 64) * 64


def definite(config: Config, corpus: Corpus) -> tuple[Config, str]:
    """The config with vocabulary, splitting and device settings filled in, checked; and a line about the device."""
    start = Run(Path(config.start)) if config.start else None
    if start and start.tokenizer().get_vocab() != read_tokenizer(corpus.path / TOKENIZER).get_vocab():
        raise UserError(
            f"corpus {corpus.path} has another tokenizer than the start run {start.path}; prepare the text again "
            f"with --tokenizer {start.path / TOKENIZER}"
        )
    for key, value in as_dict(config.training).items():
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise UserError(f"training.{key} must be a number that is not negative; got {value}.")
    model = config.model
    if model.vocabulary == 0:
        model = dataclasses.replace(model, vocabulary=padded_vocabulary(corpus.vocabulary))
    if model.vocabulary < corpus.vocabulary:
        raise UserError(
            f"model.vocabulary is {model.vocabulary}; the corpus {corpus.path} has {corpus.vocabulary} tokens."
        )
    model = checked(model)
    if model.rule.endswith(".py"):
        model = dataclasses.replace(model, rule=str(Path(model.rule).resolve()))
    training, line = resolve(config.training)
    for key in ("steps", "batch", "evaluate_every", "evaluate_sequences"):
        if getattr(training, key) < 1:
            raise UserError(f"training.{key} must be at least 1; got {getattr(training, key)}.")
    corpus.batch_at(0, seed=training.seed, batch=1, context=model.context)  # raises when the context is too long
    corpus.validation_batches(sequences=1, batch=1, context=model.context)
    places = {"corpus": str(corpus.path.resolve()), "start": str(start.path.resolve()) if start else ""}
    return Config(**places, model=model, training=training), line


class Run:
    """An existing run directory; its weights are those of its newest checkpoint, or of its best.

    Raises UserError when it is none, or its config is damaged.
    """

    def __init__(self, path: Path, best: bool = False) -> None:
        self.path, self.best = path, best
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is no run directory (it has no config.json).")
        self.config = from_dict(Config, read_json(path / "config.json"))
        self.env = read_json(path / "env.json")

    @classmethod
    def create(cls, path: Path, config: Config, corpus: Corpus) -> Run:
        """Make the directory for a definite config. Raises UserError when something is there."""
        if path.exists():
            raise UserError(f"{path} exists already; go on with --resume {path}, or choose another --out.")
        start = {"start": cls(Path(config.start)).weights} if config.start else {}
        with cls.written(path, config, {"corpus": corpus.identity, **start}) as folder:
            write_bytes(folder / TOKENIZER, (corpus.path / TOKENIZER).read_bytes())
        return cls(path)

    @staticmethod
    @contextmanager
    def written(path: Path, config: Config, origin: dict[str, Any]) -> Iterator[Path]:
        """A new run directory with its config and env.json; its tokenizer is to be added in the block."""
        with new_folder(path) as folder:
            write_json(folder / "config.json", as_dict(config))
            env = {
                "yuriiformer": __version__,
                **origin,
                "rule_sha256": find_rule(config.model.rule).sha256,
                **describe(config.training.device),
            }
            write_json(folder / "env.json", env)
            if config.model.rule.endswith(".py"):
                write_bytes(folder / "rule.py", Path(config.model.rule).read_bytes())
            (folder / "checkpoints").mkdir()
            yield folder

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def complete(self) -> bool:
        return (self.path / "summary.json").is_file()

    def require_complete(self, unfinished: bool = False) -> None:
        """Raises UserError for a run in training, unless an unfinished one will do."""
        if not (self.complete or "imported_from" in self.env or unfinished):
            raise UserError(
                f"{self.path} is at step {self.step} of {self.config.training.steps}; finish it with "
                f"`yuriiformer train --resume {self.path}`, or give --unfinished to take its newest checkpoint."
            )

    @property
    def step(self) -> int:
        """The step of the newest checkpoint, 0 where there is none."""
        return max((step for step, _ in newest_first(self.checkpoints)), default=0)

    @property
    def weights(self) -> dict[str, Any]:
        """Those of the whole checkpoint it is asked for, by run, step and checksum. Raises UserError without one."""
        _, state, _ = newest_whole(self.checkpoints, required=True, best=self.best)
        sha256 = state["files"][MODEL]["sha256"]
        return {"run": self.path.resolve().name, "step": state["progress"]["step"], "sha256": sha256}

    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.path / TOKENIZER)

    def corpus(self) -> Corpus:
        """The corpus the run was made with. Raises UserError when it is another one now, or when it has none."""
        if not self.config.corpus:
            raise UserError(
                f"{self.path} was imported and has no corpus; train on from it as a new run: "
                f"yuriiformer train ARM --from {self.path} --out DIR"
            )
        corpus = Corpus(Path(self.config.corpus))
        if corpus.identity != self.env.get("corpus"):
            raise UserError(f"corpus {corpus.path} is not the one {self.path} was trained on (its sha256 differs).")
        return corpus

    def build(self) -> LanguageModel:
        """The model with its initial weights, those of its start run where it has one.

        Raises UserError when its rule file or start run is gone or has changed.
        """
        rule = self.config.model.rule
        if rule.endswith(".py") and not (Path(rule).is_file() and sha256(Path(rule)) == self.env.get("rule_sha256")):
            raise UserError(
                f"{self.path} was trained with the rule file {rule}, which is missing or has changed; "
                f"put the copy {self.path / 'rule.py'} back in its place."
            )
        model = LanguageModel(self.config.model, self.config.training.seed)
        if self.config.start and not newest_first(self.checkpoints):  # a checkpoint holds all weights itself
            self._start(model)
        return model

    def _start(self, model: LanguageModel) -> None:
        """Copy every tensor of the start run; what the model has besides (coefficients, tables) keeps its own start."""
        try:
            start = Run(Path(self.config.start))
            found = start.weights["sha256"]
        except UserError as error:
            raise UserError(f"config key start: {error}") from None
        if found != self.env.get("start", {}).get("sha256"):
            raise UserError(f"config key start: {start.path} has other weights now than those {self.path} starts from.")
        tensors, own = start.load()[0].state_dict(), model.state_dict()
        if foreign := [name for name, t in tensors.items() if name not in own or own[name].shape != t.shape]:
            raise UserError(
                f"config key start: tensor {foreign[0]} of {start.path} does not fit the model of {self.path}."
            )
        model.load_state_dict(tensors, strict=False)

    def load(self) -> tuple[LanguageModel, list[str]]:
        """The model with its weights, and a line for each damaged checkpoint passed over."""
        model = self.build()
        return model, restore(self.checkpoints, model, best=self.best)[1]

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def records(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl; a last line cut short by a kill is left out."""
        lines = self.metrics.read_text(encoding="utf-8").split("\n")[:-1] if self.metrics.is_file() else []
        try:
            return [json.loads(line) for line in lines]
        except json.JSONDecodeError as error:
            raise UserError(f"{self.metrics} is damaged: {error}") from None

    def truncate_metrics(self, step: int) -> list[dict[str, Any]]:
        """Drop what was logged after the checkpoint that training goes on from; return what is left."""
        kept = [record for record in self.records() if record["step"] <= step]
        write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))
        return kept
