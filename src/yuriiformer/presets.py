"""Runs with a name, as functions. Imports no torch."""

from __future__ import annotations

from .config import Config, ModelConfig, TrainingConfig

BASELINE = "gradient_descent"
# Honest controls, as changes to an arm: as many parameters as momentum's own tables bring, without momentum ...
SECOND_TABLE = "second_table=true"
# ... and momentum without one parameter more. The velocity norm gives v unit size while x0 has size 0.02, so from
# v0 = 0 the velocity would swamp the token's own embedding; a baseline with the same scale stands beside it.
SCALED = "x0_scale=30"
ZERO_START = "velocity_start=zeros"

# The arms of `compare` when none are named; the first is the baseline.
DEMO_ARMS = (BASELINE, f"{BASELINE},{SECOND_TABLE}", "nesterov")

# ... and when they start from a run without momentum.
START_ARMS = (BASELINE, DEMO_ARMS[-1])

ARM_HELP = """an arm is RULE[:SPLITTING][,KEY=VALUE ...]; a KEY is a config key without its section, an option or a
coefficient of the rule. Examples: nesterov   nesterov:strang   heavy_ball,velocity_start=zeros,x0_scale=30
imex,k=2   nesterov,mu=0.5,beta=0.5   my_rule.py:euler"""


def demo(rule: str = "nesterov") -> Config:
    """Half a minute on two CPU cores: 4 layers of width 96, context 128, 400 steps of 2,048 tokens."""
    return Config(model=ModelConfig(rule=rule, layers=4, heads=3, width=96, context=128), training=TrainingConfig())
