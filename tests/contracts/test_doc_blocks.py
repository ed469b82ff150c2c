"""The commands, programs and transcripts of README and docs are such that tlora takes them.

A comment above a block says how it is checked beyond that: `<!-- run: base -->` runs it on the base
model that comes with the package, `<!-- from: FILE -->` says which file it quotes.
"""

import ast
import inspect
import itertools
import json
import logging
import re
import shlex
import textwrap
from pathlib import Path

import pytest

import tlora
from tlora import cli
from tlora.checks import choices
from tlora.demo.run import BASE_MODEL, write_rows
from tlora.flags import fields_of
from tlora.registry import METHODS
from tlora.shortnames import short_names
from tlora.training.argumentfields import declared_fields
from tlora.training.kinds import KINDS

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"(?:^<!-- (\w+): (\S+) -->\n)?^( *)```(\w*)\n(.*?)^\3```$", re.M | re.S)


def blocks(text):
    """Yield (mark, argument, language, content) of each fenced block."""
    for mark, argument, _, language, content in FENCE.findall(text):
        yield mark, argument, language, textwrap.dedent(content)


def commands(text):
    """Yield the words of each `tlora` command of a page, in blocks and within sentences."""
    code = [
        content
        for _, argument, language, content in blocks(text)
        if language != "python" and argument != "fault"
    ]
    rest = FENCE.sub("", text)
    code += re.findall(r"(?:^ {4,}\S.*\n)+", rest, re.M)
    lines = [line for each in code for line in each.replace("\\\n", " ").splitlines()]
    lines += [" ".join(each.split()) for each in re.findall(r"`(tlora [^`]+)`", rest)]
    for line in lines:
        found = re.search(r"(?:^|-m )tlora(?:\.cli)? (\w+)( .*)?$", line.strip().removeprefix("$ "))
        if found and found[1] in cli.VERBS:
            yield found[1], shlex.split(found[2] or "", comments=True)


def names_below():
    """Return what may stand below `adapter.` and `trainer.`."""
    found = {name for kind in KINDS.values() for name in declared_fields(kind.arguments)}
    trainer = {f"trainer.{name}" for name in found}
    options = [METHODS.load(name).options for name in METHODS.names()]
    return trainer | {f"adapter.{name}" for each in options for name, _ in fields_of(each)}


BELOW = names_below()
ALWAYS = {"config", "preset", "print_config", "help"}


def faults(verb, words):
    """Return the flags of a command that the verb lacks, and values that they do not take."""
    record = cli.VERBS[verb].record
    fields = dict(fields_of(record))
    known = {*fields, *short_names(record), *ALWAYS, *BELOW}
    found = []
    for word, following in itertools.pairwise([*words, "..."]):
        if not word.startswith("--"):
            continue
        name, equals, value = word[2:].partition("=")
        value = value if equals else following
        if not (name in known or name.partition(".")[0] == "judge"):
            found.append(word)
        listed = choices(fields[name].kind) if name in fields else []
        if listed and value.islower() and not value.startswith("-") and value not in listed:
            found.append(f"{word} {value}")
    return found


@pytest.mark.parametrize("page", TEXTS)
def test_every_flag_of_a_command_is_one_of_its_verb(page):
    for verb, words in commands(TEXTS[page]):
        assert not faults(verb, words), (verb, words)


def test_a_flag_that_is_not_there_is_found():
    ((verb, words),) = commands(
        "```sh\n$ tlora train --modle x --dtype float31 --adapter.r 4\n```\n"
    )
    assert faults(verb, words) == ["--modle", "--dtype float31"]


def calls(program):
    """Yield the name and the call of each public function of tlora in a program."""
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).removeprefix("tlora.")
            if name.partition(".")[0] in tlora.__all__:
                yield name, node


@pytest.mark.parametrize("page", TEXTS)
def test_every_call_in_a_program_fits_the_function(page):
    for _, _, language, content in blocks(TEXTS[page]):
        if language == "python":
            for name, call in calls(content):
                head, _, method = name.partition(".")
                function = getattr(tlora, head)
                function = getattr(function, method) if method else function
                if not any(isinstance(each, ast.Starred) for each in call.args):
                    named = {each.arg: None for each in call.keywords if each.arg}
                    inspect.signature(function).bind(*call.args, **named)


def test_every_quoted_block_stands_in_its_file():
    quoted = 0
    for text in TEXTS.values():
        for mark, file, _, content in blocks(text):
            if mark == "from":
                source = (ROOT / file).read_text(encoding="utf-8")
                indented = [
                    textwrap.indent(content.strip("\n"), " " * depth) for depth in (0, 4, 8, 12)
                ]
                assert any(f"\n{each}\n" in source for each in indented), content
                quoted += 1
    assert quoted > 4


def steady(line):
    """Return a line without what differs from run to run: speeds, times, losses, replies."""
    if re.match(r"step \d|trained \d|\d+-\d+=", line):
        return ""
    return re.sub(r"captured energy.*|\d+ ?s\b", "", line).strip()


@pytest.mark.parametrize("page", ["start.md", "choosing.md"])
def test_transcripts_on_the_base_show_what_the_commands_print(
    page, tmp_path, monkeypatch, capsys, caplog
):
    """Training is cut short; it changes none of the lines that are compared."""
    caplog.set_level(logging.INFO, logger="tlora")
    monkeypatch.chdir(tmp_path)
    write_rows("rows", 0)
    for mark, argument, language, content in blocks(TEXTS[page]):
        if (mark, argument, language) != ("run", "base", "console"):
            continue
        for part in content.split("$ tlora ")[1:]:
            command, *shown = part.replace("BASE", BASE_MODEL).splitlines()
            words = shlex.split(command)
            words += (
                ["--max_steps", "2", "--trainer.use_cpu", "true"] if words[0] == "train" else []
            )
            caplog.clear()
            assert cli.main(words) == 0, capsys.readouterr().err
            said = f"{caplog.text}\n{capsys.readouterr().out}".replace(str(tmp_path), "/path/to")
            for line in filter(None, map(steady, shown)):
                assert line in said, (command, line)


def test_faults_are_said_as_the_page_of_errors_says(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    files = {
        "rows.jsonl": [{"prompt": f"{n}?", "response": "no"} for n in "1234"],
        "other.jsonl": [{"ask": f"{n}?", "say": "no"} for n in "1234"],
    }
    for name, rows in files.items():
        Path(name).write_text("\n".join(map(json.dumps, rows)))
    Path("broken.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "resp\n')
    checked = 0
    for mark, argument, _, content in blocks(TEXTS["faq.md"]):
        for part in content.split("$ tlora ")[1:] if (mark, argument) == ("run", "fault") else ():
            command, _, shown = part.replace("BASE", BASE_MODEL).partition("\n")
            assert cli.main(shlex.split(command)) == 2, command
            assert capsys.readouterr().err.endswith(shown), command
            checked += 1
    assert checked >= 10


def test_the_conversations_of_the_page_are_read_as_it_says(
    tiny_llama, tiny_tokenizer, tmp_path, monkeypatch, caplog
):
    (row,) = re.findall(r'^\{"messages".*$', TEXTS["start.md"], re.M)
    (content,) = (each[3] for each in blocks(TEXTS["start.md"]) if each[:2] == ("run", "chat"))
    command, _, line, *_ = content.splitlines()
    monkeypatch.chdir(tmp_path)
    Path("chat.jsonl").write_text("\n".join([row] * 8))
    tiny_llama().save_pretrained("CHAT")
    tiny_tokenizer.save_pretrained("CHAT")
    Path("CHAT/chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    caplog.set_level(logging.INFO, logger="tlora")
    words = shlex.split(command.replace("--max_steps 12", "--max_steps 1"))[2:]
    assert cli.main([*words, "--trainer.use_cpu", "true"]) == 0
    assert line in caplog.text


def test_the_defaults_that_pages_name():
    defaults = {name: field.default for name, field in fields_of(cli.VERBS["train"].record)}
    options = {name: field.default for name, field in fields_of(METHODS.load("tlora").options)}
    assert f"| {options['r']} | the default;" in TEXTS["choosing.md"]
    assert options["r"] == options["lora_alpha"]
    samples = defaults["calibration.samples"]
    assert f"{samples} rows of the training file are the default" in TEXTS["choosing.md"]


def test_the_program_with_trl_of_the_first_page_runs(saved, tiny_llama, tmp_path, monkeypatch):
    (program,) = (each[3] for each in blocks(TEXTS["start.md"]) if each[:2] == ("run", "trl"))
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n} and {n} is ", "completion": f"{2 * n}"} for n in range(8)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    program = program.replace("BASE", saved(tiny_llama())).replace(
        "r=8, lora_alpha=8", "r=4, lora_alpha=4"
    )
    names = {}
    exec(compile(program, "start.md", "exec"), names)
    moved = [p for n, p in names["model"].named_parameters() if ".lora_B." in n]
    assert any(p.abs().max() > 0 for p in moved)


def test_the_steps_of_how_it_works_give_an_adapter_that_changes_nothing(
    tiny_llama, tiny_tokenizer, capsys
):
    import torch

    text = TEXTS["how-it-works.md"]
    (program,) = (each[3] for each in blocks(text) if each[:2] == ("run", "model"))
    rows = [{"prompt": f"{n} and {n} is ", "completion": f"{2 * n}"} for n in range(40)]
    ids = {"input_ids": torch.arange(3, 9).reshape(1, -1)}
    names = {"model": tiny_llama(), "tokenizer": tiny_tokenizer, "rows": rows}
    exec(compile(program.replace("=8", "=4"), "how-it-works.md", "exec"), names)
    assert "captured energy" in capsys.readouterr().out
    with torch.no_grad():
        assert torch.equal(names["model"](**ids).logits, tiny_llama()(**ids).logits)
