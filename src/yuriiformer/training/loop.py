"""Training, top to bottom."""

from __future__ import annotations

import itertools
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ..data.tokenizer import END_OF_TEXT
from ..errors import Interrupted, UserError
from ..files import disk_errors, lock, write_json
from ..generate import generate
from ..model import LanguageModel, flops_per_token
from .checkpoint import Progress, restore, save
from .optimizer import lr_factor, make_optimizers
from .run import Run

LOG_EVERY = 10  # steps per line of metrics.jsonl
Observer = Callable[[dict[str, Any]], None]


class Diverged(UserError):
    """Loss or gradient is no number any more."""


class Stop:
    """Whether a signal has asked to stop. A second signal ends the process at once."""

    requested = False

    @contextmanager
    def on_signals(self) -> Iterator[Stop]:
        def handle(number: int, frame: FrameType | None) -> None:
            self.requested = True
            signal.signal(number, previous[signal.Signals(number)])

        previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def train(run: Run, stop: Stop, observe: Observer = lambda record: None) -> dict[str, Any]:
    """Train a run to its end, from its newest checkpoint where it has one; return its summary.

    observe: called with each line of metrics.jsonl.
    Raises Interrupted (everything saved) when `stop` was requested, Diverged when the loss is no number any more,
    UserError when the run is complete or another process trains it.
    """
    with lock(run.path, "run"):
        return _train(run, stop, observe)


def _train(run: Run, stop: Stop, observe: Observer) -> dict[str, Any]:
    if run.complete:
        raise UserError(f"{run.path} is complete: {run.config.training.steps} steps are done.")
    config, corpus = run.config.training, run.corpus()
    context, micro = run.config.model.context, config.micro_batch or config.batch
    device = torch.device(config.device)
    model = run.build().to(device)
    optimizers = make_optimizers(model, config)
    progress, complaints = restore(run.checkpoints, model, optimizers)
    for complaint in complaints:
        observe({"step": progress.step, "warning": complaint})
    run.truncate_metrics(progress.step)
    if config.compile == "yes":
        model.compile_parts()

    def to_device(array: Any) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            return model.loss(inputs, targets)

    def validate() -> float:  # with the training graph: the same numbers, and nothing more to compile
        return torch.stack([loss_of(*pair).detach() for pair in validation]).mean().item()

    def synchronised_time() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    batches = corpus.validation_batches(sequences=config.evaluate_sequences, batch=config.batch, context=context)
    validation = [
        pair for xs, ys in batches for pair in zip(to_device(xs).split(micro), to_device(ys).split(micro), strict=True)
    ]
    loss_of(*validation[0]).backward()  # compiles and warms up before the clock starts
    for optimizer in optimizers:
        optimizer.zero_grad()

    seconds, loss_sum = progress.seconds, torch.tensor(progress.loss_sum, device=device)
    with disk_errors(run.metrics), run.metrics.open("a", encoding="utf-8") as metrics:
        started = synchronised_time()
        for step in range(progress.step, config.steps):
            factor = lr_factor(step, config)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * factor
            inputs, targets = map(
                to_device, corpus.batch_at(step, seed=config.seed, batch=config.batch, context=context)
            )
            for pair in zip(inputs.split(micro), targets.split(micro), strict=True):
                loss = loss_of(*pair) * (micro / config.batch)
                loss.backward()
                loss_sum += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

            done, stopping = step + 1, stop.requested  # read once: a signal may come at any moment
            last = done == config.steps
            evaluate = last or done % config.evaluate_every == 0
            log = evaluate or done % LOG_EVERY == 0
            checkpoint = last or stopping or (config.checkpoint_every and done % config.checkpoint_every == 0)
            if not (log or checkpoint):
                continue
            seconds += synchronised_time() - started
            mean = loss_sum.item() / (step % LOG_EVERY + 1)
            if not (math.isfinite(mean) and torch.isfinite(norm)):
                raise Diverged(
                    f"{run.path} diverged by step {done}: loss or gradient is no number; lower the learning rates."
                )
            if log:
                record = {"step": done, "tokens": done * config.batch * context, "seconds": round(seconds, 4)}
                record |= {"loss": mean, "gradient_norm": norm.item(), "lr": factor}
                if evaluate:
                    record["validation"] = validate()
                    if not math.isfinite(record["validation"]):
                        raise Diverged(f"{run.path} diverged by step {done}: the validation loss is no number.")
                metrics.write(json.dumps(record) + "\n")
                metrics.flush()
                observe(record)
            if done % LOG_EVERY == 0:
                loss_sum.zero_()
            if checkpoint:
                progress = Progress(done, seconds, loss_sum.item())
                save(run.checkpoints, progress, model, optimizers, config.keep)
            if stopping and not last:
                raise Interrupted(f"stopped at step {done} of {config.steps}; saved.")
            started = synchronised_time()

    records = run.records()
    validations = [r for r in records if "validation" in r]
    best = min(validations, key=lambda r: r["validation"])
    summary = {
        "steps": config.steps,
        "tokens": records[-1]["tokens"],
        "seconds": records[-1]["seconds"],
        "tokens_per_second": _median_speed(records),
        "training_loss": records[-1]["loss"],
        "final_validation": validations[-1]["validation"],
        "best_validation": best["validation"],
        "best_step": best["step"],
        "bits_per_byte": validations[-1]["validation"] / math.log(2) / corpus.bytes_per_token,
        "parameters": model.parameter_counts(),
        "forward_flops_per_token": flops_per_token(run.config.model),
        "coefficients": model.learned_coefficients(),
        "streams": model.rule.streams,
        "sample": _sample(run, model, batches[0][0][0]),
    }
    write_json(run.path / "summary.json", summary)
    return summary


def _median_speed(records: list[dict[str, Any]]) -> float:
    """Tokens per second of training alone, without validation and checkpoints: the median over the log's intervals."""
    points = [{"tokens": 0, "seconds": 0.0}, *records]
    speeds = [
        (b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"])
        for a, b in itertools.pairwise(points)
        if b["seconds"] > a["seconds"]
    ]
    return sorted(speeds)[len(speeds) // 2]


def _sample(run: Run, model: LanguageModel, validation: Any) -> dict[str, str]:
    """A continuation of the first validation tokens: the same prompt for every arm."""
    tokenizer, prompt = run.tokenizer(), validation[:32].tolist()
    ids = list(generate(model, prompt, tokens=120, temperature=0.8, top_k=50))
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = ids[: ids.index(end)] if end in ids else ids
    full = tokenizer.decode(prompt + ids, skip_special_tokens=False)
    start = tokenizer.decode(prompt, skip_special_tokens=False)
    return {"prompt": start, "text": full[len(start) :]}
