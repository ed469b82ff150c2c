"""`tlora chat`: what is asked of the model, what is shown, and how a conversation goes."""

from __future__ import annotations

import builtins
import io
import json

import peft
import pytest
import torch
import transformers

from tlora import cli
from tlora.chat import chat
from tlora.chat.chatconfig import ChatConfig
from tlora.chat.partners import Stream
from tlora.errors import ConfigError, DataError
from tlora.tasks import tokens
from tlora.tasks.base import INSTRUCTION_PROMPT
from tlora.tasks.dataconfig import DataConfig
from tlora.training import train

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }} so\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
SHORT = {"max_steps": 1, "save_strategy": "no"}


@pytest.fixture(scope="module")
def made(config_in, tmp_path_factory):
    """Return a function that trains a step in a format, once."""
    folder, runs = tmp_path_factory.mktemp("chat"), {}
    (folder / "template.jinja").write_text(TEMPLATE)

    def run(style, **data):
        if style not in runs:
            template = str(folder / "template.jinja") if style == "chat" else None
            fields = DataConfig(format=style, chat_template=template, **data)
            runs[style] = train.run(config_in(folder / style, data=fields, trainer=SHORT))
        return runs[style]

    return run


def partner(path, **fields):
    """Load whom to talk to; return it with a list that gets the prompts that it reads."""
    found = chat.make_partner(ChatConfig(path=str(path), max_new_tokens=3, **fields))
    prompts, generate = [], found.model.generate

    def watched(**call):
        prompts.append(found.tokenizer.decode(call["input_ids"][0]))
        found.calls = call
        return generate(**call)

    found.model.generate = watched
    return found, prompts


def said(found, text):
    pieces = []
    found.answer(text, pieces.append)
    return "".join(pieces)


def test_one_prompt_is_answered_greedily_and_nothing_else_is_printed(made, capsys):
    run = made("alpaca")
    capsys.readouterr()
    argv = ["chat", str(run.path), "--prompt", "3+4?", "--max_new_tokens", "6"]
    assert cli.main(argv) == 0
    model = peft.AutoPeftModelForCausalLM.from_pretrained(run.adapter).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.adapter)
    ids = tokens.prompt_ids(tokenizer, INSTRUCTION_PROMPT.format(instruction="3+4?"))
    reply = []
    for _ in range(6):
        with torch.no_grad():
            reply.append(model(torch.tensor([[*ids, *reply]])).logits[0, -1].argmax().item())
        if reply[-1] == tokenizer.eos_token_id:
            break
    text = tokenizer.decode(reply, skip_special_tokens=True).strip()
    assert capsys.readouterr().out == f"{text}\n"


def test_a_chat_remembers_until_it_is_cleared(made):
    found, prompts = partner(made("chat", system="Be brief.").path)
    first = said(found, "3+4?")
    said(found, "and 5?")
    found.clear()
    said(found, "6+1?")
    start = "s: Be brief. so\nu: 3+4? so\n"
    assert prompts == [
        f"{start}a:",
        f"{start}a: {first.strip()} so\nu: and 5? so\na:",
        "s: Be brief. so\nu: 6+1? so\na:",
    ]


def test_the_oldest_turns_fall_off_when_the_model_is_full(made, monkeypatch):
    found, prompts = partner(made("chat").path)
    longest = len(found._prompt("3+4?")[1]) + 3
    found.clear()
    monkeypatch.setattr(found, "_longest", lambda: longest)
    for text in ("3+4?", "4+5?"):
        said(found, text)
    assert prompts[1] == prompts[0].replace("3+4?", "4+5?")


def test_a_text_that_does_not_fit_is_forgotten(made, monkeypatch):
    found, prompts = partner(made("chat").path)
    longest = len(found._prompt("3+4?")[1]) + 3
    monkeypatch.setattr(found, "_longest", lambda: longest)
    with pytest.raises(DataError, match=r"the model has room for \d+ including the reply"):
        said(found, "3+4? " * 40)
    said(found, "3+4?")
    assert len(prompts) == 1
    assert prompts[0].count("3+4?") == prompts[0].count("u: ") == 1


def test_a_reply_ends_where_the_model_is_full(made, monkeypatch):
    found, _ = partner(made("raw").path)
    longest = len(found._prompt("3+4?")[1]) + 2
    monkeypatch.setattr(found, "_longest", lambda: longest)
    said(found, "3+4?")
    assert found.calls["max_new_tokens"] == 2


@pytest.mark.parametrize("style", ["alpaca", "raw"])
def test_instructions_are_asked_one_by_one(made, style):
    found, prompts = partner(made(style).path)
    said(found, "3+4?")
    said(found, "4+5?")
    form = {"alpaca": INSTRUCTION_PROMPT, "raw": "{instruction}"}[style]
    assert [text.removeprefix("<s>").strip() for text in prompts] == [
        found.tokenizer.decode(found.tokenizer(form.format(instruction=text))["input_ids"]).strip()
        for text in ("3+4?", "4+5?")
    ]


def test_a_prompt_template_of_one_column_is_filled(made):
    found, prompts = partner(made("raw").path)
    found._template = "Q: {question} A:"
    said(found, "3+4?")
    assert prompts[0].endswith("Q: 3+4? A:")


def test_the_system_message_and_the_format_can_be_given(made):
    found, prompts = partner(made("chat").path, system="Add.", format="raw")
    said(found, "3+4?")
    assert prompts[0].split("\n")[-1] == "3+4?" and "Add." in prompts[0]


def test_a_temperature_draws_and_its_seed_repeats(made):
    replies = []
    for seed in (1, 1, 2):
        found, _ = partner(made("raw").path, temperature=5.0, seed=seed)
        replies.append([said(found, f"{n}+4?") for n in range(4)])
        assert found.calls["do_sample"] and found.calls["temperature"] == 5.0
    assert replies[0] == replies[1] != replies[2]


class Words:
    """A tokenizer that a stream never asks."""


@pytest.mark.parametrize(
    ("pieces", "reply"),
    [
        (["  Hel", "lo", " wor", "ld "], "Hello world"),
        (["Yes <|im", "_e", "nd|>\nuser"], "Yes"),
        (["Yes <|im", "ported|> "], "Yes <|imported|>"),
        (["<|im_end|>"], ""),
    ],
)
def test_a_stream_shows_pieces_and_never_what_ends_a_reply(pieces, reply):
    shown = []
    stream = Stream(Words(), shown.append, ["<|im_end|>"])
    for piece in pieces:
        stream.on_finalized_text(piece)
        assert reply.startswith("".join(shown))
    stream.on_finalized_text("", stream_end=True)
    assert "".join(shown) == stream.reply == reply


def test_what_ends_a_turn_ends_a_reply(made):
    found, _ = partner(made("chat").path)
    said(found, "3+4?")
    assert found.calls["stop_strings"] == ["so"]


class Echo:
    """Repeats what it is told."""

    says = "it repeats."
    heard: list[str]

    def __init__(self):
        self.heard = []

    def answer(self, text, show):
        self.heard.append(text)
        if text == "stop":
            raise KeyboardInterrupt
        show(text)

    def clear(self):
        self.heard.clear()


def talked(lines):
    shown, echo = [], Echo()
    chat.talk(echo, iter(lines), shown.append)
    return echo.heard, "".join(shown)


def test_commands_are_none_of_the_conversation():
    assert talked(["one", "", "/help", "two"]) == (["one", "two"], "one\ntwo\n")
    assert talked(["one", "/clear", "two", "/exit", "three"])[0] == ["two"]


def test_ctrl_c_and_the_end_of_input_leave_cleanly(made, monkeypatch, capsys):
    assert talked(["one", "stop", "two"])[0] == ["one", "stop"]

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for end in (EOFError, KeyboardInterrupt):
        texts = iter(["3+4?"])

        def typed(_, texts=texts, end=end):
            for text in texts:
                return text
            raise end

        monkeypatch.setattr(builtins, "input", typed)
        monkeypatch.setattr("sys.stdin", Terminal())
        assert cli.main(["chat", str(made("raw").path), "--max_new_tokens", "2"]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_a_line_that_is_no_text_is_not_the_last_one(monkeypatch, caplog):
    typed = iter([UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "two", EOFError()])

    def read(_):
        line = next(typed)
        if isinstance(line, Exception):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", read)
    assert [*chat._lines()] == ["two"]
    assert "the input is not valid utf-8" in caplog.text


def test_what_is_piped_in_is_one_prompt(made, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("3+4?\n4+5?\n"))
    argv = ["chat", str(made("raw").path), "--max_new_tokens", "4"]
    assert cli.main(argv) == 0
    piped = capsys.readouterr().out.splitlines()[-1] + "\n"
    assert cli.main([*argv, "--prompt", "3+4?\n4+5?"]) == 0
    assert capsys.readouterr().out == piped
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    assert cli.main(argv) == 2
    assert "the piped input is empty" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    assert cli.main(argv) == 2
    assert "the piped input is not valid utf-8; pipe in text." in capsys.readouterr().err
    assert cli.main([*argv, "--prompt", " "]) == 2
    assert "`prompt` is empty" in capsys.readouterr().err


def test_a_base_answers_too_and_a_chat_needs_a_template(llama_folder, made):
    found, prompts = partner(llama_folder)
    said(found, "3+4?")
    assert found.style == "raw" and prompts[0].endswith("3+4?")
    with pytest.raises(ConfigError, match=r"no chat template; give --chat_template chatml"):
        partner(llama_folder, format="chat")
    asked, _ = partner(made("raw").adapter, base=llama_folder, chat_template="chatml")
    assert asked.style == "raw"  # as it was trained


def test_a_long_prompt_is_a_sentence_and_the_talk_goes_on(made, caplog, monkeypatch):
    found, prompts = partner(made("raw").path)
    monkeypatch.setattr(found, "_longest", lambda: 8)
    chat.talk(found, iter(["so " * 900, "3?"]), lambda text: None)
    assert "the model has room for 8 including the reply" in caplog.text
    assert not found.tokenizer.deprecation_warnings  # where it notes that it warned
    assert len(prompts) == 1


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_classifier_says_the_label_and_its_probability(
    config_in, saved, tiny_bert_classifier, tmp_path, kind, capsys
):
    label = ["bad", "good", "fair"] if kind == "classification" else [0.5, 1.5, 2.5]
    rows = [{"text": f"so {n}", "label": label[n % 3]} for n in range(12)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(kind=kind, text_column="text", label_column="label")
    model = saved(tiny_bert_classifier())
    run = train.run(
        config_in(
            tmp_path / "run",
            model=model,
            train_file=str(file),
            data=data,
            trainer=SHORT,
            adapter={"r": 2},
        )
    )
    assert cli.main(["chat", str(run.path), "--prompt", "so 4"]) == 0
    head = {"num_labels": 3} if kind == "classification" else {"num_labels": 1}
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        run.adapter, ignore_mismatched_sizes=True, **head
    ).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(model)("so 4", return_tensors="pt")
    with torch.no_grad():
        logits = loaded(**inputs).logits[0]
    shown = capsys.readouterr().out.splitlines()[-1]
    if kind == "regression":
        assert float(shown) == pytest.approx(logits.item(), rel=1e-4)
    else:
        best = int(logits.argmax())
        share = logits.softmax(0)[best].item()
        assert shown == f"{sorted(label)[best]} ({share:.1%})"


def test_text_to_text_answers_what_it_reads(config_in, saved, tiny_t5, tmp_path):
    fields = {"model": saved(tiny_t5()), "data": DataConfig(kind="seq2seq"), "trainer": SHORT}
    run = train.run(config_in(tmp_path / "run", adapter={"r": 2}, **fields))
    found, prompts = partner(run.path)
    reply = said(found, "3+4?")
    model = peft.AutoPeftModelForSeq2SeqLM.from_pretrained(run.adapter).eval()
    inputs = found.tokenizer("3+4?", return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0]
    assert reply == found.tokenizer.decode(plain, skip_special_tokens=True).strip()
    assert len(prompts) == 1
