"""MT-Bench from end to end: a model's answers, a judge on a socket, one folder and its report."""

import json
import shutil
from pathlib import Path

import openai
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import judge_server
from judge_server import says, status
from tlora import cli
from tlora.demo.run import BASE_MODEL
from tlora.errors import ArtifactError, ConfigError, DataError, JudgeError
from tlora.evaluate import evaluate, loading
from tlora.evaluate.conversations import INSTRUCTION, TEMPLATE, MtBench
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evalfolder import EvalFolder
from tlora.scoring.mtbench.judgeconfig import JudgeConfig
from tlora.tasks.base import INSTRUCTION_PROMPT

KEY = "sk-test-0f343b0931126a20"
TEMPLATED = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}[a]"
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Sea.", "Again."]},
    {"question_id": 82, "category": "writing", "turns": ["Of clips and keys at night?", "More."]},
    {"question_id": 111, "category": "math", "turns": ["1+1=", "2+2="]},
]
REFERENCES = [{"question_id": 111, "choices": [{"turns": ["2", "4"]}]}]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """The shipped base with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "chatty"
    shutil.copytree(BASE_MODEL, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATED
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(here):
    folder = here / "data" / "mt_bench"
    (folder / "reference_answer").mkdir(parents=True)
    for name, rows in (
        ("question.jsonl", QUESTIONS),
        ("reference_answer/gpt-4.jsonl", REFERENCES),
    ):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(here / "data")


@pytest.fixture
def server():
    with judge_server.running() as running:
        yield running


@pytest.fixture
def config(data, chatty):
    def make(**fields):
        given = {
            "models": [f"chatty={chatty}"],
            "tasks": ["mtbench"],
            "data_dir": data,
            "output_dir": "out",
            "gen_kwargs": {"max_gen_toks": 8},
        }
        return EvalConfig(**given | fields)

    return make


def by(server, **fields):
    given = {"url": server.url, "model": "grader", "concurrency": 1, "retries": 1}
    return JudgeConfig(**given | fields)


@pytest.fixture
def loaded(monkeypatch):
    names = []
    load = loading.load
    monkeypatch.setattr(
        loading,
        "load",
        lambda evaluated, *a, **h: names.append(evaluated.name) or load(evaluated, *a, **h),
    )
    return names


def lines(model="chatty"):
    return EvalFolder("out").read_samples(model, "mtbench")


def entry():
    return EvalFolder("out").read()["tasks"][0]


def alone(folder, prompt, stops=()):
    """What generation writes after one prompt, without any of our code."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=1)
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    for stop in stops:
        text = text.partition(stop)[0]
    return text.strip()


def test_the_second_turn_follows_the_models_own_first_answer(config, chatty):
    chosen = INSTRUCTION
    greedy = {"max_gen_toks": 8, "do_sample": False}
    evaluate.run(config(gen_kwargs=greedy, chat_prompt="instruction", batch_size=2))
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    found = lines()
    assert [line["item"] for line in found] == ["81/1", "81/2", "82/1", "82/2", "111/1", "111/2"]
    assert len({line["reply"] for line in found}) > 1
    for question, first, second in zip(QUESTIONS, found[::2], found[1::2], strict=True):
        assert [first["prompt"], second["prompt"]] == question["turns"]
        said = [{"role": "user", "content": question["turns"][0]}]
        assert first["rendered"] == chosen.render(tokenizer, said)
        said += [
            {"role": "assistant", "content": first["reply"]},
            {"role": "user", "content": question["turns"][1]},
        ]
        assert second["rendered"] == chosen.render(tokenizer, said)
        for line in (first, second):
            assert line["reply"] == alone(chatty, line["rendered"], chosen.stops(tokenizer))
    protocol = entry()["protocol"]
    assert protocol.startswith("MT-Bench, two turns (Zheng et al., arXiv 2306.05685), greedy, up")
    assert protocol.endswith(f"prompts: {chosen.says}; not graded")


CHAT = [
    {"role": "user", "content": "One {x}?"},
    {"role": "assistant", "content": "Yes, {y}."},
    {"role": "user", "content": "Two?"},
]


def test_conversations_become_prompts_of_either_form(chatty):
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    assert TEMPLATE.render(tokenizer, CHAT) == "[u]One {x}?[a]Yes, {y}.[u]Two?[a]"
    first = INSTRUCTION_PROMPT.format(instruction="One {x}?")
    assert INSTRUCTION.render(tokenizer, CHAT) == (
        f"{first}Yes, {{y}}.\n\n### Instruction:\nTwo?\n\n### Response:"
    )
    system = {"role": "system", "content": "Be brief."}
    assert INSTRUCTION.render(tokenizer, [system, *CHAT[:1]]) == f"Be brief.\n\n{first}"


class Recorder:
    """A model that notes what it was asked; as vLLM's class, it counts no prompts that it cut."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.requests = []

    def generate_until(self, requests):
        self.requests += [request.args for request in requests]
        return [f" reply {number}\n" for number, _ in enumerate(requests)]


def test_each_request_has_the_temperature_of_its_category_and_ends_with_its_turn(config, chatty):
    lm = Recorder(AutoTokenizer.from_pretrained(chatty))
    task = MtBench("mtbench", config(chat_prompt="instruction", gen_kwargs={}))
    answers = task.evaluate(lm)
    for (_, options), temperature in zip(lm.requests, [0.7, 0.7, 0.0] * 2, strict=True):
        assert options == {
            "until": ["### Instruction:"],
            "max_gen_toks": 1024,
            "do_sample": temperature > 0,
            "temperature": temperature,
        }
    assert answers.truncated == 0
    assert [line["reply"] for line in answers.lines[::2]] == ["reply 0", "reply 1", "reply 2"]


def test_a_model_without_a_template_gets_the_papers_prompt_and_the_result_says_so(config, chatty):
    models = [f"chatty={chatty}", f"again={chatty}", f"bare={BASE_MODEL}"]
    evaluate.run(config(models=models, limit=2))
    assert lines("again") == lines()  # drawn replies are the seed's
    assert [line["item"] for line in lines()] == ["81/1", "81/2", "82/1", "82/2"]
    assert entry()["items"] == 4
    assert lines("bare")[0]["rendered"].startswith("Below is an instruction")
    assert lines("chatty")[0]["rendered"] == "[u]Sea.[a]"
    assert (
        "the model's chat template (again); the instruction prompt of arXiv 2604.18124,"
        " the first turn standing before the second (bare); not graded"
    ) in entry()["protocol"]


def test_answers_grades_and_report_in_one_run(config, demo_adapter, server, chatty):
    server.by_body = lambda body: says(
        f"Words. [[{9 if 'eference' in body['messages'][0]['content'] else 4}]]"
    )
    models = [f"chatty={chatty}", f"drawn={demo_adapter}"]
    evaluate.run(config(models=models, with_merged=True, judge=by(server)))
    task = entry()
    names = ["chatty", "drawn", "drawn-merged"]
    assert task["metrics"] == ["score", "turn_1", "turn_2", "writing", "math"]
    assert task["items"] == 6
    for name in names:
        assert task["scores"][name] == {
            "score": pytest.approx(17 / 3),
            "turn_1": pytest.approx(17 / 3),
            "turn_2": pytest.approx(17 / 3),
            "writing": 4.0,
            "math": 9.0,
        }
        assert [line["scores"]["score"] for line in lines(name)] == [4.0] * 4 + [9.0] * 2
        assert lines(name)[0]["judgment"] == "Words. [[4]]"
    assert lines("chatty")[4]["target"] == "2"
    assert lines("drawn") != lines("chatty")
    counts = task["judge"]["models"]["chatty"]
    assert (counts["judgments"], counts["tokens_in"]) == (6, 600)
    assert task["protocol"].endswith(
        "; graded 1 to 10 by grader at temperature 0.0, mtbench-single, our wording"
    )


def everything_in(folder):
    return "".join(p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file())


def test_the_command_line_grades_later_without_a_model(
    config, chatty, server, loaded, capfd, monkeypatch
):
    here = Path()
    command = ["eval", "--tasks", "mtbench", "--output_dir", "out"]
    asking = [chatty, "--data_dir", "data", "--gen_kwargs", '{"max_gen_toks": 8}']
    assert cli.main([command[0], asking[0], *command[1:], *asking[1:]]) == 0
    assert server.bodies == []
    assert loaded == ["base"]
    before = [(line["reply"], line["rendered"]) for line in lines("base")]
    shutil.rmtree("data")
    monkeypatch.setattr(loading, "load_tokenizer", None)
    judge = ["--judge.url", server.url, "--judge.model", "grader"]
    assert cli.main([*command, *judge]) == 0
    assert loaded == ["base"]
    assert [(line["reply"], line["rendered"]) for line in lines("base")] == before
    assert entry()["scores"]["base"]["score"] == 7.0
    assert "not graded" not in entry()["protocol"]
    assert len(server.bodies) == 6
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert "7.0" in Path("out/report.md").read_text()
    assert cli.main(["eval", "--output_dir", "out", *judge]) == 0
    assert len(server.bodies) == 6
    assert KEY not in everything_in(here) + "".join(capfd.readouterr())


def test_grading_alone_waits_for_nobody_and_writes_over_nobody(config, server):
    evaluate.run(config())
    before = Path("out/eval.json").read_bytes()
    alone = EvalConfig(output_dir="out", judge=by(server))
    with EvalFolder("out").locked(), pytest.raises(ConfigError, match="another process is"):
        evaluate.run(alone)
    assert server.bodies == []
    assert Path("out/eval.json").read_bytes() == before

    def busy(body):
        with pytest.raises(ConfigError, match="another process is"):
            evaluate.run(config(models=[f"second={BASE_MODEL}"]))
        return says("[[4]]")

    server.by_body = busy
    evaluate.run(alone)
    assert entry()["scores"]["chatty"]["score"] == 4.0
    with pytest.raises(ConfigError, match="no model to evaluate is given"):
        EvalConfig(tasks=["mtbench"])
    with pytest.raises(ArtifactError, match=r"there is no eval\.json"):
        evaluate.run(EvalConfig(output_dir="elsewhere", judge=by(server)))
    assert not Path("elsewhere").exists()


def test_an_added_model_is_graded_the_others_keep_their_grades_from_the_same_judge(
    config, chatty, demo_adapter, server
):
    server.always = says("[[3]]")
    evaluate.run(config(judge=by(server)))
    asked = len(server.bodies)
    server.always = says("[[5]]")
    both = [f"chatty={chatty}", f"drawn={demo_adapter}"]
    evaluate.run(config(models=both, judge=by(server)))
    assert len(server.bodies) <= asked + 6
    assert entry()["scores"]["chatty"]["score"] == 3.0
    assert entry()["scores"]["drawn"]["score"] == 5.0
    evaluate.run(config(models=both))
    assert entry()["protocol"].endswith("mtbench-single, our wording")
    # Another judge grades all models again.
    server.always = says("[[2]]")
    stricter = by(server, model="stricter", request={"temperature": None, "seed": 3})
    evaluate.run(EvalConfig(output_dir="out", judge=stricter))
    assert [entry()["scores"][name]["score"] for name in ("chatty", "drawn")] == [2.0, 2.0]
    assert "by stricter at its own temperature" in entry()["protocol"]
    sent = {"model": "stricter", "max_tokens": 2048, "seed": 3}
    assert entry()["judge"]["request"] == sent
    assert sent.items() <= server.bodies[-1].items()


def test_answers_without_a_grade_are_counted_told_of_and_reported(config, server, caplog):
    server.script = [says("I cannot judge this."), says("[[11]]")]
    cli.evaluate(config(judge=by(server)))
    task = entry()
    assert task["judge"]["models"]["chatty"]["unrated"] == {"no rating": 1, "out of range": 1}
    assert (
        "chatty: 2 of 6 answers to mtbench have no grade and are excluded from the mean"
        in caplog.text
    )
    assert task["scores"]["chatty"]["score"] == 7.0
    assert [line["scores"].get("score") for line in lines()[:3]] == [None, None, 7.0]
    assert "chatty has no score on 2 of 6 items" in Path("out/report.md").read_text()


def test_a_judge_that_fails_leaves_the_answers_and_the_same_command_goes_on(config, server, loaded):
    server.script = [says("[[7]]"), status(500), status(500)]
    with pytest.raises(JudgeError, match=r"of 6 judgments are saved"):
        evaluate.run(config(judge=by(server)))
    assert loaded == ["chatty"]
    assert all(line["scores"] == {} for line in lines())
    evaluate.run(config(judge=by(server)))
    assert loaded == ["chatty"]
    assert entry()["scores"]["chatty"]["score"] == 7.0
    assert len(server.bodies) <= 8


BAD = {
    "prompts of the judge": (
        {"judge": {"url": "http://localhost:9/v1", "model": "m", "prompts": "none.jsonl"}},
        DataError,
        "none.jsonl: cannot be read",
    ),
    "a key without cover": (
        {"judge": {"url": "http://judge.example/v1", "model": "m"}},
        ConfigError,
        "would be sent unencrypted",
    ),
    "no such file": ({"data_dir": "nowhere"}, DataError, "mt_bench/question.jsonl"),
    "no folder of files": ({"data_dir": None}, DataError, "its rows are not on the Hub"),
    "too long": (
        {"gen_kwargs": {"max_gen_toks": 256}},
        ConfigError,
        "a reply may take 256 tokens, but chatty has room for 256",
    ),
    "a temperature": (
        {"gen_kwargs": {"temperature": 0.3}},
        ConfigError,
        "`gen_kwargs.temperature` does not apply to MT-Bench",
    ),
    "no template": (
        {"models": [BASE_MODEL], "chat_prompt": "template"},
        ConfigError,
        "the tokenizer has no chat template",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_refused_before_a_model_is_loaded(config, loaded, fault):
    fields, error, says_ = BAD[fault]
    if "judge" in fields:
        fields = fields | {"judge": JudgeConfig(**fields["judge"])}
    with pytest.raises(error, match=says_):
        evaluate.run(config(**fields))
    assert loaded == []
    assert not Path("out").exists()
