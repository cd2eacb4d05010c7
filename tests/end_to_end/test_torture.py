"""A tenth of `yuriiformer torture`; and that it notices when a promise is not kept."""

import json
import os

import pytest
from safetensors import SafetensorError

from yuriiformer import files
from yuriiformer.cli import main
from yuriiformer.torture import disk, power, processes
from yuriiformer.torture.run import CASES
from yuriiformer.torture.subject import Bench, Broken
from yuriiformer.training import checkpoint

pytestmark = [
    pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux"),
    pytest.mark.xdist_group("torture"),
]


@pytest.fixture(scope="module")
def tenth(tmp_path_factory):
    """The command's exit code, and what it found."""
    out = tmp_path_factory.mktemp("torture")
    code = main(["torture", "--tenth", "--out", str(out)])
    return code, json.loads((out / "torture.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_lost(tenth, name):
    code, found = tenth
    case = next(case for case in found["cases"] if case["case"] == name)
    assert case["failed"] == []
    assert case["kept"] == case["of"] > 0
    assert code == 0


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench") / "work")


def broken(trial, bench, seeds):
    """How many trials say that a promise was not kept."""
    found = 0
    for seed in seeds:
        try:
            trial(bench, seed)
        except (Broken, SafetensorError):
            found += 1
    return found


def test_checksums_that_nobody_looks_at_are_noticed(bench, monkeypatch):
    assert broken(disk.flip, bench, range(40)) == 0
    written = lambda file: files.read_json(file.parent / checkpoint.STATE)["files"][file.name]["sha256"]  # noqa: E731
    monkeypatch.setattr(checkpoint, "sha256", written)
    assert broken(disk.flip, bench, range(40)) > 0


def test_a_save_without_syncs_is_noticed(bench, monkeypatch):
    power._trace.cache_clear()
    monkeypatch.setattr(files, "sync", lambda path: None)
    assert broken(power.power, bench, range(power.instants(bench))) > 0
    power._trace.cache_clear()


def test_a_checkpoint_of_another_run_is_noticed(bench, monkeypatch):
    monkeypatch.setattr(bench, "expected", bench.expected | {"model.safetensors": "other"})
    with pytest.raises(Broken, match=r"model.safetensors differ from the undisturbed run's"):
        processes.stop(bench, 0)


def test_a_case_that_is_not_known(tmp_path, capsys):
    assert main(["torture", "--only", "kil", "--out", str(tmp_path)]) == 2
    assert "case 'kil' is not known; did you mean 'kill'?" in capsys.readouterr().err
    assert main(["torture", "--count", "0", "--out", str(tmp_path)]) == 2
