"""Every statement is a test, and each is held by a second, independent look at what it claims."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from yuriiformer.config import ModelConfig
from yuriiformer.errors import UserError
from yuriiformer.model import LanguageModel
from yuriiformer.oracle import Attention
from yuriiformer.report.theory import write_page
from yuriiformer.rule import all_rules
from yuriiformer.theory import STATEMENTS, Row, compute, look_at, random_subject, with_rules
from yuriiformer.theory.acceleration import KAPPAS, optimise, textbook
from yuriiformer.theory.particles import attraction, clusters, energy, start
from yuriiformer.theory.statement import Statement
from yuriiformer.theory.subject import causal_attention, softmax_attention
from yuriiformer.tied import TiedAttention, TiedMLP

# The smallest numbers of statements that must hold and must fail: a statement that lost its rows proves nothing.
EXPECTED = {
    "interaction_energy": (3, 0), "log_sum_exp": (3, 2), "mlp_potential": (3, 1), "causal_untied": (1, 6),
    "splitting_order": (18, 0), "explicit_substeps": (2, 1), "commutator": (3, 0), "integrators": (4, 1),
    "rates": (20, 0), "sublinear": (4, 4), "restart": (6, 0), "beyond_quadratics": (0, 1), "other_functions": (4, 0),
    "clustering": (5, 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def computed() -> dict[str, Statement]:
    return {statement.name: statement for statement in compute(random_subject(gain=8))}


@pytest.mark.parametrize("name", STATEMENTS)
def test_the_statement_comes_out_as_theory_says(name, computed):
    statement = computed[name]
    assert statement.as_expected, statement.verdict
    holding, failing = EXPECTED[name]
    assert sum(row.holds is True for row in statement.rows) >= holding
    assert sum(row.holds is False for row in statement.rows) == failing
    assert statement.plots or name == "log_sum_exp"


def test_the_page_is_whole_small_and_asks_no_network(computed, tmp_path):
    data = [statement.as_dict() for statement in computed.values()]
    theory = {
        "command": "x", "yuriiformer": "0", "subject": "s", "verdict": "v", "run": None, "as_expected": True,
        "statements": json.loads(json.dumps(data, allow_nan=False)),
    }  # fmt: skip
    write_page(theory, tmp_path / "theory.html")
    page = (tmp_path / "theory.html").read_text()
    assert len(page.encode()) < 10e6
    outside = (
        page.replace("http://www.w3.org/", "")
        .replace("http://purl.org/", "")
        .replace("http://creativecommons.org/", "")
    )
    assert "http" not in outside
    assert "<script" not in page
    for statement in computed.values():
        assert f'id="{statement.name}"' in page
    assert page.count("<svg") == sum(len(statement.plots) for statement in computed.values())
    assert "does not hold" in page


def test_the_document_has_every_statement_and_its_tests_exist():
    document = (Path(__file__).parents[2] / "docs" / "theory.md").read_text()
    for name in STATEMENTS:
        assert f"**`{name}`**" in document, name
    assert "test_the_statement_comes_out_as_theory_says" in document


def test_what_contradicts_theory_is_told():
    def row(number, **more):
        return Row("w", number, 1.0, 0.1, **more)

    assert row(1.05).holds
    assert not row(1.2).holds
    assert not row(math.nan).holds
    assert not row(None).holds
    assert row(5.0, relation=">=").holds
    assert not row(5.0, relation="<=").holds
    assert not row(1.05, should=False).as_expected
    assert "not as theory says: w" in Statement("n", "t", "e", "c", [row(1.05, should=False)]).verdict


@pytest.mark.parametrize("oracles", ["plain", "tied", "gpt2"])
def test_a_models_own_layers_are_looked_at(oracles):
    """The states noted are those of the model itself, and its oracles answer what they answer there."""
    config = ModelConfig(
        rule="nesterov", layers=2, heads=2, width=16, context=8, vocabulary=32, oracles=oracles, velocity_start="own"
    )
    model, ids = LanguageModel(config, seed=1), torch.arange(8)
    seen = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, given, out: seen.append(given[0][0][0]))
    model(ids[None])
    subject = look_at("it", model, ids)
    for place, state, layer in zip(subject.places, seen, model.layers, strict=True):
        torch.testing.assert_close(place.state, state.double(), rtol=1e-4, atol=1e-6)
        answer = layer.attn(state[None], causal_attention)[0]
        torch.testing.assert_close(place.fields()["attn"](place.state), answer.double(), rtol=1e-3, atol=1e-6)
    for name in ("causal_untied", "commutator"):
        assert STATEMENTS[name](subject).as_expected, STATEMENTS[name](subject).verdict


def test_tied_oracles_are_gradients_by_finite_differences():
    """The energies once more, without autograd."""
    generator = torch.Generator().manual_seed(0)
    attn, mlp = TiedAttention(8, 2).double(), TiedMLP(8).double()
    attn.norm = mlp.norm = torch.nn.Identity()
    y = torch.randn(1, 5, 8, generator=generator, dtype=torch.float64)
    bump = 1e-5 * torch.randn(1, 5, 8, generator=generator, dtype=torch.float64)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    with torch.no_grad():
        change = (attn.energy(y + bump, y, mask) - attn.energy(y - bump, y, mask)) / 2
        torch.testing.assert_close(change, (attn(y, causal_attention) * bump).sum(-1), rtol=1e-7, atol=1e-15)
        change = (mlp.energy(y + bump) - mlp.energy(y - bump)) / 2
        torch.testing.assert_close(change, (mlp(y) * bump).sum(-1), rtol=1e-7, atol=1e-15)


def test_tied_attention_is_attention_with_tied_matrices():
    """The plain oracle with values = keys and the queries transposed behind answers the same."""
    tied, plain = TiedAttention(8, 2).double(), Attention(8, 2).double()
    with torch.no_grad():
        plain.qkv.weight.copy_(torch.cat([tied.query.weight, tied.key.weight, tied.key.weight]))
        plain.out.weight.copy_(tied.query.weight.T)
        x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for attend in (causal_attention, softmax_attention):
            torch.testing.assert_close(tied(x, attend), plain(x, attend), rtol=0, atol=1e-14)


def test_our_softmax_attention_is_torchs():
    q, k, v = torch.randn(3, 2, 2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch_own = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(causal_attention(q, k, v), torch_own(q, k, v, is_causal=True))
    torch.testing.assert_close(softmax_attention(q, k, v), torch_own(q, k, v))


@pytest.mark.parametrize("name", [n for n, r in all_rules().items() if r.textbook and not r.whole_layer])
def test_a_rules_textbook_rate_is_its_spectral_radius(name):
    """The rate once more, without iterating: the largest eigenvalue of one step as a linear map, over all curvatures."""
    rule = all_rules()[name]
    for kappa in KAPPAS:
        promise, values = textbook(rule, kappa)
        coefficients = {n: c.default for n, c in rule.coefficients.items()} | dict(values)
        norm = [lambda z: z] if rule.normed else []
        radii = []
        for curvature in np.linspace(1 / kappa, 1, 50):
            basis = np.eye(len(rule.streams))
            columns = [rule(*e, lambda z, c=curvature: -c * z, *norm, **coefficients) for e in basis]
            radii.append(max(abs(np.linalg.eigvals(np.array(columns).reshape(len(basis), -1).T))))
        assert -math.log(max(radii)) == pytest.approx(-math.log(promise), rel=1e-3)


def test_heavy_ball_and_no_other_cycles_on_the_counterexample():
    """Lessard, Recht and Packard: three points, for ever."""

    def descent(x):
        return -torch.where(x < 1, 25 * x, torch.where(x < 2, x + 24, 25 * x - 24)) / 25

    ends = {}
    for name, rule in all_rules().items():
        promise, values = textbook(rule, 25.0)
        if promise:
            path = optimise(rule, descent, torch.tensor([3.3]).double(), values)
            ends[name] = [x.item() for _, x in zip(range(301), path, strict=False)][-4:]
    assert {name for name, end in ends.items() if abs(end[-1]) > 1e-6} == {"heavy_ball"}
    assert ends["heavy_ball"][0] == pytest.approx(ends["heavy_ball"][3], abs=1e-9)
    assert ends["heavy_ball"][0] != pytest.approx(ends["heavy_ball"][1], abs=0.1)


def test_restarts_forget_velocity_and_time():
    rule = all_rules()["nesterov"]
    fresh = optimise(rule, lambda x: -x / 2, torch.ones(1), {}, momentum=1)
    restarted = optimise(rule, lambda x: -x / 2, torch.full((1,), 7.0), {}, momentum=1)
    for _ in range(5):
        next(restarted)
    here = next(restarted)
    one, _ = next(fresh), None
    assert restarted.send(True) / here == pytest.approx((next(fresh) / one).item(), rel=1e-6)


def test_clusters_and_energy_of_known_configurations():
    poles = torch.tensor([[0.0, 0, 1], [0, 0, 1], [0, 0, -1], [1, 0, 0]]).double()
    assert clusters(poles) == 3
    chain = torch.stack([torch.tensor([math.cos(a), math.sin(a), 0]) for a in (0.0, 0.09, 0.18, 0.27, 1.0)]).double()
    assert clusters(chain) == 2  # linked in a row, though the ends are far apart
    assert energy(poles[:2]).item() == pytest.approx(1)
    x = start()
    nudged = x + 1e-4 * attraction(x)
    assert (energy(nudged / nudged.norm(dim=-1, keepdim=True)) > energy(x)).all()


def test_a_rule_from_outside_takes_part(tmp_path):
    """Whole specification in one file: a rule with a textbook stands among the others, and a wrong promise is found out."""
    file = tmp_path / "boasting.py"
    file.write_text(
        "from yuriiformer.rule import Oracle, Stream, rule\n\n\n"
        "@rule(source='nowhere', textbook=lambda s: (1 - s, {}))\n"
        "def boasting(x: Stream, oracle: Oracle) -> Stream:\n"
        "    return x + oracle(x)\n"
    )
    subject = with_rules(random_subject(gain=8), [str(file)])
    assert set(subject.rules) == {*all_rules(), "boasting"}
    few = {name: subject.rules[name] for name in ("nesterov", "boasting")}
    statement = STATEMENTS["rates"](dataclasses.replace(subject, rules=few))
    assert not statement.as_expected
    assert "boasting" in statement.verdict
    assert "nesterov" not in statement.verdict


def test_what_would_not_fit_in_memory_is_told_first():
    """Thousands of tokens have a Jacobian of terabytes."""
    config = ModelConfig(rule="gradient_descent", layers=1, heads=2, width=128, context=8192, vocabulary=32)
    with pytest.raises(
        UserError, match=r"8192 tokens of width 128 would take about [\d,.]+ GiB of memory; .* --tokens"
    ):
        look_at("it", LanguageModel(config), torch.zeros(8192, dtype=torch.long))
