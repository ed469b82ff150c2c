"""GLUE: six of its tasks, with the benchmark's metrics (Wang et al., arXiv 1804.07461).

Rows come from `nyu-mll/glue` on the Hub or from local files in the layout that each task was
published in. Some of those have no header and some are quoted by nobody, so they are read here
line by line: fields are split at tabs, and a quotation mark is a character like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tlora.errors import DataError
from tlora.runconfig import Kind
from tlora.tasks import metrics
from tlora.tasks.base import Row, Task, text_of
from tlora.tasks.source import existing_file, read_file

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

# Columns of each file layout under the Hub's names; None: a column that is not used.
Layout = tuple[str | None, ...]


class Glue(Task):
    """What the GLUE tasks share: reading a layout, a text or a pair of texts, a label."""

    kind: Kind = "classification"
    hub_eval_split = "validation"
    columns: tuple[str, ...] = ("sentence1", "sentence2")
    """The text columns: one, or a pair."""
    label_words: Mapping[str, int] = {}
    """Labels that a file writes as words."""
    headless: Sequence[Layout] = ()
    """Layouts of lines in a file without a header, told apart by their number of fields."""
    renamed: Mapping[str, str] = {}
    """Header names of a published file that differ from the Hub's."""

    def read_file(self, path: str) -> Dataset:
        """Read a .tsv, .txt or .csv of the task's published layout, or any file with a header."""
        from datasets import Dataset

        if not path.endswith((".tsv", ".txt", ".csv")):
            return read_file(path)
        # Split at newlines alone: str.splitlines also breaks at characters found in sentences.
        text = existing_file(path).read_text(encoding="utf-8-sig")
        lines = [line.split("\t") for line in text.split("\n") if line.strip()]
        if not lines:
            raise DataError(f"{path}: the file has no rows.")
        header = tuple(self.renamed.get(name, name) for name in lines[0])
        if set(self.columns) <= set(header):
            return Dataset.from_list(_named(path, (header,), lines[1:], first=2))
        if len(lines[0]) in map(len, self.headless):
            return Dataset.from_list(_named(path, self.headless, lines, first=1))
        if path.endswith(".csv"):
            return read_file(path)
        wanted = ", ".join(map(repr, (*self.columns, "label")))
        raise DataError(
            f"{path}: line 1 has {len(lines[0])} tab-separated fields and is not a known layout of"
            f" this task; give a header line with {wanted}."
        )

    def row(self, raw: Mapping[str, Any], where: str) -> Row:
        """Return {"text", "text_pair", "label"}."""
        texts = [text_of(raw, column, where).strip() for column in self.columns]
        label = text_of(raw, "label", where)
        return {
            "text": texts[0],
            "text_pair": texts[1] if len(texts) > 1 else None,
            "label": self.label(label, where),
        }

    def label(self, text: str, where: str) -> float:
        """Return the class id, or for a regression the number."""
        count = len(self.label_names or ())
        value = self.label_words.get(text, text)
        if str(value).isdigit() and int(value) < count:
            return int(value)
        raise DataError(f"{where}: label {text!r} is not one of the classes 0 to {count - 1}.")

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Score the predicted classes; ``predictions`` are logits, rows x classes."""
        return self.score(predictions.argmax(axis=-1), labels)

    def score(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The benchmark's metric of this task: accuracy, unless a task says otherwise."""
        return {"accuracy": metrics.accuracy(predicted, labels)}


def _named(
    path: str, layouts: Sequence[Layout], lines: list[list[str]], first: int
) -> list[dict[str, str]]:
    """Give each line's fields the names of the layout that has as many; drop the unnamed."""
    by_width = {len(layout): layout for layout in layouts}
    rows = []
    for number, fields in enumerate(lines, start=first):
        names = by_width.get(len(fields))
        if names is None:
            widths = " or ".join(map(str, by_width))
            raise DataError(
                f"{path}: line {number} has {len(fields)} tab-separated fields, not {widths};"
                " mend the line."
            )
        rows.append({name: field for name, field in zip(names, fields, strict=True) if name})
    return rows


class Cola(Glue):
    """Acceptability of a sentence. Published as source, label, mark, sentence without a header."""

    hub = ("nyu-mll/glue", "cola")
    columns = ("sentence",)
    label_names = ["unacceptable", "acceptable"]  # noqa: RUF012
    headless = ((None, "label", None, "sentence"),)

    def score(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Matthews correlation."""
        return {"matthews_correlation": metrics.matthews(predicted, labels)}


class Sst2(Glue):
    """Sentiment of a sentence of a film review."""

    hub = ("nyu-mll/glue", "sst2")
    columns = ("sentence",)
    label_names = ["negative", "positive"]  # noqa: RUF012


class Mrpc(Glue):
    """Paraphrase or not. Published with the header Quality, #1 ID, #2 ID, #1 String, #2 String."""

    hub = ("nyu-mll/glue", "mrpc")
    label_names = ["not_equivalent", "equivalent"]  # noqa: RUF012
    renamed = {"Quality": "label", "#1 String": "sentence1", "#2 String": "sentence2"}  # noqa: RUF012

    def score(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """F1 of the class "equivalent", and accuracy."""
        return {
            "f1": metrics.f1(predicted, labels),
            "accuracy": metrics.accuracy(predicted, labels),
        }


class Stsb(Glue):
    """Similarity of two sentences, 0 to 5. GLUE's file has a header, the STS benchmark's none."""

    kind = "regression"
    hub = ("nyu-mll/glue", "stsb")
    renamed = {"score": "label"}  # noqa: RUF012
    headless = (
        (None, None, None, None, "label", "sentence1", "sentence2"),
        # Some rows name the sources of both sentences at the end.
        (None, None, None, None, "label", "sentence1", "sentence2", None, None),
    )

    def label(self, text: str, where: str) -> float:
        """Return the similarity."""
        try:
            return float(text)
        except ValueError:
            raise DataError(f"{where}: label {text!r} is not a number from 0 to 5.") from None

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Pearson's and Spearman's correlation; ``predictions`` are rows x 1."""
        return metrics.correlations(predictions.reshape(len(labels)), labels)


class Rte(Glue):
    """Does the first sentence entail the second."""

    hub = ("nyu-mll/glue", "rte")
    label_names = ["entailment", "not_entailment"]  # noqa: RUF012
    label_words = {"entailment": 0, "not_entailment": 1}  # noqa: RUF012


class Wnli(Glue):
    """Does the second sentence, with a pronoun filled in, follow from the first."""

    hub = ("nyu-mll/glue", "wnli")
    label_names = ["not_entailment", "entailment"]  # noqa: RUF012
    headless = ((None, "sentence1", "sentence2", "label"),)
