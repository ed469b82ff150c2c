"""What the tables say of the first try."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
import synthetic

from tlora.report import comparison, firsttrytable, page, plaintext
from tlora.report.intervals import difference

ORIGINS = {
    "lora": [("quality/sums", 1e-3)],
    "tlora": [("quality/sums", 1e-2), ("quality/code", 4e-2)],
    "dora": [("quality/sums", 1e-3)],
    "full": [],
}


@pytest.fixture
def made(tmp_path):
    """Return a comparison of which full is in no other one, and lora's default its tuned rate."""
    config = synthetic.comparison(tmp_path / "made", first_try=["quality/sums", "quality/code"])
    return dataclasses.replace(config, first_try=ORIGINS)


@pytest.fixture
def results(made):
    return comparison.read(synthetic.write(made, {"lora": 0.05}))


def by_label(results):
    return {m.label: m for m in results.methods}


def test_methods_with_a_default_come_best_first_and_the_others_are_named(results):
    told = firsttrytable.table(results)
    means = [statistics.fmean(by_label(results)[row[0]].first_try.values()) for row in told.rows]
    assert means == sorted(means, reverse=True)
    assert {row[0] for row in told.rows} == {"lora", "tlora", "dora"}
    assert told.absent == "No other comparison has: full."
    rows = {row[0]: row for row in told.rows}
    assert rows["tlora"][1:3] == ["0.02", "quality/sums 0.01; quality/code 0.04"]
    assert (
        rows["tlora"][3] == f"{statistics.fmean(by_label(results)['tlora'].first_try.values()):.4f}"
    )
    assert len(rows["tlora"][5].split()) == 5
    for text in (plaintext.markdown(results), page.render(results)):
        assert all(cell in text for cell in rows["tlora"] if cell)
        assert told.absent in text
        assert told.note.split(":")[0] in text


def test_differences_are_paired_with_its_own_tuned_runs_and_those_of_the_best(results):
    known = by_label(results)
    tlora, best = known["tlora"], results.methods[0]
    assert tlora.learning_rate != 2e-2
    row = next(row for row in firsttrytable.table(results).rows if row[0] == "tlora")
    for cell, other in zip(row[6:], (tlora, best), strict=True):
        wanted = difference(tlora.first_try, other.scores, "higher").interval
        assert cell[1:].startswith(f"{abs(wanted.mean):.4f}")
        assert cell.startswith("+" if wanted.mean > 0 else "\N{MINUS SIGN}")
    assert firsttrytable.table(results).head[-1] == f"minus {best.label}, tuned"


def test_a_default_that_is_the_tuned_rate_has_the_same_runs(results):
    lora = by_label(results)["lora"]
    assert lora.learning_rate == 1e-3
    assert lora.first_try == lora.scores
    row = next(row for row in firsttrytable.table(results).rows if row[0] == "lora")
    assert row[6:] == ["same runs", "same runs"]  # it is the best one, too
    assert sum(t.phase == "final" for t in lora.trials) == 5


def test_runs_of_the_first_try_change_no_tuned_score_and_are_among_the_records(made, results):
    plain = synthetic.comparison(made.config.output_dir)
    before = comparison.gather(plain, comparison.CompareFolder(made.config.output_dir))
    for label, method in by_label(before).items():
        assert method.scores == by_label(results)[label].scores
        assert method.first_try == {}
    more = {r["name"] for r in results.records} - {r["name"] for r in before.records}
    assert len(more) == 5 * 2  # tlora and dora at rates of their own
    assert "first-try" not in page.render(before)
    assert "First try" not in plaintext.markdown(before)


def test_runs_that_are_missing_are_said_to_be(made):
    folder = synthetic.write(made)
    for name in folder.names():
        if name.startswith("tlora-lr0.02-"):
            folder.record_file(name).unlink()
    results = comparison.read(folder)
    assert "tlora, 5 of 5 final runs" in {p.run for p in results.problems}
    assert firsttrytable.table(results).rows[-1][0] == "tlora"
    assert "no score" in firsttrytable.table(results).rows[-1]
    assert "no score" in page.render(results)


def test_before_any_final_run_there_is_a_table_without_scores(made):
    folder = synthetic.write(made)
    for name in folder.names():
        if "-final-" in name:
            folder.record_file(name).unlink()
    told = firsttrytable.table(comparison.read(folder))
    assert told.head[-1] == "minus best tuned"
    assert all("no score" in row for row in told.rows)


def test_the_width_stands_beside_the_tuned_rate(results):
    lora = by_label(results)["lora"]
    assert lora.width[1]  # all three rates are within 5 %
    assert lora.width[0] == pytest.approx(10)
    row = next(r for r in plaintext.markdown(results).splitlines() if r.startswith("| lora |"))
    assert " | 0.001 | >10.0\N{MULTIPLICATION SIGN} | " in row
    assert ">10.0\N{MULTIPLICATION SIGN}".replace(">", "&gt;") in page.render(results)
