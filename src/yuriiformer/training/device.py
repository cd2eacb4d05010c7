"""The `auto` settings made definite: device, precision and compilation, by what was measured."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import sysconfig
from pathlib import Path

import torch

from ..config import TrainingConfig
from ..errors import EnvironmentFault, UserError

# Dense peaks of matrix products in FLOP/s, by words of the device's name; the first row that fits counts.
# From NVIDIA's data sheets of H200, H100, A100, L40S and RTX 4090 (tensor cores; fp32 without TF32, as torch computes it).
PEAKS = (
    ("H200", {"bf16": 989e12, "fp32": 67e12}),
    ("H100 PCIe", {"bf16": 756e12, "fp32": 51e12}),
    ("H100 NVL", {"bf16": 835e12, "fp32": 60e12}),
    ("H100", {"bf16": 989e12, "fp32": 67e12}),
    ("A100", {"bf16": 312e12, "fp32": 19.5e12}),
    ("L40S", {"bf16": 362e12, "fp32": 91.6e12}),
    ("RTX 4090", {"bf16": 165.2e12, "fp32": 82.6e12}),
)


def peak_flops(device: str, precision: str) -> float | None:
    """The published peak in FLOP/s of a device's name (as `describe` gives it), or None where it is not known here."""
    return next((peaks[precision] for name, peaks in PEAKS if name in device), None)


def resolve(config: TrainingConfig) -> tuple[TrainingConfig, str]:
    """The config without `auto`, and a line that says what was chosen and why. Attention's stays: training times its kernels.

    Measured (docs/performance.md): on a CPU with AMX, bf16 with compiled layers is the fastest; other CPUs stay in
    fp32. CUDA: bf16, compiled. MPS: fp32, eager (not measured).
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(d for d in available if available[d]) if config.device == "auto" else config.device
    if not available[device]:
        raise UserError(f"device {device!r} is not there; available: {', '.join(d for d in available if available[d])}")

    precision = config.precision
    if precision == "auto":
        bf16 = {"cuda": device == "cuda" and torch.cuda.is_bf16_supported(), "cpu": _has_amx()}
        precision = "bf16" if bf16.get(device) else "fp32"

    compile_, why = config.compile, ""
    if compile_ == "auto":
        missing = "not measured on mps" if device == "mps" else _missing_for_compile(device)
        compile_, why = ("no", f" ({missing})") if missing else ("yes", "")
    elif compile_ == "yes" and (missing := _missing_for_compile(device)):
        raise EnvironmentFault(f"training.compile=yes needs what is not here: {missing}. Use training.compile=auto.")
    if config.streams == "bf16" and precision != "bf16":
        raise UserError(f"training.streams=bf16 needs training.precision=bf16, which is {precision} here.")
    line = f"{device}, {precision}, {'compiled' if compile_ == 'yes' else 'eager'}{why}"
    if device != "cuda" and config.attention != "auto":
        raise UserError(
            f"training.attention={config.attention} chooses a kernel of cuda; on {device} leave it at auto."
        )
    return dataclasses.replace(config, device=device, precision=precision, compile=compile_), line  # type: ignore[arg-type]


def _has_amx() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def _missing_for_compile(device: str) -> str:
    if device == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "no Triton"
    compiler = os.environ.get("CXX") or ("clang++" if platform.system() == "Darwin" else "g++")
    if platform.system() == "Windows" or not shutil.which(compiler.split()[0]):
        return "no C++ compiler"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "no Python headers"
    return ""


def describe(device: str) -> dict[str, str | int]:
    """The machine, for the record."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor() if device == "cpu" else device,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
