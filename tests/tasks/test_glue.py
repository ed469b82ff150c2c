import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from tlora.errors import ConfigError, DataError
from tlora.registry import TASKS
from tlora.tasks.dataconfig import DataConfig


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
    "rte": (
        "rte",
        "train.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tnot_entailment\n1\tC.\tD.\tentailment\n",
        [("A.", "B.", 1), ("C.", "D.", 0)],
    ),
    "qqp, a question broken over two lines": (
        "qqp",
        "train.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        "0\t1\t2\tA?\tB?\t0\n1\t3\t4\tC\nc?\tD?\t1\n2\t5\t6\tE?\tF?\t1\n",
        [("A?", "B?", 0), ("E?", "F?", 1)],
    ),
    "mnli, five annotators in development": (
        "mnli",
        "dev_mismatched.tsv",
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse"
        "\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2"
        "\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label\n"
        f"0\t7\t7c\tfacts\t( A\t( B\t(ROOT\t(ROOT\tA.\tB.{5 * chr(9)}neutral\tcontradiction\n",
        [("A.", "B.", 2)],
    ),
    "qnli": (
        "qnli",
        "train.tsv",
        'index\tquestion\tsentence\tlabel\n0\tWho?\tHe "was.\tentailment\n'
        "1\tWhen?\tNow.\tnot_entailment\n",
        [("Who?", 'He "was.', 0), ("When?", "Now.", 1)],
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


# Raffel et al. 2020, appendix D: prompt and response of a row of each task.
AS_TEXT = {
    "cola": (
        {"sentence": "John made Bill master of himself. ", "label": 1},
        "cola sentence: John made Bill master of himself.",
        "acceptable",
    ),
    "sst2": (
        {"sentence": "it confirms fincher 's status", "label": 1},
        "sst2 sentence: it confirms fincher 's status",
        "positive",
    ),
    "stsb": (
        {"sentence1": "A.", "sentence2": "B.", "label": 3.25},
        "stsb sentence1: A. sentence2: B.",
        "3.2",
    ),
    "mnli": (
        {"premise": "A.", "hypothesis": "B.", "label": 2},
        "mnli hypothesis: B. premise: A.",
        "contradiction",
    ),
}


def as_text(name):
    return TASKS.load(name)(DataConfig(kind="seq2seq"))


@pytest.mark.parametrize("name", AS_TEXT)
def test_text_to_text_is_as_t5_published_it(name):
    raw, prompt, response = AS_TEXT[name]
    assert as_text(name).row(raw, "row 1") == {"prompt": prompt, "response": response}


@pytest.mark.parametrize(
    ("label", "word"),
    [(0, "0.0"), (0.09, "0.0"), (0.11, "0.2"), (2.667, "2.6"), (4.95, "5.0"), (5, "5.0")],
)
def test_a_similarity_is_rounded_to_fifths(label, word):
    assert as_text("stsb").word(label) == word


def test_other_kinds_are_refused():
    with pytest.raises(
        ConfigError, match="is 'causal', but this task supports 'classification' or"
    ):
        TASKS.load("sst2")(DataConfig(kind="causal"))


def test_a_line_of_another_width_names_file_and_line(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\nfine\t1\nfine 1\n")
    with pytest.raises(DataError, match=r"train\.tsv: line 3 has 1 tab-separated fields, not 2"):
        rows("sst2", path)


def test_an_unknown_layout_names_the_wanted_columns(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("review\tstars\tdate\nfine\t1\t2\n")
    with pytest.raises(DataError, match="add a header line with 'sentence', 'label'"):
        rows("sst2", path)


def test_a_label_outside_the_classes_names_its_row(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\nfine\t1\nfine\t2\n")
    with pytest.raises(DataError, match=r"row 2: label '2' is not one of the classes 0 to 1"):
        rows("sst2", path)


@pytest.mark.parametrize("label", ["5.2", "-1", "nan", "high"])
def test_a_similarity_outside_the_scale_names_its_row(label, tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text(f"sentence1\tsentence2\tscore\nA.\tB.\t5\nA.\tB.\t{label}\n")
    with pytest.raises(DataError, match=f"row 2: label '{label}' is not a number from 0 to 5"):
        rows("stsb", path)


def replies(name, labels):
    """What a model would have to write for these labels; -1: something else."""
    task = as_text(name)
    return [task.word(label) if label >= 0 else "Positive." for label in labels]


CLASSES = ["cola", "sst2", "mrpc"]
CASES = {
    "mixed": ([1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 1, 1]),
    "all wrong": ([0, 1, 0], [1, 0, 1]),
    "one class predicted": ([1, 1, 1], [1, 0, 1]),
    "one class in the labels": ([1, 0, 1], [0, 0, 0]),
    "one class in both": ([1, 1, 1], [1, 1, 1]),
}


def by_definition(name, predicted, labels):
    accuracy = sklearn.metrics.accuracy_score(labels, predicted)
    if name == "cola":
        one_class = len({*labels, *predicted}) == 1  # sklearn warns, and says 0 too
        matthews = 0.0 if one_class else sklearn.metrics.matthews_corrcoef(labels, predicted)
        return {"matthews_correlation": matthews}
    if name in ("mrpc", "qqp"):
        f1 = sklearn.metrics.f1_score(labels, predicted, zero_division=0)
        return {"f1": f1, "accuracy": accuracy}
    return {"accuracy": accuracy}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", CLASSES)
def test_scores_of_classes_and_of_words_equal_the_definition(name, case):
    predicted, labels = CASES[case]
    expected = pytest.approx(by_definition(name, predicted, labels))
    task = TASKS.load(name)(DataConfig())
    assert task.metrics(np.eye(3)[predicted], np.array(labels)) == expected
    assert as_text(name).reply_metrics(replies(name, predicted), replies(name, labels)) == expected


def test_similarities_are_correlated_as_scipy_does():
    predicted, labels = [1.0, 1.0, 2.0, 3.0], [0.2, 0.4, 0.4, 3.0]
    expected = pytest.approx(
        {
            "pearson": scipy.stats.pearsonr(predicted, labels).statistic,
            "spearmanr": scipy.stats.spearmanr(predicted, labels).statistic,
        }
    )
    task = TASKS.load("stsb")(DataConfig())
    assert task.metrics(np.array(predicted)[:, None], np.array(labels)) == expected
    written = as_text("stsb").reply_metrics(list(map(str, predicted)), replies("stsb", labels))
    assert written == expected


@pytest.mark.parametrize(
    "reply", ["Positive", "negative positive", "", "positive.", "1", "not_positive", "positiv"]
)
def test_a_reply_that_is_no_label_is_wrong(reply):
    assert as_text("sst2").reply_metrics([reply] * 2, ["positive", "negative"]) == {"accuracy": 0.0}
    assert as_text("sst2").reply_metrics([" positive "], ["positive"]) == {"accuracy": 1.0}


@pytest.mark.filterwarnings("error")
def test_replies_that_are_no_labels_lower_every_score():
    labels, predicted = [1, 1, 0, 0, 1], [1, -1, 0, -1, 1]
    # F1 as in T5's evaluation: each counts as the other class, here one miss and one false alarm.
    assert as_text("mrpc").reply_metrics(replies("mrpc", predicted), replies("mrpc", labels)) == (
        pytest.approx({"f1": 2 * 2 / (2 * 2 + 1 + 1), "accuracy": 3 / 5})
    )
    right = as_text("cola").reply_metrics(replies("cola", labels), replies("cola", labels))
    some = as_text("cola").reply_metrics(replies("cola", predicted), replies("cola", labels))
    none = as_text("cola").reply_metrics(["?"] * 5, replies("cola", labels))
    assert right["matthews_correlation"] == 1
    assert some["matthews_correlation"] == pytest.approx(
        sklearn.metrics.matthews_corrcoef(labels, predicted)
    )
    assert none["matthews_correlation"] == 0


@pytest.mark.parametrize("reply", ["nan", "inf", "-0.2", "5.2", "about 3", "", "3,2"])
def test_a_reply_that_is_no_similarity_counts_as_minus_one(reply):
    labels = replies("stsb", [1.0, 4.0, 2.0])
    assert as_text("stsb").reply_metrics(["1.0", "4.0", reply], labels) == (
        pytest.approx(
            {
                "pearson": scipy.stats.pearsonr([1, 4, -1], [1, 4, 2]).statistic,
                "spearmanr": scipy.stats.spearmanr([1, 4, -1], [1, 4, 2]).statistic,
            }
        )
    )


@pytest.mark.filterwarnings("error")
def test_an_undefined_correlation_counts_as_zero():
    stsb = TASKS.load("stsb")(DataConfig())
    for predicted, labels in (([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]), ([1.0], [1.0])):
        scores = stsb.metrics(np.array(predicted)[:, None], np.array(labels))
        assert scores == {"pearson": 0.0, "spearmanr": 0.0}
