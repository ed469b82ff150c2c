"""The command line: `tlora VERB [flags]`.

A verb is a line in `VERBS`: its name, its purpose, the record that its flags fill, and the function
below that takes the record. Slow imports happen in that function, so that help is fast.

Exit codes: 0 done, 2 bad input (a sentence says which), 1 anything else, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tlora import __version__, extras, presets
from tlora.chat.chatconfig import ChatConfig
from tlora.compare.compareconfig import CompareConfig
from tlora.credentials import RedactingFormatter, printable, redacted
from tlora.errors import (
    ConfigError,
    RunsFailedError,
    TLoraError,
    did_you_mean,
    system_fault,
)
from tlora.evaluate.evalconfig import EvalConfig
from tlora.exporters.exportconfig import ExportConfig, MergeConfig
from tlora.registry import CONVERSATIONS, EVALUATIONS, FORMATS, METHODS, TASKS, Entry
from tlora.training.runconfig import RunConfig
from tlora.verbconfig import (
    DemoConfig,
    InitConfig,
    InspectConfig,
    ListConfig,
    interrupted,
    no_bars_in_batch_jobs,
)
from tlora.verify.verifyconfig import VerifyConfig

logger = logging.getLogger("tlora.cli")  # __name__ is "__main__" under `python -m`

_REGISTERED: dict[str, Callable[[], list[Entry]]] = {
    "methods": METHODS.entries,
    "tasks": TASKS.entries,
    "formats": FORMATS.entries,
    "evaluations": lambda: [*EVALUATIONS.entries(), *CONVERSATIONS.entries()],
    "presets": presets.entries,
}


def demo(config: DemoConfig) -> None:
    """Run the demonstration."""
    from tlora.demo import summary
    from tlora.demo.run import BASE_MODEL, check, run, write_rows

    check(config.output_dir, config.seed, config.rows_only)
    if config.rows_only:
        for name, folder in write_rows(config.output_dir, config.seed).items():
            _say(f"{name}: {folder}/train.jsonl and test.jsonl")
        _say(f"model: {BASE_MODEL}")
        return
    from datasets import disable_progress_bars
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    # Training keeps its progress bar; loading and tokenizing are fast here.
    disable_progress_bar()
    disable_progress_bars()
    result = run(output_dir=config.output_dir, seed=config.seed, tell=_say)
    Console().print(summary.table(result.scores))
    _say(summary.text(result))


def init(config: InitConfig) -> None:
    """Calibrate, plan and attach; save the untrained adapter. --dry_run only estimates the cost."""
    if config.dry_run:
        from tlora.report.estimate import show
        from tlora.training import dryrun

        show(dryrun.run(config.run_config()))
        return
    no_bars_in_batch_jobs()
    from tlora.training.initialize import run

    _report(run(config.run_config()))


def train(config: RunConfig) -> None:
    """Initialize, train, evaluate and save."""
    no_bars_in_batch_jobs()
    from tlora.training.train import run

    _report(run(config), trained=True)


def chat(config: ChatConfig) -> None:
    """Talk to a run, an adapter or a model."""
    no_bars_in_batch_jobs()
    from tlora.chat.chat import run

    run(config, sys.stdin, _show)


def compare(config: CompareConfig) -> None:
    """Run the missing parts of a comparison; write its page and its tables."""
    from tlora.compare.compare import run
    from tlora.compare.comparefolder import CompareFolder
    from tlora.report.inspecting import show_comparison

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    progress = run(config, tell=_note)
    _say(f"{progress.finished} of {progress.total} runs are finished")
    show_comparison(CompareFolder(config.output_dir), _say)
    if progress.failed:
        raise RunsFailedError(
            "\n  ".join([f"{len(progress.failed)} runs failed:", *progress.failed])
            + "\nRerun the same command to try them again."
        )


def evaluate(config: EvalConfig) -> None:
    """Evaluate models on tasks; write the page and tables of the folder."""
    no_bars_in_batch_jobs()
    from tlora.evaluate.evaluate import run
    from tlora.report.inspecting import show_evaluation

    show_evaluation(run(config, tell=_say), _say)


def inspect(config: InspectConfig) -> None:
    """Show a plan or an adapter, or write the page of a comparison or an evaluation again."""
    from tlora.report.inspecting import run

    run(_say, **vars(config))


def export(config: ExportConfig) -> None:
    """Write an adapter in the format of its reader."""
    no_bars_in_batch_jobs()
    from tlora.exporters.export import run, show

    show(run(config), _say)


def merge(config: MergeConfig) -> None:
    """Merge an adapter into its base model."""
    export(config.export())


def verify(config: VerifyConfig) -> None:
    """Check which readers load an adapter correctly, or whether an export equals it."""
    no_bars_in_batch_jobs()
    from tlora.verify.verify import run

    run(config, _say)


def list_registered(config: ListConfig) -> None:
    """List the names that --method, --task, --tasks and --preset take."""
    for title, registered in _REGISTERED.items():
        entries = registered()
        if config.what == title or (config.what is None and entries):
            _list_one(title, entries, heading=config.what is None)
    if config.what == "tasks":
        # `--task` of a training is easily confused with `--tasks` of an evaluation.
        _list_one("evaluations", _REGISTERED["evaluations"](), heading=True)


def _list_one(title: str, entries: list[Entry], heading: bool) -> None:
    width = max((len(entry.name) for entry in entries), default=0)
    lines = [f"{entry.name:<{width}}  {entry.summary}" for entry in entries]
    if heading:
        lines = [title, *(f"  {line}" for line in lines)]
    _say("\n".join(lines or [f"no {title} registered"]))


@dataclass(frozen=True)
class Verb:
    """One verb of the command line."""

    name: str
    summary: str
    record: type
    run: Callable[[Any], None]
    extra: str | None = None
    """The package extra that it needs."""


VERBS = {
    verb.name: verb
    for verb in (
        Verb("demo", "see it work on a small embedded model", DemoConfig, demo, "train"),
        Verb("init", "calibrate and save an untrained adapter", InitConfig, init, "train"),
        Verb("train", "initialize, train, evaluate, save", RunConfig, train, "train"),
        Verb("chat", "talk to what was trained", ChatConfig, chat, "train"),
        Verb(
            "eval",
            "base, adapters, merged models on tasks, one table",
            EvalConfig,
            evaluate,
            "eval",
        ),
        Verb(
            "compare",
            "methods x learning rates x seeds, one table",
            CompareConfig,
            compare,
            "compare",
        ),
        Verb(
            "inspect",
            "show a run, an adapter, a comparison or an evaluation",
            InspectConfig,
            inspect,
            "train",
        ),
        Verb("export", "write an adapter in the format your server needs", ExportConfig, export),
        Verb("merge", "merge an adapter into its base: a whole model", MergeConfig, merge),
        Verb(
            "verify",
            "check an export, and which servers read it correctly",
            VerifyConfig,
            verify,
        ),
        Verb(
            "list",
            "list methods, tasks, formats, evaluations, presets",
            ListConfig,
            list_registered,
        ),
    )
}


def _leave_process_group() -> None:
    """Close torch's process group; gloo's threads abort a process that exits with one open."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code."""
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("tlora").setLevel(logging.INFO)
    # PEFT reads a property that transformers has renamed; users cannot fix that.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    warnings.formatwarning = lambda message, *_: f"{message}\n"  # without the line that warns
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].startswith("--local_rank="):
        # DeepSpeed's launcher puts it before the verb and sets LOCAL_RANK, which is read instead.
        argv = argv[1:]
    try:
        code = _run(argv)
        _leave_process_group()
        return code
    except SystemExit as stop:  # --help, after showing it
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        _complain(str(stop) or interrupted(*argv[:1]))
        return 130
    except BrokenPipeError:
        # The reader of our output has closed the pipe (`tlora list | head -1`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        fault = error if isinstance(error, TLoraError) else system_fault(error)
        if fault is None:
            sys.stderr.write(printable(redacted(traceback.format_exc())))
            return 1
        _complain(str(fault))
        return fault.exit_code


def _run(argv: list[str]) -> int:
    word = argv[0] if argv else "--help"
    if word in ("-h", "--help"):
        _say(_overview())
        return 0
    if word in ("-V", "--version"):
        _say(f"tlora {__version__}")
        return 0
    if word not in VERBS:
        hint = did_you_mean(word, VERBS) or " Run `tlora --help`."
        raise ConfigError(f"there is no verb {word!r}.{hint}", where="command line")
    from tlora.flags import help_of
    from tlora.parsing import Parsed, parse
    from tlora.yamlfiles import to_yaml

    verb, rest = VERBS[word], argv[1:]
    if {"-h", "--help"} & set(rest):
        _say(help_of(f"tlora {verb.name}", verb.record, rest))
        return 0
    if verb.extra:
        extras.require(verb.extra, where=word)
    parsed: Parsed[Any] = parse(f"tlora {verb.name}", verb.record, rest)
    record = parsed.record
    if parsed.print_config:
        from tlora.training.continuing import with_adapter

        record = with_adapter(record) if isinstance(record, RunConfig) else record
        resolves = isinstance(record, (RunConfig, CompareConfig))
        _say(to_yaml(record.resolved() if resolves else record).rstrip())
    else:
        if parsed.note:
            logger.info("%s", parsed.note)
        verb.run(record)
    return 0


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb.name:<{width}}  {verb.summary}" for verb in VERBS.values())
    return (
        "usage: tlora VERB [run.yaml] [flags]\n\n"
        "Task-aware LoRA: adapts a model to a task and saves a standard PEFT adapter.\n\n"
        f"{verbs}\n\n"
        "`tlora VERB --help` lists the flags of a verb; `tlora --version` prints the version."
    )


def _report(folder: Any, trained: bool = False) -> None:
    """Print where a run left its files, and after a training the next commands.

    In a process group only the first process prints.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if folder.plan.is_file():
        from tlora import AdapterPlan

        _say(AdapterPlan.load(folder.plan).summary())
    from tlora.training import closing

    if words := closing.held_out(folder):
        _say(words)
    _say(f"adapter: {folder.adapter}")
    if trained and (words := closing.next_commands(folder)):
        _say(words)


def _say(text: str) -> None:
    _show(f"{text}\n")


def _show(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def _note(text: str) -> None:
    """Report progress on standard error, beside the output."""
    logger.info("%s", text)


def _complain(text: str) -> None:
    if "tqdm" in sys.modules:  # a progress bar is redrawn below the text, not before it
        sys.modules["tqdm"].tqdm.write(f"tlora: {printable(text)}", file=sys.stderr)
    else:
        sys.stderr.write(f"tlora: {printable(text)}\n")


if __name__ == "__main__":
    sys.exit(main())
