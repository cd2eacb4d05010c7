"""Small models, a small corpus, and every rule x splitting found by discovery."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from yuriiformer.config import Config, ModelConfig, TrainingConfig
from yuriiformer.data.corpus import Corpus
from yuriiformer.data.prepare import prepare
from yuriiformer.rule import all_rules
from yuriiformer.splitting import legal_splittings

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SMALL = {"layers": 2, "heads": 2, "width": 16, "context": 16, "vocabulary": 64}

COMBINATIONS = [
    pytest.param(
        (rule.name, splitting, options), id=f"{rule.name}-{splitting}" + "".join(f"-{k}{v}" for k, v in options.items())
    )
    for rule in all_rules().values()
    for splitting in legal_splittings(rule)
    for options in [{}, *({name: value} for name, values in rule.options.items() for value in values[1:])]
]


@pytest.fixture(params=COMBINATIONS)
def combination(request: pytest.FixtureRequest) -> dict:
    rule, splitting, options = request.param
    return {"rule": rule, "splitting": splitting, "options": options, **SMALL}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the folder shared/data is not beside the project")
    return SHARED


STORY = "Once upon a time there was a small grey cat who lived by the sea. {} times it asked the moon for milk.\n"


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 short documents in one file."""
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(STORY.format(i) * 3 for i in range(200)))
    return path


@pytest.fixture(scope="session")
def corpus(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return prepare(str(text), tmp_path_factory.mktemp("corpus") / "c", tokenizer="bpe:300")


@pytest.fixture
def config(corpus: Corpus) -> Config:
    """Twelve steps of a tiny Nesterov model in fp32, eager."""
    model = ModelConfig(rule="nesterov", **{**SMALL, "vocabulary": 0})
    training = TrainingConfig(
        steps=12,
        batch=4,
        evaluate_every=5,
        evaluate_sequences=8,
        checkpoint_every=4,
        device="cpu",
        precision="fp32",
        compile="no",
    )
    return Config(corpus=str(corpus.path), model=model, training=training)


@pytest.fixture
def cli(tmp_path: Path):
    """Run the command line in a fresh process, in an empty folder."""

    def run(*arguments: object, timeout: float = 300, **env: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "yuriiformer", *map(str, arguments)]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "160", **env},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


def prompts(task, limit: int | None = None) -> list[tuple[str, str]]:
    """Every prompt of a task of lm-eval, with each of its answers."""
    from yuriiformer.evaluate.tasks import manager

    task.write()
    (made,) = manager(task.folder).load([task.lm_eval_name])["tasks"].values()
    made.set_config(key="num_fewshot", value=task.shots)
    made.set_fewshot_seed(seed=1234)
    made.build_all_requests(limit=limit)
    return [instance.args for instance in made.instances]


@pytest.fixture(scope="session")
def gpt2_folder(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with random weights and biases as transformers saves it, with the corpus's tokenizer; of the size that
    the pages' commands are cut to."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: dev)")
    sizes = {"vocab_size": 320, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    folder = tmp_path_factory.mktemp("hub") / "gpt2_folder"
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((corpus.path / "tokenizer.json").read_bytes())
    return folder
