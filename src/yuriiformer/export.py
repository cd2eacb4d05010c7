"""A run as a Hugging Face folder: weights, tokenizer, model card, and one modelling file made of our own sources.

The folder appears only after a fresh process has loaded it and agreed with the run.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer

from . import cache as cache_module
from . import config, errors, huggingface, model, oracle, rule, splitting, tied
from .data.tokenizer import END_OF_TEXT
from .errors import UserError
from .files import new_folder, read_json, write_json, write_text
from .flatten import flatten
from .model import LanguageModel, training_flops_per_token
from .training.run import Run

MODELING = "modeling_yuriiformer"
CLASSES = {
    "AutoConfig": "YuriiFormerConfig",
    "AutoModel": "YuriiFormerModel",  # vLLM asks for it
    "AutoModelForCausalLM": "YuriiFormerForCausalLM",
}
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
EQUAL, CLOSE = 1e-6, 1e-5  # of the largest logit, in fp32: the same kernel, and another one because of a mask


def export(run: Run, out: Path, *, unfinished: bool = False) -> dict[str, Any]:
    """Write the folder `out` and return what the fresh process found.

    unfinished: also a run that is still in training, from its newest checkpoint.
    Raises UserError when `out` is not empty, the run is not complete, or its tokenizer has more tokens than its model.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is not empty; choose another --out.")
    run.require_complete(unfinished)
    core, _ = run.load()
    tokenizer = run.tokenizer()
    if tokenizer.get_vocab_size() > core.config.vocabulary:
        raise UserError(
            f"{run.path}: the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {core.config.vocabulary}."
        )
    with new_folder(out) as folder:
        write_model(core, tokenizer, folder)
        (checks,) = check([core], [folder])
        write_json(folder / "checks.json", checks)
        write_text(folder / "README.md", model_card(run, core, checks))
    return checks


def modeling_source(of: rule.Rule) -> str:
    """The one file that a foreign machine needs: our core with this rule alone, and its transformers classes."""
    own = Path(of.step.__code__.co_filename)
    modules = (errors, config, rule, own, splitting, tied, oracle, cache_module, model, huggingface)
    files = [m if isinstance(m, Path) else Path(m.__file__ or "") for m in modules]
    name = of.step.__name__
    only = f'def find_rule(name: str) -> Rule:\n    """The rule of this model."""\n    return {name}'
    title = (
        f'"""YuriiFormer with the rule {name!r}: the sources of the package in one file, written by\n'
        '`yuriiformer export`. It imports torch and transformers, nothing else from outside the standard library.\n"""'
    )
    return f"{title}\n\n" + flatten(files, list(CLASSES.values()), {"find_rule": only})


def write_model(core: LanguageModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Configuration, weights, modelling file and tokenizer."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    hf_config = huggingface.YuriiFormerConfig(
        model=config.as_dict(core.config), bos_token_id=end, eos_token_id=end, pad_token_id=end
    )
    hf = huggingface.YuriiFormerForCausalLM(hf_config)
    hf.model.core.load_state_dict(core.state_dict())
    hf.config.auto_map = {auto: f"{MODELING}.{name}" for auto, name in CLASSES.items()}
    hf.config.model["rule"] = Path(core.config.rule).name  # a rule file's folder is nobody else's
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        hf.save_pretrained(folder)
    write_text(folder / f"{MODELING}.py", modeling_source(core.rule))
    _write_tokenizer(tokenizer, core.config.context, folder)


def _write_tokenizer(tokenizer: Tokenizer, context: int, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    end = {} if tokenizer.token_to_id(END_OF_TEXT) is None else dict.fromkeys(SPECIAL, END_OF_TEXT)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=context, padding_side="left",
        clean_up_tokenization_spaces=False, **end,
    )  # fmt: skip
    fast.save_pretrained(folder)


@torch.no_grad()
def check(
    cores: Sequence[LanguageModel], folders: Sequence[Path], python: str = sys.executable
) -> list[dict[str, Any]]:
    """What a fresh process, which knows the folders alone, computes beside what the cores compute.

    python: the interpreter of that process; it needs torch and transformers.
    Raises UserError when they differ.
    """
    generator, ids = torch.Generator().manual_seed(0), {}
    for number, core in enumerate(cores):
        shape = (2, min(24, core.config.context // 2))
        ids[str(number)] = torch.randint(core.config.vocabulary, shape, generator=generator)
    with tempfile.TemporaryDirectory() as name:
        safetensors.torch.save_file(ids, Path(name, "ids.safetensors"))
        script = Path(__file__).with_name("export_check.py")
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(name, "modules"))}
        command = [python, "-P", str(script), name, *map(str, folders)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the export cannot be loaded back: {done.stderr.strip().splitlines()[-1]}")
        theirs = safetensors.torch.load_file(Path(name, "out.safetensors"))
        versions = read_json(Path(name, "versions.json"))

    found = []
    for number, core in enumerate(cores):
        logits, padded = theirs[f"{number}.logits"], theirs[f"{number}.padded"]
        ours = core.eval()(ids[str(number)])
        largest = ours.abs().max()
        checks = {
            "logits": ((logits - ours).abs().max() / largest).item(),
            "left_padded": ((padded - logits[:1, -1]).abs().max() / largest).item(),
            "cached_equals_uncached": torch.equal(theirs[f"{number}.cached"], theirs[f"{number}.uncached"]),
            **versions,
        }
        if not (checks["logits"] <= EQUAL and checks["left_padded"] <= CLOSE and checks["cached_equals_uncached"]):
            raise UserError(f"the export does not compute what the run computes: {checks}. Nothing was written.")
        found.append(checks)
    return found


def model_card(run: Run, core: LanguageModel, checks: dict[str, Any]) -> str:
    """README.md: what it is, how to use it, its measured numbers and how they were obtained."""
    summary = read_json(run.path / "summary.json") if run.complete else {}
    settings, env, training = core.config, run.env, run.config.training
    parameters = sum(core.parameter_counts().values())
    rows = {
        "rule, splitting": f"{Path(settings.rule).name}, {settings.splitting}",
        "layers, heads, width, context": f"{settings.layers}, {settings.heads}, {settings.width}, {settings.context}",
        "parameters": f"{parameters:,}",
        "training FLOPs a token": f"{training_flops_per_token(settings):,}",
    }
    if summary:
        rows |= {
            "training tokens": f"{summary['tokens']:,} ({summary['steps']} steps of {training.batch} x {settings.context})",
            "validation loss": f"{summary['final_validation']:.4f} nats per token",
            "bits per byte": f"{summary['bits_per_byte']:.4f}",
            "training speed": f"{summary['tokens_per_second']:,.0f} tokens/s on {env['device']}, {env['threads']} threads",
            "seed": str(training.seed),
        }
    table = "\n".join(["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows.items())])
    if summary:
        corpus = env["corpus"]
        how = (
            f"Trained by `yuriiformer train` (YuriiFormer {env['yuriiformer']}, torch {env['torch']}) on the corpus "
            f"`{Path(corpus['source']).name}` with the tokenizer `{Path(corpus['tokenizer']).name}`, sha256 "
            f"`{corpus['sha256'][:16]}`. The validation loss is over {training.evaluate_sequences} held-out sequences, "
            "in the precision of the training; the speed is of training alone."
        )
    else:
        how = "The weights were imported, or the training was not finished: there are no measured numbers."
    details = json.dumps({"model": config.as_dict(settings) | {"rule": Path(settings.rule).name}}, indent=1)
    if summary:
        details += "\n" + json.dumps({"training": config.as_dict(training)}, indent=1)
    return CARD.format(
        name=run.path.name, rule=core.rule.name, doc=inspect.getdoc(core.rule.step) or "", table=table, how=how,
        source=core.rule.source, details=details, **checks,
    )  # fmt: skip


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- yuriiformer
---
# {name}

A YuriiFormer: a transformer whose layers are steps of the optimisation method `{rule}`.

{doc}

Source of the rule: {source}.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```

The code is `modeling_yuriiformer.py` beside this file; where the package yuriiformer is installed, `import
yuriiformer.huggingface` makes `trust_remote_code` unnecessary for a rule of the package.

## Numbers

{table}

{how}

## Checked when it was written

Loaded in a fresh process (transformers {transformers}, torch {torch}) from this folder alone, in fp32: logits differ from the run's by at
most {logits:.1e} of the largest logit; greedy decoding with a cache equals decoding without: {cached_equals_uncached}; left padding
changes logits by at most {left_padded:.1e} of the largest.

## Configuration

```json
{details}
```
"""
