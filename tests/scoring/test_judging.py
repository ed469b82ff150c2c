"""Judging against a server on a real socket: slow, broken, busy, refusing."""

import asyncio
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import openai
import pytest

import judge_server
from judge_server import cut, hang_up, raw, says, slow, status
from tlora.errors import ConfigError, JudgeError
from tlora.scoring.mtbench import endpoint
from tlora.scoring.mtbench.config import JudgeConfig, is_local
from tlora.scoring.mtbench.judging import Answered, judge
from tlora.scoring.mtbench.questions import Question

KEY = "sk-test-d41d8cd98f00b204"


@pytest.fixture
def server():
    with judge_server.running() as running:
        yield running


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    # A key of the client's own choice, which nobody has told it to send.
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "sk-admin-d41d8cd98f00b204")


def config(server, **fields):
    given = {"model": "grader", "concurrency": 1, "retries": 3} | fields
    return JudgeConfig(url=server.url, **given)


def answered(count=1):
    return [
        Answered(
            Question(str(n), "writing", (f"first of {n}", f"second of {n}")),
            (f"answer one of {n}", f"answer two of {n}"),
        )
        for n in range(count)
    ]


def scores(judged):
    return [each.score for pair in judged.judgements for each in pair]


def statuses(judged):
    return [each.status for pair in judged.judgements for each in pair]


def test_a_question_is_two_requests_of_the_protocol(server, tmp_path):
    server.script = [says("Fine. Rating: [[3]]"), says("Better. Rating: [[8.5]]")]
    judged = judge(answered(), config(server), tmp_path)
    assert scores(judged) == [3.0, 8.5]
    for body in server.bodies:
        assert body["path"] == "/v1/chat/completions"
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("grader", 0.0, 2048)
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
    first, second = (body["messages"][1]["content"] for body in server.bodies)
    assert "first of 0" in first
    assert "answer one of 0" in first
    assert "second of 0" not in first
    assert "answer two of 0" not in first
    for text in ("first of 0", "answer one of 0", "second of 0", "answer two of 0"):
        assert text in second
    assert all("authorization" not in headers for headers in server.headers)


def test_further_fields_are_sent_and_null_leaves_one_out(server, tmp_path):
    request = {"seed": 3, "max_tokens": None, "max_completion_tokens": 99}
    judge(answered(), config(server, request=request), tmp_path)
    body = server.bodies[0]
    assert "max_tokens" not in body
    assert (body["seed"], body["max_completion_tokens"]) == (3, 99)


def test_grades_go_to_the_answers_they_are_of(server, tmp_path):
    def grade(body):
        text = body["messages"][1]["content"]
        number = int(text.split("first of ")[1].split("\n")[0])
        # The later a question, the sooner its grade.
        return slow(0.02 * (5 - number), says(f"[[{number + (5 if 'second of' in text else 1)}]]"))

    server.by_body = grade
    judged = judge(
        answered(5),
        config(server, concurrency=10),
        tmp_path,
    )
    assert scores(judged) == [1, 5, 2, 6, 3, 7, 4, 8, 5, 9]


def test_so_many_requests_run_at_a_time_and_no_more(server, tmp_path):
    together = threading.Barrier(3)

    def act(handler):
        together.wait(60)
        says("[[7]]")(handler)

    server.always = act
    judge(answered(6), config(server, concurrency=3), tmp_path)
    assert server.most_at_once == 3


PASSING = {
    "busy": status(429),
    "server error": status(500),
    "gateway": status(503, "<html>no</html>"),
    "not JSON": raw(b"<html>login</html>"),
    "half of JSON": raw(b'{"choices": [{"mess'),
    "no choice": raw(b'{"choices": []}'),
    "an error with status 200": raw(b'{"error": {"message": "overloaded"}}'),
    "content of another type": says(None, message={"content": [1]}),
    "not UTF-8": raw(b"\xff\xfe\xfd"),
    "cut": cut,
    "hung up": hang_up,
}


@pytest.mark.parametrize("failure", PASSING)
def test_what_passes_is_tried_again(server, tmp_path, failure):
    server.script = [PASSING[failure], PASSING[failure]]
    judged = judge(answered(), config(server), tmp_path)
    assert scores(judged) == [7.0, 7.0]
    assert len(server.bodies) == 4
    assert judged.counts(config(server))["retried"] == 2


def silent(handler, released):
    released.wait(60)


def trickle(handler, released):
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    while not released.wait(0.05):
        handler.wfile.write(b" ")
        handler.wfile.flush()


@pytest.mark.parametrize("never", [silent, trickle])
def test_an_answer_that_does_not_end_is_given_up_and_asked_for_again(server, tmp_path, never):
    released = threading.Event()
    server.script = [lambda handler: never(handler, released)] * 2
    # Many tries, since on a busy machine a good answer may be late too.
    judged = judge(answered(), config(server, timeout=0.5, retries=100), tmp_path)
    released.set()
    assert scores(judged) == [7.0, 7.0]
    assert judged.retried == len(server.bodies) - 2 >= 2


def test_it_is_asked_again_as_late_as_the_endpoint_wants(server, tmp_path):
    server.script = [status(429, Retry_After="0.5")]
    judge(answered(), config(server), tmp_path)
    assert server.times[1] - server.times[0] >= 0.5


@pytest.mark.parametrize("header", ["soon", "nan", "-3"])
def test_a_retry_after_without_sense_does_no_harm(server, tmp_path, header):
    server.script = [status(429, Retry_After=header)]
    assert scores(judge(answered(), config(server), tmp_path)) == [7.0, 7.0]


def test_a_wait_of_days_is_an_error(server, tmp_path):
    server.always = status(429, Retry_After="100000")
    with pytest.raises(JudgeError, match=r"tries: 1\): status 429 \(busy\)"):
        judge(answered(), config(server), tmp_path)


@pytest.mark.parametrize(
    ("code", "text", "advice"),
    [
        (401, "bad key", "no key was sent: OPENAI_API_KEY is unset"),
        (404, "no such model", "check `judge.url`, `judge.model`"),
        (400, "max_tokens is unknown", "`judge.request`"),
        (429, '{"error": {"code": "insufficient_quota"}}', "insufficient_quota"),
        (302, "elsewhere", "status 302"),
    ],
)
def test_what_does_not_pass_is_an_error_at_once(server, tmp_path, code, text, advice):
    server.always = status(code, text, Location="http://127.0.0.1:1/")
    with pytest.raises(ConfigError) as error:
        judge(answered(4), config(server), tmp_path)
    assert text in str(error.value)
    assert advice in str(error.value)
    assert len(server.bodies) == 1


def test_an_endpoint_that_is_down_ends_it_after_the_tries_of_one_round(tmp_path, server):
    gone = dataclasses.replace(config(server), url="http://127.0.0.1:9/v1")
    with pytest.raises(
        JudgeError, match=r"^of 200 judgements 0 were .* 3 failed.*tries: 4\): ConnectError"
    ):
        judge(answered(100), gone, tmp_path)


def test_what_was_judged_beside_a_failure_is_kept(server, tmp_path):
    def act(body):
        bad = "first of 1\n" in body["messages"][1]["content"]
        return status(500, "out of order") if bad else says("[[7]]")

    server.by_body = act
    some = config(server, retries=1, concurrency=8)
    with pytest.raises(JudgeError, match=r"of 6 judgements 4 were made.* 2 failed.*out of order"):
        judge(answered(3), some, tmp_path)
    server.by_body = None
    server.bodies.clear()
    judged = judge(answered(3), some, tmp_path)
    assert scores(judged) == [7.0] * 6
    assert len(server.bodies) == 2


def test_failures_here_and_there_do_not_end_it(server, tmp_path):
    server.script = [status(500), says("[[7]]")] * 6
    with pytest.raises(JudgeError, match=r"of 12 judgements 6 were made.* 6 failed"):
        judge(answered(6), config(server, retries=0), tmp_path)
    assert len(server.bodies) == 12


UNRATED = {
    "I cannot judge this.": "no rating",
    "": "no rating",
    "[[0]]": "out of range",
    "[[11]]": "out of range",
    "Rating: [[1000000]]": "out of range",
    "[[ten]]": "no rating",
}


@pytest.mark.parametrize("text", UNRATED)
def test_a_judgement_without_a_grade_is_counted_and_not_asked_again(server, tmp_path, text):
    server.script = [says(text), says("[[4]]")]
    judged = judge(answered(), config(server), tmp_path)
    assert scores(judged) == [None, 4.0]
    assert statuses(judged) == [UNRATED[text], "rated"]
    assert judged.counts(config(server))["unrated"] == {UNRATED[text]: 1}
    assert scores(judge(answered(), config(server), tmp_path)) == [None, 4.0]
    assert len(server.bodies) == 2


def test_the_endpoints_own_refusals_are_told_apart(server, tmp_path):
    server.script = [
        says(None, message={"refusal": "I must not, [[5]] or not."}),
        says("[[5]]", finish_reason="content_filter"),
        says("The answer begins well and", finish_reason="length"),
        says("[[6]] and then some", finish_reason="length"),
    ]
    judged = judge(answered(2), config(server), tmp_path)
    assert statuses(judged) == ["declined", "declined", "cut off", "rated"]
    assert scores(judged) == [None, None, None, 6.0]


def test_a_kept_judgement_makes_no_request(server, tmp_path):
    first = judge(answered(2), config(server), tmp_path)
    assert len(server.bodies) == 4
    again = judge(answered(2), config(server), tmp_path)
    assert len(server.bodies) == 4
    assert again.judgements == first.judgements
    assert (first.asked, again.asked) == (4, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"temperature": 0.5},
        {"max_tokens": 7},
        {"request": {"seed": 1}},
        {"prompts": "changed"},
    ],
)
def test_another_request_is_another_judgement(server, tmp_path, change):
    judge(answered(), config(server), tmp_path / "kept")
    if "prompts" in change:
        change = {"prompts": str(write_prompts(tmp_path))}
    judge(answered(), dataclasses.replace(config(server), **change), tmp_path / "kept")
    assert len(server.bodies) == 4
    judge(answered(), config(server), tmp_path / "kept")
    assert len(server.bodies) == 4  # both are kept


def write_prompts(folder):
    rows = []
    for name in ("single-v1", "single-math-v1"):
        for turns in ("", "-multi-turn"):
            fields = ["question_1", "answer_1", "question_2", "answer_2"]
            fields = fields if turns else ["question", "answer"]
            if "math" in name:
                fields += ["ref_answer_1", "ref_answer_2"] if turns else ["ref_answer_1"]
            template = " ".join(f"{{{field}}}" for field in fields)
            rows.append(
                {
                    "name": name + turns,
                    "system_prompt": "s",
                    "prompt_template": template,
                    "output_format": "[[rating]]",
                }
            )
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_another_answer_is_judged_anew(server, tmp_path):
    judge(answered(), config(server), tmp_path)
    other = dataclasses.replace(answered()[0], answers=("answer one of 0", "changed"))
    judge([other], config(server), tmp_path)
    assert len(server.bodies) == 3  # the first turn is the same


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"url": 1}', "\x00"])
def test_a_damaged_judgement_is_asked_for_again(server, tmp_path, damage):
    judge(answered(), config(server), tmp_path)
    file = next(tmp_path.glob("*.json"))
    file.write_text(damage)
    assert scores(judge(answered(), config(server), tmp_path)) == [7.0, 7.0]
    assert len(server.bodies) == 3


def test_tokens_and_cost_are_of_all_judgements_kept_ones_too(server, tmp_path):
    priced = config(server, price_in=2.0, price_out=10.0)
    expected = {"judgements": 4, "tokens_in": 400, "tokens_out": 40, "cost": 0.0012}
    for asked in (4, 0):
        counts = judge(answered(2), priced, tmp_path).counts(priced)
        assert counts["asked_now"] == asked
        assert {name: counts[name] for name in expected} == pytest.approx(expected)
    assert judge(answered(2), config(server), tmp_path).counts(config(server))["cost"] is None


def test_a_cost_is_not_made_up_where_tokens_are_not_counted(server, tmp_path):
    priced = config(server, price_in=2.0, price_out=10.0)
    server.script = [says("[[7]]", usage={}), says("[[7]]", usage={"prompt_tokens": "many"})]
    counts = judge(answered(2), priced, tmp_path).counts(priced)
    assert counts["without_token_counts"] == 2
    assert (counts["tokens_in"], counts["cost"]) == (200, None)


def everything_in(folder):
    return "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "MY_KEY"])
def test_the_key_is_sent_and_is_nowhere_else(server, tmp_path, monkeypatch, caplog, capfd, name):
    monkeypatch.setenv(name, f" {KEY}\n")
    caplog.set_level(logging.DEBUG)
    keyed = config(server, key_variable=name)
    server.script = [says(f"Your header says Bearer {KEY}, so [[5]]"), status(500, f"at {KEY}")]
    judged = judge(answered(), keyed, tmp_path)
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert scores(judged) == [5.0, 7.0]
    server.always = status(401, f'{{"error": "incorrect key {KEY}"}}')
    messages = []
    for failing in (status(401, f"incorrect {KEY}"), status(503, f"at {KEY}"), cut):
        server.always = failing
        with pytest.raises((ConfigError, JudgeError)) as error:
            judge(answered(3), keyed, tmp_path)
        messages += [str(error.getrepr()), str(error.value), repr(error.value)]
    assert any("[key]" in message for message in messages)
    seen = [everything_in(tmp_path), caplog.text, "".join(capfd.readouterr()), *messages]
    seen += [repr(judged), repr(keyed), repr(endpoint.Endpoint(keyed, None, KEY))]
    assert all(KEY not in text for text in seen)
    assert all(name not in path.name for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("key", ["sk-\x07secret", "sk-sécret-secret", "two secret words"])
def test_a_key_that_no_header_carries_is_refused_unseen(server, tmp_path, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigError, match="the key in OPENAI_API_KEY has characters") as error:
        judge(answered(), config(server), tmp_path)
    assert "cret" not in str(error.value)
    assert server.bodies == []


def test_a_key_does_not_travel_unencrypted(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    far = JudgeConfig(url="http://judge.example/v1", model="grader")
    with pytest.raises(ConfigError, match="would travel unencrypted"):
        endpoint.read_key(far)
    assert endpoint.read_key(dataclasses.replace(far, key_variable=None)) is None
    assert endpoint.read_key(dataclasses.replace(far, url="https://judge.example/v1")) == KEY


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("[::1]", True),
        ("127.0.0.1.example", False),
        ("localhost.example", False),
        ("10.0.0.1", False),
        ("[::2]", False),
    ],
)
def test_which_hosts_are_this_machine(host, local):
    assert is_local(f"http://{host}:8000/v1") is local


def test_a_key_with_a_slash_is_found_where_json_has_escaped_it(server, tmp_path, monkeypatch):
    key = 'sk/test/"x"/d41d8cd98f'
    monkeypatch.setenv("OPENAI_API_KEY", key)
    escaped = json.dumps({"choices": [{"message": {"content": f"{key} [[5]]"}}]})
    server.script = [raw(escaped.replace("/", r"\/").encode())]
    by_number = "".join(f"\\u{ord(character):04x}" for character in key)
    server.script.append(raw(escaped.replace(json.dumps(key)[1:-1], by_number).encode()))
    judged = judge(answered(), config(server), tmp_path)
    assert [each.reply.text for each in judged.judgements[0]] == ["[key] [[5]]"] * 2
    server.always = status(400, json.dumps(key).replace("/", r"\/"))
    with pytest.raises(ConfigError, match=r'"\[key\]"'):
        judge(answered(2), config(server), tmp_path)


def test_no_proxy_stands_before_this_machine(server, tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert scores(judge(answered(), config(server), tmp_path)) == [7.0, 7.0]


def test_half_of_a_surrogate_pair_can_be_kept(server, tmp_path):
    server.script = [says("well done \ud83d [[5]]")]
    judged = judge(answered(), config(server), tmp_path)
    assert judged.judgements[0][0].reply.text == "well done ? [[5]]"
    assert judge(answered(), config(server), tmp_path).judgements == judged.judgements


def test_a_filler_of_a_key_is_no_secret(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    server.always = says("EMPTY words. [[2]]")
    judged = judge(answered(), config(server), tmp_path)
    assert judged.judgements[0][0].reply.text == "EMPTY words. [[2]]"


def test_it_runs_inside_an_event_loop(server, tmp_path):
    async def notebook():
        return judge(answered(), config(server), tmp_path)

    assert scores(asyncio.run(notebook())) == [7.0, 7.0]


JOB = """
import sys
from tlora.scoring.mtbench.config import JudgeConfig
from tlora.scoring.mtbench.judging import Answered, judge
from tlora.scoring.mtbench.questions import Question
answered = [Answered(Question(str(n), "writing", (f"q {n}", f"r {n}")), ("a", "b"))
            for n in range(20)]
config = JudgeConfig(url=sys.argv[1], model="grader", concurrency=2)
print(len(judge(answered, config, sys.argv[2]).judgements))
"""


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_after_a_kill_only_the_rest_is_asked(server, tmp_path, stop):
    killed = threading.Event()
    server.script = [says("[[7]]")] * 10 + [lambda handler: silent(handler, killed)] * 2
    command = [sys.executable, "-c", JOB, server.url, str(tmp_path)]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ)
    while len(server.bodies) < 12:
        time.sleep(0.01)
        assert job.poll() is None
    job.send_signal(stop)
    job.communicate()
    killed.set()
    kept = len(list(tmp_path.glob("*.json")))
    assert 0 < kept < 40
    assert list(tmp_path.glob("*.json")) == list(tmp_path.glob("[!.]*"))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "20"
    assert len(server.bodies) - 12 == 40 - kept
