"""Training, top to bottom."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..data.corpus import Corpus
from ..data.tokenizer import END_OF_TEXT
from ..errors import EnvironmentFault, Interrupted, UserError
from ..files import append_line, lock, read_json, remove_partials, sync, write_json
from ..generate import generate
from ..machine import memory_peak
from ..model import LanguageModel, flops_per_token, training_flops_per_token
from ..signals import Stop
from .checkpoint import Progress, Writer, load_model, load_optimizers, newest_whole, require_room, snapshot
from .device import describe, peak_flops
from .distributed import World
from .kernels import attention, fastest_attention
from .memory import fit
from .optimizer import lr_factor
from .run import Run
from .step import Batch, Stepper, out_of_memory

LOG_EVERY = 10  # steps per line of metrics.jsonl
PATIENCE = 10  # refused steps in a row, counted when a line is logged, after which training goes back to its checkpoint
Observer = Callable[[dict[str, Any]], None]


class Diverged(UserError):
    """Loss or gradient is no number any more."""


class Unstable(Exception):
    """Nothing but refused steps: computed once more from the newest checkpoint, they may come out better."""


def train(run: Run, stop: Stop, observe: Observer = lambda record: None, world: World = World()) -> dict[str, Any]:  # noqa: B008
    """Train a run to its end, from its newest checkpoint where it has one; return its summary.

    observe: called in the leading process with each line of metrics.jsonl, and with {"step", "warning" or "note"}.
    Raises Interrupted (everything saved) when `stop` was requested, Diverged when the loss is no number any more,
    UserError when the run is complete or another process trains it, EnvironmentFault when the machine refuses.
    """
    with ExitStack() as held:
        world.lead(lambda: held.enter_context(lock(run.path, "run")))
        if world.lead(lambda: run.complete):
            raise UserError(f"{run.path} is complete: {run.config.training.steps} steps are done.")
        rewound: set[int] = set()
        while True:
            try:
                return _train(run, stop, observe if world.leads else lambda record: None, world, held)
            except Unstable as error:
                # A fault of the hardware does not come back when the same steps are computed again; divergence does.
                at = world.lead(lambda: run.step)
                if at in rewound:
                    raise Diverged(f"{run.path} diverged: {error}; lower the learning rates.") from None
                rewound.add(at)
                if world.leads:
                    observe({"step": at, "warning": f"{error}; going back to step {at}"})
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                raise EnvironmentFault(f"out of memory: {str(error).splitlines()[0]}") from None


def _train(run: Run, stop: Stop, observe: Observer, world: World, held: ExitStack) -> dict[str, Any]:
    config, corpus = run.config.training, run.corpus()
    context = run.config.model.context
    found, state, complaints = world.lead(lambda: _newest(run))
    checkpoint, progress = run.checkpoints / found, Progress(**state)

    def warn(text: str) -> None:
        observe({"step": progress.step, "warning": text})

    for complaint in complaints:
        warn(complaint)
    model = run.build()
    if found:
        load_model(checkpoint, model)
    micro, kernel = config.micro_batch or progress.micro_batch, progress.attention
    if not micro:
        micro, line = world.lead(lambda: fit(run.config, world.size))
        observe({"step": progress.step, "note": line})
    if not kernel:
        kernel, line = world.lead(lambda: fastest_attention(run.config))
        if line:
            observe({"step": progress.step, "note": line})
    held.enter_context(attention(kernel))
    config = dataclasses.replace(config, micro_batch=micro)
    stepper = Stepper(model, config, world, stop, warn)
    if found:
        load_optimizers(checkpoint, model, stepper.optimizers)
        stepper.remember(progress)
    logged = world.lead(lambda: run.truncate_metrics(progress.step))
    best = min((record["validation"] for record in logged if "validation" in record), default=math.inf)
    mean = logged[-1]["loss"] if logged else math.nan
    world.lead(lambda: require_room(run.checkpoints, 3 * sum(p.numel() * p.element_size() for p in model.parameters())))

    mine = slice(world.rank, None, world.size)
    validation = [
        stepper.to_device((xs[mine], ys[mine]))
        for xs, ys in corpus.validation_batches(
            sequences=config.evaluate_sequences, batch=config.batch, context=context
        )
    ]
    _warm_up(stepper, validation[0])

    def synchronised_time() -> float:
        if stepper.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def save(writer: Writer, done: int, measured: float | None) -> None:
        tensors = snapshot(model, stepper.optimizers)
        if world.leads:
            if run.metrics.is_file():
                sync(run.metrics)
            total, count = losses.tolist()
            state = Progress(done, seconds, total, int(count), *stepper.guard.numbers(), stepper.micro, kernel)
            writer.submit(state, measured, tensors)

    def finish(writer: Writer) -> None:
        if poisoned := world.lead(writer.finish):
            raise Unstable(poisoned)

    seconds = progress.seconds
    losses = torch.tensor([progress.loss_sum, progress.loss_count], device=stepper.device)  # since the log's last line
    saved = progress.step if found else None
    with Writer(run.checkpoints, config.keep, config.keep_best, warn) as writer:
        started = synchronised_time()
        for step, batch in _batches(corpus, run, progress.step, world, stepper):
            result = stepper(step, batch)
            if result is None:
                seconds += synchronised_time() - started
                if saved != step:
                    save(writer, step, None)
                finish(writer)
                raise Interrupted(f"stopped at step {step} of {config.steps}; saved.")
            loss, norm = result
            losses += torch.stack([loss.nan_to_num(0, 0, 0), loss.isfinite().float()])
            done = step + 1
            last = done == config.steps
            evaluate = last or done % config.evaluate_every == 0
            log = evaluate or done % LOG_EVERY == 0
            due = last or (config.checkpoint_every and done % config.checkpoint_every == 0)
            if not (log or due):
                continue
            seconds += synchronised_time() - started
            if poisoned := world.lead(writer.poll):
                raise Unstable(poisoned)
            if stepper.guard.longest.item() >= PATIENCE:
                raise Unstable(f"{PATIENCE} steps in a row until step {done} had a loss or gradient beyond reason")
            measured = None
            if log:
                total, count = losses.tolist()
                mean = total / count if count else mean
                record = {"step": done, "tokens": done * config.batch * context, "seconds": round(seconds, 4)}
                record |= {
                    "loss": mean,
                    "gradient_norm": norm.nan_to_num(0, 0, 0).item(),
                    "lr": lr_factor(step, config),
                }
                record |= _utilisation(run, record, logged[-1] if logged else None, world)
                if skipped := int(stepper.guard.skipped.item()):
                    record["skipped"] = skipped
                if evaluate:
                    measured = record["validation"] = stepper.validate(validation)
                    if not math.isfinite(measured):
                        raise Unstable(f"the validation loss of step {done} is no number")
                    due = due or (config.keep_best and measured < best)
                    best = min(best, measured)
                if world.leads:
                    append_line(run.metrics, json.dumps(record))
                logged.append(record)
                observe(record)
            if done % LOG_EVERY == 0:
                losses.zero_()
            # Amid refused steps nothing is saved: what training may have to go back to comes before them.
            if last or (due and not stepper.guard.row.item()):
                save(writer, done, measured)
                saved = done
            started = synchronised_time()
        finish(writer)

    world.lead(lambda: write_json(run.path / "summary.json", _summary(run, corpus)))
    return read_json(run.path / "summary.json")


def _warm_up(stepper: Stepper, batch: Batch) -> None:
    """Compile and allocate before the clock starts.

    A kill amid a compilation leaves half a library under its final name, which torch would load for ever.
    """
    first = batch[0][: stepper.micro], batch[1][: stepper.micro]
    while True:
        try:
            stepper.gradient(first)
            break
        except Exception as error:
            if not (broken := re.search(r"(/\S+\.so): ", str(error))) or "ImportError" not in repr(error):
                raise
            Path(broken[1]).unlink(missing_ok=True)
            torch._dynamo.reset()
        finally:
            stepper.clear()


def _utilisation(run: Run, now: dict[str, Any], before: dict[str, Any] | None, world: World) -> dict[str, float]:
    """Peak bytes of this process, and the share of the device's peak FLOPs since the line before, where that is known."""
    device, precision = run.config.training.device, run.config.training.precision
    seconds, tokens = (now[k] - (before[k] if before else 0) for k in ("seconds", "tokens"))
    found: dict[str, float] = {"memory": torch.cuda.max_memory_allocated() if device == "cuda" else memory_peak()}
    if seconds and (peak := peak_flops(str(describe(device)["device"]), precision)):
        found["mfu"] = training_flops_per_token(run.config.model) * tokens / seconds / (peak * world.size)
    return found


def _newest(run: Run) -> tuple[str, dict[str, Any], list[str]]:
    """The name of the newest whole checkpoint (empty: none), its progress, and what was passed over."""
    remove_partials(run.checkpoints)  # of a process that was killed
    checkpoint, state, complaints = newest_whole(run.checkpoints)
    return (checkpoint.name, state["progress"], complaints) if checkpoint else ("", {}, [])


def _batches(corpus: Corpus, run: Run, first: int, world: World, stepper: Stepper) -> Iterator[tuple[int, Batch]]:
    """This process's share of each batch; the next one is read while the device is at work."""
    config, context = run.config.training, run.config.model.context

    def read(step: int) -> Batch:
        rows = corpus.batch_at(
            step, seed=config.seed, batch=config.batch, context=context, rank=world.rank, world=world.size
        )
        return stepper.to_device(rows)

    with ThreadPoolExecutor(1, "batches") as pool:
        coming = pool.submit(read, first)
        for step in range(first, config.steps):
            batch = coming.result()
            if step + 1 < config.steps:
                coming = pool.submit(read, step + 1)
            yield step, batch


def _summary(run: Run, corpus: Corpus) -> dict[str, Any]:
    """What a finished run says of itself, by its last checkpoint."""
    config, records = run.config, run.records()
    validations = [r for r in records if "validation" in r]
    best = min(validations, key=lambda r: r["validation"])
    model = run.load()[0].to(config.training.device)
    held_out = corpus.validation_batches(sequences=1, batch=1, context=config.model.context)
    return {
        "steps": config.training.steps,
        "tokens": records[-1]["tokens"],
        "seconds": records[-1]["seconds"],
        "tokens_per_second": _median_speed(records),
        "training_loss": records[-1]["loss"],
        "final_validation": validations[-1]["validation"],
        "best_validation": best["validation"],
        "best_step": best["step"],
        "skipped": records[-1].get("skipped", 0),
        "bits_per_byte": validations[-1]["validation"] / math.log(2) / corpus.bytes_per_token,
        "parameters": model.parameter_counts(),
        "forward_flops_per_token": flops_per_token(config.model),
        "coefficients": model.learned_coefficients(),
        "streams": model.rule.streams,
        "sample": _sample(run, model, held_out[0][0][0]),
    }


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
