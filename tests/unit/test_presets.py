"""The paper's runs, number by number, as the paper is quoted (docs/fidelity.md); the shorthand for them on the command line."""

import pytest

from yuriiformer import presets
from yuriiformer.arguments import make_parser
from yuriiformer.cli import _base, _text
from yuriiformer.compare import parse_arm
from yuriiformer.config import override
from yuriiformer.errors import UserError
from yuriiformer.model import LanguageModel, training_flops_per_token
from yuriiformer.reproduce import arms_of, deviations, parameters, with_vocabulary
from yuriiformer.rule import all_rules
from yuriiformer.training.optimizer import lr_factor, make_optimizers

# name: (layers, heads, width, steps, warm-up, Muon's rate, parameters, with velocity tables, source)
PAPER = {
    "tinystories_small": (12, 12, 768, 10_000, 1_000, 0.02, 124_373_760, 163.8e6, "tinystories"),
    "openwebtext_small": (12, 12, 768, 30_000, 3_000, 0.004, 124_373_760, 163.8e6, "openwebtext"),
    "openwebtext_medium": (24, 16, 1024, 30_000, 3_000, 0.004, 354.6e6, 407.2e6, "openwebtext"),
}


@pytest.fixture(params=PAPER)
def paper(request):
    return (*PAPER[request.param], request.param)


def test_the_paper_s_numbers(paper):
    layers, heads, width, steps, warmup, _, plain, with_velocity, source, name = paper
    preset = presets.PRESETS[name]
    assert (preset.source, preset.tokenizer) == (source, "gpt2")
    config = preset.config()
    model, training = config.model, config.training
    assert (model.layers, model.heads, model.width) == (layers, heads, width)
    assert (model.context, model.vocabulary, model.velocity_start) == (1024, 50_304, "own")
    assert training.batch * model.context == 30 * 16 * 1024 == 491_520
    assert (training.steps, training.clip, training.precision, training.optimizer) == (steps, 1.0, "bf16", "muon")
    assert (training.evaluate_every, training.evaluate_sequences) == (100, 160 * 30)
    rates = [lr_factor(step, training) for step in range(steps)]
    assert rates[0] == 1 / warmup
    assert rates[warmup - 1] == rates[warmup] == max(rates) == 1
    assert rates[-1] == pytest.approx(0.1, abs=1e-6)
    assert rates[(steps + warmup) // 2] == pytest.approx(0.55)  # the middle of a cosine from 1 to 0.1

    baseline = presets.PRESETS[name].config(presets.BASELINE)
    assert parameters(baseline.model) == pytest.approx(plain, rel=0 if plain == 124_373_760 else 1e-4)
    own = parameters(model)
    assert own == pytest.approx(with_velocity, rel=1e-4)
    tables, norms_and_scalars = (50_304 + 1024) * width, 2 * layers * (width + 3)
    assert own == parameters(baseline.model) + tables + norms_and_scalars

    # nanoGPT's count: 6 N + 12 L d T, N without the position table, which multiplies nothing, and without norms
    matrices = 12 * layers * width**2 + 50_304 * width
    assert training_flops_per_token(model) == 6 * matrices + 12 * layers * width * 1024


def test_the_rates_of_each_group(paper):
    *_, muon_lr, _, _, _, name = paper
    config = presets.PRESETS[name].config("nesterov")
    small = override(
        config, {f"model.{k}": v for k, v in {"layers": 1, "heads": 2, "width": 8, "vocabulary": 64}.items()}
    )
    model = LanguageModel(small.model)
    of = {id(p): key for key, p in model.named_parameters()}
    found = {
        of[id(p)]: (type(optimizer).__name__, group["lr"], group.get("weight_decay"))
        for optimizer in make_optimizers(model, small.training)
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found.keys() == set(of.values())
    assert found["layers.0.attn.qkv.weight"] == found["layers.0.mlp.out.weight"] == ("Muon", muon_lr, None)
    for table in ("input.token", "input.position", "velocity.0.token", "velocity.0.position"):
        assert found[f"{table}.weight"] == ("AdamW", 6e-4, 0.1)
    assert found["norm.weight"] == found["layers.0.substeps.0.norm.weight"] == ("AdamW", 6e-4, 0.0)
    assert found["layers.0.substeps.0.raw"] == ("AdamW", pytest.approx(3e-3), 0.0)


def test_every_rule_has_every_preset():
    for preset in presets.PRESETS.values():
        for name in all_rules():
            config = preset.config(name)
            assert config == override(preset.config(), {"model.rule": name})
            assert parse_arm(name, with_vocabulary(preset.config(), 1000)).config.model.rule == name


@pytest.mark.parametrize("name", presets.TABLES)
def test_the_arms_of_a_table_are_models(name):
    table = presets.find_table(name)
    preset = presets.find_preset(table.preset)
    arms = arms_of(table, preset.config(), controls=True)
    assert [arm.name for arm in arms][: len(table.rows)] == list(table.rows)
    assert next(iter(table.rows)) == "gradient_descent"
    for arm in arms:
        assert parameters(arm.config.model) > 124_000_000
    for said in (said for row in table.rows.values() for said in row):
        assert said.best or said.final
    assert arms[-3].config.model.second_table
    if name == "openwebtext":
        assert {arm.name: arm.config.training.schedule for arm in arms}["triple_momentum,schedule=wsd"] == "wsd"
    assert deviations(preset.config(), preset, preset.source, "gpt2:a_folder") == []


def test_what_sets_a_run_apart_is_named():
    preset = presets.PRESETS["tinystories_small"]
    harmless = override(preset.config(), {"training.micro_batch": 8, "training.compile": "no", "training.seed": 3})
    assert deviations(harmless, preset, "tinystories", "gpt2") == []
    other = presets.scaled(override(preset.config(), {"model.layers": 4}), 0.05)
    assert deviations(other, preset, "my_text.txt", "bpe:1024") == [
        "model.layers 4 instead of 12",
        "training.steps 500 instead of 10,000",
        "training.evaluate_every 50 instead of 100",
        "text my_text.txt instead of tinystories",
        "tokenizer bpe:1024 instead of gpt2",
    ]


def test_a_scale_keeps_the_shares():
    whole = presets.tinystories_small().training
    part = presets.scaled(presets.tinystories_small(), 0.01).training
    assert (part.steps, part.evaluate_every, part.checkpoint_every) == (100, 10, 10)
    assert part.warmup * part.steps == whole.warmup * whole.steps / 100
    assert presets.scaled(presets.tinystories_small(), 1) == presets.tinystories_small()
    for scale in (0, -1, 1.01, float("nan")):
        with pytest.raises(UserError, match="above 0 and at most 1"):
            presets.scaled(presets.tinystories_small(), scale)
    with pytest.raises(UserError, match=r"less than one of 10,000 steps; give at least 0\.0001"):
        presets.scaled(presets.tinystories_small(), 1e-5)


def options(*arguments):
    return make_parser().parse_args(["train", "--out", "run", *arguments])


def test_a_preset_brings_its_text_and_the_command_line_goes_over_it():
    asked = options("--preset", "tinystories_small", "--schedule", "wsd", "--set", "model.layers=4")
    base = _base(asked)
    assert (base.training.steps, base.training.schedule, base.model.layers) == (10_000, "wsd", 4)
    assert (_text(asked), base.model.vocabulary) == (("tinystories", "gpt2"), 50_304)
    flat = [lr_factor(step, base.training) for step in range(1000, 10_000 - 1667)]
    assert set(flat) == {1.0}, "warm-up, flat, and the last sixth falls"
    assert lr_factor(9_999, base.training) == pytest.approx(0.1, abs=1e-3)

    mine = options("--preset", "tinystories_small", "--corpus", "my_text.txt", "--tokenizer", "bpe:512")
    assert (_text(mine), _base(mine).model.vocabulary) == (("my_text.txt", "bpe:512"), 0)
    assert (_text(options()), _base(options())) == (("stdlib", "bpe:1024"), presets.demo())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset", "tinystory_small"], "preset 'tinystory_small' is not known; did you mean 'tinystories_small'?"),
        (["--schedule", "cosin"], "training.schedule 'cosin' is not known; did you mean 'cosine'?"),
    ],
)
def test_unknown_names(arguments, says):
    with pytest.raises(UserError) as error:
        _base(options(*arguments))
    assert says in str(error.value)


def test_the_meta_device_counts_what_is_there():
    model = with_vocabulary(override(presets.demo(), {"model.layers": 1}), 300).model
    assert parameters(model) == sum(p.numel() for p in LanguageModel(model).parameters())
