"""Judging against a server on a real socket: broken, busy, refusing."""

import dataclasses
import json
import logging
import threading

import openai
import pytest

import judge_server
from judge_server import cut, hang_up, raw, says, status
from tlora.errors import ConfigError, JudgeError
from tlora.scoring.mtbench import endpoint
from tlora.scoring.mtbench.judgeconfig import JudgeConfig, is_local
from tlora.scoring.mtbench.judging import answer_lines, counts, judge
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
        line
        for n in range(count)
        for line in answer_lines(
            Question(str(n), "writing", (f"first of {n}", f"second of {n}")),
            (f"answer one of {n}", f"answer two of {n}"),
            ("", ""),
        )
    ]


def scores(replies):
    return [reply.score for reply in replies]


def test_a_question_is_two_requests_of_the_protocol(server, tmp_path):
    server.script = [says("Fine. Rating: [[3]]"), says("Better. Rating: [[8.5]]")]
    request = {"seed": 3, "max_tokens": None}
    assert scores(judge(answered(), config(server, request=request), tmp_path)) == [3.0, 8.5]
    for body in server.bodies:
        assert body["path"] == "/v1/chat/completions"
        assert (body["model"], body["temperature"], body["seed"]) == ("grader", 0.0, 3)
        assert "max_tokens" not in body
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
    first, second = (body["messages"][1]["content"] for body in server.bodies)
    texts = ("first of 0", "answer one of 0", "second of 0", "answer two of 0")
    assert [text in first for text in texts] == [True, True, False, False]
    assert all(text in second for text in texts)
    assert all("authorization" not in headers for headers in server.headers)


def test_grades_go_to_their_answers_and_so_many_are_asked_at_a_time(server, tmp_path):
    together = threading.Barrier(3)

    def grade(body):
        text = body["messages"][1]["content"]
        number = int(text.split("first of ")[1].split("\n")[0])
        answer = says(f"[[{number + (5 if 'second of' in text else 1)}]]")

        def act(handler):
            together.wait(60)
            answer(handler)

        return act

    server.by_body = grade
    replies = judge(answered(3), config(server, concurrency=3), tmp_path)
    assert scores(replies) == [1, 5, 2, 6, 3, 7]
    assert server.most_at_once == 3


@pytest.mark.parametrize("failure", [status(429), status(503, "<html>no</html>"), cut, hang_up])
def test_what_passes_is_tried_again(server, tmp_path, failure):
    server.script = [failure, failure]
    assert scores(judge(answered(), config(server), tmp_path)) == [7.0, 7.0]
    assert len(server.bodies) == 4


REFUSED = [
    (status(401, "bad key"), ConfigError, "bad key.*no key was sent: OPENAI_API_KEY is unset"),
    (status(404, "no such model"), ConfigError, "no such model.*check `judge.url`, `judge.model`"),
    (status(302, "on", Location="http://127.0.0.1:1/"), ConfigError, "status 302"),
    (raw(b"<html>login</html>"), JudgeError, "not a chat completion: <html>login</html>"),
    (raw(b'{"choices": []}'), JudgeError, "not a chat completion"),
    (raw(b'{"error": {"message": "overloaded"}}'), JudgeError, "overloaded"),
    (says(None, message={"content": [1]}), JudgeError, "not a chat completion"),
]


@pytest.mark.parametrize(("answer", "error", "said"), REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_pass_is_an_error_at_once(server, tmp_path, answer, error, said):
    server.always = answer
    with pytest.raises(error, match=said):
        judge(answered(4), config(server), tmp_path)
    assert len(server.bodies) <= 2  # one that was under way with it


def test_an_endpoint_that_is_down_is_an_error(tmp_path, server):
    gone = dataclasses.replace(config(server), url="http://127.0.0.1:9/v1")
    with pytest.raises(JudgeError, match=r"^0 of 200 judgments are saved .*ConnectError"):
        judge(answered(100), gone, tmp_path)


def test_what_was_judged_before_a_failure_is_kept(server, tmp_path):
    server.script = [says("[[7]]")] * 3 + [status(500, "out of order")] * 2
    some = config(server, retries=1)
    with pytest.raises(JudgeError, match=r"^[34] of 6 judgments are saved.*out of order"):
        judge(answered(3), some, tmp_path)
    kept = len(list(tmp_path.glob("*.json")))
    server.script = []
    server.bodies.clear()
    assert scores(judge(answered(3), some, tmp_path)) == [7.0] * 6
    assert len(server.bodies) == 6 - kept
    next(tmp_path.glob("*.json")).write_text("{")  # a damaged one is asked for again
    assert scores(judge(answered(3), some, tmp_path)) == [7.0] * 6
    assert len(server.bodies) == 7 - kept


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (says("I cannot judge this."), "no rating"),
        (says(""), "no rating"),
        (says("[[0]]"), "out of range"),
        (says("[[11]]"), "out of range"),
        (says(None, message={"refusal": "I must not, [[5]] or not."}), "declined"),
        (says("[[5]]", finish_reason="content_filter"), "declined"),
        (says("The answer begins well and", finish_reason="length"), "cut off"),
        (says("[[6]] and then some", finish_reason="length"), "rated"),
    ],
)
def test_a_judgment_without_a_grade_is_counted_and_not_asked_again(server, tmp_path, answer, what):
    server.script = [answer]
    replies = judge(answered(), config(server), tmp_path)
    assert scores(replies) == [6.0 if what == "rated" else None, 7.0]
    assert replies[0].status == what
    expected = {"judgments": 2, "tokens_in": 200, "tokens_out": 20}
    unrated = {} if what == "rated" else {what: 1}
    for _ in range(2):
        assert counts(replies) == expected | {"unrated": unrated}
        replies = judge(answered(), config(server), tmp_path)
    assert len(server.bodies) == 2


def test_another_request_is_another_judgment(server, tmp_path):
    plain = config(server)
    judge(answered(), plain, tmp_path)
    changes = ({"model": "other"}, {"temperature": 0.5}, {"request": {"seed": 1}})
    for number, change in enumerate(changes, start=2):
        judge(answered(), dataclasses.replace(plain, **change), tmp_path)
        assert len(server.bodies) == 2 * number
    other = answered()
    other[1]["reply"] = "changed"
    judge(other, plain, tmp_path)
    judge(answered(), plain, tmp_path)
    assert len(server.bodies) == 9  # of the other answer only the second turn; the first is kept


def everything_in(folder):
    return "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "MY_KEY"])
def test_the_key_is_sent_and_is_nowhere_else(server, tmp_path, monkeypatch, caplog, capfd, name):
    monkeypatch.setenv(name, f" {KEY}\n")
    caplog.set_level(logging.DEBUG)
    keyed = config(server, key_variable=name)
    server.script = [says(f"Your header says Bearer {KEY}, so [[5]]"), status(500, f"at {KEY}")]
    replies = judge(answered(), keyed, tmp_path)
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert scores(replies) == [5.0, 7.0]
    messages = []
    for failing in (status(401, f"incorrect {KEY}"), status(503, f"at {KEY}"), cut):
        server.always = failing
        with pytest.raises((ConfigError, JudgeError)) as error:
            judge(answered(3), keyed, tmp_path)
        messages += [str(error.getrepr()), str(error.value), repr(error.value)]
    assert any("[key]" in message for message in messages)
    seen = [everything_in(tmp_path), caplog.text, "".join(capfd.readouterr()), *messages]
    seen += [repr(replies), repr(keyed), repr(endpoint.Endpoint(keyed, None, KEY))]
    assert all(KEY not in text for text in seen)


def test_a_key_with_a_slash_is_found_where_json_has_escaped_it(server, tmp_path, monkeypatch):
    key = 'sk/test/"x"/d41d8cd98f'
    monkeypatch.setenv("OPENAI_API_KEY", key)
    escaped = json.dumps({"choices": [{"message": {"content": f"{key} [[5]]"}}]})
    server.script = [raw(escaped.replace("/", r"\/").encode())]
    by_number = "".join(f"\\u{ord(character):04x}" for character in key)
    server.script.append(raw(escaped.replace(json.dumps(key)[1:-1], by_number).encode()))
    replies = judge(answered(), config(server), tmp_path)
    assert [reply.text for reply in replies] == ["[key] [[5]]"] * 2
    server.always = status(400, json.dumps(key).replace("/", r"\/"))
    with pytest.raises(ConfigError, match=r'"\[key\]"'):
        judge(answered(2), config(server), tmp_path)


@pytest.mark.parametrize("key", ["sk-\x07secret", "sk-sécret-secret", "two secret words"])
def test_a_key_that_no_header_carries_is_refused_unseen(server, tmp_path, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigError, match="the key in OPENAI_API_KEY has characters") as error:
        judge(answered(), config(server), tmp_path)
    assert "cret" not in str(error.value)
    assert server.bodies == []


def test_a_key_does_not_travel_unencrypted(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    far = JudgeConfig(url="http://judge.example/v1", model="grader")
    with pytest.raises(ConfigError, match="would be sent unencrypted"):
        endpoint.read_key(far)
    assert endpoint.read_key(dataclasses.replace(far, key_variable=None)) is None
    assert endpoint.read_key(dataclasses.replace(far, url="https://judge.example/v1")) == KEY
    for host in ("localhost", "127.0.0.1", "127.8.8.8", "[::1]"):
        assert is_local(f"http://{host}:8000/v1")
    for host in ("127.0.0.1.example", "localhost.example", "10.0.0.1", "[::2]"):
        assert not is_local(f"http://{host}:8000/v1")


def test_a_filler_of_a_key_is_no_secret_and_no_proxy_is_asked(server, tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    # Half of a surrogate pair, which a reply that was cut may end in, fits in no file.
    server.always = says("EMPTY words \ud83d [[2]]")
    replies = judge(answered(), config(server), tmp_path)
    assert replies[0].text == "EMPTY words ? [[2]]"
    assert judge(answered(), config(server), tmp_path) == replies
