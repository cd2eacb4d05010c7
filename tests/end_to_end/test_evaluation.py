"""lm-eval on an export: its own command line's numbers, a stop in the middle, and wrong input."""

import bz2
import itertools
import json
import lzma
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import SHARED, prompts
from transformers import AutoTokenizer

from yuriiformer.cli import main
from yuriiformer.config import Config, ModelConfig, TrainingConfig
from yuriiformer.errors import Interrupted
from yuriiformer.evaluate.evaluate import evaluate
from yuriiformer.evaluate.paired import compare
from yuriiformer.evaluate.remembering import RememberingModel
from yuriiformer.evaluate.tasks import read
from yuriiformer.files import read_json
from yuriiformer.signals import Stop
from yuriiformer.training.loop import train
from yuriiformer.training.run import Run, definite

TASKS, LIMIT = ["hellaswag", "arc_easy"], 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The first 20 documents of each of the shared files, in their format and under their names."""
    if not SHARED.is_dir():
        pytest.skip("the folder shared/data is not beside the project")
    folder = tmp_path_factory.mktemp("data")
    for name, module, lines in (
        ("hellaswag_val_full.txt.bz2", bz2, 120),
        ("arc_easy_test.jsonl.xz", lzma, 20),
        ("arc_easy_train.jsonl.xz", lzma, 40),
    ):
        with module.open(SHARED / name, "rt", encoding="utf-8") as file:
            (folder / name).write_bytes(module.compress("".join(itertools.islice(file, lines)).encode()))
    return folder


@pytest.fixture(scope="module")
def tiny(corpus, tmp_path_factory):
    """A run of two steps whose context holds the answers, not the prompts."""
    model = ModelConfig(rule="nesterov", layers=2, heads=2, width=16, context=256)
    training = TrainingConfig(steps=2, batch=2, evaluate_sequences=2, device="cpu", precision="fp32", compile="no")
    config = Config(corpus=str(corpus.path), model=model, training=training)
    run = Run.create(tmp_path_factory.mktemp("tiny") / "run", definite(config, corpus)[0], corpus)
    train(run, Stop())
    return run


@pytest.fixture(scope="module")
def evaluated(tiny, data):
    return evaluate(tiny.path, tasks=TASKS, data=data, limit=LIMIT)


def documents(folder, task):
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]


def test_equal_to_lm_evals_own_command_line(evaluated, tiny, tmp_path):
    """The command that the result names, in a process of its own: equal to the last bit, each loglikelihood, too."""
    task = "hellaswag"
    mine = evaluated["tasks"][task]
    _, *command = shlex.split(mine["lm_eval"])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *command, "--output_path", str(tmp_path), "--log_samples"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("results_*.json")
    theirs = read_json(file)["results"][f"{task}_local"]
    for metric in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        assert mine["results"][f"{task}_local"][metric] == theirs[f"{metric},none"]
    (file,) = tmp_path.rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    lines = documents(tiny.path / "evaluation", task)
    assert [sample["doc_hash"] for sample in samples] == [line["document"] for line in lines]
    assert [[float(said[0]) for said in s["filtered_resps"]] for s in samples] == [x["answers"] for x in lines]


def test_what_is_kept(evaluated, tiny):
    assert list(evaluated["tasks"]) == TASKS
    assert evaluated["validation"]["tokens"] > 256
    for task, shots in zip(TASKS, (10, 25), strict=True):
        result = evaluated["tasks"][task]
        assert result["shots"] == {f"{task}_local": shots}
        assert result["truncated"] == {"prompts": 24, "of": 24}, "ten examples do not fit into 256 tokens"
        assert result["seeds"]["fewshot_random_seed"] == 1234
        assert set(result["settings"]["versions"]) >= {"lm_eval", "transformers", "torch", "datasets"}
        lines = documents(tiny.path / "evaluation", task)
        assert len(lines) == LIMIT
        accuracy = sum(max(range(4), key=x["answers"].__getitem__) == x["target"] for x in lines) / LIMIT
        assert accuracy == pytest.approx(result["results"][f"{task}_local"]["acc"])
    assert not list((tiny.path / "evaluation").glob("*.partial*"))


def test_stopped_and_gone_on_equals_uninterrupted(evaluated, tiny, data, tmp_path, monkeypatch):
    """One example a prompt, so that some prompts are cut and some are not; Ctrl-C in the second and the fourth batch."""
    calls, stop_at, model_call = [], set(), RememberingModel._model_call

    def counted(self, inputs, *arguments, **options):
        if len(calls) in stop_at:
            stop_at.discard(len(calls))
            self._flush()  # as before any other batch
            raise KeyboardInterrupt
        calls.append(inputs.shape)
        return model_call(self, inputs, *arguments, **options)

    monkeypatch.setattr(RememberingModel, "_model_call", counted)
    asked = {"tasks": ["arc_easy"], "data": data, "limit": 10, "shots": 1}
    whole = evaluate(tiny.path, out=tmp_path / "whole", **asked)
    shapes, calls[:] = list(calls), []
    assert len(shapes) == 5
    stop_at |= {1, 3}
    for kept in (8, 24):
        with pytest.raises(Interrupted, match=f"stopped in task arc_easy; {kept} answers are kept"):
            evaluate(tiny.path, out=tmp_path / "parts", **asked)
    parts = evaluate(tiny.path, out=tmp_path / "parts", **asked)
    assert calls == shapes, "nothing is asked twice, and the batches are the same"
    assert documents(tmp_path / "parts", "arc_easy") == documents(tmp_path / "whole", "arc_easy")
    a, b = whole["tasks"]["arc_easy"], parts["tasks"]["arc_easy"]
    assert (a["results"], a["truncated"]) == (b["results"], b["truncated"])

    tokenizer = AutoTokenizer.from_pretrained(tiny.path / "export", trust_remote_code=True)
    lengths = [
        len(tokenizer("".join(prompt)).input_ids) for prompt in prompts(read(["arc_easy"], 1, data, tmp_path)[0], 10)
    ]
    cut = sum(length > 256 + 1 for length in lengths)  # the last token is predicted, not read
    assert a["truncated"] == {"prompts": cut, "of": 40}
    assert 0 < cut < 40

    calls.clear()
    assert evaluate(tiny.path, out=tmp_path / "whole", **asked) == whole
    assert not calls, "a finished task is not asked again"
    rows = compare(tiny.path, tmp_path / "parts")["rows"]
    assert [row["task"] for row in rows] == ["validation"], "other prompts are not compared"
    rows = compare(tmp_path / "whole", tmp_path / "parts")["rows"]
    assert [(row["metric"], row["n"], row["difference"]) for row in rows if row["task"] == "arc_easy_local"] == [
        ("acc", 10, 0), ("acc_norm", 10, 0),
    ]  # fmt: skip


def test_a_folder_of_any_model_and_an_export_that_is_out_of_date(evaluated, tiny, data, tmp_path, capsys):
    """The export by itself is a Hugging Face folder: the same numbers. An export of other weights is made anew."""
    shutil.copytree(tiny.path, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    weights = tmp_path / "run" / "export" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-4] + b"\0\0\0\0")
    asked = ["--tasks", "arc_easy", "--data", str(data), "--limit", str(LIMIT), "--json"]
    assert main(["evaluate", str(tmp_path / "run"), *asked]) == 0
    found = json.loads(capsys.readouterr().out)
    assert weights.read_bytes() == good
    assert found["tasks"]["arc_easy"]["results"] == evaluated["tasks"]["arc_easy"]["results"]
    export = tmp_path / "run" / "export"
    assert main(["evaluate", str(export), *asked]) == 2
    assert "brings code of its own; look at it, then add --trust-remote-code" in capsys.readouterr().err
    assert main(["evaluate", str(export), *asked, "--trust-remote-code", "--out", str(tmp_path / "by_itself")]) == 0
    by_itself = json.loads(capsys.readouterr().out)
    assert by_itself["validation"] is None
    assert documents(tmp_path / "by_itself", "arc_easy") == documents(tiny.path / "evaluation", "arc_easy")


@pytest.fixture
def fails(capsys, tmp_path):
    """Run a command that must fail; return its one line."""

    def run(*arguments, code=2):
        before = sorted(tmp_path.rglob("*"))
        assert main(["evaluate", *map(str, arguments)]) == code
        error = capsys.readouterr().err.strip().splitlines()
        assert error[-1].startswith("yuriiformer: ")
        assert not any("Traceback" in line for line in error)
        assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"
        return error[-1]

    return run


def test_wrong_target(fails, tmp_path, tiny, config, corpus):
    assert "give a run or a folder to evaluate, or --compare A B" in fails()
    assert "is no run directory and no Hugging Face folder" in fails(tmp_path / "nothing")
    assert "was not evaluated yet; do it with: yuriiformer evaluate" in fails("--compare", tiny.path, tmp_path)
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    assert "is half a Hugging Face folder" in fails(folder, "--tasks", "arc_easy")
    (folder / "model.safetensors").write_bytes(b"")
    assert "Name --tasks" in fails(folder)
    run = Run.create(tmp_path / "run", definite(config, corpus)[0], corpus)
    assert "is at step 0 of 12; finish it with" in fails(run.path)
    assert "has no checkpoint yet" in fails(run.path, "--unfinished")


def test_wrong_tasks(fails, tmp_path, tiny, data, monkeypatch):
    out = ["--out", tmp_path / "out"]
    assert "--limit must be at least 1; got 0" in fails(tiny.path, "--tasks", "arc_easy", "--limit", 0, *out)
    assert "belong to --tasks" in fails(tiny.path, "--data", data, *out)
    assert "is no folder" in fails(tiny.path, "--tasks", "arc_easy", "--data", tmp_path / "nothing", *out)
    line = fails(tiny.path, "--tasks", "arc_challenge", "--data", data, *out)
    assert (
        "holds no test split of task 'arc_challenge'; a file is found by both names, such as arc_challenge_test.jsonl"
        in line
    )
    line = fails(tiny.path, "--tasks", "arc_easy,hellaswagg", "--data", data, *out)
    assert "task 'hellaswagg' is not known; did you mean 'hellaswag'?" in line
    assert len(line) < 400
    own = tmp_path / "own"
    own.mkdir()
    (own / "arc_easy_test.jsonl").write_text('{"question": "Why?", "answer": "so"}\n')
    assert "has the columns 'question', 'answer'; task 'arc_easy' reads answerKey, choices, question" in fails(
        tiny.path, "--tasks", "arc_easy", "--data", own, *out
    )
    (own / "arc_easy_test.jsonl").write_text('{"question": \n')
    assert "is not JSON" in fails(tiny.path, "--tasks", "arc_easy", "--data", own, *out)
    (own / "hellaswag_val.txt").write_text("one\n7\n")
    assert "line 2: six lines make a document" in fails(tiny.path, "--tasks", "hellaswag", "--data", own, *out)
    (own / "hellaswag_validation.jsonl").write_text("{}\n")
    assert "holds more than one validation split" in fails(tiny.path, "--tasks", "hellaswag", "--data", own, *out)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'yuriiformer[evaluate]'" in fails(
        tiny.path, "--tasks", "arc_easy", "--data", data, *out, code=3
    )


def test_no_network(cli, tiny, tmp_path):
    """An address where nothing listens, and an empty cache."""
    done = cli(
        "evaluate", tiny.path, "--tasks", "arc_easy", "--out", tmp_path / "out",
        HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "task 'arc_easy' needs its data from the Hugging Face hub, which cannot be reached" in done.stderr
    assert "--data FOLDER" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
