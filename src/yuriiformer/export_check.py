"""Run as a script in a fresh process: load exported folders with transformers alone and compute with them.

Arguments: a folder with ids.safetensors, which is given out.safetensors and versions.json; and the exported folders,
whose tensors are numbered in that order.
"""

import json
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor


@torch.no_grad()
def main(exchange: str, *folders: str) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ids = safetensors.torch.load_file(Path(exchange, "ids.safetensors"))
    out: dict[str, Tensor] = {}
    for number, folder in enumerate(folders):
        out |= {f"{number}.{name}": tensor.contiguous() for name, tensor in compute(folder, ids[str(number)]).items()}
    safetensors.torch.save_file(out, Path(exchange, "out.safetensors"))
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    Path(exchange, "versions.json").write_text(json.dumps(versions))
    assert "yuriiformer.model" not in sys.modules


def compute(folder: str, ids: Tensor) -> dict[str, Tensor]:
    """Logits, those of the first row with padding before it, and greedy tokens with and without a cache."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    model, report = loaded
    if wrong := {kind: sorted(keys) for kind, keys in report.items() if keys}:
        raise RuntimeError(f"weights and model do not fit: {wrong}")
    transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = model.float().eval()
    padding = 5
    padded = torch.cat([ids.new_zeros(1, padding), ids[:1]], dim=1)
    seen = torch.ones_like(padded)
    seen[:, :padding] = 0
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    greedy = {"max_new_tokens": ids.shape[1] // 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return {
        "logits": model(ids).logits,
        "padded": model(padded, attention_mask=seen, position_ids=positions).logits[:, -1],
        "cached": model.generate(ids, **greedy),
        "uncached": model.generate(ids, use_cache=False, **greedy),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
