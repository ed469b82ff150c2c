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
        ("tlora", "tlora:TaskAwareLora", "TLoRA: A is calibrated and frozen, B trains"),
        ("full", "full:FullFineTuning", "full fine-tuning: every weight trains"),
        ("lora", "lora:Lora", "LoRA: A starts random, A and B train"),
        ("rslora", "rslora:RankStabilizedLora", "rsLoRA: LoRA with the scale alpha / sqrt(r)"),
        ("loraplus", "loraplus:LoraPlus", "LoRA+: LoRA with a higher learning rate for B"),
        ("lora-rite", "lorarite:LoraRite", "LoRA-RITE: steps do not depend on how B A is factored"),
        ("dora", "dora:Dora", "DoRA: LoRA that also trains each row's norm"),
        ("adalora", "adalora:AdaLora", "AdaLoRA: LoRA that prunes ranks during training"),
        ("olora", "olora:Olora", "OLoRA: A and B start from the QR decomposition of W"),
        ("pissa", "pissa:Pissa", "PiSSA: A and B start from W's largest singular components"),
        ("milora", "milora:Milora", "MiLoRA: A and B start from W's smallest singular components"),
        ("ailora", "ailora:Ailora", "AILoRA: queries start as in PiSSA, values as in MiLoRA"),
        ("corda", "corda:Corda", "CorDA: A and B start from W, weighted by your inputs"),
        ("eva", "eva:Eva", "EVA: A starts from the principal directions of your inputs"),
        ("lora-ga", "loraga:LoraGa", "LoRA-GA: A and B start from the gradient's singular vectors"),
        ("lora-one", "loraone:LoraOne", "LoRA-One: A and B start with a rank-r gradient step"),
        ("astra", "astra:Astra", "Astra: A and B start from W's main output directions"),
        ("lora-fa", "lorafa:LoraFa", "LoRA-FA: A is random and frozen, B trains"),
        ("trimatrix", "trimatrix:TriMatrix", "Tri-Matrix: only the middle r x r matrix trains"),
        ("mtlora", "mtlora:MtLora", "MTLoRA: an r x r matrix trains between A and B"),
        ("dylora", "dylora:DyLora", "DyLoRA: LoRA that can be cut to any smaller rank afterwards"),
        ("edora", "edora:EDora", "EDoRA: LoRA-XS that also trains each row's norm"),
        ("gelora", "gelora:GeLora", "GeLoRA: LoRA with ranks from the dimension of hidden states"),
        ("gora", "gora:Gora", "GoRA: LoRA with ranks and an initial B from the gradient"),
        ("lorta", "lorta:Lorta", "LoRTA: layers, heads and projections share one CP tensor"),
        ("lora-xs", "loraxs:LoraXs", "LoRA-XS: an r x r matrix trains in W's singular basis"),
        ("qa-lora", "qalora:QaLora", "QA-LoRA: LoRA that reads means of neighboring inputs"),
        ("mica", "mica:Mica", "MiCA: B is frozen at W's smallest singular vectors, A trains"),
        ("xgblora", "chain:XgbLora", "XGBLoRA: LoRAs of rank 1 train one after another"),
        ("rac-lora", "chain:RacLora", "RAC-LoRA: as XGBLoRA, with A random and frozen"),
        ("houlsby", "houlsby:Houlsby", "Houlsby: bottleneck adapters in each block"),
    ),
    families=_classes(
        "tlora.methods",
        ("peft:TYPE", "anypeft:method_of", "any adapter type of PEFT: peft:vera, peft:oft ..."),
    ),
)

TASKS = Registry(
    "task",
    _classes(
        "tlora.tasks",
        ("jsonl", "jsonl:Jsonl", "your rows, from files or the Hub; --data.* names the columns"),
        ("gsm8k", "gsm8k:Gsm8k", "GSM8K: grade-school math word problems with solutions"),
        ("math", "math:Math", "MetaMathQA: the paper's math training set"),
        ("code", "code:Code", "CodeFeedback: the paper's code training set"),
        ("chat", "chat:Chat", "WizardLM: the paper's chat training set"),
        (
            "commonsense",
            "commonsense:Commonsense",
            "commonsense_170k: the paper's training set of eight question sets",
        ),
        ("cola", "glue:Cola", "GLUE CoLA: is a sentence grammatical (Matthews)"),
        ("sst2", "glue:Sst2", "GLUE SST-2: is a movie review positive (accuracy)"),
        ("mrpc", "glue:Mrpc", "GLUE MRPC: are two sentences paraphrases (F1, accuracy)"),
        ("stsb", "glue:Stsb", "GLUE STS-B: similarity of two sentences (Pearson, Spearman)"),
        ("qqp", "glue:Qqp", "GLUE QQP: do two questions ask the same (F1, accuracy)"),
        ("mnli", "glue:Mnli", "GLUE MNLI: entailment, contradiction or neither (accuracy)"),
        ("qnli", "glue:Qnli", "GLUE QNLI: does a sentence answer a question (accuracy)"),
        ("rte", "glue:Rte", "GLUE RTE: does a sentence entail another (accuracy)"),
        ("wnli", "glue:Wnli", "GLUE WNLI: which noun does a pronoun mean (accuracy)"),
    ),
)

FORMATS = Registry(
    "format",
    _classes(
        "tlora.exporters",
        ("native", "native:Native", "as trained, with ranks and scales per module: PEFT"),
        ("compact", "compact:Compact", "scales merged into B, ranks per module: PEFT, vLLM"),
        ("uniform", "uniform:Uniform", "one rank and scale for all modules: every LoRA server"),
        ("merged", "merged:Merged", "a full model, the adapter merged into the base: any server"),
        ("gguf", "gguf:Gguf", "a GGUF adapter file, scales merged into B: llama.cpp, Ollama"),
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
