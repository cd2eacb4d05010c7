"""Loading a run, a checkpoint, a corpus or a config executes nothing of what stands in them."""

import json
import pickle
import shutil
import subprocess
import sys

import pytest

LOAD = """
import sys
from pathlib import Path
from yuriiformer.config import Config, load
from yuriiformer.config import ModelConfig
from yuriiformer.data.corpus import Corpus
from yuriiformer.errors import UserError
from yuriiformer.training.run import Run

def everything(folder):
    said = []
    for read in (
        lambda: Run(folder / "run").load(),
        lambda: Run(folder / "run").records(),
        lambda: Run(folder / "run").tokenizer(),
        lambda: Corpus(folder / "corpus").batch_at(0, seed=0, batch=2, context=16),
        lambda: load(folder / "config.toml", Config(model=ModelConfig(rule="nesterov"))),
        lambda: load(folder / "config.json", Config(model=ModelConfig(rule="nesterov"))),
    ):
        try:
            read()
            said.append("read")
        except UserError as error:
            said.append(str(error))
    return said

good, bad = map(Path, sys.argv[1:])
assert everything(good) == ["read"] * 6, everything(good)
everything(bad)  # whatever is imported late is there now

import yuriiformer.config
SOURCE = Path(yuriiformer.config.__file__).read_text().replace(chr(34), chr(39))  # its annotations are text, compiled to read a config by
FORBIDDEN = ("pickle.find_class", "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen",
             "socket.connect", "import")
events = []

def listen(event, arguments):
    if event == "compile" and isinstance(arguments[0], bytes) and arguments[0].decode() in SOURCE:
        events.append("annotation")
    elif event == "exec" and arguments[0].co_filename == "<string>" and events[-1:] == ["annotation"]:
        events.pop()
    elif event in FORBIDDEN:
        events.append((event, str(arguments)[:80]))

sys.addaudithook(listen)
assert everything(good) == ["read"] * 6
refused = everything(bad)
found = list(events)
assert "read" not in refused, refused
assert not any("\\n" in line for line in refused), refused
exec("'nowhere in it'")
assert len(events) > len(found), "the hook hears nothing"
print(found)
"""


class Code:
    def __reduce__(self):
        return exec, ("open('carried_out', 'w')",)


def test_nothing_is_executed(tmp_path, corpus, config):
    pytest.importorskip("torch")
    from yuriiformer.config import as_dict
    from yuriiformer.signals import Stop
    from yuriiformer.training.loop import train
    from yuriiformer.training.run import Run, definite

    good, bad = tmp_path / "good", tmp_path / "bad"
    shutil.copytree(corpus.path, good / "corpus")
    run = Run.create(good / "run", definite(config, corpus)[0], corpus)
    train(run, Stop())
    (good / "config.toml").write_text("[model]\nwidth = 32\n")
    (good / "config.json").write_text(json.dumps({"model": as_dict(config.model)}))
    shutil.copytree(good, bad)
    code = "__import__('os').mkdir('carried_out')"
    for file in bad.rglob("*.safetensors"):
        file.write_bytes(pickle.dumps(Code()))
    for file in [*bad.rglob("state.json"), bad / "run" / "tokenizer.json", bad / "corpus" / "manifest.json"]:
        file.write_text(code)
    (bad / "run" / "metrics.jsonl").write_text(code + "\n")
    (bad / "config.toml").write_text(code)
    (bad / "config.json").write_bytes(pickle.dumps(Code()))
    (bad / "json.py").write_text("open('carried_out', 'w')")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(good), str(bad)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert not list(tmp_path.rglob("carried_out"))
