"""The nine GLUE tasks with the benchmark's metrics (Wang et al., arXiv 1804.07461).

Each is a classification (STS-B a regression) with a new head, or with `data.kind` "seq2seq" text to
text as in T5 (Raffel et al., arXiv 1910.10683, appendix D, and its released code): the prompt is
the task's name and each text after the name of its column, in the order of those names; the
response is the class as a word, or the similarity rounded to fifths. A reply is read back as that
word or number; anything else counts as wrong. (T5 itself formats WNLI differently.)

Rows come from `nyu-mll/glue` on the Hub or from local files in the layout that each task was
published in. Some of those have no header and none escapes quotation marks, so they are read
line by line: fields are split at tabs, and a quotation mark is an ordinary character.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tlora.errors import DataError, shortened
from tlora.tasks import metrics
from tlora.tasks.base import Row, Task, text_of
from tlora.tasks.dataconfig import DataConfig, Kind
from tlora.tasks.source import decoded, existing_file, read_file

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

logger = logging.getLogger(__name__)

# Columns of files without a header, with the Hub's names; None: an unused column.
Layout = tuple[str | None, ...]

_RENAMED = {
    **dict.fromkeys(("Quality", "score", "is_duplicate", "gold_label"), "label"),
    "#1 String": "sentence1",
    "#2 String": "sentence2",
}
"""Header names in published files that differ from the Hub's."""
_PUBLISHED = (".tsv", ".txt", ".csv")
"""Suffixes of files to read line by line."""
_STS: Layout = (None, None, None, None, "label", "sentence1", "sentence2")


class Glue(Task):
    """Base class of the GLUE tasks: reads a layout with one or two texts and a label."""

    kind: Kind = "classification"
    classifies = True
    other_kinds: tuple[Kind, ...] = ("seq2seq",)
    reads = ("label_names",)
    hub: tuple[str, str]
    hub_eval_split = "validation"
    columns: tuple[str, ...] = ("sentence1", "sentence2")
    """One or two text columns."""
    renamed: Mapping[str, str] = _RENAMED
    headless: Sequence[Layout] = ()
    """Line layouts of files without a header, distinguished by their number of fields."""
    broken_lines = False
    """Whether the published file has lines with too few fields, which the Hub drops."""

    def __init__(self, data: DataConfig) -> None:
        super().__init__(data)
        self.reads_replies = self.kind == "seq2seq"

    def check_file(self, path: str) -> None:
        """Check that `read_file` can read a local file, without reading rows.

        Raises:
            DataError: the file is missing or of an unknown kind.
        """
        if path.endswith(_PUBLISHED):
            existing_file(path)
        else:
            super().check_file(path)

    def read_file(self, path: str) -> Dataset:
        """Read a .tsv, .txt or .csv file in the published layout, or any file with a header."""
        from datasets import Dataset

        if not path.endswith(_PUBLISHED):
            return read_file(path)
        # Split at newlines alone: str.splitlines also breaks at characters found in sentences.
        text = "".join(decoded(existing_file(path)))
        lines = [line.split("\t") for line in text.split("\n") if line.strip()]
        if not lines:
            raise DataError(f"{path}: the file has no rows.")
        header = tuple(self.renamed.get(name, name) for name in lines[0])
        if set(self.columns) <= set(header):
            rows = lines[1:]
            if self.broken_lines:
                rows = [fields for fields in rows if len(fields) >= len(header)]
                if missing := len(lines) - 1 - len(rows):
                    logger.warning("%s: skipping %d broken lines.", path, missing)
            return Dataset.from_list(_named(path, (header,), rows, first=2))
        if len(lines[0]) in map(len, self.headless):
            return Dataset.from_list(_named(path, self.headless, lines, first=1))
        if path.endswith(".csv"):
            return read_file(path)
        wanted = ", ".join(map(repr, (*self.columns, "label")))
        raise DataError(
            f"{path}: line 1 has {len(lines[0])} tab-separated fields, which matches no layout of"
            f" this task; add a header line with {wanted}."
        )

    def row(self, raw: Mapping[str, Any], where: str) -> Row:
        """Return {"text", "text_pair", "label"}, or {"prompt", "response"} for text to text."""
        texts = [text_of(raw, column, where).strip() for column in self.columns]
        label = self.label(text_of(raw, "label", where), where)
        if self.kind == "seq2seq":
            named = sorted(zip(self.columns, texts, strict=True))
            parts = [self.hub[1], *(f"{column}: {text}" for column, text in named)]
            return {"prompt": " ".join(parts), "response": self.word(label)}
        first, second = (*texts, None)[:2]
        return {"text": first, "text_pair": second, "label": label}

    def label(self, text: str, where: str) -> float:
        """Return the class id of a number or name, or the number for a regression."""
        names = self.label_names or []
        if text in names:
            return names.index(text)
        if text.isdigit() and int(text) < len(names):
            return int(text)
        raise DataError(
            f"{where}: label {shortened(text)!r} is not one of the classes 0 to {len(names) - 1}."
        )

    def word(self, label: float) -> str:
        """Return a label as text."""
        return (self.label_names or [])[int(label)]

    def read(self, text: str) -> float:
        """Parse ``text`` as a label; -1 if it is not one."""
        names = self.label_names or []
        return names.index(text.strip()) if text.strip() in names else -1

    def reply_metrics(self, replies: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
        """Parse replies as labels and score them."""
        import numpy as np

        labels = np.array([self.read(target) for target in targets])
        if (labels == -1).any():
            lost = targets[int((labels == -1).argmax())]
            raise DataError(
                f"the tokenizer turns a row's label into {lost!r}; use a model whose"
                " tokenizer preserves the task's label words."
            )
        return self.score(np.array([self.read(reply) for reply in replies]), labels)

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Score predicted classes; ``predictions`` are logits, rows x classes."""
        return self.score(predictions.argmax(axis=-1), labels)

    def score(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return the task's GLUE metric; accuracy by default."""
        return {"accuracy": metrics.accuracy(predicted, labels)}


def _named(
    path: str, layouts: Sequence[Layout], lines: list[list[str]], first: int
) -> list[dict[str, str]]:
    """Name each line's fields by the layout with that number of fields; drop unnamed fields."""
    by_width = {len(layout): layout for layout in layouts}
    rows = []
    for number, fields in enumerate(lines, start=first):
        names = by_width.get(len(fields))
        if names is None:
            widths = " or ".join(map(str, by_width))
            raise DataError(
                f"{path}: line {number} has {len(fields)} tab-separated fields, not {widths};"
                " fix the line."
            )
        rows.append({name: field for name, field in zip(names, fields, strict=True) if name})
    return rows


class _Paraphrase(Glue):
    """Paraphrase task, scored by F1 of the second class and accuracy."""

    def score(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return F1 and accuracy."""
        found = {"f1": metrics.f1(predicted, labels)}
        return found | {"accuracy": metrics.accuracy(predicted, labels)}


class Cola(Glue):
    """Acceptability of a sentence; published as source, label, mark, sentence, without a header."""

    hub = ("nyu-mll/glue", "cola")
    columns = ("sentence",)
    label_names = ["unacceptable", "acceptable"]  # noqa: RUF012
    headless = ((None, "label", None, "sentence"),)

    def score(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return Matthews correlation."""
        return {"matthews_correlation": metrics.matthews(predicted, labels)}


class Sst2(Glue):
    """Sentiment of a sentence from a film review."""

    hub = ("nyu-mll/glue", "sst2")
    columns = ("sentence",)
    label_names = ["negative", "positive"]  # noqa: RUF012


class Mrpc(_Paraphrase):
    """Whether two sentences are paraphrases."""

    hub = ("nyu-mll/glue", "mrpc")
    label_names = ["not_equivalent", "equivalent"]  # noqa: RUF012


class Stsb(Glue):
    """Similarity of two sentences, 0 to 5; GLUE's file has a header, the STS benchmark's not."""

    kind = "regression"
    hub = ("nyu-mll/glue", "stsb")
    # Some rows end with the sources of both sentences.
    headless = (_STS, (*_STS, None, None))

    def label(self, text: str, where: str) -> float:
        """Return the similarity."""
        if self.read(text) < 0:
            raise DataError(f"{where}: label {shortened(text)!r} is not a number from 0 to 5.")
        return float(text)

    def word(self, label: float) -> str:
        """Return the similarity rounded to the nearest fifth: "3.8"."""
        return f"{round(label * 5) / 5:.1f}"

    def read(self, text: str) -> float:
        """Parse ``text`` as a number from 0 to 5; -1 if it is not one."""
        try:
            number = float(text)
        except ValueError:
            return -1.0
        return number if 0 <= number <= 5 else -1.0

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Score predicted numbers; ``predictions`` are rows x 1."""
        return self.score(predictions.reshape(len(labels)), labels)

    def score(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return Pearson's and Spearman's correlation."""
        return metrics.correlations(predicted, labels)


class Qqp(_Paraphrase):
    """Whether two questions are duplicates."""

    hub = ("nyu-mll/glue", "qqp")
    columns = ("question1", "question2")
    label_names = ["not_duplicate", "duplicate"]  # noqa: RUF012
    broken_lines = True


class Mnli(Glue):
    """Whether the premise entails the hypothesis, contradicts it, or neither.

    Evaluates on the matched set; for the mismatched set, use `data.eval_split`
    "validation_mismatched" or its file.
    """

    hub = ("nyu-mll/glue", "mnli")
    hub_eval_split = "validation_matched"
    columns = ("premise", "hypothesis")
    label_names = ["entailment", "neutral", "contradiction"]  # noqa: RUF012
    renamed = _RENAMED | {"sentence1": "premise", "sentence2": "hypothesis"}


class Qnli(Glue):
    """Whether the sentence contains the answer to the question."""

    hub = ("nyu-mll/glue", "qnli")
    columns = ("question", "sentence")
    label_names = ["entailment", "not_entailment"]  # noqa: RUF012


class Rte(Glue):
    """Whether the first sentence entails the second."""

    hub = ("nyu-mll/glue", "rte")
    label_names = ["entailment", "not_entailment"]  # noqa: RUF012


class Wnli(Glue):
    """Whether the first sentence entails the second, which resolves one of its pronouns."""

    hub = ("nyu-mll/glue", "wnli")
    label_names = ["not_entailment", "entailment"]  # noqa: RUF012
