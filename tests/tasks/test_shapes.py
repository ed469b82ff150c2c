"""People's rows in one form, whatever their file looks like."""

import json

import pytest

from tlora.errors import ConfigError, DataError
from tlora.tasks.dataconfig import DataConfig
from tlora.tasks.jsonl import Jsonl

CHAT = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.fixture
def load(tmp_path):
    """Return the rows of a file as a model with a chat template gets them."""

    def rows(*raw, template=True, **data):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in raw))
        task = Jsonl(DataConfig(**data))
        task.settle(template, None)
        found, _ = task.load(str(file), None)
        return task.rows(found, "rows.jsonl")

    return rows


@pytest.mark.parametrize(
    ("speakers", "roles"),
    [
        (("system", "human", "gpt"), ("system", "user", "assistant")),
        (("user", "chatgpt"), ("user", "assistant")),
        (("human", "observation", "model"), ("user", "tool", "assistant")),
        (("Human", "Assistant"), ("user", "assistant")),
    ],
)
def test_speakers_have_the_roles_of_chat_templates(load, speakers, roles):
    (row,) = load({"conversations": [{"from": who, "value": "x"} for who in speakers]})
    assert tuple(turn["role"] for turn in row["messages"]) == roles


def test_conversations_may_be_of_role_and_content(load):
    assert load({"conversations": [USER, ASSISTANT]}) == [{"messages": [USER, ASSISTANT]}]


def test_fields_that_only_other_rows_have_are_left_out(load):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    other = {"id": "2", "type": "function", "function": {"name": "g", "arguments": {"y": 2}}}
    rows = [
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [c]}]}
        for c in (call, other)
    ]
    loaded = load(*rows, {"messages": [USER, ASSISTANT]})
    assert [row["messages"][1].get("tool_calls") for row in loaded] == [[call], [other], None]
    assert loaded[2]["messages"] == [USER, ASSISTANT]


@pytest.mark.parametrize("tools", [[{"type": "function", "function": {"name": "f"}}], None, []])
def test_tools_are_a_list_or_its_json(load, tools):
    wanted = {"tools": tools} if tools else {}
    chat = {"messages": [USER, ASSISTANT]}
    assert load(chat | {"tools": tools}) == load(chat | {"tools": json.dumps(tools)})
    assert load(chat | {"tools": tools}) == [chat | wanted]


def test_a_system_message_is_given_to_rows_that_have_none(load):
    said = {"role": "system", "content": "Be brief."}
    own = {"role": "system", "content": "Rhyme."}
    rows = load(
        {"messages": [USER, ASSISTANT]}, {"messages": [own, USER, ASSISTANT]}, system="Be brief."
    )
    assert [row["messages"][0] for row in rows] == [said, own]
    (row,) = load({"instruction": "a", "output": "b"}, system="Be brief.")
    assert row["messages"] == [said, USER, ASSISTANT]
    (row,) = load({"instruction": "a", "output": "b"}, system="Be brief.", template=False)
    assert row["prompt"].startswith("Be brief.\n\nBelow is an instruction")


def test_what_is_not_read_is_named_once(load, caplog):
    row = {"instruction": "a", "output": "b", "input": "", "id": 3, "source": "x"}
    load(row, row)
    assert [r.getMessage() for r in caplog.records if "ignoring" in r.getMessage()] == [
        f"{_file(caplog)}: ignoring unused columns 'id', 'source'."
    ]


def _file(caplog):
    return caplog.records[-1].args[0]


@pytest.mark.parametrize(
    ("row", "template", "data", "wanted"),
    [
        ({"question": "a", "answer": "b"}, True, {}, "chat"),
        ({"question": "a", "answer": "b"}, False, {}, "alpaca"),
        ({"question": "a", "answer": "b"}, True, {"format": "alpaca"}, "alpaca"),
        ({"question": "a", "answer": "b"}, True, {"kind": "seq2seq"}, "raw"),
        ({"prompt": "a", "completion": "b"}, True, {}, "raw"),
        ({"prompt": "a", "completion": "b"}, True, {"format": "chat"}, "chat"),
        ({"text": "a"}, True, {}, "raw"),
        (CHAT, True, {}, "chat"),
        (
            {"q": "a", "r": "b"},
            True,
            {"prompt_template": "Q: {q}", "response_column": "r"},
            "raw",
        ),
        ({"q": "a", "r": "b"}, True, {"prompt_column": "q", "response_column": "r"}, "chat"),
    ],
)
def test_the_format_follows_rows_and_model_unless_it_is_given(
    tmp_path, row, template, data, wanted
):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    task = Jsonl(DataConfig(**data))
    task.settle(template, None)
    raw, _ = task.load(str(file), None)
    assert task.data.format == wanted
    (made,) = task.rows(raw, "rows.jsonl")
    keys = {"chat": {"messages"}, "alpaca": {"prompt", "response"}, "raw": {*made}}[wanted]
    assert {*made} == keys
    assert made.get("prompt", "").startswith("Below is an") == (wanted == "alpaca")


@pytest.mark.parametrize(
    ("row", "data"), [(CHAT, {}), ({"question": "a", "answer": "b"}, {"format": "chat"})]
)
def test_chats_without_a_template_are_refused_before_a_line_says_how_they_are_written(
    load, caplog, row, data
):
    with (
        caplog.at_level("INFO"),
        pytest.raises(DataError, match=r"rows\.jsonl: the model's tokenizer has no chat template"),
    ):
        load(row, template=False, **data)
    assert "read as" not in caplog.text


def test_a_task_with_a_prompt_of_its_own_takes_no_other_format():
    from tlora.tasks.gsm8k import Gsm8k

    with pytest.raises(ConfigError, match=r"is 'chat', but this task has its own prompts"):
        Gsm8k(DataConfig(format="chat"))
    task = Gsm8k(DataConfig())
    task.settle(True, None)
    assert task.data.format == "alpaca"


def test_a_message_shows_the_beginning_of_a_row(load):
    with pytest.raises(DataError) as error:
        load({"messages": [{"role": "narrator", "content": "x" * 5000}]})
    assert len(str(error.value)) < 600


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def called(load, **fields):
    (row,) = load({"messages": [USER, {"role": "assistant", "content": None} | fields]})
    return row["messages"][1]


@pytest.mark.parametrize(("speaker", "says"), [("role", "value"), ("from", "content")])
def test_what_a_turn_says_is_read_by_either_name(load, speaker, says):
    turns = [{speaker: "user", says: "a"}, {speaker: "assistant", says: "b"}]
    assert load({"messages": turns}) == [{"messages": [USER, ASSISTANT]}]


@pytest.mark.parametrize("calls", [[CALL], CALL, json.dumps([CALL]), [CALL["function"]]])
def test_calls_are_a_list_or_its_json(load, calls):
    assert called(load, tool_calls=calls)["tool_calls"] == [CALL]
    assert called(load, function_call=calls)["tool_calls"] == [CALL]
    turn = {"from": "function_call", "value": CALL["function"]}
    (row,) = load({"conversations": [{"from": "human", "value": "a"}, turn]})
    assert row["messages"][1]["tool_calls"] == [CALL]


@pytest.mark.parametrize("arguments", [{}, {"arguments": None}, {"arguments": ""}])
def test_a_call_without_arguments_has_none(load, arguments):
    call = {"function": {"name": "f"} | arguments}
    (found,) = called(load, tool_calls=[call])["tool_calls"]
    assert found["function"] == {"name": "f", "arguments": {}}


def test_a_call_that_is_null_says_nothing(load):
    turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": None}]
    (row,) = load({"conversations": turns})
    assert row["messages"][1] == {"role": "assistant", "content": ""}


def test_lists_are_read_from_the_cells_of_a_table(tmp_path):
    file = tmp_path / "rows.csv"
    turns = json.dumps([USER, ASSISTANT]).replace('"', '""')
    file.write_text(f'messages,tools\n"{turns}",\n"{turns}","[{{""name"": ""f""}}]"\n')
    task = Jsonl(DataConfig())
    plain, tooled = task.rows(task.load(str(file), None)[0], "rows.csv")
    assert plain == {"messages": [USER, ASSISTANT]}
    assert tooled == plain | {"tools": [{"name": "f"}]}


def test_a_column_of_the_system_message_fills_an_empty_one(load):
    turns = [{"role": "system", "content": ""}, USER, ASSISTANT]
    (row,) = load({"conversations": turns, "system": "s"})
    assert row["messages"][0] == {"role": "system", "content": "s"}


def test_an_input_of_zero_is_an_input(load):
    (row,) = load({"instruction": "Is it even?", "input": 0, "output": "yes"}, format="raw")
    assert row["prompt"] == "Is it even?\n\n0"
