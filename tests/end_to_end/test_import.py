"""docs/import.md is true: its commands run, in its order, with a small GPT-2 and a text of one's own."""

import re
import shlex
import shutil
from pathlib import Path

import torch

from yuriiformer.cli import main
from yuriiformer.training.run import Run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "import.md"
SHORT = ["--set", "training.steps=2", "training.batch=4", "training.evaluate_sequences=4", "training.compile=no"]


def test_every_command_of_the_page_runs(gpt2_folder, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(gpt2_folder, "gpt2_folder")
    shutil.copy(text, "my_text.txt")
    lines = [
        line for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL) for line in block.splitlines()
    ]
    assert len(lines) >= 5
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "yuriiformer"
        assert main([*arguments, *(SHORT if arguments[0] in ("compare", "train") else [])]) == 0, line
    runs = Path("runs")
    shutil.rmtree(runs / "gpt2")  # what was started from it stands alone
    for made in [runs / "heavier", *(runs / "momentum" / "runs").iterdir()]:
        assert torch.isfinite(Run(made).load()[0](torch.zeros(1, 8, dtype=torch.long))).all()
