"""The validation loss against a computation token by token; local files against the columns of the hub."""

import json
import math

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import prompts

from yuriiformer.errors import UserError
from yuriiformer.evaluate.evaluate import evaluate
from yuriiformer.evaluate.paired import compare
from yuriiformer.evaluate.remembering import Memory
from yuriiformer.evaluate.tasks import read
from yuriiformer.signals import Stop
from yuriiformer.training.loop import train
from yuriiformer.training.run import Run, definite


@pytest.fixture
def run(tmp_path, config, corpus):
    made = Run.create(tmp_path / "run", definite(config, corpus)[0], corpus)
    train(made, Stop())
    return made


def test_validation_is_the_mean_over_every_token(run, corpus):
    result = evaluate(run.path)["validation"]
    model, context = run.load()[0].eval(), run.config.model.context
    tokens = torch.from_numpy(corpus.tokens["validation"].astype("int64"))
    losses = []
    with torch.no_grad():
        for at in range(1, len(tokens)):
            before = tokens[(at - 1) // context * context : at]
            losses.append(-model(before[None])[0, -1].double().log_softmax(-1)[tokens[at]].item())
    assert (len(tokens) - 1) % context, "there is a shorter block at the end"
    assert result["tokens"] == len(losses)
    assert result["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    split = corpus.manifest["splits"]["validation"]
    assert result["bits_per_byte"] * math.log(2) * split["bytes"] == pytest.approx(result["loss"] * split["tokens"])
    lines = [json.loads(line) for line in (run.path / "evaluation" / "validation.jsonl").read_text().splitlines()]
    assert len(lines) == result["blocks"] == math.ceil(len(losses) / context)
    assert lines[-1]["loss"] == pytest.approx(sum(losses[-lines[-1]["tokens"] :]) / lines[-1]["tokens"], rel=1e-5)


def test_what_is_measured_is_not_measured_again(run, tmp_path):
    first = evaluate(run.path)
    assert evaluate(run.path) == first, "its seconds, too"
    changed = json.loads((run.path / "evaluation" / "validation.json").read_text())
    changed["settings"]["weights_sha256"] = "of another checkpoint"
    (run.path / "evaluation" / "validation.json").write_text(json.dumps(changed))
    again = evaluate(run.path)
    assert again["validation"]["settings"] == first["validation"]["settings"]
    assert again["validation"]["loss"] == first["validation"]["loss"]


def test_a_run_beside_itself_and_beside_another(run, tmp_path):
    evaluate(run.path)
    (row,) = compare(run.path, run.path)["rows"]
    assert (row["task"], row["difference"], row["p_value"]) == ("validation", 0, 1)
    with pytest.raises(UserError, match="was not evaluated yet"):
        compare(run.path, tmp_path)


def test_memory_keeps_whole_batches_of_its_own_settings(tmp_path):
    def memory(settings=1):
        return Memory(tmp_path / "m.jsonl", {"settings": settings})

    first = memory()
    first.cut[Memory.key("loglikelihood", ("a", "b"))] = True
    first.add("loglikelihood", ("a", "b"), (-0.1, False))
    assert first.flush() == 1
    first.add("generate_until", ("a", {}), "text")
    first.flush()
    whole = (tmp_path / "m.jsonl").read_text()
    (tmp_path / "m.jsonl").write_text(whole[:-5])  # a kill within the last line
    second = memory()
    assert second.answers == {Memory.key("loglikelihood", ("a", "b")): (-0.1, False)}
    assert list(second.cut.values()) == [True]
    second.add("generate_until", ("a", {}), "text")
    second.flush()
    assert (tmp_path / "m.jsonl").read_text() == whole
    assert not memory(settings=2).answers


QUESTIONS = [
    {"question": f"How many are {i} and {i}?", "choices": [str(i), str(2 * i), "many"], "answer": 1, "id": f"q{i}"}
    for i in range(12)
]


def test_every_layout_of_arc_makes_the_same_prompts(tmp_path):
    """Reduced JSON lines, the hub's columns as JSON and as numbered parquet files: the stock task's prompts."""
    letters = ["A", "B", "C"]
    stock = [
        {
            "id": q["id"],
            "question": q["question"],
            "choices": {"text": q["choices"], "label": letters},
            "answerKey": "B",
        }
        for q in QUESTIONS
    ]
    for name in ("reduced", "json", "parquet/ARC-Easy"):
        (tmp_path / name).mkdir(parents=True)
    for split, part in (("train", slice(0, 8)), ("test", slice(8, 12))):
        lines = [json.dumps(q) for q in QUESTIONS[part]]
        (tmp_path / "reduced" / f"arc_easy_{split}.jsonl").write_text("\n".join(lines))
        (tmp_path / "json" / f"arc-easy.{split}.json").write_text(json.dumps(stock[part]))
        for number, rows in enumerate((stock[part][:2], stock[part][2:])):
            table = pyarrow.Table.from_pylist(rows)
            file = tmp_path / "parquet" / "ARC-Easy" / f"{split}-0000{number}-of-00002.parquet"
            pyarrow.parquet.write_table(table, file)
    found = []
    for name in ("reduced", "json", "parquet"):
        (task,) = read(["arc_easy"], 3, tmp_path / name, tmp_path / name / "tasks")
        found.append(prompts(task))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 4 * 3
    prompt, answer = found[0][0]
    assert answer == " 8"
    *examples, last = prompt.split("\n\n")
    assert len(examples) == 3
    assert last == "Question: How many are 8 and 8?\nAnswer:"
    own = {f"Question: {q['question']}\nAnswer: {2 * i}" for i, q in enumerate(QUESTIONS[:8])}
    assert set(examples) <= own


def test_without_a_train_split_no_document_is_its_own_example(tmp_path):
    """With 10 examples of 12 documents almost every prompt would leak."""
    lines = []
    for i in range(12):
        lines += [
            f"Walking: Somebody walks {i} miles. she",
            str(i % 4),
            *(f"sees the number {i} in {j}." for j in range(4)),
        ]
    (tmp_path / "hellaswag_val.txt").write_text("\n".join(lines) + "\n")
    (task,) = read(["hellaswag"], None, tmp_path, tmp_path / "tasks")
    assert task.shots == 10
    made = prompts(task)
    assert len(made) == 12 * 4
    for number, (prompt, _) in enumerate(made):
        own = f"Walking: Somebody walks {number // 4} miles. she"
        assert prompt.count(own) == 1
        assert prompt.endswith(own)
        assert prompt.count("Walking: ") == 11
    assert "without the document that is asked" in " ".join(task.differs)
    assert "ctx_b" in " ".join(task.differs)


def test_the_shared_files_are_read_whole(shared, tmp_path):
    tasks = read(["hellaswag", "arc_easy", "arc_challenge"], None, shared, tmp_path)
    lengths = {name: text.count("\n") for task in tasks for name, text in task.files.items() if name.endswith("jsonl")}
    assert lengths == {
        "hellaswag_validation.jsonl": 10042, "arc_easy_train.jsonl": 2251, "arc_easy_test.jsonl": 2376,
        "arc_challenge_train.jsonl": 1119, "arc_challenge_test.jsonl": 1172,
    }  # fmt: skip
    assert [task.shots for task in tasks] == [10, 25, 25]
