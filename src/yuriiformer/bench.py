"""Training steps of arms that take turns in one process: time, utilisation, memory, and what a second stream costs.

Nothing is imitated: a step is `training.step.Stepper`'s own, on random tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from .config import Config, ModelConfig, TrainingConfig
from .model import LanguageModel, checked, training_flops_per_token
from .rule import find_rule
from .signals import Stop
from .splitting import find_splitting
from .training.device import describe, peak_flops, resolve
from .training.distributed import World
from .training.kernels import attention, attention_times, fastest_attention, now
from .training.memory import estimate, fit
from .training.step import Batch, Stepper

WARM_UP = 20  # steps of each contestant that are not timed
RESAMPLED = 2000  # bootstrap samples behind an interval of 95 %
VOCABULARY = 1024  # where a config leaves it to the corpus
THEIRS = "transformers GPT-2"
Tell = Callable[[str], None]


def bench(
    arms: Mapping[str, Config],
    steps: int,
    tell: Tell,
    advance: Callable[[float], None],
    *,
    warm_up: int = WARM_UP,
    transformers: bool = False,
) -> dict[str, Any]:
    """Time steps of each arm, by turns; the first arm is what the others are set beside.

    tell, advance: called with a line, and with the steps done. transformers: its GPT-2 of the first arm's size takes
    part, as its users train it (AdamW, eager).
    """
    configs = _definite(arms, tell)
    first = next(iter(configs.values()))
    training, model = first.training, first.model
    device, machine = training.device, describe(training.device)
    copied, multiplied = _copy_speed(device), _product_speed(device, training.precision)
    times: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}

    with attention(fastest_attention(first)[0]):
        contestants: dict[str, Stepper | TheirStepper] = {
            name: Stepper(LanguageModel(config.model), config.training, World(), Stop(), tell)
            for name, config in configs.items()
        }
        if transformers:
            contestants[THEIRS] = TheirStepper(first, tell)
        ids = torch.randint(model.vocabulary, (training.batch, model.context + 1), device=device)
        batch = ids[:, :-1], ids[:, 1:]
        for step in range(warm_up + steps):
            for name, stepper in contestants.items():
                others = _allocated(device) - _standing(stepper)
                started = now(device)
                stepper(step, batch)
                seconds = now(device) - started
                if step >= warm_up:
                    times.setdefault(name, []).append(seconds)
                    if device == "cuda":
                        peaks[name] = torch.cuda.max_memory_allocated() - others
            advance(1)

    tokens = training.batch * model.context
    rows = {
        name: _row(configs.get(name, first), seconds, tokens)
        | {"peak_bytes": peaks.get(name), "sequences_a_pass": contestants[name].micro}
        | {"step_bytes": peaks[name] - _standing(contestants[name]) if name in peaks else None}
        | _beside(seconds, next(iter(times.values())))
        for name, seconds in times.items()
    }
    _beyond(configs, rows, tokens, copied)
    return {
        "machine": machine,
        "steps": steps,
        "warm_up": warm_up,
        "tokens_per_step": tokens,
        "model": dataclasses.asdict(model),
        "training": dataclasses.asdict(training),
        "copy_bytes_per_second": copied,
        "matrix_product_flops": multiplied,
        "published_peak_flops": peak_flops(str(machine["device"]), training.precision),
        "attention_seconds": attention_times(first),
        "arms": rows,
    }


def _definite(arms: Mapping[str, Config], tell: Tell) -> dict[str, Config]:
    """What the arms say, with nothing left open; as many sequences a pass for all as fit for each."""
    found = {}
    for name, config in arms.items():
        model = checked(dataclasses.replace(config.model, vocabulary=config.model.vocabulary or VOCABULARY))
        training, line = resolve(config.training)
        found[name] = Config(model=model, training=training)
        if len(found) == 1:
            tell(line)
    fitting = []
    for name, config in found.items():
        micro, line = fit(config)
        fitting.append(config.training.micro_batch or micro)
        tell(f"{name}: {line}")
    micro = min(fitting)
    return {
        name: dataclasses.replace(config, training=dataclasses.replace(config.training, micro_batch=micro))
        for name, config in found.items()
    }


def _row(config: Config, seconds: list[float], tokens: int) -> dict[str, Any]:
    times, training = np.array(seconds), config.training
    median = float(np.median(times))
    flops = training_flops_per_token(config.model) * tokens / median
    peak = peak_flops(str(describe(training.device)["device"]), training.precision)
    return {
        "median_seconds": median,
        "interval": _interval(lambda chosen: np.median(times[chosen], axis=1), len(times)),
        "first_and_ninth_decile": [float(q) for q in np.quantile(times, [0.1, 0.9])],
        "tokens_per_second": tokens / median,
        "flops": flops,
        "mfu": peak and flops / peak,
        "estimated_bytes": estimate(config, training.micro_batch),
    }


def _beside(seconds: list[float], first: list[float]) -> dict[str, Any]:
    """The ratio of median steps, with its interval."""
    mine, base = np.array(seconds), np.array(first)
    if seconds is first:
        return {}
    return {
        "ratio": float(np.median(mine) / np.median(base)),
        "ratio_interval": _interval(lambda c: np.median(mine[c], axis=1) / np.median(base[c], axis=1), len(mine)),
    }


def _beyond(configs: Mapping[str, Config], rows: Mapping[str, Any], tokens: int, copied: float) -> None:
    """What a second stream must move, beside what could be copied in the time that its arm takes beyond the first one.

    Where the first arm has one stream and nothing but the rule differs.
    """
    first, *others = configs
    for name in others:
        config, base = configs[name], configs[first]
        floor = velocity_bytes(config.model, config.training)
        if floor is None or config.training != base.training or len(find_rule(base.model.rule).streams) > 1:
            continue
        beyond = rows[name]["median_seconds"] - rows[first]["median_seconds"]
        rows[name]["velocity_bytes_per_token"] = {"floor": floor, "copied_in_the_time": beyond / tokens * copied}


def _interval(statistic: Callable[[Any], Any], count: int) -> list[float]:
    """Bootstrap: the middle 95 % of the statistic over resampled steps; contestants of one turn stay together."""
    chosen = np.random.default_rng(0).integers(count, size=(RESAMPLED, count))
    return [float(q) for q in np.quantile(statistic(chosen), [0.025, 0.975])]


def velocity_bytes(model: ModelConfig, training: TrainingConfig) -> int | None:
    """The bytes a token that a second stream must move through memory in a training step, at the least.

    Between an oracle's answer and the next question, read and written once each, in numbers of `o` bytes (oracles) and
    `s` (streams): with one stream 2o + 2s forward and o + 3s backward (and o for the answer's gradient where its
    numbers are not the stream's); with a velocity, whose norm is undone in the backward pass instead of kept,
    2o + 4s and 3o + 4s. None where that arithmetic does not hold: a whole layer, or another number of streams.
    """
    rule = find_rule(model.rule)
    if rule.whole_layer or len(rule.streams) != 2:
        return None
    o = 2 if training.precision == "bf16" else 4
    s = 2 if training.streams == "bf16" else 4
    one = 3 * o + 5 * s + (o if s > o else 0)
    two = 5 * o + 8 * s
    return model.layers * len(find_splitting(rule, model.splitting).stages) * model.width * (two - one)


class TheirStepper:
    """A step of transformers' GPT-2 of a config's size, in fp32 on a CPU and in the config's precision on a GPU."""

    def __init__(self, config: Config, tell: Tell) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        model, training = config.model, config.training
        self.device, self.micro = training.device, training.micro_batch
        self.half = training.device == "cuda" and training.precision == "bf16"
        sizes: dict[str, Any] = {
            "n_embd": model.width,
            "n_layer": model.layers,
            "n_head": model.heads,
            "n_positions": model.context,
        }
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
        self.model = GPT2LMHeadModel(GPT2Config(vocab_size=model.vocabulary, **sizes))
        self.model.to(torch.device(self.device))  # type: ignore[arg-type]
        self.optimizers = [torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)]
        tell(f"{THEIRS}: {'bf16' if self.half else 'fp32'}, AdamW, eager")

    def __call__(self, step: int, batch: Batch) -> None:
        inputs, _ = batch
        for rows in inputs.split(self.micro):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
                loss = self.model(rows, labels=rows).loss
            (loss * len(rows) / len(inputs)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizers[0].step()
        self.optimizers[0].zero_grad()


def _allocated(device: str) -> int:
    if device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _standing(stepper: Stepper | TheirStepper) -> int:
    """Bytes of weights and optimiser states."""
    states = (t for o in stepper.optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t))
    return sum(t.nbytes for t in (*states, *stepper.model.parameters()))


def _fastest(device: str, work: Callable[[], Any]) -> float:
    """Seconds of the fastest of ten calls."""
    found = []
    for _ in range(10):
        started = now(device)
        work()
        found.append(now(device) - started)
    return min(found)


def _copy_speed(device: str) -> float:
    """Bytes a second, read and written."""
    source = torch.zeros(2**30 if device == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(device, lambda: target.copy_(source))


def _product_speed(device: str, precision: str) -> float:
    """FLOP a second of a large matrix product."""
    size, dtype = (8192 if device == "cuda" else 2048), (torch.bfloat16 if precision == "bf16" else torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / _fastest(device, lambda: a @ a)
