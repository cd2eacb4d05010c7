"""What makes a step fast or small leaves what it computes alone; what is estimated is what is used."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

from yuriiformer import machine, presets
from yuriiformer.bench import velocity_bytes
from yuriiformer.cli import main
from yuriiformer.config import Config, ModelConfig, TrainingConfig, override
from yuriiformer.errors import EnvironmentFault, UserError
from yuriiformer.model import LanguageModel, cross_entropy
from yuriiformer.oracle import causal
from yuriiformer.training import memory
from yuriiformer.training.device import _missing_for_compile, peak_flops, resolve
from yuriiformer.training.kernels import ATTENTION, attention, attention_seconds, equip
from yuriiformer.training.memory import estimate, fit

ROOT = Path(__file__).resolve().parents[2]
GPT2 = {"layers": 12, "heads": 12, "width": 768, "context": 1024, "vocabulary": 50304}


def config(rule: str = "nesterov", sizes: dict = SMALL, **training: object) -> Config:
    recipe = {"device": "cpu", "precision": "fp32", "compile": "no", **training}
    return Config(model=ModelConfig(rule=rule, splitting="lie_trotter", **sizes), training=TrainingConfig(**recipe))


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is computed within it."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("chunk", [7, 16, 1000])
def test_a_loss_in_chunks_is_the_loss_and_never_holds_all_logits(chunk, precision):
    generator = torch.Generator().manual_seed(0)
    hidden, table = (torch.randn(s, generator=generator) for s in ((4, 10, 8), (500, 8)))
    targets = torch.randint(500, (4, 10), generator=generator)
    found = []
    for loss_chunk in (0, chunk):
        model = LanguageModel(ModelConfig(rule="nesterov", **SMALL))
        equip(model, config(loss_chunk=loss_chunk).training)
        leaves = [hidden.clone().requires_grad_(), table.clone().requires_grad_()]
        with Largest() as largest, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model.cross_entropy(*leaves, targets)
            (3 * loss).backward()
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
        assert largest.numel == max(min(loss_chunk or 40, 40) * 500, 500 * 8)
    close = {"rtol": 1e-5, "atol": 1e-7} if precision == "fp32" else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(*found, **close)


def test_a_loss_in_chunks_is_compiled_with_the_rest(ids):
    if missing := _missing_for_compile("cpu"):
        pytest.skip(missing)
    weights, table = torch.randn(2, 16, 16), torch.randn(64, 16, requires_grad=True)
    model = LanguageModel(ModelConfig(rule="nesterov", **SMALL))
    equip(model, config(loss_chunk=16, compile="yes").training)
    loss, plain = model.cross_entropy(weights, table, ids), cross_entropy(weights, table, ids)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(*(torch.autograd.grad(value, table)[0] for value in (loss, plain)))


def test_another_kernel_of_attention_computes_the_same():
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    tag = torch.compiler.config.cache_key_tag
    found = []
    for name in ("auto", "math"):
        with attention(name):
            out = causal(q, k, v)
            found.append([out, *torch.autograd.grad(out.sin().sum(), (q, k, v))])
            # Without it a graph that is kept on disk would bring another run's kernel (docs/performance.md).
            assert ("attention=math" in torch.compiler.config.cache_key_tag) == (name == "math")
    torch.testing.assert_close(*found)
    assert torch.compiler.config.cache_key_tag == tag


def test_kernels_before_the_chosen_one_are_off_and_those_after_it_stand_in():
    enabled = lambda: [getattr(torch.backends.cuda, f"{n}_sdp_enabled")() for n in ("cudnn", "flash", "mem_efficient", "math")]  # noqa: E731  # fmt: skip
    before = enabled()
    for i, name in enumerate(ATTENTION):
        with attention(name):
            assert enabled() == [j >= i for j in range(4)]
    assert enabled() == before


def test_only_kernels_that_can_are_timed():
    timed = attention_seconds(2, 2, 16, 8, "fp32", "cpu")
    assert set(timed) == {"flash", "math"}, "torch has no other kernel on a CPU"
    assert list(timed.values()) == sorted(timed.values())


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"training\.attention=flash chooses a kernel of cuda"):
        resolve(TrainingConfig(device="cpu", attention="flash"))
    with pytest.raises(UserError, match=r"streams=bf16 needs training\.precision=bf16, which is fp32"):
        resolve(TrainingConfig(device="cpu", precision="fp32", streams="bf16"))


def test_peaks_are_known_by_the_devices_name():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_flops("Intel(R) Xeon(R) Processor", "bf16") is None


def test_the_second_streams_floor_is_the_counted_one():
    """12 layers of two substeps, width 768: 10 widths of bytes a substep in bf16, 14 where the streams are fp32."""
    half, single = (config(sizes=GPT2, precision="bf16", streams=s) for s in ("bf16", "fp32"))
    assert velocity_bytes(half.model, half.training) == 24 * 768 * 10
    assert velocity_bytes(single.model, single.training) == 24 * 768 * 14
    baseline = config("gradient_descent")
    assert velocity_bytes(baseline.model, baseline.training) is None


def test_momentum_needs_no_kernel_more_than_the_baseline():
    """In a compiled layer, forward and backward: what the second stream asks for is fused into kernels that are there."""
    if missing := _missing_for_compile("cpu"):
        pytest.skip(missing)
    from torch._inductor.utils import run_fw_bw_and_get_code

    def kernels(rule):
        torch._dynamo.reset()
        model = LanguageModel(ModelConfig(rule=rule, **SMALL))
        layer = torch.compile(model.layers[0], fullgraph=True, dynamic=False)
        streams = tuple(torch.randn(2, 16, 16, requires_grad=True) for _ in model.rule.streams)

        def loss():
            with torch.autocast("cpu", torch.bfloat16):
                return sum(stream.square().sum() for stream in layer(streams))

        _, codes = run_fw_bw_and_get_code(loss)
        return [len(re.findall(r"cpp_fused_\w+\(", code[code.index("def call(") :])) for code in codes]

    baseline, momentum = kernels("gradient_descent"), kernels("nesterov")
    assert len(baseline) == 2
    assert all(count > 0 for count in baseline)
    assert momentum == baseline


def test_the_estimate_is_what_a_step_takes():
    """Growth of resident memory in a fresh process; docs/performance.md has more cases."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of resident memory is read from /proc")
    case = "narrow, nesterov, precision=fp32, compile=no"
    done = subprocess.run(
        [sys.executable, "benchmarks/memory.py", "--only", case, "--out", "-"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert 0.9 < row["ratio"] < 1.1


@pytest.mark.parametrize("rule", ["gradient_descent", "nesterov"])
def test_the_micro_batch_is_the_largest_that_fits(monkeypatch, rule):
    wanted = config(rule, batch=480)
    needed = lambda n: sum(estimate(wanted, n).values())  # noqa: E731
    for least, micro in ((480, 480), (479, 240), (130, 120), (70, 60), (1, 1)):
        monkeypatch.setattr(memory, "memory_free", lambda least=least: (needed(least) + 1) / memory.SPARE)
        found, line = fit(wanted)
        assert found == micro
        assert needed(found) <= needed(least)
        assert line.startswith(f"micro-batch {micro} x {480 // micro}: ")
    monkeypatch.setattr(memory, "memory_free", lambda: (needed(7) + 1) / memory.SPARE)
    assert fit(override(wanted, {"training.batch": 11}))[0] == 6, "two uneven passes rather than eleven"
    monkeypatch.setattr(memory, "memory_free", lambda: 80 * (needed(7) + 1) / memory.SPARE)
    assert fit(wanted, ranks=80)[0] == 6, "processes on a CPU share its memory"


def test_too_little_memory_says_what_would_fit(monkeypatch):
    wanted = config(sizes={**SMALL, "vocabulary": 4096, "context": 64})
    free = sum(estimate(wanted, 1).values()) * 0.7
    monkeypatch.setattr(memory, "memory_free", lambda: free / memory.SPARE)
    with pytest.raises(EnvironmentFault, match="one sequence needs about") as error:
        fit(wanted)
    offered = re.findall(r"([a-z]+\.\w+)=(\w+)(?: on (\d+) devices)?", str(error.value))
    assert len(offered) >= 3
    for key, value, devices in offered:
        assert sum(estimate(override(wanted, {key: value}), 1, int(devices or 1)).values()) <= free


def test_the_demo_goes_through_whole():
    base = presets.demo()
    demo = override(base, {"model.vocabulary": 1024, "model.splitting": "lie_trotter"})
    training, _ = resolve(demo.training)
    assert fit(Config(model=demo.model, training=training))[0] == base.training.batch


def test_sharding_divides_what_stands():
    sharded = config(sizes={**SMALL, "layers": 8}, parallel="fsdp")
    one, four = estimate(sharded, 1), estimate(sharded, 1, ranks=4)
    assert four["gradients"] == one["gradients"] // 4
    assert four["activations"] == one["activations"]


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 300000\n")
    monkeypatch.setattr(machine, "CGROUPS", ((str(tmp_path), *machine.CGROUPS[0][1:]),))
    assert machine.memory_free() == 400_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory_free() > 1e6


def test_bench_measures_the_trainings_own_steps(tmp_path, capsys):
    tiny = [f"model.{key}={value}" for key, value in SMALL.items()] + ["training.compile=no", "training.batch=4"]
    command = ["bench", "gradient_descent", "nesterov", "nesterov,precision=fp32", "verlet", "--steps", "4"]
    assert main([*command, "--warm-up", "1", "--json", "--out", str(tmp_path / "b.json"), "--set", *tiny]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "b.json").read_text())
    assert found["tokens_per_step"] == 4 * 16
    first, *others = found["arms"].values()
    for arm in (first, *others):
        assert arm["interval"][0] <= arm["median_seconds"] <= arm["interval"][1]
        assert arm["tokens_per_second"] == pytest.approx(64 / arm["median_seconds"])
        assert arm["sequences_a_pass"] == 4
    assert "ratio" not in first
    for arm in others:
        assert arm["ratio"] == pytest.approx(arm["median_seconds"] / first["median_seconds"])
    assert [n for n, arm in found["arms"].items() if "velocity_bytes_per_token" in arm] == ["nesterov"]
