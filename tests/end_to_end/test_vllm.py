"""The exported folder in vLLM gives our tokens. Off unless YURIIFORMER_VLLM_PYTHON names an interpreter that has vLLM."""

import json
import os
import subprocess

import pytest
import torch

from yuriiformer.config import ModelConfig
from yuriiformer.data.tokenizer import make_tokenizer
from yuriiformer.generate import generate_batch
from yuriiformer.model import LanguageModel

PYTHON = os.environ.get("YURIIFORMER_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="YURIIFORMER_VLLM_PYTHON names no interpreter with vLLM")

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
folder, prompts, tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
if __name__ == "__main__":
    model = LLM(folder, trust_remote_code=True, dtype="float32", max_model_len=128, enforce_eager=True)
    settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    found = model.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], settings)
    print("TOKENS", json.dumps([list(f.outputs[0].token_ids) for f in found]))
"""


@pytest.mark.parametrize(
    ("rule", "splitting"), [("gradient_descent", "lie_trotter"), ("nesterov", "lie_trotter"), ("nesterov", "strang"), ("verlet", "auto")]
)  # fmt: skip
def test_vllm_gives_our_tokens(rule, splitting, tmp_path):
    from yuriiformer.export import write_model

    config = ModelConfig(rule=rule, splitting=splitting, layers=3, heads=2, width=64, context=128, vocabulary=320)
    model = LanguageModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty(parameter.shape).normal_(0, 0.1, generator=generator))
    write_model(model, make_tokenizer("bytes", []), tmp_path / "model")
    prompts = [[3, 1, 4, 1, 5], [9, 2], list(range(40))]
    ours = [list(row) for row in zip(*generate_batch(model, prompts, tokens=24, temperature=0), strict=True)]
    script = tmp_path / "serve.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [PYTHON, script, tmp_path / "model", json.dumps(prompts), "24"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, done.stdout + done.stderr
    assert json.loads(lines[-1].removeprefix("TOKENS ")) == ours
