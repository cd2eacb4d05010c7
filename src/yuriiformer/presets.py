"""Runs with a name, as functions, and the published numbers they are held against. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from .config import Config, ModelConfig, TrainingConfig
from .errors import UserError, unknown

BASELINE, MOMENTUM = "gradient_descent", "nesterov"
# Honest controls, as changes to an arm: as many parameters as momentum's own tables bring, without momentum ...
SECOND_TABLE = "second_table=true"
# ... and momentum without one parameter more. The velocity norm gives v unit size while x0 has size 0.02, so from
# v0 = 0 the velocity would swamp the token's own embedding; a baseline with the same scale stands beside it.
SCALED = "x0_scale=30"
ZERO_START = "velocity_start=zeros"
CONTROLS = (f"{BASELINE},{SECOND_TABLE}", f"{BASELINE},{SCALED}", f"{MOMENTUM},{ZERO_START},{SCALED}")

# The arms of `compare` when none are named; the first is the baseline.
DEMO_ARMS = (BASELINE, f"{BASELINE},{SECOND_TABLE}", MOMENTUM)

# ... and when they start from a run without momentum.
START_ARMS = (BASELINE, MOMENTUM)

ARM_HELP = """an arm is RULE[:SPLITTING][,KEY=VALUE ...]; a KEY is a config key without its section, an option or a
coefficient of the rule. Examples: nesterov   nesterov:strang   heavy_ball,velocity_start=zeros,x0_scale=30
imex,k=2   nesterov,mu=0.5,beta=0.5   my_rule.py:euler"""


def demo(rule: str = MOMENTUM) -> Config:
    """Half a minute on two CPU cores: 4 layers of width 96, context 128, 400 steps of 2,048 tokens."""
    return Config(model=ModelConfig(rule=rule, layers=4, heads=3, width=96, context=128), training=TrainingConfig())


def tinystories_small(rule: str = MOMENTUM) -> Config:
    """The paper's small model on TinyStories: 12 layers of width 768, 10,000 steps of 491,520 tokens."""
    return _paper(rule, layers=12, heads=12, width=768, steps=10_000, muon_lr=0.02)


def openwebtext_small(rule: str = MOMENTUM) -> Config:
    """The same model on OpenWebText: 30,000 steps of 491,520 tokens."""
    return _paper(rule, layers=12, heads=12, width=768, steps=30_000, muon_lr=0.004)


def openwebtext_medium(rule: str = MOMENTUM) -> Config:
    """The paper's medium model on OpenWebText: 24 layers of width 1,024."""
    return _paper(rule, layers=24, heads=16, width=1024, steps=30_000, muon_lr=0.004)


def _paper(rule: str, *, layers: int, heads: int, width: int, steps: int, muon_lr: float) -> Config:
    """What the paper's runs share (docs/fidelity.md). How a step is cut into micro-batches changes nothing that is learned."""
    return Config(
        model=ModelConfig(rule=rule, layers=layers, heads=heads, width=width, context=1024, vocabulary=50_304),
        training=TrainingConfig(
            steps=steps, batch=480, warmup=0.1, schedule="cosine", final_lr=0.1, clip=1.0, precision="bf16",
            muon_lr=muon_lr, adamw_lr=6e-4, coefficient_lr=5.0, weight_decay=0.1,
            evaluate_every=100, evaluate_sequences=160 * 30, checkpoint_every=500,
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """A recipe for any rule, and the text it is for."""

    config: Callable[..., Config]
    source: str
    tokenizer: str
    held_out: float = 0.05  # the share of the source that validates, where it has no validation text of its own


PRESETS = {
    "demo": Preset(demo, "stdlib", "bpe:1024"),
    "tinystories_small": Preset(tinystories_small, "tinystories", "gpt2"),
    # 0.1 % of OpenWebText is 9 million tokens: enough for 4,800 sequences, and 9.0 billion are left to train on.
    "openwebtext_small": Preset(openwebtext_small, "openwebtext", "gpt2", 0.001),
    "openwebtext_medium": Preset(openwebtext_medium, "openwebtext", "gpt2", 0.001),
}


def find_preset(name: str) -> Preset:
    """Raises UserError for a name that is none."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]


def scaled(config: Config, scale: float) -> Config:
    """The whole recipe in a share of its steps; shares of the steps stay shares, and validation still comes ten times.

    Raises UserError when less than one step is left.
    """
    if not 0 < scale <= 1:
        raise UserError(f"--scale must be above 0 and at most 1; got {scale:g}.")
    steps = round(config.training.steps * scale)
    if steps < 1:
        raise UserError(
            f"--scale {scale:g} gives less than one of {config.training.steps:,} steps; "
            f"give at least {1 / config.training.steps:g}."
        )
    often = {
        key: min(getattr(config.training, key), max(1, steps // 10)) for key in ("evaluate_every", "checkpoint_every")
    }
    return replace(config, training=replace(config.training, steps=steps, **often))


@dataclass(frozen=True)
class Published:
    """What a source says of an arm: validation loss in nats per token, accuracy by task; None where it does not say."""

    source: str
    best: float | None = None
    final: float | None = None
    note: str = ""  # what else is said of it
    scores: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """The runs behind a table of published numbers; the first arm is the baseline."""

    title: str
    preset: str
    rows: Mapping[str, tuple[Published, ...]]
    controls: tuple[str, ...] = CONTROLS


PAPER = "arXiv:2601.23236"
REPRODUCTION = "an independent run"
LATER = "arXiv:2605.24425, its code"
WSD = "schedule=wsd"
GAIN = {"hellaswag": "1.8 points above the baseline", "arc_easy": "2.1 points above the baseline"}
LATER_SCORES = {"hellaswag": "0.316–0.318", "arc_easy": "0.443"}  # of its momentum arms together

# As summaries and reproductions quote them: the paper's full text is not known to us (docs/fidelity.md). A single number that
# is not said to be the best or the last stands as the best.
TABLES = {
    "tinystories": Table(
        "TinyStories, small",
        "tinystories_small",
        {
            BASELINE: (Published(PAPER, 1.106, 1.114, "another summary: final 1.113"),),
            MOMENTUM: (Published(PAPER, 1.078, 1.090), Published(REPRODUCTION, 1.076, 1.088)),
            "imex,k=2": (Published(PAPER, 1.070),),
        },
    ),
    "openwebtext": Table(
        "OpenWebText, small",
        "openwebtext_small",
        {
            BASELINE: (
                Published(PAPER, 2.990, note="another summary: 3.023"),
                Published(LATER, 3.008, scores={"hellaswag": "0.302", "arc_easy": "0.430"}),
            ),
            MOMENTUM: (
                Published(PAPER, 2.920, note="another summary: 2.926", scores=GAIN),
                Published(LATER, 2.941),
            ),
            f"{MOMENTUM},{WSD}": (Published(LATER, 2.9275, scores=LATER_SCORES),),
            f"triple_momentum,{WSD}": (Published(LATER, 2.9236, scores=LATER_SCORES),),
        },
        (f"{BASELINE},{WSD}", *CONTROLS),
    ),
    "openwebtext_medium": Table(
        "OpenWebText, medium",
        "openwebtext_medium",
        {
            BASELINE: (Published(PAPER, 2.775),),
            MOMENTUM: (Published(PAPER, 2.707, scores={"hellaswag": "1.3 points above the baseline"}),),
        },
    ),
}


def find_table(name: str) -> Table:
    """Raises UserError for a name that is none."""
    if name not in TABLES:
        raise unknown("table", name, TABLES)
    return TABLES[name]
