"""The comparison's page in a browser, opened from disk."""

from __future__ import annotations

import pytest
import synthetic
from browsing import PHONE, contrast, luminance, overhanging

from tlora.report import comparison, plaintext

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A page of all methods with one crashed final run; one name is as unkind as a name can be."""
    methods = [
        *synthetic.every_method(),
        {"name": "lora", "label": "</script>  <b>", "adapter": {"r": 3}},
    ]
    made = synthetic.comparison(tmp_path_factory.mktemp("page"), methods=methods)
    folder = synthetic.write(made, {"lora": 0.05, "full": -0.05})
    crashed = next(name for name in folder.names() if name.startswith("full") and "seed6" in name)
    error = {"cause": "ended by SIGKILL", "last_lines": ["a" * 300]}
    folder.write_record(crashed, folder.record(crashed) | {"status": "failed", "error": error})
    return plaintext.write(comparison.read(folder), folder.path)[0]


def test_tables_and_charts_are_there(opened):
    tab = opened()
    count = len(synthetic.every_method()) + 1
    assert tab.locator("table.scores tbody tr").count() == count
    assert tab.locator("table.scores svg.strip circle.seed").count() == 5 * count - 1
    assert tab.locator("table.scores .values span").count() == 5 * count - 1
    assert tab.locator("#learning-rates figure svg polyline.own").count() == count
    assert tab.locator("#loss figure svg polyline.own").count() == count
    assert tab.locator("#size .wide circle").count() == count
    assert tab.locator("#maps table.map tbody tr").count() == 2 * 6
    assert tab.locator("svg:not([role=img])").count() == 0
    assert tab.locator("svg > title").count() == tab.locator("svg").count()
    assert "ended by SIGKILL" in tab.locator("#missing").inner_text()
    assert tab.locator("main b").count() == 0  # the unkind name is text


def test_nothing_is_wider_than_a_telephone(opened):
    tab = opened(PHONE)
    for details in tab.locator("details").all():
        details.evaluate("element => element.open = true")
    assert tab.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    # What is wider, the table of all pairs, scrolls in a box of its own.
    assert overhanging(tab) == []
    assert tab.locator("#size .narrow svg").is_visible()
    assert not tab.locator("#size .wide svg").is_visible()
    for label in ("mean", "adapter parameters", "peak MiB", "train s"):
        cell = tab.locator(f'table.scores td[data-label="{label}"]').first
        assert cell.is_visible()
        name = cell.evaluate("element => getComputedStyle(element, '::before').content")
        assert name == f'"{label}"'
    smallest = """() => Math.min(...[...document.querySelectorAll("svg text")]
        .filter(text => text.getClientRects().length)
        .map(text => text.getBoundingClientRect().height))"""
    assert tab.evaluate(smallest) > 9


def test_dark_and_light_differ_and_both_can_be_read(opened):
    grounds = []
    for scheme in ("light", "dark"):
        tab = opened(scheme=scheme)
        ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        grounds.append(luminance(ground))
        for words in ("main p", ".note", "h1", "a", "table.scores td", "svg text"):
            assert contrast(tab, words) > 4.5, (scheme, words)
    assert grounds[0] > 0.9
    assert grounds[1] < 0.05


def test_two_methods_are_compared_by_choosing_them(opened):
    tab = opened()
    verdict = tab.locator("#verdict")
    tab.select_option("#first", "lora")
    tab.select_option("#second", "full")
    assert verdict.inner_text().startswith("lora is better than full by 0.")
    assert tab.locator("#pairs tbody tr").count() == 4  # one run of `full` crashed
    tab.select_option("#first", "tlora")
    tab.select_option("#second", "dora")
    assert verdict.inner_text().startswith("Tie: tlora minus dora is ")
    shown = [float(c) for c in tab.locator("#pairs tbody tr:first-child td").all_inner_texts()[:2]]
    said = tab.locator("#pairs tbody tr:first-child td").nth(2).inner_text()
    assert float(said.replace("\N{MINUS SIGN}", "-")) == pytest.approx(
        shown[0] - shown[1], abs=2e-4
    )
    tab.select_option("#second", "</script>  <b>")
    assert tab.locator("#pairs tbody tr").count() == 5
    tab.select_option("#second", "tlora")
    assert verdict.inner_text() == "Choose two different methods."
    assert tab.locator("#pairs tbody tr").count() == 0


def test_without_scripts_everything_but_the_selector_is_there(opened):
    tab = opened(java_script_enabled=False)
    assert tab.locator("table.scores svg.strip").first.is_visible()
    tab.locator("#pair summary").click()
    assert tab.locator("table.matrix td.win").first.is_visible()
    assert "need JavaScript" in tab.locator("#pair").inner_text()
