"""What can be typed: every command and its options, as argparse reads them. Imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from . import __version__, presets
from .config import Config, flat_keys
from .errors import UserError


class Parser(argparse.ArgumentParser):
    """One line for a wrong command line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See: {self.prog} --help")


def make_parser() -> Parser:
    parser = Parser(prog="yuriiformer", description="Transformer layers as steps of optimisation methods.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, dest="name", metavar="COMMAND", parser_class=Parser)

    def command(name: str, text: str, epilog: str = "") -> Parser:
        sub: Parser = commands.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        return sub

    sub = command(
        "compare",
        "train several arms on the same batches and say which is better",
        f"{presets.ARM_HELP}\n\n{_keys()}",
    )
    sub.add_argument("arms", nargs="*", metavar="ARM", help="the first is the baseline; none: the demo's three")
    sub.add_argument(
        "--controls",
        action="store_true",
        help="add the honest controls: the baseline with a second input table, and v0 = 0 with a scaled x0 beside a scaled baseline",
    )
    sub.add_argument("--seeds", type=int, default=3, metavar="N", help="from training.seed on; default 3")
    budget = sub.add_mutually_exclusive_group()
    for kind, text in (("tokens", "training tokens"), ("flops", "training FLOPs"), ("seconds", "seconds of training")):
        budget.add_argument(f"--{kind}", type=float, metavar="X", help=f"{text} for each arm and seed")
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="default: runs/demo; an unfinished comparison there goes on",
    )
    _recipe_arguments(sub)
    _engine_arguments(sub)
    sub.add_argument(
        "--json", action="store_true", help="print comparison.json; everything else goes to standard error"
    )

    sub = command("train", "train one arm", f"{presets.ARM_HELP}\n\n{_keys()}")
    sub.add_argument("arm", nargs="?", metavar="ARM", help=f"default: {presets.DEMO_ARMS[-1]}")
    sub.add_argument("--out", type=Path, metavar="DIR", help="the new run directory")
    sub.add_argument("--resume", type=Path, metavar="DIR", help="go on with a run")
    sub.add_argument("--rule", metavar="NAME|FILE.py", help="the same as naming it as ARM")
    sub.add_argument("--splitting", metavar="NAME", help="the same as ARM:NAME")
    _recipe_arguments(sub)
    _track_argument(sub)

    sub = command("status", "say how a run or a comparison stands: running, stopped or dead, and what to do next")
    sub.add_argument("directory", type=Path, metavar="DIR", help="a run's directory, or a comparison's")
    sub.add_argument("--verify", action="store_true", help="also read every checkpoint and compare its checksums")
    sub.add_argument("--json", action="store_true")

    sub = command(
        "reproduce",
        "run what stands behind a published table, and set our numbers beside it",
        "The same command goes on with what is there. What it costs is told before it starts; --plan stops there.",
    )
    sub.add_argument("table", metavar="TABLE", help=", ".join(presets.TABLES))
    sub.add_argument("--plan", action="store_true", help="print what it costs, and stop")
    sub.add_argument(
        "--calibrate", action="store_true", help="measure this device's speed first, by ten steps of each arm"
    )
    sub.add_argument(
        "--scale", type=float, default=1.0, metavar="X", help="the whole protocol in this share of the steps, in (0, 1]"
    )
    sub.add_argument("--seeds", type=int, default=1, metavar="N", help="from training.seed on; default 1, as published")
    sub.add_argument("--controls", action="store_true", help="add arms that no table has: the honest controls")
    sub.add_argument("--tasks", metavar="NAME,...", help="then ask each run: tasks of lm-eval, hellaswag,arc_easy")
    sub.add_argument("--data", type=Path, metavar="FOLDER", help="local files for the tasks, in place of the hub")
    sub.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    sub.add_argument("--out", type=Path, metavar="DIR", help="default: runs/reproduce/TABLE")
    _change_arguments(sub)
    _engine_arguments(sub)
    sub.set_defaults(start=None, config=None, schedule=None)
    sub.add_argument(
        "--json", action="store_true", help="print reproduction.json, or the plan; all else: standard error"
    )

    sub = command("prepare", "turn text into a corpus")
    sub.add_argument(
        "source",
        metavar="SOURCE",
        help="stdlib, tinystories, openwebtext, or a file or folder: .txt .md .py .jsonl .parquet, also .xz .gz .bz2 .zst",
    )
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")
    sub.add_argument(
        "--tokenizer",
        default="bpe:1024",
        metavar="NAME",
        help="bpe:SIZE (trained on the corpus), bytes, gpt2, gpt2:FOLDER, FILE.json; default bpe:1024",
    )
    sub.add_argument("--validation", metavar="SOURCE", help="held-out text of its own; else a share is held out")
    sub.add_argument("--fraction", type=float, default=0.05, metavar="X", help="the share held out, default 0.05")
    sub.add_argument("--workers", type=int, metavar="N", help="processes, default one a core")

    sub = command("import", "make a run of a GPT-2: a Hugging Face folder, or nanoGPT's ckpt.pt")
    sub.add_argument(
        "source", metavar="SOURCE", help="a folder with config.json and weights, a ckpt.pt, or a hub's name"
    )
    sub.add_argument("--out", type=Path, required=True, metavar="RUN", help="the new run directory")
    sub.add_argument(
        "--tokenizer", metavar="NAME", help="gpt2, gpt2:FOLDER, bytes, FILE.json; default: the folder's own"
    )
    sub.add_argument("--trust", action="store_true", help="read a pickle (.pt, .bin), as tensors and plain values only")

    sub = command("generate", "continue prompts with a trained run")
    sub.add_argument("run_directory", type=Path, metavar="RUN")
    sub.add_argument("--prompt", action="append", metavar="TEXT", help="several are continued together, as a batch")
    sub.add_argument("--samples", type=int, default=1, metavar="N", help="continuations of each prompt")
    sub.add_argument("--tokens", type=int, default=200, metavar="N")
    sub.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="0 takes the likeliest token; default 0.8"
    )
    sub.add_argument("--top-k", type=int, metavar="N")
    sub.add_argument("--top-p", type=float, metavar="X")
    sub.add_argument("--seed", type=int, default=0, metavar="N")
    sub.add_argument(
        "--no-cache", action="store_true", help="recompute the whole window for every token (the same text, slower)"
    )
    _best_argument(sub)
    sub.add_argument("--compile", action="store_true", help="decode by a compiled graph: for thousands of tokens")
    sub.add_argument("--through", action="store_true", help="go on after an end-of-text token")
    sub.add_argument("--json", action="store_true", help="print a list of prompts with their continuations")

    sub = command("export", "write a run as a Hugging Face folder, and check it in a fresh process")
    sub.add_argument("run_directory", type=Path, metavar="RUN")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    _best_argument(sub)
    sub.add_argument("--unfinished", action="store_true", help="also a run still in training: its newest checkpoint")
    sub.add_argument("--json", action="store_true", help="print what the check found")

    sub = command(
        "evaluate",
        "validation loss, lm-eval's tasks, and paired tests of two models",
        "A run is evaluated on its whole validation split; with --tasks, its export is also asked by lm-eval.",
    )
    sub.add_argument("target", nargs="?", type=Path, metavar="RUN|FOLDER", help="a run, or a Hugging Face folder")
    sub.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two that were evaluated: paired tests")
    sub.add_argument("--tasks", metavar="NAME,...", help="tasks of lm-eval, such as hellaswag,arc_easy")
    sub.add_argument("--data", type=Path, metavar="FOLDER", help="local files for the tasks, in place of the hub")
    sub.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    sub.add_argument(
        "--shots", type=int, metavar="N", help="examples in a prompt; default 10 for hellaswag, 25 for arc"
    )
    sub.add_argument("--batch", type=int, default=8, metavar="N", help="prompts a forward pass; default 8")
    sub.add_argument("--out", type=Path, metavar="DIR", help="default: RUN|FOLDER/evaluation; what is there is kept")
    _best_argument(sub)
    sub.add_argument("--unfinished", action="store_true", help="also a run still in training: its newest checkpoint")
    sub.add_argument("--trust-remote-code", action="store_true", help="run the code that a Hugging Face folder brings")
    sub.add_argument("--json", action="store_true", help="print the results; everything else goes to standard error")

    sub = command("inspect", "look inside one trained run, or two side by side: every quantity along depth")
    sub.add_argument("run_directories", type=Path, nargs="+", metavar="RUN", help="one or two")
    sub.add_argument("--out", type=Path, metavar="DIR", help="for inspection.html and .json; default: RUN/inspection")
    sub.add_argument("--corpus", type=Path, metavar="DIR", help="a prepared corpus in place of the run's own")
    sub.add_argument("--sequences", type=int, metavar="N", help="validation sequences; default: 2,048 tokens' worth")
    sub.add_argument("--json", action="store_true", help="print inspection.json; all else goes to standard error")

    sub = command("torture", "prove on this machine that nothing is lost: kills, signals, full disks, damage")
    sub.add_argument("--only", nargs="+", default=[], metavar="CASE", help="kill, term, disk, flip, power, rank, world")
    sub.add_argument("--count", type=int, metavar="N", help="trials of each case; default: each case's own number")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of the first trial, default 0; each has its own")
    sub.add_argument("--tenth", action="store_true", help="every tenth trial")
    sub.add_argument("--out", type=Path, default=Path("runs/torture"), metavar="DIR", help="default: runs/torture")
    sub.add_argument("--json", action="store_true", help="print torture.json")

    sub = command("theory", "compute the statements behind it all: energies, splittings, acceleration, particles")
    sub.add_argument("--only", nargs="+", action="extend", default=[], metavar="NAME", help="these statements alone")
    sub.add_argument("--run", type=Path, metavar="RUN", dest="run_directory", help="look at a trained run's oracles")
    sub.add_argument("--tokens", type=int, default=12, metavar="N", help="of the text that the run reads; default 12")
    sub.add_argument("--rule", metavar="FILE.py", action="append", default=[], help="also run this rule")
    sub.add_argument("--out", type=Path, default=Path("runs/theory"), metavar="DIR", help="default: runs/theory")
    sub.add_argument("--json", action="store_true", help="print theory.json; everything else goes to standard error")

    sub = command("bench", "time training steps of arms that take turns; random tokens, no text", presets.ARM_HELP)
    sub.add_argument("arms", nargs="*", metavar="ARM", help="the first is what the others are set beside")
    sub.add_argument("--preset", metavar="NAME", help=f"sizes and recipe: {', '.join(presets.PRESETS)}; default demo")
    sub.add_argument("--steps", type=int, default=100, metavar="N", help="timed steps of each arm; default 100")
    sub.add_argument("--warm-up", type=int, default=20, metavar="N", help="steps before them; default 20")
    sub.add_argument("--transformers", action="store_true", help="let GPT-2 from transformers take part")
    sub.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="config keys")
    sub.add_argument("--out", type=Path, metavar="FILE.json", help="write what was measured")
    sub.add_argument("--json", action="store_true", help="print it; everything else goes to standard error")
    sub.set_defaults(start=None, config=None, corpus=None, tokenizer=None, schedule=None)

    sub = command("rules", "list the update rules")
    sub.add_argument(
        "--rule", metavar="FILE.py", action="append", default=[], help="also a rule from outside the package"
    )
    sub.add_argument("--json", action="store_true")
    return parser


def _recipe_arguments(sub: Parser) -> None:
    sub.add_argument(
        "--preset", metavar="NAME", help=f"a recipe and its text: {', '.join(presets.PRESETS)}; default demo"
    )
    sub.add_argument("--schedule", metavar="NAME", help="the same as --set training.schedule=NAME")
    sub.add_argument(
        "--from",
        type=Path,
        dest="start",
        metavar="RUN",
        help="start from the weights of a run, with its model and tokenizer, and on the next seed; an arm of another rule "
        "first computes exactly the same function",
    )
    sub.add_argument("--config", type=Path, metavar="FILE", help="a .toml or .json file of config keys")
    _change_arguments(sub)


def _change_arguments(sub: Parser) -> None:
    sub.add_argument(
        "--corpus", metavar="DIR|SOURCE", help="a prepared corpus, or a source to prepare; default: the recipe's"
    )
    sub.add_argument("--tokenizer", metavar="NAME", help="for a source to prepare; default: the recipe's")
    sub.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="config keys, such as model.width=128",
    )


def _engine_arguments(sub: Parser) -> None:
    sub.add_argument(
        "--engine", default="local", metavar="NAME", help="local: one run after another; ray: many at once on a cluster"
    )
    sub.add_argument(
        "--workers", type=int, metavar="N", help="runs at once with --engine ray; default one a GPU, or one a core"
    )
    _track_argument(sub)


def _best_argument(sub: Parser) -> None:
    sub.add_argument("--best", action="store_true", help="the checkpoint of the lowest validation loss, not the newest")


def _track_argument(sub: Parser) -> None:
    sub.add_argument("--track", default="", metavar="NAME,...", help="also show it in tensorboard, trackio, wandb")


def _keys() -> str:
    lines = ["config keys:"]
    demo = presets.demo()
    for key, field in flat_keys(Config).items():
        section, _, name = key.rpartition(".")
        default = getattr(getattr(demo, section) if section else demo, name)
        lines.append(f"  {key:<28} {field.metadata['doc']}" + (f" [{default}]" if default not in ("", {}) else ""))
    return "\n".join(lines)
