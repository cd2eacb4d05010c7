"""Run as a script in a fresh process: load an exported folder with transformers alone and compute with it.

Arguments: the folder, and a folder with ids.safetensors to write out.safetensors and versions.json into.
"""

import json
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers


@torch.no_grad()
def main(folder: str, exchange: str) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ids = safetensors.torch.load_file(Path(exchange, "ids.safetensors"))["ids"]
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    model, report = loaded
    if wrong := {kind: sorted(keys) for kind, keys in report.items() if keys}:
        raise RuntimeError(f"weights and model do not fit: {wrong}")
    transformers.AutoTokenizer.from_pretrained(folder)
    model = model.float().eval()
    padding = 5
    padded = torch.cat([ids.new_zeros(1, padding), ids[:1]], dim=1)
    seen = torch.ones_like(padded)
    seen[:, :padding] = 0
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    greedy = {"max_new_tokens": ids.shape[1] // 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = {
        "logits": model(ids).logits,
        "padded": model(padded, attention_mask=seen, position_ids=positions).logits[:, -1],
        "cached": model.generate(ids, **greedy),
        "uncached": model.generate(ids, use_cache=False, **greedy),
    }
    safetensors.torch.save_file({k: t.contiguous() for k, t in out.items()}, Path(exchange, "out.safetensors"))
    assert "yuriiformer.model" not in sys.modules
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    Path(exchange, "versions.json").write_text(json.dumps(versions))


if __name__ == "__main__":
    main(*sys.argv[1:])
