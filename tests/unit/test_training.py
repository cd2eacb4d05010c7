"""The recipe, and that nothing is lost: resume is bit-identical."""

import json
from importlib.machinery import ExtensionFileLoader, ModuleSpec

import pytest
import torch

from yuriiformer.config import ModelConfig, TrainingConfig, override
from yuriiformer.errors import Interrupted, UserError
from yuriiformer.files import sha256
from yuriiformer.model import LanguageModel
from yuriiformer.signals import Stop
from yuriiformer.training.loop import train
from yuriiformer.training.optimizer import Muon, lr_factor, make_optimizers
from yuriiformer.training.run import MEASURED, Run, definite
from yuriiformer.training.step import Stepper


def start(path, config, corpus):
    return Run.create(path, definite(config, corpus)[0], corpus)


def hashes(run):
    """The sha256 of every file of the last checkpoint, and the log without its clock."""
    newest = run.checkpoints / f"step_{run.step}"
    log = [{k: v for k, v in r.items() if k not in MEASURED} for r in run.records()]
    return {f.name: sha256(f) for f in newest.glob("*.safetensors")}, log


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, config, corpus, precision):
    config = override(config, {"training.precision": precision, "training.steps": 25})
    whole = start(tmp_path / "whole", config, corpus)
    train(whole, Stop())
    parts, stop = start(tmp_path / "parts", config, corpus), Stop()

    def interrupt(record):
        stop.requested = record["step"] in (5, 15)

    for _ in range(2):
        stop.requested = False
        with pytest.raises(Interrupted, match="saved"):
            train(parts, stop, interrupt)
    stop.requested = False
    train(parts, stop)
    assert hashes(parts) == hashes(whole)
    assert (parts.path / "summary.json").is_file()


def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, config, corpus):
    run = start(tmp_path / "run", config, corpus)
    train(run, Stop())
    expected = hashes(run)
    newest = run.checkpoints / "step_12" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-3] ^= 16
    newest.write_bytes(data)
    (run.path / "summary.json").unlink()
    records = []
    train(run, Stop(), records.append)
    assert records[0]["step"] == 10  # the best one
    assert "model.safetensors is damaged" in records[0]["warning"]
    assert hashes(run) == expected


def test_no_whole_checkpoint_is_an_error(tmp_path, config, corpus):
    run = start(tmp_path / "run", config, corpus)
    train(run, Stop())
    for state in run.checkpoints.rglob("state.json"):
        state.write_text("{}")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        run.load()


def test_accumulation_does_not_change_what_is_learned(tmp_path, config, corpus):
    losses = []
    for micro in (0, 2):
        run = start(
            tmp_path / f"micro{micro}",
            override(config, {"training.micro_batch": micro, "training.adamw_lr": 1e-3, "training.muon_lr": 1e-3}),
            corpus,
        )
        losses.append(train(run, Stop())["final_validation"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_muon_equals_torchs():
    shapes = [(12, 4), (4, 12), (6, 6), (12, 4)]
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a, b = Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0, momentum=0.95)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)  # both iterate in bf16; a step of lr 0.02 is 0.02 to 0.03


def test_groups_follow_the_recipe():
    model = LanguageModel(ModelConfig(rule="nesterov", layers=1, heads=1, width=8, context=8, vocabulary=64))
    adamw, muon = make_optimizers(model, TrainingConfig(adamw_lr=0.001, muon_lr=0.02))
    tables, norms, scalars = adamw.param_groups
    names = {p: n for n, p in model.named_parameters()}
    assert {names[p] for p in muon.param_groups[0]["params"]} == {
        f"layers.0.{n}.weight" for n in ("attn.qkv", "attn.out", "mlp.up", "mlp.out")
    }
    assert {names[p].split(".")[-2] for p in tables["params"]} == {"token", "position"}
    assert len(tables["params"]) == 4
    assert (tables["weight_decay"], norms["weight_decay"], scalars["weight_decay"]) == (0.1, 0, 0)
    assert scalars["lr"] == pytest.approx(5 * tables["lr"])
    assert {names[p].split(".")[-1] for p in scalars["params"]} == {"raw"}


def test_schedules():
    config = TrainingConfig(steps=100, warmup=0.1)
    cosine = [lr_factor(s, config) for s in range(101)]
    assert cosine[0] == 0.1
    assert cosine[9] == cosine[10] == 1
    assert cosine[55] == pytest.approx(0.55)
    assert cosine[100] == pytest.approx(0.1)
    wsd = [lr_factor(s, TrainingConfig(steps=120, warmup=0.1, schedule="wsd", final_lr=0.0)) for s in range(121)]
    assert wsd[12:101] == [1] * 89
    assert wsd[110] == pytest.approx(0.5)
    assert wsd[120] == 0


def test_config_goes_through_json(config):
    from yuriiformer.config import Config, as_dict, from_dict

    assert from_dict(Config, json.loads(json.dumps(as_dict(config)))) == config


def test_compiled_equals_eager(ids):
    """The shipped way to compile, through the real compiler."""
    from yuriiformer.training.device import _missing_for_compile

    if missing := _missing_for_compile("cpu"):
        pytest.skip(missing)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    models = [
        LanguageModel(ModelConfig(rule="nesterov", layers=2, heads=2, width=16, context=16, vocabulary=64))
        for _ in range(2)
    ]
    models[1].compile_parts()
    losses = [model.loss(ids, ids) for model in models]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert count == 2, "one graph for all layers and one for the loss"


def test_half_a_library_of_a_killed_compilation_is_made_again(tmp_path, config, corpus, monkeypatch):
    """What a kill amid the compiler's work leaves in its cache does not stand in the way of going on."""
    library = tmp_path / "kernel.main.so"
    library.write_bytes(b"\x7fELF")
    real = Stepper.gradient

    def gradient(self, batch):
        if library.exists():  # loaded as torch loads it
            ExtensionFileLoader("kernel", str(library)).create_module(ModuleSpec("kernel", None, origin=str(library)))
        return real(self, batch)

    monkeypatch.setattr(Stepper, "gradient", gradient)
    run = start(tmp_path / "run", config, corpus)
    train(run, Stop())
    assert run.complete
    assert not library.exists()
