"""What every rule x splitting must do; the list is found by discovery, so a new rule is tested by being there."""

import itertools
import re
import typing

import pytest
import torch
from conftest import COMBINATIONS
from torch._dynamo.testing import CompileCounter

from yuriiformer.cache import KVCache
from yuriiformer.config import ModelConfig, TrainingConfig
from yuriiformer.model import LanguageModel, flops_per_token, oracle_calls
from yuriiformer.oracle import ORACLES
from yuriiformer.rule import all_rules, as_streams
from yuriiformer.training.optimizer import make_optimizers


def build(combination: dict, **changes: object) -> LanguageModel:
    return LanguageModel(ModelConfig(**{**combination, **changes}))


def decode(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits from a cache: a prompt of five, then one by one, then three at once."""
    cache = KVCache(model.config.context, torch.device("cpu"))
    parts = [ids[:, :5], *ids[:, 5:13].split(1, dim=1), ids[:, 13:]]
    return torch.cat([model(part, cache) for part in parts], dim=1)


def test_cached_equals_full(combination, ids):
    model = build(combination).double()
    torch.testing.assert_close(
        decode(model, ids), model(ids), rtol=0, atol=1e-6
    )  # attention itself runs in fp32 on a CPU


def test_causal(combination, ids):
    model = build(combination)
    changed = ids.clone()
    changed[:, 9] = (ids[:, 9] + 1) % 64
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_every_parameter_is_used_and_counted(combination, ids):
    model = build(combination)
    model.loss(ids, ids).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    total = sum(p.numel() for p in model.parameters())
    assert sum(model.parameter_counts().values()) == total
    optimizers = make_optimizers(model, TrainingConfig())
    assert sum(p.numel() for o in optimizers for g in o.param_groups for p in g["params"]) == total


def test_one_graph_and_no_second_compilation(combination, ids):
    torch._dynamo.reset()
    counter = CompileCounter()
    model = build(combination)
    compiled = torch.compile(model.loss, backend=counter, fullgraph=True)
    targets = ids.roll(-1, 1)
    torch.testing.assert_close(compiled(ids, targets), model.loss(ids, targets))
    compiled(ids.flip(0), targets.flip(0))
    assert counter.frame_count == 1


def test_overfits_one_batch(combination, ids):
    model = build(combination)
    optimizers = make_optimizers(model, TrainingConfig(muon_lr=0.02, adamw_lr=0.01))
    first = model.loss(ids, ids).item()
    for _ in range(40):
        model.loss(ids, ids).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert model.loss(ids, ids).item() < 0.5 * first


def test_flops_are_what_torch_counts(combination, ids):
    for oracles in ORACLES:
        model = build(combination, velocity_start="linear", oracles=oracles)
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            torch.utils.flop_counter.FlopCounterMode(display=False) as counter,
        ):
            model(ids)
        assert counter.get_total_flops() == ids.numel() * sum(flops_per_token(model.config).values()), oracles


def test_oracle_calls_are_what_a_forward_makes(combination, ids):
    model = build(combination)
    made = {"attn": 0, "mlp": 0}
    for layer in model.layers:
        for name in made:
            getattr(layer, name).register_forward_hook(lambda *_, name=name: made.update({name: made[name] + 1}))
    model(ids)
    assert made == {name: 2 * n for name, n in oracle_calls(model.config).items()}


HINTS = typing.get_type_hints(ModelConfig)
CHOICES = [
    *(
        [{name: v} for v in typing.get_args(HINTS[name])]
        for name in ("velocity_start", "velocity_norm", "coefficients")
    ),
    [{}, {"x0_scale": 30.0}, {"x0_scale": 30.0, "learn_x0_scale": True}],
]
# Every product of these; the choices that touch nothing else take turns.
VARIANTS = [
    dict(itertools.chain(*map(dict.items, row)))
    | {"initial": ("rule", "neutral")[i % 2], "second_table": i % 4 > 1, "oracles": [*ORACLES][i // 4 % len(ORACLES)]}
    for i, row in enumerate(itertools.product(*CHOICES))
]


def test_every_legal_variant_trains_and_decodes(combination, ids):
    assert len(VARIANTS) == 4 * 3 * 4 * 3
    for variant in VARIANTS:
        model = build(combination, **variant)
        model.loss(ids, ids).backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not missing, (variant, missing)
        for optimizer in make_optimizers(model, TrainingConfig()):
            optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(decode(model, ids), model(ids), rtol=1e-4, atol=1e-5, msg=str(variant))


def test_variants_compile_as_one_graph(combination, ids):
    """A share of the variants for each, so that every variant is compiled with some rule x splitting."""
    number = [p.values[0] for p in COMBINATIONS].index(
        (combination["rule"], combination["splitting"], combination["options"])
    )
    for variant in VARIANTS[number :: len(COMBINATIONS)]:
        torch._dynamo.reset()
        model = build(combination, layers=1, **variant)
        compiled = torch.compile(model.loss, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids, ids), model.loss(ids, ids), msg=str(variant))


def test_streams_in_bf16_stay_so_and_train(combination, ids):
    """Under autocast, whose norms answer in fp32; the loss is that of fp32 streams, nearly."""
    model, dtypes = build(combination), set()
    for layer in model.layers:
        layer.register_forward_hook(lambda _, __, streams: dtypes.update(stream.dtype for stream in streams))
    losses = []
    for dtype in (None, torch.bfloat16):
        dtypes.clear()
        model.stream_dtype = dtype
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model.loss(ids, ids))
        assert dtypes == {dtype or torch.float32}
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
    losses[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("rule", all_rules().values(), ids=lambda r: r.name)
def test_reductions_hold(rule):
    generator = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64).unbind()
    matrix = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    oracles = [lambda y: torch.tanh(y @ matrix), lambda y: torch.sin(y @ matrix.T)][: len(rule.oracles)]

    def step(r, values):
        coefficients = {n: values.get(n, c.default) for n, c in r.coefficients.items()}
        norm = [lambda y: y] if r.normed else []
        return as_streams(r(*[x, v][: len(r.streams)], *oracles, *norm, **coefficients))

    for other, values in rule.reduces_to.items():
        for mine, theirs in zip(step(rule, values), step(all_rules()[other], {}), strict=False):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("rule", all_rules().values(), ids=lambda r: r.name)
def test_docstring_is_complete(rule):
    text = rule.step.__doc__ or ""
    assert "$$" in text, "its equation"
    assert re.search(r"\bcalls?\b", text), "its cost"
    assert rule.source
    for name in rule.coefficients:
        assert f"`{name}`" in text, f"the meaning of {name}"


def test_only_gradient_descent_by_lie_trotter_adds_nothing(ids):
    """Arms of one seed share every tensor they have in common."""
    base = {"layers": 2, "heads": 2, "width": 16, "context": 16, "vocabulary": 64}
    plain = LanguageModel(ModelConfig(rule="gradient_descent", **base), seed=7).state_dict()
    momentum = LanguageModel(ModelConfig(rule="nesterov", **base), seed=7).state_dict()
    assert set(plain) < set(momentum)
    assert all(torch.equal(tensor, momentum[name]) for name, tensor in plain.items())
    other = LanguageModel(ModelConfig(rule="gradient_descent", **base), seed=8).state_dict()
    assert not torch.equal(plain["input.token.weight"], other["input.token.weight"])
