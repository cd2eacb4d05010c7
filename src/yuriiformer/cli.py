"""The command line. Every command imports what it needs when it runs, so `--help` answers at once."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, presets
from .arguments import make_parser
from .config import Config, flat, load, override
from .errors import EnvironmentFault, Interrupted, Refuted, UserError
from .signals import SIGNALS, Stop

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from .compare import Arm
    from .data.corpus import Corpus
    from .engines import Engine
    from .theory import Subject


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit code is 0, 1 (a statement fails), 2 (bad input), 3 (the machine refuses) or 75 (stopped, all saved)."""
    # Spinning OpenMP threads are up to 15 times slower as soon as anything else runs; `active` is a little faster alone.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        options = make_parser().parse_args(arguments)
        options.command = shlex.join(["yuriiformer", *(sys.argv[1:] if arguments is None else arguments)])
        COMMANDS[options.name](options)
        return 0
    except UserError as error:
        # Processes that train one run together fail together; what only one machine refuses, that one tells.
        if os.environ.get("RANK", "0") == "0" or isinstance(error, EnvironmentFault):
            print(f"yuriiformer: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("yuriiformer: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _preset(options: argparse.Namespace) -> presets.Preset:
    return presets.find_preset(options.preset or "demo")


def _base(options: argparse.Namespace, scale: float | None = None) -> Config:
    """The preset's config, with the model of a start run, and the file's and the command line's keys over it."""
    config = _preset(options).config()
    if scale is not None:
        config = presets.scaled(config, scale)
    if options.corpus or options.tokenizer:  # a text of one's own brings its vocabulary
        config = replace(config, model=replace(config.model, vocabulary=0))
    if options.start:
        from .training.run import Run

        run = Run(options.start).config
        training = replace(config.training, seed=run.training.seed + 1)  # other batches than the run has seen
        config = replace(config, start=str(options.start), model=run.model, training=training)
    if options.config:
        config = load(options.config, config)
    assignments = {"training.schedule": options.schedule} if options.schedule else {}
    for text in options.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text!r} must be KEY=VALUE.")
        assignments[key] = value
    config = override(config, assignments)
    if config.start != str(options.start or ""):
        raise UserError(f"give the start run as an option of its own: --from {config.start}")
    return config


def _corpus(options: argparse.Namespace, beside: Path, stop: Stop) -> Corpus:
    """A corpus by its directory, or prepared once from a source into a folder beside what is made with it."""
    if corpus := _prepared_already(options, beside):
        return corpus
    preset, source, tokenizer = _preset(options), *_text(options)
    held_out = preset.held_out if source == preset.source else presets.Preset.held_out
    return _prepared(source, beside / "corpus", tokenizer, None, held_out, None, stop)


def _text(options: argparse.Namespace) -> tuple[str, str]:
    """The source that is asked for, and its tokenizer: the one named, the start run's, or the preset's."""
    from .data.corpus import TOKENIZER

    own = str(options.start / TOKENIZER) if options.start else _preset(options).tokenizer
    return options.corpus or _preset(options).source, options.tokenizer or own


def _prepared_already(options: argparse.Namespace, beside: Path) -> Corpus | None:
    """The corpus that is asked for, where it is there. Raises UserError when another one stands in its place."""
    from .data.corpus import MANIFEST, Corpus
    from .data.sources import Source

    source, tokenizer = _text(options)
    given = (Path(source) / MANIFEST).is_file()
    made = Path(source) if given else beside / "corpus"
    if not made.exists():
        return None
    corpus = Corpus(made)
    found = corpus.manifest
    if not given and (found["source"], found["source_bytes"]) != (source, Source(source).size):
        raise UserError(f"{made} was prepared from another {source!r} ({found['source']}); choose another --out.")
    # a start run's tokenizer is compared by what it holds, when the arms are made definite
    if found["tokenizer"] != tokenizer and (options.tokenizer or not (given or options.start)):
        way = "leave --tokenizer out" if given else "choose another --out"
        raise UserError(f"{made} was prepared with tokenizer {found['tokenizer']}, not {tokenizer}; {way}.")
    return corpus


def _prepared(
    source: str,
    out: Path,
    tokenizer: str,
    validation: str | None,
    fraction: float,
    workers: int | None,
    stop: Stop,
) -> Corpus:
    from .data.prepare import passes, prepare
    from .data.sources import Source
    from .progress import Meter

    size = Source(source).size
    with Meter(f"preparing {source}", size * passes(tokenizer) if size else None) as meter:

        def advance(amount: float) -> None:
            if stop.requested:
                raise Interrupted(f"stopped while preparing {source}; nothing is kept of that.")
            meter.advance(amount)

        corpus = prepare(
            source,
            out,
            tokenizer=tokenizer,
            validation=validation,
            fraction=fraction,
            workers=workers,
            progress=advance,
        )
        counts = {name: f"{entry['tokens']:,}" for name, entry in corpus.manifest["splits"].items()}
        meter.line(
            f"{out}: {counts['train']} training and {counts['validation']} validation tokens, vocabulary {corpus.vocabulary:,}"
        )
    return corpus


def _prepare(options: argparse.Namespace) -> None:
    with Stop().on_signals() as stop, _go_on("The same command starts again."):
        _prepared(
            options.source, options.out, options.tokenizer, options.validation, options.fraction, options.workers, stop
        )


def _compare(options: argparse.Namespace) -> None:
    base = _base(options)
    if options.seeds < 1:
        raise UserError(f"--seeds must be at least 1; got {options.seeds}.")
    if options.start and options.controls:
        raise UserError("--controls change what the start run computes; leave them out with --from.")
    names = options.arms or list(presets.START_ARMS if options.start else presets.DEMO_ARMS)
    given = [
        (kind, getattr(options, kind)) for kind in ("tokens", "flops", "seconds") if getattr(options, kind) is not None
    ]

    from .compare import Budget, compare, controls, parse_arm
    from .data.corpus import Corpus
    from .progress import console
    from .report.tables import show
    from .training.distributed import joined

    engine = _engine(options)
    if options.engine != "local" and options.seconds is not None:
        raise UserError(
            "--seconds is measured on this machine, and --engine ray trains elsewhere; give --tokens or --flops."
        )
    training = base.training
    if given and not 0 < given[0][1] < math.inf:
        raise UserError(f"--{given[0][0]} must be a positive number; got {given[0][1]:g}.")
    kind, amount = given[0] if given else ("tokens", training.steps * training.batch * base.model.context)
    missing = [] if options.start else controls(names)
    if options.controls:
        names, missing = [*names, *missing], []
    arms = [parse_arm(name, base) for name in names]
    seeds = range(training.seed, training.seed + options.seeds)
    with Stop().on_signals() as stop, _go_on("The same command goes on."), joined(training.device) as world:
        made = world.lead(lambda: str(_corpus(options, options.out, stop).path))
        corpus = Corpus(Path(made))
        compare(arms, seeds, Budget(kind, amount), corpus, options.out, options.command, stop, world, engine)
    if not world.leads:
        return

    comparison = _report(options.out, missing)
    show(comparison, console)
    if missing:
        console.print(f"Honest controls not run here (--controls adds them): {', '.join(missing)}", soft_wrap=True)
    console.print(f"Look at {options.out / 'report.html'}", soft_wrap=True)
    if options.json:
        print(json.dumps(comparison))


def _engine(options: argparse.Namespace) -> Engine:
    from .engines import find_engine
    from .tracking import chosen

    return find_engine(options.engine, options.workers, chosen(options.track))


def _reproduce(options: argparse.Namespace) -> None:
    table = presets.find_table(options.table)
    options.preset, out = table.preset, options.out or Path("runs/reproduce") / options.table
    if options.seeds < 1:
        raise UserError(f"--seeds must be at least 1; got {options.seeds}.")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit must be at least 1; got {options.limit}.")
    if not options.tasks and (options.data or options.limit is not None):
        raise UserError("--data and --limit belong to --tasks; name some.")
    tasks = [name.strip() for name in (options.tasks or "").split(",") if name]
    asked = _base(options, options.scale)
    seeds = range(asked.training.seed, asked.training.seed + options.seeds)
    measured: dict[str, float] = {}  # tokens per second of each arm, where a calibration tells them

    with Stop().on_signals() as stop, _go_on("The same command goes on."):
        from .compare import Budget, compare
        from .data.corpus import Corpus
        from .data.tokenizer import vocabulary_of
        from .files import write_json, write_text
        from .progress import console
        from .report.reproduction import beside, markdown, show, show_plan, write_page
        from .reproduce import arms_of, deviations, measure, plan, with_vocabulary
        from .training.distributed import joined

        def text(corpus: Corpus | None) -> tuple[str, str, int]:
            """Source, tokenizer and its tokens, of what is there or of what will be prepared."""
            if corpus:
                return corpus.manifest["source"], corpus.manifest["tokenizer"], corpus.vocabulary
            source, tokenizer = _text(options)
            return source, tokenizer, vocabulary_of(tokenizer)

        def arms(corpus: Corpus | None) -> list[Arm]:
            return arms_of(table, with_vocabulary(asked, text(corpus)[2]), options.controls)

        def cost(corpus: Corpus | None) -> dict[str, Any]:
            source, tokenizer, tokens = text(corpus)
            differ = deviations(with_vocabulary(asked, tokens), _preset(options), source, tokenizer)
            return {"title": table.title, "deviations": differ, **plan(arms(corpus), seeds, out, measured)}

        def begin() -> str:
            """Tell what it costs and have the text prepared; empty when that was all that was asked."""
            corpus = _prepared_already(options, out)
            if options.calibrate:
                corpus = corpus or _corpus(options, out, stop)
                measured.update(measure(arms(corpus), corpus, out, stop))
            costs = cost(corpus)
            show_plan(costs, console)
            if options.plan:
                if options.json:
                    print(json.dumps(costs))
                return ""
            if tasks:
                with _extra("evaluate"):  # what they lack is told before the first run
                    from .evaluate.tasks import read
                read(tasks, None, options.data, out / "tasks")
            return str((corpus or _corpus(options, out, stop)).path)

        engine = _engine(options)
        with joined(asked.training.device) as world:
            if world.size > 1 and options.calibrate:
                raise UserError("--calibrate measures one process; leave it out.")
            if not (made := world.lead(begin)):
                return
            corpus = Corpus(Path(made))
            training, context = asked.training, asked.model.context
            budget = Budget("tokens", training.steps * training.batch * context)
            compare(arms(corpus), seeds, budget, corpus, out, options.command, stop, world, engine)
    if not world.leads:
        return

    comparison = _report(out, [])
    found = beside(table, comparison, cost(corpus))
    with _go_on("The same command goes on."), _stoppable():
        for arm in arms(corpus) if tasks else []:
            found["scores"][arm.name] = _scores(arm, seeds, out, tasks, options.data, options.limit)
    write_json(out / "reproduction.json", found)
    write_page(found, comparison, out / "reproduction.html")
    write_text(out / "reproduction.md", markdown(found))
    show(found, console)
    console.print(f"Look at {out / 'reproduction.html'}; all arms: {out / 'report.html'}", soft_wrap=True)
    if options.json:
        print(json.dumps(found))


@contextmanager
def _stoppable() -> Iterator[None]:
    """Each signal that asks to stop is Ctrl-C: for what goes on by itself the next time, and looks at no Stop."""
    previous = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("stopped.") from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _scores(
    arm: Arm, seeds: Sequence[int], out: Path, tasks: list[str], data: Path | None, limit: int | None
) -> dict[str, dict[str, Any]]:
    """What lm-eval says of the best checkpoint of each run of an arm, by task and seed: acc_norm, or acc where a task has none."""
    from .evaluate.evaluate import evaluate

    scores: dict[str, dict[str, Any]] = {task: {} for task in tasks}
    for seed in seeds:
        path = arm.path(out, seed)
        if (path / "summary.json").is_file():  # else it diverged
            for task, found in evaluate(
                path, tasks=tasks, data=data, limit=limit, best=True, out=path / "evaluation_best"
            )["tasks"].items():
                (name, numbers), *_ = found["results"].items()
                value = numbers.get("acc_norm", numbers.get("acc"))
                scores[task][str(seed)] = {"value": value, "documents": found["documents"][name]}
    return scores


def _report(out: Path, missing: list[str]) -> dict[str, Any]:
    """Write what a finished comparison says into its folder; `missing` are the controls that were not run."""
    from .files import write_json, write_text
    from .report.comparison import collect
    from .report.page import write_page
    from .report.tables import markdown

    comparison = collect(out) | {"controls_not_run": missing}
    write_json(out / "comparison.json", comparison)
    write_page(comparison, out / "report.html")
    write_text(out / "table.md", markdown(comparison))
    return comparison


@contextmanager
def _go_on(how: str) -> Iterator[None]:
    """Tell who stops a command how to go on with it."""
    try:
        yield
    except Interrupted as stopped:
        raise Interrupted(f"{stopped} {how}") from None


def _train(options: argparse.Namespace) -> None:
    if options.resume and options.out:
        raise UserError("give --out for a new run or --resume for an old one, not both.")
    if not (options.resume or options.out):
        raise UserError("where to? Give --out DIR for a new run or --resume DIR for an old one.")
    with Stop().on_signals() as stop:  # from here on, while the libraries load
        from .compare import parse_arm
        from .data.corpus import Corpus
        from .engines import Follower, Job, told
        from .progress import Meter, console
        from .tracking import chosen
        from .training.distributed import joined
        from .training.loop import train
        from .training.run import Run, definite

        track = chosen(options.track)
        if options.resume:
            names = ("arm", "rule", "splitting", "preset", "schedule", "corpus", "tokenizer", "start", "config", "set")
            if given := [name for name in names if getattr(options, name)]:
                raise UserError(f"a resumed run keeps its own {given[0]}; leave it out, or start a new run with --out.")
            run = Run(options.resume)
            base = run.config
        else:
            base = _base(options)
        with (
            joined(base.training.device) as world,
            _go_on(f"Go on with: yuriiformer train --resume {options.resume or options.out}"),
        ):
            if options.resume:
                line, done = f"going on with {options.resume}", world.lead(lambda: run.complete)
            else:
                head, comma, rest = (options.arm or presets.DEMO_ARMS[-1]).partition(",")
                rule, _, splitting = head.partition(":")
                text = f"{options.rule or rule}:{options.splitting or splitting or 'auto'}{comma}{rest}"
                arm = parse_arm(text, base)
                made = world.lead(lambda: str(_corpus(options, options.out.parent, stop).path))
                corpus = Corpus(Path(made))
                config, line = definite(arm.config, corpus)
                done = world.lead(lambda: _begun(options.out, config, corpus))
                run = Run(options.out)
            if done:  # a launcher that starts its command again has nothing left to do
                console.print(f"{run.path} is complete: {run.step} steps are done.", soft_wrap=True)
                return
            job = Job(run.path, run.config, run.config.model.rule)
            with Meter("training", job.flops) as meter, Follower(job, meter, track) as follower:
                meter.line(line)
                follower.shown.finish(told(train(run, stop, follower.observe, world)))
                meter.line(f"Generate with: yuriiformer generate {run.path} --prompt '...'")


def _begun(out: Path, config: Config, corpus: Corpus) -> bool:
    """Make the run, or go on with the same one, as a launcher that starts its command again wants it; whether it is
    complete. Raises UserError naming the key when another one is there."""
    from .training.run import Run

    if not (out / "config.json").is_file():
        return Run.create(out, config, corpus).complete
    run, asked = Run(out), flat(config)
    for key, value in flat(run.config).items():
        if value != asked[key]:
            raise UserError(
                f"{out} exists already, with {key} {value!r} in place of {asked[key]!r}; go on with it by "
                f"--resume {out}, or choose another --out."
            )
    return run.complete


def _status(options: argparse.Namespace) -> None:
    from .report.status import show, status

    found = status(options.directory, verify=options.verify)
    if options.json:
        print(json.dumps(found))
        return
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 170)
    show(found, console)


def _import(options: argparse.Namespace) -> None:
    from .importing import import_run
    from .progress import console

    run = import_run(options.source, options.out, tokenizer=options.tokenizer, trust=options.trust)
    model = run.config.model
    console.print(
        f"{run.path}: {model.layers} layers, width {model.width}, {model.heads} heads, context {model.context}, "
        f"vocabulary {model.vocabulary:,}, oracles {model.oracles}\n"
        f"Generate with: yuriiformer generate {run.path} --prompt '...'\n"
        f"Train on with: yuriiformer compare --from {run.path} --corpus SOURCE --out DIR",
        soft_wrap=True, markup=False,
    )  # fmt: skip


def _generate(options: argparse.Namespace) -> None:
    for name in ("tokens", "samples"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1; got {getattr(options, name)}.")
    from .generate import generate_batch
    from .training.run import Run

    run = Run(options.run_directory, options.best)
    model, complaints = run.load()
    for complaint in complaints:
        print(f"yuriiformer: warning: {complaint}", file=sys.stderr)
    texts = [text for text in options.prompt or ["\n"] for _ in range(options.samples)]
    tokenizer = run.tokenizer()
    steps = generate_batch(
        model, [tokenizer.encode(text).ids for text in texts], tokens=options.tokens, temperature=options.temperature,
        top_k=options.top_k, top_p=options.top_p, seed=options.seed, use_cache=not options.no_cache,
        compiled=options.compile,
    )  # fmt: skip
    if len(texts) == 1 and not options.json:
        _stream(texts[0], (ids[0] for ids in steps), tokenizer, options.through)
        return

    from .data.tokenizer import END_OF_TEXT
    from .progress import Meter

    rows: list[list[int]] = [[] for _ in texts]
    with Meter("generating", options.tokens) as meter:
        for step in steps:
            for row, token in zip(rows, step, strict=True):
                row.append(token)
            meter.advance(1)
    end = None if options.through else tokenizer.token_to_id(END_OF_TEXT)
    rows = [row[: row.index(end)] if end in row else row for row in rows]
    written = [tokenizer.decode(row, skip_special_tokens=False) for row in rows]
    if options.json:
        found = zip(texts, rows, written, strict=True)
        print(json.dumps([{"prompt": p, "text": text, "tokens": len(row)} for p, row, text in found]))
        return
    for number, (prompt, text) in enumerate(zip(texts, written, strict=True), 1):
        print(f"=== {number} of {len(texts)}\n{prompt}{text}")


def _stream(prompt: str, ids: Iterator[int], tokenizer: Tokenizer, through: bool) -> None:
    """Print the prompt, then every token as it comes, to the end of the text."""
    from tokenizers.decoders import DecodeStream

    from .data.tokenizer import END_OF_TEXT

    stream = DecodeStream(skip_special_tokens=False)
    for shown in tokenizer.encode(prompt).ids:
        print(stream.step(tokenizer, shown) or "", end="")
    for token in ids:
        if token == tokenizer.token_to_id(END_OF_TEXT) and not through:
            break
        print(stream.step(tokenizer, token) or "", end="", flush=True)
    print()


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Imports that an optional part of the installation brings."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise EnvironmentFault(
            f"this needs {error.name}, which is not installed: pip install 'yuriiformer[{name}]'"
        ) from None


def _export(options: argparse.Namespace) -> None:
    from .training.run import Run

    run = Run(options.run_directory, options.best)
    with _extra("huggingface"):
        from .export import export
    checks = export(run, options.out, unfinished=options.unfinished)
    if options.json:
        print(json.dumps(checks))
        return
    print(
        f"{options.out}: loaded back in a fresh process; logits differ by at most {checks['logits']:.1e} "
        "of the largest, "
        "decoding with a cache equals decoding without."
    )


def _evaluate(options: argparse.Namespace) -> None:
    if bool(options.target) == bool(options.compare):
        raise UserError("give a run or a folder to evaluate, or --compare A B.")
    for name, least in (("limit", 1), ("shots", 0), ("batch", 1)):
        if (value := getattr(options, name)) is not None and value < least:
            raise UserError(f"--{name} must be at least {least}; got {value}.")
    from .progress import console
    from .report.scores import show_paired, show_scores

    if options.compare:
        from .evaluate.paired import compare

        found = compare(*options.compare)
        show_paired(found, console)
    else:
        from .evaluate.evaluate import evaluate

        with _go_on("The same command goes on."), _extra("evaluate"):
            found = evaluate(
                options.target, tasks=[name.strip() for name in (options.tasks or "").split(",") if name], data=options.data,
                limit=options.limit, shots=options.shots, batch=options.batch, out=options.out,
                unfinished=options.unfinished, trust_remote_code=options.trust_remote_code, best=options.best,
            )  # fmt: skip
        show_scores(found, console)
    if options.json:
        print(json.dumps(found))


def _inspect(options: argparse.Namespace) -> None:
    paths = options.run_directories
    out = options.out or paths[0] / "inspection"
    if len(paths) > 2:
        raise UserError(f"inspect shows one run or two side by side; got {len(paths)}.")
    if options.sequences is not None and options.sequences < 1:
        raise UserError(f"--sequences must be at least 1; got {options.sequences}.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out.")
    from .files import disk_errors, write_json
    from .inspection.depth import corpus_for, inspect_run, memory_needed, require_memory
    from .progress import Meter
    from .report.inspection import labelled, write_page
    from .training.run import Run

    runs = [Run(path) for path in paths]
    corpora = [corpus_for(run, options.corpus) for run in runs]
    with Meter("inspecting", len(runs)) as meter:
        meter.line(f"about {max(map(memory_needed, runs)) / 1e9:.1f} GB of memory")
        for run in runs:
            require_memory(run)
        found = []
        for run, corpus in zip(runs, corpora, strict=True):
            found.append(inspect_run(run, corpus, options.sequences, meter.advance))
        inspection = {"command": options.command, "runs": labelled(found)}
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        write_json(out / "inspection.json", inspection)
        write_page(inspection, out / "inspection.html")
        for run in inspection["runs"]:
            for complaint in run["warnings"]:
                meter.line(f"warning: {complaint}")
            for title, text in run["says"].items():
                meter.line(f"{run['label']}: {title}: {text}")
        meter.line(f"Look at {out / 'inspection.html'}")
    if options.json:
        print(json.dumps(inspection))


def _torture(options: argparse.Namespace) -> None:
    if options.count is not None and options.count < 1:
        raise UserError(f"--count must be at least 1; got {options.count}.")
    from .torture.run import torture

    found = torture(
        options.out, options.only, count=options.count, seed=options.seed, tenth=options.tenth, command=options.command
    )
    if options.json:
        print(json.dumps(found))
    if broken := [case["case"] for case in found["cases"] if case["failed"]]:
        raise Refuted(f"{', '.join(broken)}: something was lost. What failed is in {options.out / 'failed'}.")


def _theory(options: argparse.Namespace) -> None:
    if options.tokens < 2:
        raise UserError(f"--tokens must be at least 2; got {options.tokens}.")
    from .theory import STATEMENTS, chosen, random_subject, with_rules

    names = chosen(options.only)
    subject = _subject(options.run_directory, options.tokens) if options.run_directory else random_subject(8)
    subject = with_rules(subject, options.rule)

    from .files import disk_errors, write_json
    from .progress import Meter, console
    from .report.theory import write_page

    with disk_errors(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    found = []
    with Meter("computing", len(names)) as meter:
        for name in names:
            meter.advance(0, name)
            statement = STATEMENTS[name](subject)
            found.append(statement.as_dict())
            meter.advance(1, name)
            meter.line(f"{name}: {statement.verdict}")
    unexpected = [s["name"] for s in found if not s["as_expected"]]
    verdict = (
        f"Not as theory says: {', '.join(unexpected)}."
        if unexpected
        else f"All {len(found)} statements came out as theory says, in what holds and in what does not."
    )
    theory = {
        "command": options.command, "yuriiformer": __version__, "subject": subject.title, "verdict": verdict,
        "run": options.run_directory and str(options.run_directory), "as_expected": not unexpected, "statements": found,
    }  # fmt: skip
    write_json(options.out / "theory.json", theory)
    write_page(theory, options.out / "theory.html")
    console.print(f"{verdict} Look at {options.out / 'theory.html'}", soft_wrap=True, markup=False)
    if options.json:
        print(json.dumps(theory))
    if unexpected:
        raise Refuted(f"{verdict} The numbers are in {options.out / 'theory.html'}.")


def _subject(path: Path, tokens: int) -> Subject:
    """The layers of a run that reads some text."""
    import torch

    from .theory import TEXT, look_at
    from .training.run import Run

    run = Run(path)
    model, complaints = run.load()
    for complaint in complaints:
        print(f"yuriiformer: warning: {complaint}", file=sys.stderr)
    ids = run.tokenizer().encode(TEXT * tokens).ids[: min(tokens, model.config.context)]
    return look_at(f"the trained run {path}", model, torch.tensor(ids))


def _bench(options: argparse.Namespace) -> None:
    for name, least in (("steps", 2), ("warm_up", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}; got {getattr(options, name)}.")
    if options.out and not options.out.absolute().parent.is_dir():
        raise UserError(f"the folder of --out {options.out} does not exist.")
    base = _base(options)

    from .compare import SHARED, parse_arm
    from .progress import Meter, console
    from .report.bench import show

    names = options.arms or [presets.BASELINE, presets.DEMO_ARMS[-1]]
    arms = {name: parse_arm(name, base, SHARED - {"precision", "compile", "loss_chunk"}).config for name in names}
    with _extra("huggingface"), Meter("timing", options.steps + options.warm_up) as meter:
        from .bench import bench

        found = bench(
            arms, options.steps, meter.line, meter.advance, warm_up=options.warm_up, transformers=options.transformers
        )
    found = {"command": options.command, "yuriiformer": __version__, **found}
    if options.out:
        from .files import write_json

        write_json(options.out, found)
    show(found, console)
    if options.json:
        print(json.dumps(found))


def _rules(options: argparse.Namespace) -> None:
    from .rule import all_rules, find_rule
    from .splitting import legal_splittings

    rules = {**all_rules(), **{name: find_rule(name) for name in options.rule}}
    listed: list[dict[str, Any]] = [
        {
            "name": rule.name,
            "streams": rule.streams,
            "oracles": rule.oracles,
            "coefficients": {
                n: {"range": c.range.interval, "initial": c.default} for n, c in rule.coefficients.items()
            },
            "options": rule.options,
            "splittings": list(legal_splittings(rule)),
            "calls": rule.calls({}),
            "readout": rule.readout,
            "reduces_to": rule.reduces_to,
            "source": rule.source,
            "summary": (rule.step.__doc__ or "").strip().split("\n")[0],
        }
        for rule in rules.values()
    ]
    if options.json:
        print(json.dumps(listed, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("rule", "streams", "coefficients (initial)", "splittings", "what it does")
    for entry in listed:
        coefficients = ", ".join(f"{n} ({c['initial']:g})" for n, c in entry["coefficients"].items())
        choices = "".join(f" {n}={'|'.join(map(str, values))}" for n, values in entry["options"].items())
        table.add_row(
            entry["name"],
            " ".join(entry["streams"]),
            coefficients + choices,
            " ".join(entry["splittings"]),
            entry["summary"],
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())


COMMANDS = {
    "compare": _compare,
    "train": _train,
    "status": _status,
    "reproduce": _reproduce,
    "prepare": _prepare,
    "import": _import,
    "generate": _generate,
    "export": _export,
    "evaluate": _evaluate,
    "inspect": _inspect,
    "torture": _torture,
    "theory": _theory,
    "bench": _bench,
    "rules": _rules,
}
