"""An evaluation's page in a browser, opened from disk."""

import pytest
from browsing import PHONE, contrast, overhanging
from playwright.sync_api import expect

import evaluations
from tlora.report import evalpage, evaluation, outcomes, read_evaluation

pytestmark = pytest.mark.browser
UNKIND = "</script><b>&amp;\"'|"
EXAMPLES = "".join(f"Q: What is {n} + {n}? A: {n + n}\n" for n in range(20))
MANY = 5000


@pytest.fixture(scope="module")
def scores():
    return evaluations.drawn(MANY, [0.4, 0.6, 0.41])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, scores):
    """5,000 sums and 40 graded items; names, prompts and replies as unkind as can be."""
    names = ("base", "tuned", UNKIND)
    drawn = [evaluations.lines(made, seed=seed) for seed, made in enumerate(scores)]
    for made in drawn:
        for line in made:
            line["prompt"] = EXAMPLES + line["prompt"]
        made[7] |= {"reply": f"<img src=x onerror=alert(1)>{UNKIND}<!--", "answer": UNKIND}
        made[8] |= {"prompt": f"{EXAMPLES}<script>alert(2)</script> {'w' * 400}", "answer": None}
    for place in (7, 8):
        drawn[0][place] |= {"scores": {"exact_match": 1.0}}
        for made in drawn[1:]:
            made[place] |= {"scores": {"exact_match": 0.0}}
    marks = ([4.0, 6.0] * 20, [5.5, 6.0] * 20, [4.0, 7.0] * 20)
    rated = [evaluations.lines(made, "rating", seed) for seed, made in enumerate(marks)]
    for made in rated:
        for line in made:
            line |= {"answer": None, "target": None}
    tasks = {
        "sums": dict(zip(names, drawn, strict=True)),
        f"chat {UNKIND}": dict(zip(names, rated, strict=True)),
    }
    return evaluations.write(tmp_path_factory.mktemp("page"), tasks)


@pytest.fixture(scope="module")
def file(folder):
    return evaluation.write(folder).page


@pytest.fixture(scope="module")
def results(folder):
    return outcomes.gather(read_evaluation.read(folder))


def lines(tab):
    return tab.locator("#items > details")


def shown(tab):
    """Return how many items the filters leave."""
    return int(tab.locator("#shown").inner_text().split(" of ")[1].split(".")[0])


def test_table_picture_and_list_are_there(opened, results):
    tab = opened()
    assert tab.locator("table.scores tbody tr").count() == 2
    assert tab.locator("table.scores thead th").count() == 5
    cell = tab.locator("table.scores tbody tr").first.locator("td").nth(2)
    known = results.rows[0].cells[1]
    text = cell.inner_text()
    assert f"{known.score.mean:.4f}" in text
    assert f"+{known.difference.interval.mean:.4f} ▲ better" in text
    assert f"+{known.difference.interval.low:.4f} to " in text
    assert "tie" in tab.locator("table.scores tbody tr").first.locator("td").nth(3).inner_text()
    assert tab.locator("#picture svg").count() == 2
    assert tab.locator("#picture svg circle.score").count() == 6
    assert tab.locator("svg > title").count() == tab.locator("svg").count()
    assert lines(tab).count() == 25
    total = sum(len(found) for found in known.changes.values())
    assert shown(tab) == total > 2000


def test_hostile_texts_are_texts(opened):
    tab = opened()
    assert tab.locator("main b:not(h4 b), main img, main script").count() == 0
    assert UNKIND in tab.locator("table.scores thead th").last.inner_text()
    tab.fill("#search", "onerror")
    expect(lines(tab)).to_have_count(1)
    lines(tab).first.locator("summary").click()
    body = lines(tab).first.locator(".body")
    assert f"<img src=x onerror=alert(1)>{UNKIND}<!--" in body.inner_text()
    assert body.locator("img, script").count() == 0


def test_an_item_opens_with_prompt_target_both_replies_and_answers(opened, results):
    tab = opened()
    lost = results.rows[0].cells[1].changes["lost"]
    number, place = next((n, i) for n, i in enumerate(lost) if i > 8)  # no unkind one
    old, new = (results.evaluation.tasks[0].samples[m][place] for m in ("base", "tuned"))
    line = lines(tab).nth(number)
    assert line.locator(".id").inner_text() == old.item
    assert line.locator(".step").inner_text() == (
        f"{old.answer} → {new.answer} (target {old.target})"
    )
    assert line.locator(".body").count() == 0  # made when it is opened
    line.locator("summary").click()
    text = line.locator(".body").inner_text()
    for expected in (old.reply, new.reply, old.target, f"parsed answer: {new.answer}"):
        assert expected in text
    # The examples, which all prompts begin with, are folded away and said once.
    assert line.locator("pre").first.inner_text() == old.prompt.removeprefix(EXAMPLES)
    assert tab.locator("#prefix pre").text_content() == EXAMPLES
    line.locator("summary").click()
    line.locator("summary").click()
    assert line.locator(".body").count() == 1


def test_filters_agree_with_what_was_counted(opened, results):
    tab = opened()
    row, graded = results.rows[0], results.rows[1]
    for kind, found in row.cells[1].changes.items():
        tab.select_option("#kind", kind)
        assert shown(tab) == len(found)
        ids = lines(tab).locator(".id").all_inner_texts()
        first = row.task.samples["base"]
        assert ids == [first[place].item for place in found[:25]]
    tab.select_option("#model", UNKIND)
    assert tab.locator("#kind").input_value() == "other"
    assert shown(tab) == len(row.cells[2].changes["other"])
    tab.select_option("#task", graded.task.name)
    assert "same score, different reply" in tab.locator("#kind").inner_text()
    tab.select_option("#kind", "gained")
    assert shown(tab) == 20
    assert lines(tab).first.locator(".step").inner_text() == "6 → 7"


def test_a_search_is_for_all_its_words_in_any_case(opened):
    tab = opened()
    tab.fill("#search", "ANN SUM-4321")
    expect(lines(tab)).to_have_count(1)
    assert lines(tab).first.locator(".id").inner_text() == "sum-4321"
    tab.fill("#search", "there is no such word")
    expect(lines(tab)).to_have_count(0)
    assert tab.locator("#shown").inner_text() == "No items match."
    tab.fill("#search", "")
    expect(lines(tab)).to_have_count(25)


def test_counts_in_the_table_lead_to_their_items(opened, results):
    tab = opened()
    found = results.rows[0].cells[2].changes["gained"]
    tab.locator("table.scores tbody tr").first.locator("td").nth(3).locator("a").first.click()
    assert tab.locator("#kind").input_value() == "gained"
    assert shown(tab) == len(found)
    assert tab.locator("#model option:checked").inner_text() == UNKIND
    assert tab.locator("#items").is_visible()


def test_pages_are_turned_by_keyboard_too(opened):
    tab = opened()
    first = lines(tab).first.locator(".id").inner_text()
    assert tab.locator("#before").is_disabled()
    tab.locator("#after").focus()
    tab.keyboard.press("Enter")
    assert tab.locator("#shown").inner_text().startswith("Items 26 to 50 of ")
    tab.click("#before")
    assert lines(tab).first.locator(".id").inner_text() == first


def test_thousands_of_items_are_no_burden(opened):
    """The document stays small whatever is searched for."""
    tab = opened()
    assert tab.evaluate("document.querySelectorAll('*').length") < 1000
    tab.fill("#search", "apples 99")
    expect(tab.locator("#shown")).to_contain_text("of ")
    assert tab.evaluate("document.querySelectorAll('*').length") < 1000


def test_nothing_is_wider_than_a_telephone_and_all_can_be_read(opened):
    tab = opened(PHONE, "dark")
    tab.fill("#search", "sum-8 wwwww")  # one very long word
    expect(lines(tab)).to_have_count(1)
    for details in tab.locator("details").all():
        details.evaluate("element => element.open = true")
    assert tab.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert overhanging(tab) == []
    # The table has become a list; nothing of it is cut off either.
    cut = """() => [...document.querySelectorAll("table.scores td *")].filter(element =>
        element.getBoundingClientRect().right > innerWidth).length"""
    assert tab.evaluate(cut) == 0
    for words in (".note", "h1", ".ends", ".tie", "#items .step", "#items .id", "svg text"):
        assert contrast(tab, words) > 4.5, words


def test_without_scripts_the_table_is_there(opened):
    tab = opened(java_script_enabled=False)
    assert tab.locator("table.scores .win").first.is_visible()
    assert tab.locator("#picture svg").first.is_visible()
    assert "needs JavaScript" in tab.locator("#changes").inner_text()


def test_items_that_nothing_changed_are_not_carried(results):
    task = evalpage.replies(results)["tasks"][0]
    changed = {i for cell in results.rows[0].cells for kind in cell.changes.values() for i in kind}
    assert len(task["items"]) == len(changed) < MANY
