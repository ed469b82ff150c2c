import numpy as np
import pytest

from tlora.errors import DataError
from tlora.registry import TASKS
from tlora.runconfig import DataConfig


def rows(name, path):
    task = TASKS.load(name)(DataConfig())
    train, _ = task.load(str(path), None)
    return [task.row(raw, f"row {index + 1}") for index, raw in enumerate(train)]


# Each layout as its benchmark publishes it, and what it should become.
LAYOUTS = {
    "cola without a header": (
        "cola",
        "train.tsv",
        'gj04\t1\t\tHe said "no, then left.\ngj04\t0\t*\tHim left.\n',
        [('He said "no, then left.', None, 1), ("Him left.", None, 0)],
    ),
    "sst2": (
        "sst2",
        "train.tsv",
        "sentence\tlabel\na charming journey \t1\nNA\t0\n",
        [("a charming journey", None, 1), ("NA", None, 0)],
    ),
    "mrpc with a byte order mark and carriage returns": (
        "mrpc",
        "msr_paraphrase_train.txt",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tA b.\tB a.\r\n",
        [("A b.", "B a.", 1)],
    ),
    "stsb of the STS benchmark, some rows with sources": (
        "stsb",
        "sts-train.csv",
        "news\tMSR\t2012\t1\t5.000\tA.\tB.\nnews\tMSR\t2012\t2\t0.25\tC.\tD.\thttp\thttp\n",
        [("A.", "B.", 5.0), ("C.", "D.", 0.25)],
    ),
    "stsb of GLUE": (
        "stsb",
        "train.tsv",
        "index\tgenre\tsentence1\tsentence2\tscore\n0\tnews\tA.\tB.\t3.8\n",
        [("A.", "B.", 3.8)],
    ),
    "rte": (
        "rte",
        "train.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tnot_entailment\n1\tC.\tD.\tentailment\n",
        [("A.", "B.", 1), ("C.", "D.", 0)],
    ),
    "wnli": (
        "wnli",
        "dev.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\tThe drain.\tThe hair.\t0\n",
        [("The drain.", "The hair.", 0)],
    ),
    "a line separator inside a sentence": (
        "sst2",
        "train.tsv",
        "sentence\tlabel\none\u2028two\t1\n",
        [("one\u2028two", None, 1)],
    ),
    "any file with named columns": (
        "sst2",
        "train.jsonl",
        '{"sentence": "fine", "label": 1}\n',
        [("fine", None, 1)],
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_published_layouts_are_read(case, tmp_path):
    name, file, text, expected = LAYOUTS[case]
    path = tmp_path / file
    path.write_bytes(text.encode())
    assert rows(name, path) == [
        {"text": first, "text_pair": second, "label": label} for first, second, label in expected
    ]


def test_a_line_of_another_width_names_file_and_line(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\nfine\t1\nfine 1\n")
    with pytest.raises(DataError, match=r"train\.tsv: line 3 has 1 tab-separated fields, not 2"):
        rows("sst2", path)


def test_an_unknown_layout_names_the_wanted_columns(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("review\tstars\tdate\nfine\t1\t2\n")
    with pytest.raises(DataError, match="give a header line with 'sentence', 'label'"):
        rows("sst2", path)


def test_a_label_outside_the_classes_names_its_row(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\nfine\t1\nfine\t2\n")
    with pytest.raises(DataError, match=r"row 2: label '2' is not one of the classes 0 to 1"):
        rows("sst2", path)


def logits(classes):
    return np.eye(2)[np.array(classes)]


PREDICTED, LABELS = [1, 1, 0, 0, 1, 0], np.array([1, 0, 0, 0, 1, 1])
# By hand: true positives 2, false positives 1, false negatives 1, true negatives 2.


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cola", {"matthews_correlation": (2 * 2 - 1 * 1) / 9}),
        ("sst2", {"accuracy": 4 / 6}),
        ("mrpc", {"f1": 2 * 2 / (2 * 2 + 1 + 1), "accuracy": 4 / 6}),
        ("rte", {"accuracy": 4 / 6}),
        ("wnli", {"accuracy": 4 / 6}),
    ],
)
def test_classification_metrics_equal_the_hand_computed_ones(name, expected):
    task = TASKS.load(name)(DataConfig())
    assert task.metrics(logits(PREDICTED), LABELS) == pytest.approx(expected)


def test_stsb_correlations_equal_the_hand_computed_ones():
    task = TASKS.load("stsb")(DataConfig())
    scores = task.metrics(np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 3.0, 2.0]))
    # Deviations (-4/3, -1/3, 5/3) and (-1, 1, 0): -(-4/3) - 1/3 = 1 over sqrt(42/9 * 2).
    assert scores == pytest.approx({"pearson": 1 / (42 / 9 * 2) ** 0.5, "spearmanr": 0.5})


@pytest.mark.filterwarnings("error")
def test_an_undefined_correlation_counts_as_zero():
    stsb, cola = (TASKS.load(name)(DataConfig()) for name in ("stsb", "cola"))
    assert stsb.metrics(np.ones((3, 1)), np.array([1.0, 2.0, 3.0])) == {
        "pearson": 0.0,
        "spearmanr": 0.0,
    }
    assert cola.metrics(logits([1, 1, 1]), np.array([1, 0, 1])) == {"matthews_correlation": 0.0}
