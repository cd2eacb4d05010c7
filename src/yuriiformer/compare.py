"""The main job: several arms, several seeds, the same batches, one budget, a verdict.

Every run is an ordinary run directory under OUT/runs, so a killed comparison goes on where it stood.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import statistics
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import Config, ModelConfig, TrainingConfig, as_dict, flat_keys, override, parse
from .data.corpus import Corpus
from .engines import Engine, Job, local
from .errors import UserError, unknown
from .files import lock, read_json, write_json
from .model import training_flops_per_token
from .presets import SCALED, SECOND_TABLE, ZERO_START
from .progress import Meter
from .rule import find_rule
from .signals import Stop
from .surgery import operate
from .training.distributed import World
from .training.loop import train
from .training.run import Run, definite

CALIBRATION_STEPS, CALIBRATION_ROUNDS = 40, 3
# What all arms of a comparison share: another batch or precision in one arm would not be a paired comparison.
SHARED = {
    "steps", "batch", "micro_batch", "seed", "evaluate_every", "evaluate_sequences", "checkpoint_every", "keep",
    "keep_best", "parallel", "device", "precision", "compile", "attention", "loss_chunk", "context", "vocabulary",
}  # fmt: skip
CALIBRATION = "calibration"  # a folder for short runs that are thrown away


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: a name as the user wrote it, and the config it means."""

    name: str
    config: Config

    @property
    def slug(self) -> str:
        return re.sub(r"[^\w.=-]+", "_", self.name).strip("_")

    def path(self, out: Path, seed: int) -> Path:
        """The run directory of a seed in the comparison's folder."""
        return out / "runs" / f"{self.slug}-seed{seed}"


@dataclass(frozen=True)
class Budget:
    """What every arm may spend: `tokens`, `flops` (training) or `seconds` (of training on this machine)."""

    kind: str
    amount: float


def parse_arm(text: str, base: Config, shared: Collection[str] = SHARED) -> Arm:
    """`RULE[:SPLITTING][,KEY=VALUE ...]` over a base config.

    A key is a field of the model or of the training, an option or a coefficient of the rule. With a start run, the
    model is the one of the rule that computes what the run computes.
    Raises UserError for a key that is none, or that changes what the start run computes.
    """
    head, *assignments = text.split(",")
    name, _, splitting = head.partition(":")
    rule = find_rule(name)
    kept = Run(Path(base.start)).config.model if base.start else None
    if kept:
        _refuse_changes("", base, kept)
        base = dataclasses.replace(base, model=operate(kept, name))
        splitting = base.model.splitting if splitting in ("", "auto") else splitting
    changes: dict[str, Any] = {"model.rule": name, "model.splitting": splitting or "auto"}
    values, options = dict(base.model.values), dict(base.model.options)
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"arm {text!r}: {assignment!r} must be KEY=VALUE.")
        if key in shared:
            section = "model" if key in flat_keys(ModelConfig) else "training"
            raise UserError(f"arm {text!r}: {key} is the same for all arms; give it as --set {section}.{key}={value}")
        if key in flat_keys(ModelConfig):
            changes[f"model.{key}"] = value
        elif key in flat_keys(TrainingConfig):
            changes[f"training.{key}"] = value
        elif key in rule.options:
            options[key] = parse(value, type(rule.options[key][0]))
        elif key in rule.coefficients:
            values[key] = parse(value, float)
        else:
            known = {*flat_keys(ModelConfig), *flat_keys(TrainingConfig), *rule.options, *rule.coefficients}
            raise unknown(f"arm {text!r}: key", key, known)
    changes["model.values"] = {k: v for k, v in values.items() if k in rule.coefficients}
    changes["model.options"] = {k: v for k, v in options.items() if k in rule.options}
    arm = Arm(text, override(base, changes))
    if kept:
        new_velocity = len(rule.streams) > len(find_rule(kept.rule).streams)
        _refuse_changes(f"arm {text!r}: ", arm.config, base.model, "velocity_start" if new_velocity else "")
    return arm


def _refuse_changes(where: str, config: Config, kept: ModelConfig, but: str = "") -> None:
    """What starts from a run computes what the run computes: only the start of a new velocity is free."""
    for key, value in as_dict(config.model).items():
        if key != but and value != (own := getattr(kept, key)):
            raise UserError(
                f"{where}{key} is {value!r}; to compute what the start run {config.start} computes it must be {own!r}."
            )


def controls(names: Sequence[str]) -> list[str]:
    """The honest controls that a comparison of these arms lacks: the baseline with momentum's parameters, and each
    momentum arm with no parameters more, beside the baseline with the same scale (see `presets`)."""
    baseline, *others = names
    scaled = baseline if SCALED in baseline else f"{baseline},{SCALED}"
    momentum = [
        name for name in others if len(find_rule(re.split("[:,]", name)[0]).streams) > 1 and ZERO_START not in name
    ]
    wanted = [f"{baseline},{SECOND_TABLE}", scaled, *(f"{n},{ZERO_START},{SCALED}" for n in momentum)]
    return [name for name in wanted if name not in names] if momentum else []


def compare(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    budget: Budget,
    corpus: Corpus,
    out: Path,
    command: str,
    stop: Stop,
    world: World,
    engine: Engine = local,
) -> None:
    """Train every arm with every seed into `out`, or what is missing of it. The first arm is the baseline.

    The processes of a world train one run after the other together; another engine has processes of its own.

    Raises UserError when `out` holds another comparison, Interrupted (everything saved) when asked to stop.
    """
    with Meter("comparing", None) as meter:
        made = [(arm, *definite(arm.config, corpus)) for arm in arms]
        meter.line(f"{len(arms)} arms x {len(seeds)} seeds on {made[0][2]}")
        arms = [dataclasses.replace(arm, config=config) for arm, config, _ in made]
        for i, arm in enumerate(arms):
            if same := [other.name for other in arms[:i] if other.config == arm.config or other.slug == arm.slug]:
                raise UserError(f"arms {same[0]!r} and {arm.name!r} are the same; name each once.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out.")
    if world.size > 1 and budget.kind == "seconds":
        raise UserError("--seconds measures one process; give several of them --tokens or --flops.")
    with ExitStack() as held:
        world.lead(lambda: held.enter_context(_held(out)))
        steps = world.lead(lambda: _plan(arms, seeds, budget, corpus, out, command, stop))
        _run(arms, seeds, steps, out, stop, world, engine)


@contextmanager
def _held(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    with lock(out, "comparison"):
        yield


def _run(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    steps: dict[str, int],
    out: Path,
    stop: Stop,
    world: World,
    engine: Engine,
) -> None:
    """Train what is missing, seed by seed, so that an early look has every arm."""
    runs = [(seed, arm) for seed in seeds for arm in arms]
    jobs = [
        Job(
            arm.path(out, seed),
            override(arm.config, {"training.seed": seed, "training.steps": steps[arm.name]}),
            f"[{number}/{len(runs)}] {arm.name}, seed {seed}",
        )
        for number, (seed, arm) in enumerate(runs, 1)
    ]
    finished = world.lead(lambda: [job.finished for job in jobs])
    with Meter("comparing", sum(job.flops for job in jobs)) as meter:
        meter.skip(sum(job.flops for job, done in zip(jobs, finished, strict=True) if done))
        if missing := [job for job, done in zip(jobs, finished, strict=True) if not done]:
            engine(missing, meter, stop, world)


def _plan(
    arms: Sequence[Arm], seeds: Sequence[int], budget: Budget, corpus: Corpus, out: Path, command: str, stop: Stop
) -> dict[str, int]:
    """The steps of each arm; written down before the first run, and checked when the comparison goes on."""
    wanted = {
        "corpus": corpus.identity,
        "start": Run(Path(arms[0].config.start)).weights if arms[0].config.start else None,
        "seeds": list(seeds),
        "budget": dataclasses.asdict(budget),
        "arms": {arm.name: as_dict(arm.config) for arm in arms},
        "rules": {arm.name: find_rule(arm.config.model.rule).sha256 for arm in arms},
    }
    file = out / "plan.json"
    if file.is_file():
        plan = read_json(file)
        for key, value in wanted.items():
            if json.dumps(plan.get(key)) != json.dumps(value):  # the order of the arms counts
                raise UserError(
                    f"{out} holds a comparison with another {key}; go on with the same command, or choose another --out."
                )
        return {name: int(steps) for name, steps in plan["steps"].items()}
    if any(p.name not in ("corpus", CALIBRATION, ".lock") for p in out.iterdir()):
        raise UserError(f"{out} is not empty and holds no comparison; choose another --out.")
    steps = _steps(arms, budget, corpus, out, stop)
    slugs = {arm.name: arm.slug for arm in arms}
    write_json(file, wanted | {"steps": steps, "slugs": slugs, "command": command})
    return steps


def _steps(arms: Sequence[Arm], budget: Budget, corpus: Corpus, out: Path, stop: Stop) -> dict[str, int]:
    match budget.kind:
        case "tokens":
            tokens = {arm.name: budget.amount for arm in arms}
        case "flops":
            tokens = {arm.name: budget.amount / training_flops_per_token(arm.config.model) for arm in arms}
        case _:
            tokens = {name: budget.amount * speed for name, speed in speeds(arms, corpus, out, stop).items()}
    steps = {a.name: round(tokens[a.name] / (a.config.training.batch * a.config.model.context)) for a in arms}
    for name, count in steps.items():
        if count < 1:
            raise UserError(f"a budget of {budget.amount:g} {budget.kind} is less than one step of arm {name!r}.")
    return steps


def speeds(
    arms: Sequence[Arm], corpus: Corpus, out: Path, stop: Stop,
    steps: int = CALIBRATION_STEPS, rounds: int = CALIBRATION_ROUNDS,
) -> dict[str, float]:  # fmt: skip
    """Tokens per second of each arm: the median of short runs that take turns."""
    path = out / CALIBRATION
    changes = {"steps": steps, "evaluate_every": steps, "evaluate_sequences": 1}
    measured: dict[str, list[float]] = {arm.name: [] for arm in arms}
    try:
        with Meter("calibrating", rounds * len(arms)) as meter:
            for arm in [*arms] * rounds:
                shutil.rmtree(path, ignore_errors=True)
                short = override(arm.config, {f"training.{key}": value for key, value in changes.items()})
                measured[arm.name].append(train(Run.create(path, short, corpus), stop)["tokens_per_second"])
                meter.advance(1, arm.name)
    finally:
        shutil.rmtree(path, ignore_errors=True)
    return {name: statistics.median(speeds) for name, speeds in measured.items()}
