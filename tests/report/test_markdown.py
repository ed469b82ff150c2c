"""Names in Markdown stay text, whatever stands in them."""

import synthetic

import evaluations
from tlora.report import comparison, evaluation, markdown, outcomes, plaintext, read_evaluation

UNKIND = "<script>alert(1)</script>|`<img src=x onerror=alert(1)>[a](javascript:b)\n# c\x1b[2J"


def cells(line):
    """Return the cells of a line of a table, as a reader of Markdown divides it."""
    return line.replace("\\|", "\0").strip("|").split("|")


def test_a_table_keeps_its_cells_and_lines():
    lines = markdown.table(["method", "score"], [[UNKIND, "0.5"], ["b", "p < 0.05"]])
    text = markdown.document(lines)
    assert text.count("\n") == len(lines) == 4
    assert [len(cells(line)) for line in lines] == [2, 2, 2, 2]
    assert "<" not in text.replace("p < 0.05", "") and "](" not in text and "\x1b" not in text
    assert "\\`" in text
    assert text.endswith("| b | p < 0.05 |\n")


def test_plain_names_are_written_as_they_are():
    assert markdown.document(["- a_b is *better* than c-1 (p < 0.05, x>y)."]) == (
        "- a_b is *better* than c-1 (p < 0.05, x>y).\n"
    )


def test_the_report_of_an_evaluation_has_no_html(tmp_path):
    made = [evaluations.lines([1.0, 0.0] * 20), evaluations.lines([1.0] * 40)]
    names = (UNKIND.replace("/", "").replace("\n", " "), "b")
    folder = evaluations.write(tmp_path / "out", {"sums": dict(zip(names, made, strict=True))})
    text = evaluation.markdown(outcomes.gather(read_evaluation.read(folder)))
    assert "&lt;script>alert(1)&lt;script>" in text
    assert "<script" not in text and "<img" not in text and "](" not in text


def test_the_report_of_a_comparison_has_no_html(tmp_path):
    methods = [{"name": "lora", "label": UNKIND}, {"name": "tlora"}]
    made = synthetic.comparison(tmp_path / "compare", methods=methods, title=UNKIND)
    text = plaintext.markdown(comparison.read(synthetic.write(made)))
    assert "&lt;script>alert(1)&lt;/script>" in text
    assert "<script" not in text and "<img" not in text and "\x1b" not in text
    assert not any(line.startswith("# c") for line in text.splitlines())
