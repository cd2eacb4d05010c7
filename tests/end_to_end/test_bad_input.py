"""Wrong input: one clear line on standard error, the right exit code, no traceback, nothing half-written."""

import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from yuriiformer.cli import main
from yuriiformer.data.tokenizer import byte_level_bpe

RULE = '''from yuriiformer.rule import Norm, Oracle, Positive, Stream, Unit, Velocity, rule
@rule(source="here")
def mine({signature}):
    """Mine."""
    {body}
'''


@pytest.fixture
def fails(capsys, monkeypatch, tmp_path):
    """Run a command that must fail; return its one line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, code: int = 2) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main([str(a) for a in arguments]) == code
        error = capsys.readouterr().err.strip().splitlines()
        assert error[-1].startswith("yuriiformer: ")
        assert not any("Traceback" in line for line in error)
        assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"
        return error[-1]

    return run


@pytest.fixture
def train(fails, corpus):
    return lambda *arguments: fails("train", *arguments, "--corpus", corpus.path, "--out", "run")


def test_unknown_rule(train):
    assert "rule 'nestrov' is not known; did you mean 'nesterov'?" in train("nestrov")


def test_illegal_splitting(train):
    line = train("verlet:strang")
    assert "rule 'verlet' cannot be used with splitting 'strang'" in line
    assert "Legal: whole_layer" in line
    assert "Legal: lie_trotter, euler, strang" in train("nesterov:whole_layer")
    assert "did you mean 'strang'" in train("nesterov:strange")


def test_rule_file(train, tmp_path):
    path = tmp_path / "mine.py"

    def wrong(signature="x: Stream, oracle: Oracle", body="return x"):
        path.write_text(RULE.format(signature=signature, body=body))
        return train("--rule", path)

    assert "mine.py' does not exist" in train("--rule", tmp_path / "no_mine.py").replace("no_", "")
    assert f"{path}, line 5: " in wrong(body="return x +")
    assert "parameter 'y' must be annotated" in wrong("x: Stream, y, oracle: Oracle")
    assert f"{path}, line 2: rule 'mine'" in wrong("x: Stream, y, oracle: Oracle")
    assert "coefficient 'beta' needs a default in (0, 1)" in wrong("x: Stream, oracle: Oracle, *, beta: Unit = 1.5")
    assert "coefficient 'beta' needs a default in (0, 1)" in wrong("x: Stream, oracle: Oracle, *, beta: Unit")
    assert "coefficient 'beta' must be annotated" in wrong("x: Stream, oracle: Oracle, *, beta=0.5")
    assert "one Stream, then Velocity, then Oracle" in wrong("v: Velocity, x: Stream, oracle: Oracle")
    assert "oracles are ('a',)" in wrong("x: Stream, a: Oracle")
    assert "returns 1 streams; its signature takes 2" in wrong("x: Stream, v: Velocity, oracle: Oracle", "return x")
    assert f"{path}, line 5: NameError" in wrong(body="return x + y")
    assert "never asks its oracle 'mlp'" in wrong("x: Stream, attn: Oracle, mlp: Oracle", "return x + attn(x)")
    path.write_text("import nothing_like_this\n")
    assert f"{path}, line 1: ModuleNotFoundError" in train("--rule", path)
    path.write_text("x = 1\n")
    assert "defines 0 rules" in train("--rule", path)


def test_config(train):
    assert "unknown" not in train("--set", "model.widht=8")
    assert "did you mean 'model.width'" in train("--set", "model.widht=8")
    assert "model.heads must divide model.width; got 5 heads, width 96" in train("--set", "model.heads=5")
    assert "config key model.width must be of type int; got 'wide'" in train("--set", "model.width=wide")
    assert "model.layers must be at least 1" in train("--set", "model.layers=0")
    assert "context 100000 is too long" in train("--set", "model.context=100000")
    assert "model.velocity_start 'own_tables' is not known" in train("nesterov,velocity_start=own_tables")
    assert "coefficient mu of rule 'nesterov' must be in (0, 1); got 2.0" in train("nesterov,mu=2")
    assert "option k of rule 'imex' must be one of (1, 2); got 3" in train("imex,k=3")
    assert "did you mean 'width'" in train("nesterov,widht=8")
    assert "KEY=VALUE" in train("nesterov,second_table")
    assert "option k of rule 'imex' must be one of (1, 2); got 'two'" in train("imex,k=two")
    assert "must be in (0, inf); got -1000.0" in train("nesterov,gamma=-1000")
    assert "must be in (0, 1); got 'half'" in train("nesterov,mu=half")
    assert "give it as --set training.batch=8" in train("nesterov,batch=8")
    assert "model.context must be at least 1" in train("--set", "model.context=0")
    assert "training.seed must be a number that is not negative; got -1" in train("--set", "training.seed=-1")
    assert "training.adamw_lr must be a number that is not negative; got nan" in train("nesterov,adamw_lr=NaN")
    assert "config key model is a section" in train("--set", "model=3")


def test_config_file(train, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[model]\nwidht = 8\n")
    assert "did you mean 'model.width'" in train("--config", file)
    file.write_text("[model\n")
    assert "cannot be read" in train("--config", file)
    assert "cannot be read" in train("--config", tmp_path)
    file.write_text("model = 3\n")
    assert "config key model is a section" in train("--config", file)


def test_import(fails, gpt2_folder, tmp_path, monkeypatch):
    """Each kind of bad source through the command line; the rest of what is refused: tests/unit/test_importing.py."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    assert "and the hub did not give it (no network)" in fails("import", "gpt2-nowhere", "--out", "run")
    assert "nothing/at/all does not exist" in fails("import", "nothing/at/all", "--out", "run")
    assert "has no config.json" in fails("import", tmp_path, "--out", "run")
    (tmp_path / "ckpt.pt").write_bytes(b"no checkpoint")
    assert "add --trust if you know where it comes from" in fails("import", "ckpt.pt", "--out", "run")
    assert "is no checkpoint of torch" in fails("import", "ckpt.pt", "--out", "run", "--trust")
    assert "they do not match" in fails("import", gpt2_folder, "--out", "run", "--tokenizer", _tokenizer(tmp_path, 100))
    assert "b.json does not exist" in fails("import", gpt2_folder, "--out", "run", "--tokenizer", "b.json")
    (tmp_path / "run").mkdir()
    assert "exists already" in fails("import", gpt2_folder, "--out", "run")
    assert "run is no run directory" in fails("generate", "run")  # as a copy that was cut short


def _tokenizer(folder, tokens):
    """A tokenizer of so many tokens fewer than bytes would need."""
    vocabulary = {chr(0x4E00 + i): i for i in range(tokens - 1)} | {"<|endoftext|>": tokens - 1}
    byte_level_bpe(vocabulary, "#version: 0.2\n").save(str(folder / "small.json"))
    return folder / "small.json"


def test_start(fails, gpt2_folder, corpus, text, tmp_path):
    assert main(["import", str(gpt2_folder), "--out", "start"]) == 0

    def train(*arguments, corpus=corpus.path):
        return fails("train", *arguments, "--corpus", corpus, "--out", "run")

    assert "rule 'verlet' cannot start from a run of 'gradient_descent'" in train("verlet", "--from", "start")
    assert "splitting is 'euler'" in train("nesterov:euler", "--from", "start")
    assert "layers is 3; to compute what the start run start computes it must be 2" in train(
        "nesterov", "--from", "start", "--set", "model.layers=3"
    )
    assert "nowhere is no run directory" in train("nesterov", "--from", "nowhere")
    assert "give the start run as an option of its own: --from start" in train("nesterov", "--set", "start=start")
    assert "leave them out with --from" in fails("compare", "--controls", "--from", "start", "--out", "run")
    assert main(["prepare", str(text), "--out", "other", "--tokenizer", "bpe:290"]) == 0
    assert "has another tokenizer than the start run start" in train("nesterov", "--from", "start", corpus="other")
    shutil.rmtree("start/checkpoints/step_0")
    assert "start has no checkpoint yet" in train("nesterov", "--from", "start")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"  \n ", "is empty"),
        (b"some text \0 and more", "is binary: a zero byte at offset 10"),
        (b"ab\n<|endoftext|>\ncaf\xe9", "is not UTF-8 at offset 20"),
        (b"a", "it is too short"),
    ],
)
def test_text(fails, tmp_path, content, said):
    (tmp_path / "x.txt").write_bytes(content)
    assert said in fails("prepare", "x.txt", "--out", "c")


def test_other_sources(fails, tmp_path, text):
    assert "no file, no folder and no name" in fails("prepare", "nothing", "--out", "c")
    (tmp_path / "x.docx").write_text("text")
    assert "format that is not known" in fails("prepare", "x.docx", "--out", "c")
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    assert 'x.jsonl, line 2: each line must be a JSON object with a "text" field' in fails(
        "prepare", "x.jsonl", "--out", "c"
    )
    for name in ("x.txt.xz", "x.txt.gz", "x.txt.bz2", "x.txt.zst"):
        (tmp_path / name).write_bytes(b"not packed at all, by any of them")
        assert "cannot be unpacked" in fails("prepare", name, "--out", "c")
    (tmp_path / "y.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-20])
    assert "cannot be unpacked" in fails("prepare", "y.txt.gz", "--out", "c")
    assert "Allowed: bytes, bpe:SIZE" in fails("prepare", text, "--out", "c", "--tokenizer", "bpe:20")
    assert "holds no file *encoder.json" in fails("prepare", text, "--out", "c", "--tokenizer", f"gpt2:{tmp_path}")
    (tmp_path / "c").mkdir()
    assert "exists already" in fails("prepare", text, "--out", "c")


def test_no_network(cli, tmp_path):
    pytest.importorskip("datasets", reason="extra: data")
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    for name in ("tinystories", "openwebtext"):
        done = cli("prepare", name, "--out", "c", **nowhere)
        assert done.returncode == 3, done.stderr
        line = done.stderr.strip().splitlines()[-1]
        for way in ("no network, or offline mode", "local .txt", "HF_HOME", "stdlib"):
            assert way in line
        assert not (tmp_path / "c").exists()


def test_corpora_and_runs(fails, corpus, tmp_path):
    assert "no run directory" in fails("generate", "nowhere")
    assert "no run directory" in fails("train", "--resume", "nowhere")
    assert "Give --out" in fails("train")
    shutil.copytree(corpus.path, tmp_path / "c")
    with (tmp_path / "c" / "train.bin").open("r+b") as file:
        file.truncate(100)
    assert "cut short" in fails("train", "--corpus", "c", "--out", "run")


def test_command_line(fails):
    assert "invalid choice: 'trian'" in fails("trian")
    assert "unrecognized arguments: --wide" in fails("rules", "--wide")
    assert "--seeds must be at least 1" in fails("compare", "--seeds", "0")
    assert "--tokens must be a positive number; got nan" in fails("compare", "--tokens", "nan")
    assert "keeps its own set" in fails("train", "--resume", "run", "--set", "training.steps=800")


def test_damaged_run(fails, tmp_path, capsys, corpus):
    small = ["--set", "training.steps=2", "model.width=16", "model.heads=2", "training.compile=no"]
    assert main(["train", "--corpus", str(corpus.path), "--out", str(tmp_path / "run"), *small]) == 0
    assert "run exists already, with model.heads 2 in place of 3" in fails(
        "train", "--corpus", corpus.path, "--out", "run"
    )
    assert "the prompt is empty" in fails("generate", "run", "--prompt", "")
    tokenizer = (tmp_path / "run" / "tokenizer.json").read_text()
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    assert "tokenizer.json cannot be read" in fails("generate", "run")
    (tmp_path / "run" / "tokenizer.json").write_text(tokenizer)
    state = tmp_path / "run" / "checkpoints" / "step_2" / "state.json"
    good = state.read_text()
    state.write_text(good.replace('"loss_sum": ', '"loss_sum": 1'))
    assert "state.json is damaged" in fails("generate", "run")
    state.write_text(good[:50])
    assert "damaged" in fails("generate", "run")
    state.write_text(good)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"]["layers"] = 3
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert "holds other tensors than" in fails("generate", "run")


def test_rule_file_of_a_run_has_changed(fails, tmp_path, corpus):
    path = tmp_path / "mine.py"
    path.write_text(RULE.format(signature="x: Stream, oracle: Oracle", body="return x + oracle(x)"))
    small = ["--set", "training.steps=2", "model.width=16", "model.heads=2", "training.compile=no"]
    assert (
        main(["train", "--rule", str(path), "--corpus", str(corpus.path), "--out", str(tmp_path / "run"), *small]) == 0
    )
    assert main(["generate", str(tmp_path / "run"), "--tokens", "3"]) == 0
    path.write_text(path.read_text() + "# changed\n")
    line = fails("generate", "run")
    assert "missing or has changed" in line
    assert "put the copy run/rule.py back" in line
    assert "missing or has changed" in fails("inspect", "run")
    path.unlink()
    assert "missing or has changed" in fails("inspect", "run")


def test_inspect(fails, tmp_path, corpus, text):
    assert "no run directory" in fails("inspect", "nowhere")
    assert "one run or two side by side; got 3" in fails("inspect", "a", "b", "c")
    assert "--sequences must be at least 1; got 0" in fails("inspect", "a", "--sequences", "0")
    shutil.copytree(corpus.path, tmp_path / "c")
    small = ["--set", "training.steps=2", "model.width=16", "model.heads=2", "training.compile=no"]
    assert main(["train", "--corpus", str(tmp_path / "c"), "--out", str(tmp_path / "run"), *small]) == 0
    assert "run/config.json is a file" in fails("inspect", "run", "--out", "run/config.json")
    assert main(["prepare", str(text), "--out", str(tmp_path / "bytes"), "--tokenizer", "bytes"]) == 0
    assert "bytes has other tokens than run" in fails("inspect", "run", "--corpus", "bytes")
    shutil.rmtree(tmp_path / "c")
    assert f"its corpus {tmp_path / 'c'} is gone; give a prepared corpus with --corpus DIR" in fails("inspect", "run")
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"corpus": ""}))
    assert "it has no corpus of its own; give a prepared corpus with --corpus DIR" in fails("inspect", "run")
    shutil.copytree(corpus.path, tmp_path / "c")
    file.write_text(json.dumps(config | {"model": config["model"] | {"rule": "gradient_descent"}}))
    assert "holds other tensors than" in fails("inspect", "run")
    file.write_text(json.dumps(config | {"model": config["model"] | {"context": 1 << 20}}))
    assert "GB are free" in fails("inspect", "run")
    file.write_text(json.dumps(config))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_2")
    assert "has no checkpoint yet" in fails("inspect", "run")


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_full_disk(tmp_path, corpus, text, command):
    """A file size limit stands in for the full disk: writing beyond it fails in the same way."""
    out = tmp_path / "out"
    arguments = {
        "prepare": ["prepare", text, "--out", out, "--tokenizer", "bytes"],
        "train": ["train", "--corpus", corpus.path, "--out", out, "--set", "training.steps=2", "training.compile=no"],
    }[command]

    def limit():
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    done = subprocess.run(
        [sys.executable, "-m", "yuriiformer", *map(str, arguments)], preexec_fn=limit, capture_output=True, text=True,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "no space left to write" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(Path(tmp_path).rglob("*.partial"))
    assert not list(Path(tmp_path).rglob("step_*"))
    assert out.exists() == (command == "train"), "a run directory stays resumable; a corpus is whole or absent"
