"""A rule put in place of another computes exactly the same function, and training can move it."""

import dataclasses
import json
import shutil

import pytest
import torch

from yuriiformer.cli import main
from yuriiformer.compare import parse_arm
from yuriiformer.config import Config, ModelConfig, TrainingConfig
from yuriiformer.errors import UserError
from yuriiformer.files import read_json
from yuriiformer.model import LanguageModel
from yuriiformer.rule import all_rules, find_rule
from yuriiformer.signals import Stop
from yuriiformer.splitting import COMPOSING
from yuriiformer.surgery import operate, reduction
from yuriiformer.training.loop import train
from yuriiformer.training.optimizer import make_optimizers
from yuriiformer.training.run import Run, definite

BASE = find_rule("gradient_descent")
ABLE = [rule.name for rule in all_rules().values() if reduction(rule, BASE) is not None]


def started(splitting="lie_trotter", oracles="plain", **changes) -> LanguageModel:
    """A model of gradient descent with no weight, bias or norm at its initial value."""
    sizes = {"layers": 2, "heads": 2, "width": 16, "context": 16, "vocabulary": 64}
    config = ModelConfig(rule="gradient_descent", splitting=splitting, oracles=oracles, **sizes, **changes)
    model = LanguageModel(config, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    return model


def operated(start: LanguageModel, rule: str, **changes) -> LanguageModel:
    model = LanguageModel(dataclasses.replace(operate(start.config, rule), **changes), seed=2)
    assert not model.load_state_dict(start.state_dict(), strict=False).unexpected_keys
    return model


def test_every_momentum_rule_that_takes_one_oracle_can():
    assert set(ABLE) == {rule.name for rule in all_rules().values() if len(rule.streams) > 1 and not rule.whole_layer}
    assert reduction(find_rule("triple_momentum"), BASE) == {"beta": 0.0, "gamma": 1.0, "mu": 0.0, "nu": 1.0}
    assert reduction(find_rule("nesterov"), find_rule("heavy_ball")) == {"mu": 0.0}
    assert reduction(find_rule("heavy_ball"), find_rule("nesterov")) is None


@pytest.mark.parametrize("oracles", ["plain", "biased", "gpt2"])
@pytest.mark.parametrize("splitting", COMPOSING)
@pytest.mark.parametrize("rule", ABLE)
def test_the_function_is_bit_identical(rule, splitting, oracles, ids):
    start = started(splitting, oracles)
    expected = start(ids)
    for velocity_start in ("zeros", "own", "x0", "linear"):
        model = operated(start, rule, velocity_start=velocity_start)
        assert torch.equal(model(ids), expected), velocity_start
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(ids), start(ids)), velocity_start
    assert sum(p.numel() for p in operated(start, rule).parameters()) == sum(p.numel() for p in start.parameters()) + (
        2 * len(COMPOSING[splitting].stages) * len(find_rule(rule).coefficients)
    )


@pytest.mark.parametrize("changes", [{"x0_scale": 30.0}, {"learn_x0_scale": True}, {"second_table": True}])
def test_a_start_with_other_tables_or_scales_keeps_its_function(changes, ids):
    start = started(**changes)
    assert torch.equal(operated(start, "nesterov")(ids), start(ids))


@pytest.mark.parametrize("rule", ABLE)
def test_every_coefficient_has_a_gradient_and_one_step_moves_it(rule, ids):
    """Only the first substep's memory and look-ahead have none, where v0 = 0: there is nothing to remember yet."""
    for velocity_start in ("zeros", "own"):
        model = operated(started(), rule, velocity_start=velocity_start)
        before = [substep for layer in model.learned_coefficients() for substep in layer]
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        for optimizer in make_optimizers(model, TrainingConfig()):
            optimizer.step()
        after = [substep for layer in model.learned_coefficients() for substep in layer]
        still = [{name for name in old if new[name] == old[name]} for old, new in zip(before, after, strict=True)]
        empty = {"beta", "mu"} & set(before[0]) if velocity_start == "zeros" else set()
        assert still == [empty, *[set()] * (len(before) - 1)]


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory) -> Run:
    """A gradient descent run of six steps."""
    model = ModelConfig(rule="gradient_descent", layers=2, heads=2, width=16, context=16)
    training = TrainingConfig(
        steps=6, batch=4, evaluate_every=3, evaluate_sequences=8, checkpoint_every=2, seed=3,
        device="cpu", precision="fp32", compile="no",
    )  # fmt: skip
    path = tmp_path_factory.mktemp("base") / "base"
    run = Run.create(path, definite(Config(corpus=str(corpus.path), model=model, training=training), corpus)[0], corpus)
    train(run, Stop())
    return run


def over(base: Run) -> Config:
    return dataclasses.replace(base.config, start=str(base.path))


def test_a_run_starts_from_the_weights_of_another(base, corpus, ids, tmp_path):
    expected = base.load()[0](ids)
    for arm in ("gradient_descent", "nesterov", "nesterov,velocity_start=own", "triple_momentum,adamw_lr=0.001"):
        config = definite(parse_arm(arm, over(base)).config, corpus)[0]
        run = Run.create(tmp_path / arm, config, corpus)
        assert torch.equal(run.build()(ids), expected)
        assert run.env["start"] == base.weights
        assert run.env["start"]["step"] == 6


def test_a_resumed_run_needs_its_start_no_more_and_a_new_one_needs_the_same(base, corpus, tmp_path):
    start = Run(shutil.copytree(base.path, tmp_path / "start"))
    config = definite(parse_arm("nesterov", over(start)).config, corpus)[0]
    whole, cut, late = (Run.create(tmp_path / name, config, corpus) for name in ("whole", "cut", "late"))
    train(whole, Stop())
    train(cut, Stop())
    for step in (6, 4):
        (cut.checkpoints / f"step_{step}").rename(tmp_path / f"gone_{step}")
    (tmp_path / "gone_4").rename(cut.checkpoints / "step_4")
    (cut.path / "summary.json").unlink()
    newest = start.checkpoints / "step_6"
    newest.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"config key start: .* has other weights now"):
        late.build()
    shutil.rmtree(start.path)
    with pytest.raises(UserError, match=r"config key start: .*start is no run directory"):
        late.build()
    train(cut, Stop())
    states = [run.load()[0].state_dict() for run in (whole, cut)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        (
            "verlet",
            "rule 'verlet' cannot start .* Rules that can: gradient_descent, heavy_ball, nesterov, triple_momentum",
        ),
        ("nesterov:strang", "splitting is 'strang'; .* must be 'lie_trotter'"),
        ("nesterov,velocity_norm=substep", "velocity_norm is 'substep'; .* must be 'none'"),
        ("nesterov,beta=0.1", r"values is .*'beta': 0.1.*; .* must be .*'beta': 0.0"),
        (
            "nesterov,coefficients=learned",
            "coefficients is 'learned'; .* must be 'free'",
        ),
        ("gradient_descent,second_table=true", "second_table is True; .* must be False"),
        ("gradient_descent,velocity_start=zeros", "velocity_start is 'zeros'; .* must be 'own'"),
    ],
)
def test_an_arm_that_changes_the_function_is_refused(base, arm, said):
    with pytest.raises(UserError, match=said):
        parse_arm(arm, over(base))


def test_a_rule_file_can_start_where_its_reduction_says_and_momentum_cannot_be_taken_away(base, tmp_path, ids):
    path = tmp_path / "mine.py"
    path.write_text(
        "from yuriiformer.rule import Oracle, Positive, Stream, rule\n"
        "@rule(source='a test', reduces_to={'gradient_descent': {'eta': 1.0}})\n"
        "def mine(x: Stream, oracle: Oracle, *, eta: Positive = 2.0) -> Stream:\n"
        "    return x + eta * oracle(x)\n"
    )
    start = base.load()[0]
    assert torch.equal(operated(start, str(path))(ids), start(ids))
    for rule in ("gradient_descent", "heavy_ball"):  # its coefficients are learned, its velocity has a norm
        with pytest.raises(UserError, match=r"a run of 'nesterov': .* Rules that can: nesterov$"):
            operate(ModelConfig(rule="nesterov", vocabulary=64), rule)


def test_compare_from_a_run(base, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = ["--set", "training.steps=2", "training.batch=4", "training.evaluate_sequences=4", "training.compile=no"]
    command = ["compare", "--from", str(base.path), "--seeds", "2", "--corpus", str(corpus.path), "--out", "out"]
    assert main([*command, *tiny]) == 0
    comparison = read_json(tmp_path / "out" / "comparison.json")
    assert comparison["start"] == base.weights
    assert comparison["seeds"] == [4, 5], "not the start run's own batches"
    assert [arm["name"] for arm in comparison["arms"]] == ["gradient_descent", "nesterov"]
    assert comparison["arms"][1]["config"]["model"]["values"] == {"beta": 0.0, "gamma": 1.0, "mu": 0.0}
    assert "starts from the weights of the run <b>base</b>" in (tmp_path / "out" / "report.html").read_text()
    capsys.readouterr()
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    plan["start"]["sha256"] = "0"
    (tmp_path / "out" / "plan.json").write_text(json.dumps(plan))
    assert main([*command, *tiny]) == 2
    assert "holds a comparison with another start" in capsys.readouterr().err
