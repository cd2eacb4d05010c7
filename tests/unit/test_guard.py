"""Steps that would do harm are left out; what does not pass is computed again; what fits no memory goes in more passes."""

import pytest
import torch

from yuriiformer.config import override
from yuriiformer.errors import EnvironmentFault
from yuriiformer.files import sha256
from yuriiformer.signals import Stop
from yuriiformer.training import loop
from yuriiformer.training.checkpoint import Progress, Writer, newest_first
from yuriiformer.training.distributed import Parallel
from yuriiformer.training.guard import WINDOW, Guard
from yuriiformer.training.loop import Diverged, train
from yuriiformer.training.run import Run, definite


def start(path, config, corpus, **changes):
    config = override(config, {f"training.{key}": value for key, value in changes.items()})
    return Run.create(path, definite(config, corpus)[0], corpus)


def weights(run):
    return {f.name: sha256(f) for f in (run.checkpoints / f"step_{run.step}").glob("*.safetensors")}


@pytest.fixture
def poison(monkeypatch):
    """Make some calls of the backward pass (one a step, after the one that warms up) leave gradients that are no numbers."""
    calls = 0
    real = Parallel.backward

    def prepare(bad):
        def backward(self, *arguments):
            nonlocal calls
            loss = real(self, *arguments)
            if bad(calls):
                next(self.plain.parameters()).grad.fill_(torch.nan)
            calls += 1
            return loss

        monkeypatch.setattr(Parallel, "backward", backward)

    return prepare


def test_a_step_without_numbers_changes_nothing_but_the_count(tmp_path, config, corpus, poison):
    whole = train(start(tmp_path / "clean", config, corpus, steps=60), Stop())
    poison(lambda call: call == 6)
    run = start(tmp_path / "run", config, corpus, steps=60)
    summary = train(run, Stop())
    assert summary["skipped"] == run.records()[-1]["skipped"] == 1
    assert summary["final_validation"] == pytest.approx(whole["final_validation"], rel=0.05)
    assert all(torch.isfinite(p).all() for p in run.load()[0].parameters())


def test_optimisers_leave_a_refused_step_out_bit_for_bit(tmp_path, config, corpus, poison):
    """The last of three steps is refused: the checkpoint holds the weights and moments of the first two."""
    refused = start(tmp_path / "refused", config, corpus, steps=3, schedule="constant", warmup=0.0)
    two = start(tmp_path / "two", config, corpus, steps=2, schedule="constant", warmup=0.0)
    train(two, Stop())
    poison(lambda call: call == 3)
    train(refused, Stop())
    assert weights(refused) == weights(two)


def test_a_fault_that_passes_leaves_no_trace(tmp_path, config, corpus, poison, monkeypatch):
    """Ten refused steps in a row: training goes back to its checkpoint, and ends as if nothing had been."""
    clean = start(tmp_path / "clean", config, corpus, steps=30)
    train(clean, Stop())
    poison(lambda call: 12 <= call <= 24)
    run, warnings = start(tmp_path / "run", config, corpus, steps=30), []
    train(run, Stop(), lambda record: warnings.append(record.get("warning")))
    assert weights(run) == weights(clean)
    assert any("going back to step" in w for w in warnings if w)


def test_a_fault_that_stays_is_divergence(tmp_path, config, corpus, poison):
    poison(lambda call: call > 5)
    run = start(tmp_path / "run", config, corpus, steps=40)
    with pytest.raises(Diverged, match="lower the learning rates"):
        train(run, Stop())
    for _, checkpoint in newest_first(run.checkpoints):
        assert checkpoint.is_dir()
    assert all(torch.isfinite(p).all() for p in run.load()[0].parameters())


def test_a_spike_is_refused_after_a_window_of_steps():
    guard = Guard(10.0, 0.0, 0, 0, torch.device("cpu"))
    loss = torch.tensor(1.0)
    assert not guard.refuses(loss, torch.tensor(50.0)), "the first steps are anything"
    for _ in range(WINDOW):
        assert not guard.refuses(loss, torch.tensor(1.0))
    mean = guard.mean.item()
    assert guard.refuses(loss, torch.tensor(10.1 * mean))
    assert guard.mean.item() == mean, "a spike is not part of the mean"
    assert guard.refuses(torch.tensor(torch.inf), torch.tensor(1.0))
    assert guard.row == 2
    assert not guard.refuses(loss, torch.tensor(9.9 * mean))
    assert guard.row == 0
    again = Guard(10.0, *guard.numbers(), torch.device("cpu"))
    assert again.numbers() == guard.numbers()
    assert not Guard(0.0, 1.0, WINDOW, 0, torch.device("cpu")).refuses(loss, torch.tensor(1e9)), "0 never"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_goes_on_in_smaller_passes(tmp_path, config, corpus, monkeypatch, error):
    expected = start(tmp_path / "expected", config, corpus, micro_batch=1)
    train(expected, Stop())
    real = Parallel.backward

    def backward(self, share, inputs, *rest):
        if len(inputs) > 1:
            real(self, share, inputs, *rest)  # a part of the gradient is there already
            raise error
        return real(self, share, inputs, *rest)

    monkeypatch.setattr(Parallel, "backward", backward)
    run, warnings = start(tmp_path / "run", config, corpus), []
    train(run, Stop(), lambda record: warnings.append(record.get("warning")))
    assert [w for w in warnings if w] == [
        f"out of memory: going on with {n} sequences a pass, the same mathematics" for n in (2, 1)
    ]
    assert weights(run) == weights(expected)
    monkeypatch.setattr(Parallel, "backward", lambda *arguments: (_ for _ in ()).throw(error))
    with pytest.raises(EnvironmentFault, match="out of memory with 1 sequences a pass"):
        train(start(tmp_path / "none", config, corpus), Stop())


def test_the_newest_and_the_best_checkpoint_are_kept(tmp_path, config, corpus, monkeypatch):
    """Validation is made to be lowest at step 5."""
    falling = iter([3.0, 4.0, 5.0])
    monkeypatch.setattr(loop.Stepper, "validate", lambda self, batches: next(falling))
    run = start(tmp_path / "run", config, corpus, keep=1, checkpoint_every=2)
    train(run, Stop())
    assert [step for step, _ in newest_first(run.checkpoints)] == [12, 5]
    best = Run(run.path, best=True)
    assert (best.weights["step"], run.weights["step"]) == (5, 12)
    newest, early = run.load()[0], best.load()[0]
    assert not torch.equal(next(newest.parameters()), next(early.parameters()))


def test_weights_that_are_no_numbers_are_never_committed(tmp_path):
    with Writer(tmp_path, keep=1, keep_best=True, warn=print) as writer:
        writer.submit(Progress(1), None, {"model.safetensors": {"w": torch.ones(2)}, "optimizer.safetensors": {}})
        assert writer.finish() is None
        writer.submit(
            Progress(2), None, {"model.safetensors": {"w": torch.tensor([1.0, torch.nan])}, "optimizer.safetensors": {}}
        )
        assert "step 2 would hold what is no number, in w" in writer.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]
