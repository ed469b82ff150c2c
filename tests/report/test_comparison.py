"""What is read from a comparison's files, and what is said of it."""

import csv
import dataclasses
import html
import io

import pytest
import synthetic

from tlora import cli
from tlora.errors import ArtifactError
from tlora.report import comparison, numbers, page, plaintext, wording
from tlora.report.intervals import difference

GAPS = {"lora": 0.05, "full": -0.05}


@pytest.fixture
def made(tmp_path):
    """A comparison of four methods: lora ahead, full behind, tlora and dora equal."""
    return synthetic.comparison(tmp_path / "made")


@pytest.fixture
def results(made):
    synthetic.write(made, GAPS)
    return comparison.gather(made, comparison.CompareFolder(made.config.output_dir))


def test_methods_come_best_first_with_seeds_means_and_intervals(results):
    assert [m.label for m in results.methods][::3] == ["lora", "full"]
    lora = results.methods[0]
    assert [*lora.scores] == results.config.final_seeds
    assert lora.score.mean == pytest.approx(sum(lora.scores.values()) / 5)
    assert lora.score.low < lora.score.mean < lora.score.high
    assert lora.parameters == lora.mean("parameters", "adapter") + 770
    assert lora.mean("seconds", "train") == 50.0


def test_lower_scores_come_first_where_lower_is_better(tmp_path):
    made = synthetic.comparison(tmp_path / "made", metric="loss")
    made = comparison.Comparison(made.config, "loss", "lower", made.experiment)
    synthetic.write(made, GAPS)
    results = comparison.gather(made, comparison.CompareFolder(made.config.output_dir))
    means = [m.score.mean for m in results.methods]
    assert means == sorted(means)
    assert "lower is better" in plaintext.markdown(results)


def test_the_test_rows_have_no_part_in_the_choice(made):
    folder = synthetic.write(made, GAPS)
    before = comparison.gather(made, folder)
    for name in folder.names():
        record = folder.record(name)
        if record["phase"] == "final":
            record["scores"]["test"]["accuracy"] = 0.01
            folder.write_record(name, record)
    after = comparison.gather(made, folder)
    rates = [{m.label: m.learning_rate for m in results.methods} for results in (before, after)]
    assert rates[0] == rates[1]
    assert [m.score.mean for m in after.methods] == [0.01] * 4


def test_a_best_rate_at_the_edge_is_said_so(results):
    edges = {m.label: m.edge for m in results.methods}
    assert edges == {"tlora": "lowest", "lora": None, "dora": "highest", "full": "lowest"}
    said = wording.edges(results)
    assert said[0].startswith("Best at the lowest learning rate tried: ")
    assert "tlora (0.0003)" in said[0]
    assert said[1].startswith("Best at the highest learning rate tried: dora (0.003).")


def test_a_single_rate_is_no_choice(tmp_path):
    made = synthetic.comparison(tmp_path, learning_rates=[1e-3])
    results = comparison.gather(made, synthetic.write(made, GAPS))
    (said,) = wording.edges(results)
    assert said.startswith("Only one learning rate was tried, ")
    assert said in plaintext.markdown(results)


def test_what_the_noise_could_have_done_is_called_a_tie(results):
    assert wording.verdict(results, "tlora", "dora").startswith("Tie: tlora minus dora is ")
    assert wording.verdict(results, "lora", "full").startswith("lora is better than full by 0.09")
    assert wording.verdict(results, "full", "lora").startswith("lora is better than full by 0.09")
    summary = wording.summary(results)
    assert summary.startswith("Best mean: lora, 0.8")
    assert "Significantly better than (each pair tested alone): " in summary


def without(folder, start, seeds):
    """Remove the final runs of some seeds from those whose names begin with ``start``."""
    for name in folder.names():
        if name.startswith(start) and any(f"seed{seed}-final" in name for seed in seeds):
            folder.record_file(name).unlink()


def test_a_method_that_lacks_a_seed_comes_after_those_that_do_not(made):
    folder = synthetic.write(made, {"lora": 0.05})
    without(folder, "lora-", [5, 6])
    results = comparison.gather(made, folder)
    assert [m.label for m in results.methods][-1] == "lora"
    said = wording.summary(results)
    assert not said.startswith("Best mean: lora")
    assert said.endswith("Worse on shared seeds than: lora (3 of 5 seeds).")
    assert "<small>3 of 5 seeds</small>" in page.render(results)


def test_no_rate_is_chosen_before_all_have_run(made):
    folder = synthetic.write(made, GAPS)
    lora = next(e for e in made.config.entries() if e.name == "lora")
    folder.record_file(made.tuning_of(lora)[-1].name).unlink()
    results = comparison.gather(made, folder)
    method = results.methods[-1]
    assert (method.label, method.learning_rate, method.edge, method.score) == (
        "lora",
        None,
        None,
        None,
    )
    causes = {p.run: p.cause for p in results.problems}
    assert causes["lora, all final runs"].startswith("not all tuning runs are here")
    only = dataclasses.replace(results, methods=[method])
    assert wording.edges(only) == []
    assert "Not every method's learning rate is chosen." in html.unescape(page.render(only))


def test_a_label_divides_no_cells(tmp_path):
    bars = {"name": "lora", "label": "a|b"}
    made = synthetic.comparison(tmp_path, methods=[bars, "tlora"])
    results = comparison.gather(made, synthetic.write(made))
    for text in (plaintext.markdown(results), plaintext.against(results, "a|b")):
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert len({row.replace("\\|", "").count("|") for row in rows}) == 1


def test_what_is_not_there_is_named_with_its_cause(made):
    folder = synthetic.write(made, GAPS)
    names = folder.names()
    gone = next(n for n in names if n.startswith("dora") and "seed4-final" in n)
    folder.record_file(gone).unlink()
    crashed = next(n for n in names if n.startswith("tlora-lr0.003-seed1"))
    record = folder.record(crashed)
    error = {"cause": "ended by SIGKILL", "last_lines": ["line one", "line two"]}
    folder.write_record(crashed, record | {"status": "failed", "error": error})
    diverged = next(n for n in names if n.startswith("lora-lr0.001-seed2-final"))
    record = folder.record(diverged)
    record["scores"]["test"]["accuracy"] = None
    folder.write_record(diverged, record)
    stopped = next(n for n in names if n.startswith("tlora-lr0.003-seed0"))
    record = folder.record(stopped)
    folder.write_record(stopped, record | {"diverged": 17, "scores": {}, "data_order": None})
    results = comparison.gather(made, folder)
    said = {problem.run: problem.cause for problem in results.problems}
    assert said == {
        "dora, 1 of 5 final runs": "not run yet",
        "tlora, tuning run, learning rate 0.003, seed 1": "failed, ended by SIGKILL",
        "tlora, tuning run, learning rate 0.003, seed 0": "the training diverged at step 17",
        "lora, final run, learning rate 0.001, seed 2": (
            "its score is not a number: the training diverged"
        ),
    }
    text = page.render(results)
    assert "line one\nline two" in text
    assert next(m for m in results.methods if m.label == "lora").score.count == 4


def test_a_comparison_that_has_only_begun_has_a_page(made):
    folder = comparison.CompareFolder(made.config.output_dir)
    results = comparison.gather(made, folder)
    assert wording.summary(results) == "No final run has a score."
    assert "lora, 6 of 6 tuning runs: not run yet" in page.render(results)
    synthetic.write(made, GAPS)
    for name in folder.names():
        if "final" in name:
            folder.record_file(name).unlink()
    results = comparison.gather(made, folder)
    assert page.render(results).count("no final run has a score") == 4
    assert "| lora | \u2013 |" in plaintext.markdown(results)


def test_files_of_other_settings_are_passed_over(made, tmp_path):
    folder = synthetic.write(made, GAPS)
    before = page.render(comparison.gather(made, folder))
    synthetic.write(synthetic.comparison(tmp_path / "made", adapter={"r": 4}), GAPS)
    assert page.render(comparison.gather(made, folder)) == before


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"steps": 95}, "steps, batch and training rows"),
        ({"batch": 16}, "steps, batch and training rows"),
        ({"rows": {"train": 999}}, "steps, batch and training rows"),
        ({"data_order": "another"}, "order of the rows"),
        ({"autocast": "bf16"}, "autocast"),
    ],
)
def test_runs_that_were_not_trained_alike_are_refused(made, change, what):
    folder = synthetic.write(made, GAPS)
    name = next(n for n in folder.names() if n.startswith("tlora"))
    folder.write_record(name, folder.record(name) | change)
    with pytest.raises(ArtifactError) as fault:
        comparison.gather(made, folder)
    assert what in str(fault.value)
    assert name in str(fault.value)


def test_the_folder_alone_gives_the_same_page(made, results):
    again = comparison.read(comparison.CompareFolder(made.config.output_dir))
    assert page.render(again) == page.render(results)


def test_the_csv_has_a_line_for_every_finished_run(results):
    rows = list(csv.DictReader(io.StringIO(plaintext.table(results))))
    assert len(rows) == 4 * (3 * 2 + 5)
    finals = [r for r in rows if (r["method"], r["phase"]) == ("lora", "final")]
    scores = next(m for m in results.methods if m.label == "lora").scores
    assert {int(r["seed"]): float(r["score"]) for r in finals} == scores


def test_the_markdown_has_every_seed_and_the_caveat(results):
    text = plaintext.markdown(results)
    for method in results.methods:
        for score in method.scores.values():
            assert f"{score:.4f}" in text
    assert "With 6 pairs at 95 %, about 0.3 would differ by chance" in text
    assert "Common options that a method lacks" not in text


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ({1: 0.5}, {1: 0.25}, "at their only shared seed"),
        ({1: 0.5, 2: 0.75}, {1: 0.25, 2: 0.0}, "but 2 seeds are not enough to tell them apart"),
        (dict.fromkeys(range(5), 0.5), dict.fromkeys(range(5), 0.25), "at every seed, which gives"),
    ],
)
def test_a_tie_for_want_of_seeds_or_spread_says_so(results, first, second, text):
    found = difference(first, second, "higher")
    said = wording.verdict(dataclasses.replace(results, differences={("a", "b"): found}), "a", "b")
    assert said.startswith("Tie: a minus b is") and text in said


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.81234, "0.8123"),
        (12.5, "12.5000"),
        (1234.5, "1234"),
        (None, "\u2013"),
        (2.14e-5, "2.1e-05"),
        (0.0, "0.0000"),
    ],
)
def test_scores_are_written_with_four_digits_and_small_ones_with_two(value, text):
    assert numbers.number(value) == text


def test_a_rank_or_scale_that_all_modules_have_is_said_in_a_line(tmp_path):
    made = synthetic.comparison(tmp_path)
    folder = synthetic.write(made)
    for name in folder.names():
        record = folder.record(name)
        for module in (record["plan"] or {}).values():
            module["rank"] = 4
        folder.write_record(name, record)
    text = page.render(comparison.read(folder))
    assert "tlora: rank: every module has 4." in text
    assert "tlora: scale: every module has" not in text
    assert text.count('<table class="map">') == 1


def test_one_method_is_set_against_the_others_seed_by_seed(results, capsys):
    assert cli.main(["inspect", results.config.output_dir, "--against", "tlora"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    told = {row[0]: row[3:] for row in rows[2:]}
    assert list(told) == [m.label for m in results.methods]
    assert told["tlora"] == ["", ""]
    own = next(m for m in results.methods if m.label == "tlora").scores
    for m in results.methods:
        if m.label != "tlora":
            mean = sum(own[seed] - m.scores[seed] for seed in own) / len(own)
            assert told[m.label][0].startswith(numbers.signed(mean))
    words = {label: word.split(",")[0] for label, (_, word) in told.items()}
    assert words == {"lora": "worse", "tlora": "", "dora": "tied", "full": "better"}


def test_to_set_against_what_is_not_there_is_refused(results, capsys, tmp_path):
    folder = results.config.output_dir
    assert cli.main(["inspect", folder, "--against", "tlroa"]) == 2
    assert "there is no method 'tlroa' here. Did you mean 'tlora'?" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path), "--against", "tlora"]) == 2
    assert "contains no comparison" in capsys.readouterr().err
