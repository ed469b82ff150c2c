"""What the docs say of methods, imports and links is true."""

import csv
import importlib
import importlib.util
import re
import statistics
from pathlib import Path

import pytest

from tlora.adapter.peft_types import KNOWN
from tlora.registry import METHODS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "methods.md"


def rows(heading="## Every method"):
    """The rows of the table below a heading, by their first cell."""
    text = PAGE.read_text(encoding="utf-8")
    below = re.search(rf"^{re.escape(heading)}$(.*?)(?=^## |\Z)", text, re.M | re.S)[1]
    lines = [line for line in below.splitlines() if line.startswith("| `")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in cells}


def test_the_table_has_every_method_in_the_order_of_the_registry():
    assert list(rows()) == METHODS.names()


def test_the_table_says_what_the_methods_declare():
    reads = {"nothing": "no", "inputs": "inputs", "gradients": "inputs, gradients"}
    starts = {"identical": "W x", "rounding": "rounding", "moved": "moved"}
    sources = {"PEFT": "PEFT", "tlora": "ours"}
    for name, row in rows().items():
        paper, layer, _, parameters, rank, base, start, saved, read, source, _ = row
        traits = METHODS.load(name).traits
        assert parameters == traits.parameters.partition(",")[0], name
        options = METHODS.load(name).options
        assert rank == str(getattr(options, "r", getattr(options, "init_r", ""))), name
        assert base == ("changed" if traits.changes_base else "kept"), name
        assert saved == traits.saved, name
        assert read == reads[traits.reads], name
        assert start == starts[traits.start], name
        assert source == sources[traits.source], name
        assert layer.startswith("W' x") == (traits.changes_base and traits.leaves == "adapter"), (
            name
        )
        if traits.leaves == "adapter":
            assert f"arxiv.org/abs/{traits.arxiv}" in paper, name


def means(table):
    """The mean final score of each method of a committed comparison."""
    scores = {}
    file = ROOT / "benchmarks" / "quality" / table / "report.csv"
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["phase"] == "final":
                scores.setdefault(row["method"], []).append(float(row["score"]))
    return [statistics.mean(made) for made in scores.values()]


def test_the_guide_to_methods_quotes_the_tables_that_it_names():
    guide = re.search(
        r"^## Which method.*?(?=^## )", PAGE.read_text(encoding="utf-8"), re.M | re.S
    )[0]
    said = [line for line in guide.splitlines() if line.startswith("| ")]
    said.append(guide.rpartition("|\n\n")[2])
    tables = {path.parent.name for path in ROOT.glob("benchmarks/quality/*/report.csv")}
    quoted = 0
    for text in said:
        named = tables & {*re.findall(r"`([\w-]+)`", text)}
        found = re.findall(r"\b\d\.\d{3}\b", text)
        known = [mean for table in named for mean in means(table)]
        for score in found:  # rounded from the four digits of the page
            assert any(abs(float(score) - mean) < 6e-4 for mean in known), (score, text)
        quoted += len(found)
    assert quoted > 20


def test_the_table_of_pefts_types_says_what_is_known_of_them():
    expected = {}
    for kind, known in KNOWN.items():
        paper = f"[{known.arxiv}](https://arxiv.org/abs/{known.arxiv})"
        start = "W x" if known.start == "rounding" else "moved"
        merges = "no" if known.unmerged else "yes"
        expected[kind] = [
            paper if known.arxiv else "not on arXiv",
            *(("refused", "", known.refused) if known.refused else (start, merges)),
        ]
        expected[kind] += [] if known.refused else [known.unmerged or ""]
    assert rows("## Any method of PEFT") == expected


def test_the_table_leads_to_how_a_method_differs():
    section = PAGE.read_text(encoding="utf-8").split("\n## Where ours differ")[1].split("\n## ")[0]
    heads = re.findall(r"^- ((?:`[\w-]+`(?:, | and )?)+)", section, re.M)
    differ = {name for head in heads for name in re.findall(r"`([\w-]+)`", head)}
    linked = {name for name, row in rows().items() if "(#where-ours-differ" in row[-1]}
    assert linked == differ


def test_the_table_of_learning_rates_says_what_the_methods_declare():
    page = PAGE.with_name("training.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| ([a-z-]+) \|(( [\de-]+ \|){4})$", page, re.M)
    assert [name for name, _, _ in table] == METHODS.names()
    for name, cells, _ in table:
        rates = METHODS.load(name).traits.learning_rates
        assert [float(cell) for cell in cells.split("|")[:-1]] == [
            rates.of(size) for size in (10**6, 10**8, 10**9, 2 * 10**10)
        ]


PAGES = [*sorted(PAGE.parent.glob("*.md")), *sorted(ROOT.glob("*.md"))]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_imported_is_there(page):
    text = page.read_text(encoding="utf-8")
    for home, names in re.findall(r"^ *from (tlora[\w.]*) import ([\w, ]+)$", text, re.M):
        module = importlib.import_module(home)
        for name in names.split(", "):
            assert hasattr(module, name) or importlib.util.find_spec(f"{home}.{name}"), (home, name)
