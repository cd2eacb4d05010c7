"""What an inspection says, against the same numbers computed another way."""

import html
import json
import math
import os
import re

import numpy as np
import pytest
import torch
from conftest import SMALL
from scipy.sparse.linalg import aslinearoperator
from torch.nn import functional as F

from yuriiformer.cli import main
from yuriiformer.config import ModelConfig
from yuriiformer.errors import UserError
from yuriiformer.inspection.depth import (
    JACOBIAN_TOKENS,
    Series,
    along_depth,
    corpus_for,
    derivatives,
    entropy_shares,
    inside_norm,
    inspect_run,
    interaction_energy,
    memory_needed,
    plain,
    read_loss,
    require_memory,
    watch,
    work,
)
from yuriiformer.inspection.jacobian import asymmetry, eigenvalues, jacobian, singular_values, typical_stretch
from yuriiformer.model import LanguageModel, oracle_calls
from yuriiformer.oracle import causal
from yuriiformer.training.checkpoint import MODEL, newest_first
from yuriiformer.training.run import Run


def stirred(seed=0, **changes):
    """A small model whose weights are large enough to bend every quantity away from its start."""
    model = LanguageModel(ModelConfig(**{"rule": "nesterov", **SMALL, **changes}), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)
    return model.requires_grad_(False)


def seen(model, ids):
    series = Series()
    along_depth(model, ids[:1, :-1], ids[:1, 1:], series)
    return series.summary()


def test_every_rule_is_inspected_as_it_is(combination, ids):
    model = stirred(**combination)
    series = seen(model, ids)
    assert series["loss"]["mean"][-1] == pytest.approx(model.loss(ids[:1, :-1], ids[:1, 1:]).item(), rel=1e-5)
    calls = oracle_calls(model.config)
    for name in ("attn", "mlp"):
        assert len(series[f"answer {name}"]["at"]) == model.config.layers * calls[name]
        assert series[f"answer {name}"]["at"] == sorted(series[f"answer {name}"]["at"])
    for name, s in series.items():
        assert None not in s["mean"], name
    assert ("size v" in series) == ("angle v mlp" in series) == (model.rule.streams == ("x", "v"))
    found = derivatives(model.layers[0], model.start(ids[:1, :6], torch.arange(6)))
    assert found["singular"] == sorted(found["singular"], reverse=True)
    assert found["singular"][0] >= found["typical"] > 0


def test_path_by_hand(ids):
    """A whole-layer rule has one substep a layer, so the layers alone give its path."""
    model = stirred(rule="verlet", layers=3)
    streams = [model.start(ids[:1, :-1], torch.arange(15))]
    for layer in model.layers:
        streams.append(layer(streams[-1]))
    xs = np.array([s[0][0].numpy() for s in streams])
    moves = np.diff(xs, axis=0)
    lengths = np.linalg.norm(moves, axis=-1)
    turns = (moves[1:] * moves[:-1]).sum(-1) / lengths[1:] / lengths[:-1]
    series = seen(model, ids)
    assert series["path length"]["mean"] == pytest.approx([lengths.sum(0).mean() / 4], rel=1e-4)
    assert series["turn"]["mean"] == pytest.approx(np.degrees(np.arccos(turns)).mean(1).tolist(), rel=1e-4)
    straight = np.linalg.norm(xs[-1] - xs[0], axis=-1) / lengths.sum(0)
    assert series["straightness"]["mean"][-1] == pytest.approx(straight.mean(), rel=1e-4)


def test_gradient_descent_moves_by_what_the_oracle_answers(ids):
    series = seen(stirred(rule="gradient_descent"), ids)
    answers = {**dict(zip(*(series["answer attn"][k] for k in ("at", "mean")), strict=True)),
               **dict(zip(*(series["answer mlp"][k] for k in ("at", "mean")), strict=True))}  # fmt: skip
    assert [answers[at] for at in series["move"]["at"]] == pytest.approx(series["move"]["mean"], rel=1e-4)


def test_a_velocity_of_zero_has_no_angle(ids):
    series = seen(stirred(velocity_start="zeros"), ids)
    assert series["angle v attn"]["mean"][0] is None
    assert series["angle v mlp"]["mean"][0] is not None


def test_watching_leaves_nothing_behind(ids):
    for rule, substeps, calls in (("verlet", 1, [0, 0, 0]), ("nesterov", 3, [0, 1, 2])):
        model = stirred(rule=rule, splitting="auto" if rule == "verlet" else "strang")
        streams = model.start(ids, torch.arange(16))
        after, called = watch(model.layers[0], streams, causal)
        assert len(after) == substeps
        assert [(c.oracle, c.substep) for c in called] == list(zip(("attn", "mlp", "attn"), calls, strict=True))
        torch.testing.assert_close(after[-1], model.layers[0](streams), rtol=0, atol=0)
        assert not any(module._forward_hooks for module in model.modules())


def test_entropy_and_energy_of_known_attention():
    q, k = torch.zeros(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    assert entropy_shares(q, k).tolist() == pytest.approx([1, 1])  # looks everywhere
    itself = torch.eye(9)[None, None] * 1e3
    assert entropy_shares(itself, itself).tolist() == pytest.approx([0])  # looks at itself alone
    q = torch.randn(1, 1, 9, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(plain(q, q, q), causal(q, q, q))
    entropies = [torch.distributions.Categorical(logits=q[0, 0, i] @ q[0, 0, : i + 1].T / 2).entropy() / math.log(i + 1)
                 for i in range(1, 9)]  # fmt: skip
    assert entropy_shares(q, q).item() == pytest.approx(torch.stack(entropies).mean().item(), rel=1e-4)


def test_attention_descends_its_energy_by_its_queries():
    """-dE/dq_i is the attention's answer when the values are the keys: the definition has the sign of a descent."""
    attn = stirred(heads=1).layers[0].attn
    y = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(0))
    q, k, _ = attn.qkv(attn.norm(y)).chunk(3, -1)
    pushed = q.clone().requires_grad_()
    scores = (pushed @ k.mT / 4).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
    energy = -4 * (scores.logsumexp(-1) - torch.arange(1, 8).log())
    (gradient,) = torch.autograd.grad(energy.sum(), pushed)
    torch.testing.assert_close(-gradient, F.scaled_dot_product_attention(q, k, k, is_causal=True))
    assert interaction_energy(attn, y) == pytest.approx(energy.mean().item(), rel=1e-4)


def test_work_of_a_gradient_is_the_fall_of_its_potential():
    random = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 1, 5, 16, generator=random)
    h = torch.randn(16, 16, generator=random)
    h = h + h.T
    fall = ((start @ h * start).sum(-1) - (end @ h * end).sum(-1)).mean().item() / 2 / 16
    assert work(lambda x: -x @ h, start, end) == pytest.approx(fall, rel=1e-4)
    fall = (start.cosh() - end.cosh()).mean().item()
    assert work(lambda x: -x.sinh(), start, end) == pytest.approx(fall, rel=1e-2)


def test_inside_the_norm_an_oracle_is_the_same_function(ids):
    layer = stirred().layers[0]
    x = torch.randn(1, 6, 16)
    for name in ("attn", "mlp"):
        oracle = getattr(layer, name)
        torch.testing.assert_close(inside_norm(layer, name)(oracle.norm(x)), oracle(x))
        assert not isinstance(oracle.norm, torch.nn.Identity)


def dense(f, x):
    return torch.autograd.functional.jacobian(f, x).reshape(x.numel(), x.numel()).numpy()


@pytest.mark.parametrize("rule", ["gradient_descent", "nesterov", "verlet"])
def test_spectrum_is_the_dense_jacobians(rule, ids):
    model = stirred(rule=rule).double()
    layer = model.layers[1]
    x = torch.stack(model.start(ids[:1, :5], torch.arange(5)))

    def whole(attend):
        return lambda s: torch.stack(layer.forward(tuple(s.unbind()), attend))

    d, j = dense(whole(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)), x), jacobian(whole(plain), x)  # fmt: skip
    v = np.random.default_rng(0).standard_normal(x.numel())
    np.testing.assert_allclose(j.matvec(v), d @ v, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(j.rmatvec(v), d.T @ v, rtol=1e-6, atol=1e-8)
    assert singular_values(j, 6) == pytest.approx(np.linalg.svd(d, compute_uv=False)[:6].tolist(), rel=1e-2)
    moduli = np.sort(np.abs(np.linalg.eigvals(d)))[::-1]
    assert abs(eigenvalues(j, 3)[0]) == pytest.approx(moduli[0], rel=2e-2)
    assert typical_stretch(j) == pytest.approx(np.linalg.norm(d) / math.sqrt(len(d)), rel=0.15)
    assert asymmetry(j) == pytest.approx(np.linalg.norm(d - d.T) / np.linalg.norm(d + d.T), rel=0.15)


def test_asymmetry_of_known_maps():
    m = np.random.default_rng(0).standard_normal((200, 200))
    assert asymmetry(aslinearoperator(m + m.T)) < 1e-12
    assert asymmetry(aslinearoperator(m - m.T)) > 1e12
    assert asymmetry(aslinearoperator(m)) == pytest.approx(1, rel=0.1)
    assert asymmetry(aslinearoperator(np.zeros((9, 9)))) == 0


def test_the_mlp_is_a_gradient_when_its_maps_are_tied(ids):
    """And then the work between two states is the fall of sum G(w_k y), G' = GELU, whatever the path."""
    layer = stirred().layers[0]
    y, z = torch.randn(2, 1, 6, 16, generator=torch.Generator().manual_seed(0))
    assert asymmetry(jacobian(inside_norm(layer, "mlp"), y)) > 0.5
    layer.mlp.out.weight.copy_(-layer.mlp.up.weight.T / 8)
    layer.mlp.up.weight.div_(4)
    assert asymmetry(jacobian(inside_norm(layer, "mlp"), y)) < 1e-5

    def potential(y):
        u = (y @ layer.mlp.up.weight.T).double()
        below, density = (1 + torch.erf(u / math.sqrt(2))) / 2, torch.exp(-u * u / 2) / math.sqrt(2 * math.pi)
        return (((u * u - 1) * below + u * density) / 2).sum(-1).mean().item() / 2 / 16  # out = -up' / 2 by now

    assert work(inside_norm(layer, "mlp"), y, z) == pytest.approx(potential(y) - potential(z), rel=1e-2)


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """Two trained runs of differing depth."""
    folder = tmp_path_factory.mktemp("runs")
    for name, arm, layers in (("plain", "gradient_descent", 3), ("momentum", "nesterov:euler,velocity_start=zeros", 1)):
        sets = [f"model.layers={layers}", "model.width=16", "model.heads=2", "model.context=16", "training.steps=2"]
        command = ["train", arm, "--corpus", str(corpus.path), "--out", str(folder / name), "--set", *sets]
        assert main([*command, "training.batch=4", "training.compile=no", "training.evaluate_sequences=4"]) == 0
    return folder


def test_two_runs_side_by_side(runs, capsys):
    arguments = ["inspect", str(runs / "plain"), str(runs / "momentum"), "--sequences", "3", "--json"]
    out = runs / "plain" / "inspection"
    out.mkdir()
    (out / "inspection.json").write_text("of an earlier time")
    assert main(arguments) == 0
    assert sorted(p.name for p in out.iterdir()) == ["inspection.html", "inspection.json"]
    found = json.loads((out / "inspection.json").read_text(), parse_constant=pytest.fail)  # no NaN
    plain_run, momentum = found["runs"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert len(plain_run["series"]["loss"]["mean"]) == 4
    assert "Size of the velocity v" not in plain_run["says"]
    assert momentum["says"].keys() - plain_run["says"].keys() == {"Size of the velocity v", "Effective step γ/(1−β)"}
    page = html.unescape((out / "inspection.html").read_text())
    for text in (*plain_run["says"].values(), *momentum["says"].values()):
        assert text in page
    assert not re.search(r"(src|href)=.http", page), "the page asks no network"


def test_the_numbers_are_the_runs_own(runs):
    run = Run(runs / "plain")
    found = inspect_run(run, sequences=4)
    model = run.load()[0]
    batches = run.corpus().validation_batches(sequences=4, batch=1, context=16)
    losses = [model.loss(*map(torch.from_numpy, pair)).item() for pair in batches]
    assert found["series"]["loss"]["mean"][-1] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["series"]["loss"]["se"][-1] == pytest.approx(np.std(losses, ddof=1) / 2, rel=1e-3)
    assert found["sequences"] == 4
    streams = model.start(torch.from_numpy(batches[0][0]), torch.arange(16))
    assert read_loss(model, streams, torch.from_numpy(batches[0][1])) > 0


def test_a_corner_of_the_jacobian_is_the_jacobian_of_a_shorter_sequence(ids):
    model = stirred()
    x = torch.stack(model.start(ids[:1], torch.arange(16)))
    layer = model.layers[0]

    def whole(s):
        return torch.stack(layer.forward(tuple(s.unbind()), plain))

    long = torch.autograd.functional.jacobian(whole, x)[:, :, :6, :, :, :, :6]
    short = torch.autograd.functional.jacobian(whole, x[:, :, :6])
    torch.testing.assert_close(long, short, rtol=1e-4, atol=1e-5)
    assert JACOBIAN_TOKENS > 0


def test_what_does_not_fit_is_refused_with_the_estimate(runs, tmp_path):
    run = Run(runs / "plain")
    assert memory_needed(run) < 1e9
    require_memory(run)
    weights = newest_first(run.checkpoints)[0][1] / MODEL
    size = weights.stat().st_size
    try:
        os.truncate(weights, 1 << 42)  # sparse: as large as a model of a trillion parameters
        with pytest.raises(UserError, match=r"needs about 879\d\.\d GB of memory and \d+\.\d GB are free"):
            require_memory(run)
    finally:
        os.truncate(weights, size)
    assert corpus_for(run).vocabulary
