"""Runs with a name, as functions. Imports no torch."""

from __future__ import annotations

from .config import Config, ModelConfig, TrainingConfig

BASELINE = "gradient_descent"
SECOND_TABLE = "second_table=true"
SCALED = "x0_scale=30"

# The arms of `compare` when none are named; the first is the baseline. The second has the parameters of the third.
DEMO_ARMS = (BASELINE, f"{BASELINE},{SECOND_TABLE}", "nesterov")
# What `compare --controls` adds: the gain without one parameter more, beside a baseline with the same scale.
CONTROL_ARMS = (f"{BASELINE},{SCALED}", f"nesterov,velocity_start=zeros,{SCALED}")

ARM_HELP = """an arm is RULE[:SPLITTING][,KEY=VALUE ...]; a KEY is a config key without its section, an option or a
coefficient of the rule. Examples: nesterov   nesterov:strang   heavy_ball,velocity_start=zeros,x0_scale=30
imex,k=2   nesterov,mu=0.5,beta=0.5   my_rule.py:euler"""


def demo(rule: str = "nesterov") -> Config:
    """Half a minute on two CPU cores: 4 layers of width 96, context 128, 400 steps of 2,048 tokens."""
    return Config(model=ModelConfig(rule=rule, layers=4, heads=3, width=96, context=128), training=TrainingConfig())
