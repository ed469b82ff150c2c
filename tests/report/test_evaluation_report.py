"""What is read from an evaluation's files, what is said of it, and how its faults are told."""

import json
import random

import pytest

import evaluations
from tlora import cli
from tlora.errors import ArtifactError
from tlora.report import evaluation, evalwording, outcomes, read_evaluation

SUMS, CHAT = "sums", "chat"


def graded(count, mean, seed):
    """Return samples scored 1 to 10, two turns of each conversation."""
    draw = random.Random(seed)
    made = evaluations.lines(
        [float(min(10, max(1, round(draw.gauss(mean, 1.5))))) for _ in range(count)], "rating"
    )
    return [
        line | {"answer": None, "target": None, "group": str(place // 2), "reply": f"{seed}"}
        for place, line in enumerate(made)
    ]


@pytest.fixture(scope="module")
def scores():
    """Right and wrong of a base, a model that is clearly better, and one that is not."""
    return evaluations.drawn(300, [0.3, 0.5, 0.31])


@pytest.fixture
def tasks(scores):
    sums = [evaluations.lines(made, seed=seed) for seed, made in enumerate(scores)]
    chats = [graded(60, mean, seed) for seed, mean in enumerate((5, 7, 5), start=3)]
    names = ("base", "good", "same")
    return {
        SUMS: dict(zip(names, sums, strict=True)),
        CHAT: dict(zip(names, chats, strict=True)),
    }


@pytest.fixture
def folder(tasks, tmp_path):
    return evaluations.write(tmp_path / "out", tasks)


def results_of(folder):
    return outcomes.gather(read_evaluation.read(folder))


def rewritten(folder, model, change, task=SUMS):
    """Apply ``change`` to the list of samples of one model."""
    file = folder / "samples" / model / f"{task}.jsonl"
    made = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    file.write_text("".join(json.dumps(line) + "\n" for line in change(made)), encoding="utf-8")


def test_differences_are_to_the_first_model_item_by_item(folder, scores):
    row = results_of(folder).rows[0]
    assert [cell.model for cell in row.cells] == ["base", "good", "same"]
    assert row.cells[0].difference is None
    base, good, _ = scores
    assert row.cells[1].difference.interval.mean == pytest.approx((sum(good) - sum(base)) / 300)
    assert row.cells[1].difference.better == 1
    assert row.cells[2].difference.better == 0
    changes = row.cells[1].changes
    assert changes["gained"] == [i for i in range(300) if good[i] > base[i]]
    assert changes["lost"] == [i for i in range(300) if good[i] < base[i]]
    told = [json.loads(line) for line in (folder / "samples/base/sums.jsonl").open()]
    asked = [json.loads(line) for line in (folder / "samples/good/sums.jsonl").open()]
    both = [i for i in range(300) if base[i] == good[i] == 0]
    assert changes["other"] == [i for i in both if told[i]["answer"] != asked[i]["answer"]]
    assert 0 < len(changes["other"]) < len(both)


def test_graded_scores_keep_their_scale(folder):
    results = results_of(folder)
    row = next(row for row in results.rows if row.task.name == CHAT)
    assert not row.right_or_wrong
    assert 4 < row.cells[0].score.mean < 6
    assert 1 < row.cells[1].difference.interval.mean < 3
    assert row.cells[1].difference.better == 1
    # The same score for another reply is a change; that of the same reply is not.
    assert row.cells[1].changes["other"]
    rewritten(folder, "good", lambda made: [m | {"reply": "3"} for m in made], CHAT)
    assert not results_of(folder).rows[1].cells[1].changes["other"]


def test_a_loss_is_shown_as_it_is_and_a_lower_one_is_better(tmp_path):
    """The files hold it negated."""
    draw = random.Random(1)
    losses = [draw.uniform(1.0, 3.0) for _ in range(40)]
    falls = [loss - 0.5 for loss in losses]
    worse = [loss + (0.4 if place else -0.1) for place, loss in enumerate(losses)]
    by_model = {
        name: evaluations.lines([-loss for loss in made], "-nll")
        for name, made in (("base", losses), ("good", falls), ("bad", worse))
    }
    folder = evaluations.write(tmp_path / "out", {"arc": by_model})
    (row,) = results_of(folder).rows
    base, good, bad = row.cells
    assert base.score.mean == pytest.approx(sum(losses) / 40)
    assert base.score.low < base.score.mean < base.score.high
    assert good.difference.interval.mean == pytest.approx(-0.5)
    assert (good.difference.better, bad.difference.better) == (1, -1)
    assert good.changes[outcomes.GAINED] == list(range(40))
    assert (bad.changes[outcomes.GAINED], len(bad.changes[outcomes.LOST])) == ([0], 39)
    text = evaluation.write(folder).text
    assert f"| arc | nll, lower is better | 40 | {base.score.mean:.4f} |" in text
    assert "(\N{MINUS SIGN}0.5000, " in text
    assert "By nll, good is better than base on arc." in text


def test_the_turns_of_a_conversation_are_drawn_together(folder):
    before = results_of(folder).rows[1].cells[1].difference.interval
    for model in ("base", "good", "same"):
        rewritten(folder, model, lambda made: [m | {"group": None} for m in made], CHAT)
    after = results_of(folder).rows[1].cells[1].difference.interval
    assert before.mean == after.mean
    assert (before.low, before.high) != (after.low, after.high)


def test_what_the_noise_could_have_done_is_never_called_a_win(folder):
    results = results_of(folder)
    assert [cell.difference.better for cell in results.rows[0].cells[1:]] == [1, 0]
    assert evalwording.summary(results) == (
        "By exact_match, good is better than base on sums. By rating, good is better than base on"
        " chat. By exact_match, same ties with base on sums. By rating, same ties with base on"
        " chat."
    )
    line = evaluation.write(folder).text.splitlines()[2]
    _, good, same = line.strip("| ").split(" | ")[3:]
    assert good.startswith("0.4667 (+0.1700, +0.12")
    assert good.endswith(": better)")
    assert same.endswith(": tie)")


def test_a_metric_that_is_zero_for_all_is_not_the_whole_verdict(tmp_path):
    """As the exact match of long replies, of which no model repeats one."""
    draw = random.Random(1)
    made = {}
    for model, rise in (("base", 0.0), ("good", 0.3)):
        made[model] = evaluations.lines([0.0] * 40)
        for line in made[model]:
            line["scores"] |= {name: draw.random() / 2 + rise for name in ("rouge1", "rougeL")}
    folder = evaluations.write(tmp_path / "out", {"jsonl": made})
    task = json.loads((folder / "eval.json").read_text(encoding="utf-8"))["tasks"][0]
    task["metrics"] += ["chrf", "-loss"]
    for scores in task["scores"].values():
        scores |= {"chrf": 20.0, "-loss": -1.16}
    evaluations.change(folder, tasks=[task])
    text = evaluation.write(folder).text
    assert (
        "\nexact_match is 0 for both models, so it cannot tell them apart. By rouge1 and rougeL"
        " good is better.\n" in text
    )
    note = "- chrf and loss have no interval: they are computed over all rows at once."
    assert text.count("no interval") == text.splitlines().count(note) == 1


def test_what_holds_alone_and_not_with_all_others_is_marked(tmp_path):
    drawn = random.Random(1)
    tasks = {}
    for number in range(9):
        base = [float(drawn.random() < 0.5) for _ in range(60)]
        model = [1.0] * 7 + base[7:] if number == 0 else base
        base = [0.0] * 7 + base[7:] if number == 0 else base
        if number:
            model = [1 - score if place < 4 else score for place, score in enumerate(base)]
        made = {"base": evaluations.lines(base), "model": evaluations.lines(model)}
        tasks[f"task-{number}"] = made
    folder = evaluations.write(tmp_path / "many", tasks)
    text = evaluation.write(folder).text
    lines = text.splitlines()
    assert lines[2].endswith(": better†) |")
    assert all(line.endswith(": tie) |") for line in lines[3:11])
    assert "† significant alone, but not when all are tested together (Holm)." in text
    assert "With 9 comparisons at 95 %, about 0.5 would differ by chance" in text
    page = evaluation.write(folder).page.read_text(encoding="utf-8")
    assert page.count("<sup>†</sup>") == 1


def test_different_prompts_are_said_with_the_difference(folder):
    rewritten(folder, "good", lambda made: [m | {"prompt": "Hm. " + m["prompt"]} for m in made])
    assert results_of(folder).other_prompts == {(SUMS, "good"): 300}
    text = evaluation.write(folder).text
    assert ": better*) |" in text
    assert "* the prompts differ." in text
    assert "sums: good had different prompts than base on 300 items." in text


def test_a_score_that_is_no_mean_of_items_is_shown_and_not_compared(folder):
    """As F1 or a correlation: known for all items together, not for each."""
    told = json.loads((folder / "eval.json").read_text(encoding="utf-8"))["tasks"]
    told[0]["metrics"] = ["f1", "exact_match"]
    for model, value in (("base", 0.41), ("good", 0.52), ("same", 0.4)):
        told[0]["scores"][model]["f1"] = value
    evaluations.change(folder, tasks=told)
    results = results_of(folder)
    row = results.rows[0]
    assert (row.metric, row.by_item) == ("f1", False)
    assert [cell.score.mean for cell in row.cells] == [0.41, 0.52, 0.4]
    assert all(cell.score.low is None and cell.difference is None for cell in row.cells)
    # The items are listed by the metric that they have.
    assert [row.metric for row in results.listed] == ["exact_match", "rating"]
    text = evaluation.write(folder).text
    assert "sums: f1 has no interval: it is computed over all rows at once." in text
    assert "| sums | f1 | 300 | 0.4100 | 0.5200 | 0.4000 |" in text


def test_items_without_a_score_are_left_out_and_a_metric_may_be_of_a_part(folder):
    """As an answer that a judge did not grade, and the first turns of conversations."""

    def turns(made):
        marks = [line["scores"]["rating"] for line in made]
        scores = [{"rating": m} | ({"first": m} if i % 2 == 0 else {}) for i, m in enumerate(marks)]
        return [line | {"scores": given} for line, given in zip(made, scores, strict=True)]

    for model in ("base", "good", "same"):
        rewritten(folder, model, turns, CHAT)
    rewritten(folder, "good", lambda made: [made[0] | {"scores": {}}, *made[1:]], CHAT)
    rewritten(folder, "base", lambda made: [*made[:-1], made[-1] | {"scores": {}}], CHAT)
    told = json.loads((folder / "eval.json").read_text(encoding="utf-8"))["tasks"]
    told[1] |= {"metrics": ["rating", "first"], "scores": {m: {} for m in ("base", "good", "same")}}
    evaluations.change(folder, tasks=told)
    rating, first = results_of(folder).rows[1:]
    assert (rating.items, first.items) == (60, 30)
    assert [cell.score.count for cell in rating.cells] == [59, 59, 60]
    assert [cell.difference.interval.count for cell in rating.cells[1:]] == [58, 59]
    assert first.cells[1].difference.interval.count == 29
    assert first.cells[2].difference.interval.count == 30
    samples_of = first.task.samples["base"]
    mean = sum(sample.scores["first"] for sample in samples_of[::2]) / 30
    assert first.cells[0].score.mean == pytest.approx(mean)
    text = evaluation.write(folder).text
    assert "chat (rating): good has no score on 1 of 60 items, which are excluded." in text
    assert "same has no score" not in text


def test_models_that_are_not_done_are_named(folder):
    told = json.loads((folder / "eval.json").read_text(encoding="utf-8"))["tasks"]
    del told[0]["scores"]["same"]
    begun = {"name": "begun", "metrics": [], "protocol": "", "items": 9, "shots": 0, "scores": {}}
    evaluations.change(folder, tasks=[*told, begun])
    results = results_of(folder)
    assert results.rows[0].cells[2].score is None
    text = evaluation.write(folder).text
    assert text.splitlines()[2].endswith("| not done |")
    assert "| begun" not in text  # it has no metric yet
    del told[1]["scores"]["base"]
    evaluations.change(folder, tasks=told)
    cells = results_of(folder).rows[1].cells
    assert cells[1].score.mean > 5
    assert all(cell.difference is None for cell in cells)
    evaluation.write(folder)


def test_one_model_alone_has_a_report(tasks, tmp_path):
    alone = evaluations.write(tmp_path / "alone", {SUMS: {"base": tasks[SUMS]["base"]}})
    report = evaluation.write(alone)
    assert "base is the only model. Its replies are in samples/." in report.text
    assert 'id="items"' not in report.page.read_text(encoding="utf-8")


def test_inspect_makes_the_same_report_again(folder, capsys):
    report = evaluation.write(folder)
    files = (report.page, report.markdown)
    before = [path.read_bytes() for path in files]
    for path in files:
        path.unlink()
    assert cli.main(["inspect", str(folder)]) == 0
    assert [path.read_bytes() for path in files] == before
    assert "| sums | exact_match | 300 |" in capsys.readouterr().out


def swapped(made):
    return [made[0] | {"item": "other"}, *made[1:]]


FAULTS = {
    "missing file": (lambda f: (f / "samples/good/sums.jsonl").unlink(), "missing or damaged"),
    "another item": (
        lambda f: rewritten(f, "good", swapped),
        "sums: base and good have different items or targets (2, as 'sum-0')",
    ),
    "another target": (
        lambda f: rewritten(f, "good", lambda m: [s | {"target": "?"} for s in m]),
        "different items or targets (300, as 'sum-0')",
    ),
    "no reply": (
        lambda f: rewritten(f, "good", lambda m: [{"item": "x", "prompt": "x"}, *m[1:]]),
        "eval.json or a file of samples is damaged",
    ),
    "not JSON": (lambda f: (f / "samples/good/sums.jsonl").write_text("{\n"), "missing or damaged"),
    "another format": (
        lambda f: evaluations.change(f, format=2),
        "another version of `tlora eval` wrote",
    ),
    "no names": (lambda f: evaluations.change(f, tasks=[{}]), "is damaged (KeyError('name'))"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_sentence_and_nothing_is_written(folder, fault, capsys):
    spoil, message = FAULTS[fault]
    spoil(folder)
    with pytest.raises(ArtifactError) as raised:
        evaluation.write(folder)
    assert message in str(raised.value)
    assert cli.main(["inspect", str(folder)]) == 2
    assert message in capsys.readouterr().err
    assert not [*folder.glob("report.*"), *folder.glob("*.part")]


def test_a_name_cannot_break_the_table(tasks, tmp_path):
    odd = {SUMS: {"base": tasks[SUMS]["base"], "a|b": tasks[SUMS]["good"]}}
    report = evaluation.write(evaluations.write(tmp_path / "odd", odd))
    assert "| task | metric | items | base | a\\|b |" in report.text
