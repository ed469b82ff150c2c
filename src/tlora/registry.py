"""Names that a user can type, each tied to an object that is imported on demand.

A new method or task is one line in a table below, a new evaluation one file in `tlora/evaluations`.
A third party adds one without changing this package, by an entry point in its own::

    [project.entry-points."tlora.methods"]
    mymethod = "mypackage.mymodule:MyMethod"

Nothing else in the library compares these names.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlora.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Entry:
    """One registered name."""

    name: str
    """The name that the user types."""
    target: str
    """Location of the object, in entry-point form: "module:attribute"."""
    summary: str
    """A one-line description."""

    def load(self) -> Any:
        """Import the module and return the object."""
        return importlib.metadata.EntryPoint(self.name, self.target, group="").load()


class Registry:
    """Built-in entries, and the entry points of other installed packages.

    Example:
        >>> METHODS.load("lora").__name__
        'Lora'

    A built-in name wins over an entry point of the same name: installing a package must not change
    an existing run file's meaning.
    """

    def __init__(self, kind: str, entries: Iterable[Entry], families: Iterable[Entry] = ()) -> None:
        """Register entries, and families of names: each loads to a function of the part after the
        colon."""
        self.kind = kind
        self.group = f"tlora.{kind}s"
        self._builtin = {entry.name: entry for entry in entries}
        self._families = {entry.name.partition(":")[0]: entry for entry in families}

    def entries(self) -> list[Entry]:
        """Return every entry: the built-in ones and families in order, then third parties'."""
        others = [
            Entry(point.name, point.value, f"from {point.dist.name if point.dist else 'outside'}")
            for point in importlib.metadata.entry_points(group=self.group)
            if point.name not in self._builtin
        ]
        others.sort(key=lambda entry: entry.name)
        return [*self._builtin.values(), *self._families.values(), *others]

    def names(self) -> list[str]:
        """Return every name that `load` accepts, except those of families."""
        return [entry.name for entry in self.entries() if entry not in self._families.values()]

    def load(self, name: str) -> Any:
        """Import and return the object called ``name``.

        Raises:
            ConfigError: nothing has that name (with a suggestion), or importing it failed.
        """
        family, colon, member = name.partition(":")
        entry = self._families.get(family) if colon else self._builtin.get(name)
        if entry is None:
            # Entry points are read from every installed package, so only if a name needs them.
            others = {entry.name: entry for entry in self.entries()}
            if name not in others:
                hint = did_you_mean(name, others) or f" Run `tlora list {self.kind}s`."
                raise ConfigError(f"there is no {self.kind} {name!r}.{hint}", where=self.kind)
            entry = others[name]
        try:
            loaded = entry.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"{name!r} cannot be imported from {entry.target} ({error}); install or repair"
                " the package that provides it.",
                where=self.kind,
            ) from error
        return loaded(member) if family in self._families else loaded


@dataclass(frozen=True)
class _File(Entry):
    """A registered file: its stem is the entry's name, its first line the summary."""

    def load(self) -> str:
        """Return the path."""
        return self.target


def _files(folder: str) -> Iterator[Entry]:
    """Yield the YAML files of one of our folders, except those that others include, `_x.yaml`."""
    for path in sorted(Path(__file__).with_name(folder).glob("[!_]*.yaml")):
        with path.open(encoding="utf-8") as file:
            yield _File(path.stem, str(path), file.readline().strip("# \n"))


def _classes(package: str, *rows: tuple[str, str, str]) -> list[Entry]:
    """Return entries for a package's classes, each given as name, "module:class" and summary."""
    return [Entry(name, f"{package}.{target}", summary) for name, target, summary in rows]


METHODS = Registry(
    "method",
    _classes(
        "tlora.methods",
        ("tlora", "tlora:TaskAwareLora", "task-aware LoRA: calibrated A, B trains"),
        ("full", "full:FullFineTuning", "full fine-tuning: every parameter trains"),
        ("lora", "lora:Lora", "PEFT's LoRA: random A, A and B train"),
        ("rslora", "rslora:RankStabilizedLora", "LoRA scaled by alpha / sqrt(r)"),
        ("loraplus", "loraplus:LoraPlus", "LoRA+: B learns faster than A"),
        ("lora-rite", "lorarite:LoraRite", "LoRA-RITE: steps that no factoring of B A changes"),
        ("dora", "dora:Dora", "DoRA: magnitudes train beside the direction"),
        ("adalora", "adalora:AdaLora", "AdaLoRA: ranks are pruned while training"),
        ("olora", "olora:Olora", "OLoRA: A and B start from W = Q R"),
        ("pissa", "pissa:Pissa", "PiSSA: A and B start from W's principal part"),
        ("milora", "milora:Milora", "MiLoRA: A and B start from W's minor part"),
        ("ailora", "ailora:Ailora", "AILoRA: queries start principal, values minor"),
        ("corda", "corda:Corda", "CorDA: A and B start from W seen by the inputs"),
        ("eva", "eva:Eva", "EVA: A starts from the inputs' principal directions"),
        ("lora-ga", "loraga:LoraGa", "LoRA-GA: A and B start from the gradient"),
        ("lora-one", "loraone:LoraOne", "LoRA-One: starts after the gradient's best rank-r step"),
        ("astra", "astra:Astra", "Astra: A and B start from W along its main outputs"),
        ("lora-fa", "lorafa:LoraFa", "LoRA-FA: random A, frozen; B trains"),
        ("trimatrix", "trimatrix:TriMatrix", "Tri-Matrix: r x r numbers train between random P, R"),
        ("mtlora", "mtlora:MtLora", "MTLoRA: an r x r matrix trains between A and B"),
        ("dylora", "dylora:DyLora", "DyLoRA: each step trains the first ranks, any number serves"),
        ("edora", "edora:EDora", "EDoRA: magnitudes and r x r numbers between W's factors"),
        ("gelora", "gelora:GeLora", "GeLoRA: ranks from the dimension of hidden states"),
        ("gora", "gora:Gora", "GoRA: ranks from |W . G|, B from the gradient"),
        ("lorta", "lorta:Lorta", "LoRTA: one CP tensor over layers, heads and projections"),
        ("lora-xs", "loraxs:LoraXs", "LoRA-XS: r x r numbers train between W's singular vectors"),
        ("qa-lora", "qalora:QaLora", "QA-LoRA: A reads means of groups of inputs"),
        ("mica", "mica:Mica", "MiCA: B from W's minor part, frozen; A trains"),
        ("xgblora", "chain:XgbLora", "XGBLoRA: LoRAs of rank 1, one merged before the next"),
        ("rac-lora", "chain:RacLora", "RAC-LoRA: a chain of LoRAs, each A new, random and frozen"),
        ("houlsby", "houlsby:Houlsby", "bottleneck adapters behind attention and feed-forward"),
    ),
    families=_classes(
        "tlora.methods",
        ("peft:TYPE", "anypeft:method_of", "any type of PEFT's: peft:vera, peft:oft, peft:ia3 ..."),
    ),
)

TASKS = Registry(
    "task",
    _classes(
        "tlora.tasks",
        ("jsonl", "jsonl:Jsonl", "your file or Hub dataset, columns by --data.*"),
        ("gsm8k", "gsm8k:Gsm8k", "grade-school math word problems, worked out"),
        ("math", "math:Math", "MetaMathQA, the paper's training set of math"),
        ("code", "code:Code", "CodeFeedback, the paper's training set of code"),
        ("chat", "chat:Chat", "WizardLM, the paper's training set of chat"),
        (
            "commonsense",
            "commonsense:Commonsense",
            "commonsense_170k: the paper's eight question sets in one form",
        ),
        ("cola", "glue:Cola", "GLUE: is the sentence grammatical (Matthews)"),
        ("sst2", "glue:Sst2", "GLUE: sentiment of a film review (accuracy)"),
        ("mrpc", "glue:Mrpc", "GLUE: are two sentences paraphrases (F1, accuracy)"),
        ("stsb", "glue:Stsb", "GLUE: similarity 0 to 5 (Pearson, Spearman)"),
        ("qqp", "glue:Qqp", "GLUE: do two questions ask the same (F1, accuracy)"),
        ("mnli", "glue:Mnli", "GLUE: entails, contradicts or neither (accuracy)"),
        ("qnli", "glue:Qnli", "GLUE: does it answer the question (accuracy)"),
        ("rte", "glue:Rte", "GLUE: does one sentence entail another (accuracy)"),
        ("wnli", "glue:Wnli", "GLUE: which noun a pronoun means (accuracy)"),
    ),
)

FORMATS = Registry(
    "format",
    _classes(
        "tlora.exporters",
        ("native", "native:Native", "ranks and scales per module, as trained: PEFT"),
        ("compact", "compact:Compact", "scales in B, own ranks: PEFT, its hot swap, vLLM"),
        ("uniform", "uniform:Uniform", "one rank, scale 1, no gaps: every LoRA server"),
        ("merged", "merged:Merged", "W + s B A: a whole model, no adapter needed"),
        ("gguf", "gguf:Gguf", "scales in B, own ranks, one file: llama.cpp, Ollama"),
    ),
)

# Each loads to the path of a YAML file of lm-evaluation-harness; so does an entry point's.
EVALUATIONS = Registry("evaluation", _files("evaluations"))

CONVERSATIONS = Registry(
    "conversation",
    [
        Entry(
            "mtbench",
            "tlora.evaluate.conversations:MtBench",
            "MT-Bench: two turns, graded 1 to 10 by a judge (--judge.*)",
        ),
    ],
)
