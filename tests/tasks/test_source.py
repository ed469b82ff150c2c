"""What is known of a file before its rows are read is what reading them gives."""

import gzip
import json
import logging

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from tlora.errors import ConfigError, DataError
from tlora.tasks import source
from tlora.tasks.dataconfig import DataConfig
from tlora.tasks.glue import Sst2
from tlora.tasks.jsonl import Jsonl
from tlora.tasks.source import read_file

ROWS = (
    [{"prompt": "1+1=", "response": "2"}],
    [{"a": 1}, {"a": None, "b": [1]}, {"c": {"d": 1}}],
    [{"text": "a\u2028b"}, {"text": "c", "more": None}],
)


@pytest.mark.parametrize("rows", ROWS)
def test_columns_are_those_that_datasets_reads(rows, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    assert source.columns_of(str(file)) == source.read_file(str(file)).column_names


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", b"a,b\n1,2\n"),
        ("rows.json", b'[{"a": 1}]'),
        ("rows.jsonl", b'{"a": 1}\n{"a": '),
        ("rows.jsonl", b"[1]\n"),
        ("rows.jsonl", b'{"a": "\xe9"}\n'),
        ("rows.jsonl", b"\n"),
        ("rows.jsonl", b'{"a": 1}\n' + b" " * 2**22),
    ],
)
def test_columns_that_only_the_reader_tells_are_left_to_it(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert source.columns_of(str(tmp_path / name)) is None


def test_checking_columns_settles_nothing(tmp_path):
    task = Jsonl(DataConfig())
    task.check_columns(["question", "answer"])
    assert task.data == DataConfig()
    with pytest.raises(ConfigError, match="the rows have the columns a; name the ones"):
        task.check_columns(["a"])


def test_sources_are_checked_together(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    task = Jsonl(DataConfig(prompt_column="q"))
    with pytest.raises(ConfigError) as error:
        task.check_sources(str(tmp_path / "rows.jsonl"), str(tmp_path / "no.csv"))
    missing_column, no_template, gone = error.value.faults
    assert "`data.prompt_column` is 'q'" in missing_column
    assert "`data.response_column` is missing" in no_template
    assert "no.csv: there is no such file" in gone


@pytest.mark.parametrize(
    ("files", "data", "there"),
    [
        (("t", None), {}, False),
        (("t", "e"), {}, True),
        ((None, None), {}, True),
        ((None, None), {"dataset": "d"}, False),
        ((None, None), {"dataset": "d", "eval_split": "s"}, True),
        (("t", None), {"eval_split": "s"}, False),
    ],
)
def test_whether_there_are_evaluation_rows_is_known_before_they_are_read(
    files, data, there, monkeypatch
):
    task = Sst2(DataConfig(**data))
    assert task.evaluates(*files) == there
    monkeypatch.setattr(Sst2, "check_sources", lambda *_: None)
    monkeypatch.setattr(Sst2, "read_file", lambda _, path: path)
    monkeypatch.setattr(source, "read_hub", lambda *names: names)
    assert (task.load(*files)[1] is not None) == there


def test_published_files_of_glue_may_end_in_txt(tmp_path):
    (tmp_path / "rows.txt").write_text("sentence\tlabel\n")
    Sst2(DataConfig()).check_file(str(tmp_path / "rows.txt"))
    with pytest.raises(DataError, match=r"no\.tsv: there is no such file"):
        Sst2(DataConfig()).check_file(str(tmp_path / "no.tsv"))


LATIN = {
    "rows.jsonl": '{"prompt": "a"}\n{"prompt": "é"}\n',
    "rows.json": '[{"prompt": "a"},\n{"prompt": "é"}]',
    "rows.csv": "prompt\né\n",
    "rows.tsv": "prompt\né\n",
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LATIN)
def test_bytes_that_are_not_utf8_are_named_by_their_line(tmp_path, name, packed):
    raw = LATIN[name].encode("latin-1")
    file = tmp_path / (f"{name}.gz" if packed else name)
    file.write_bytes(gzip.compress(raw) if packed else raw)
    with pytest.raises(DataError, match=r"rows.*: line 2 is not UTF-8 \(byte 0xe9\)"):
        read_file(str(file))


def test_a_letter_on_the_border_of_two_pieces_is_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    start = '{"text": "'
    text = "a" * ((1 << 20) - len(start) - 1) + "é"
    file.write_text(f'{start}{text}"}}\n', encoding="utf-8")
    assert read_file(str(file))[0]["text"] == text


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("rows.jsonl", "null\n", "row 1 is null"),
        ("rows.json", "[null, 1]", "row 1 is null"),
        ("rows.jsonl", '{"a": ' + "[" * 3000 + "]" * 3000 + "}", "cannot be read as rows"),
        ("rows.jsonl", '{"a": 1}\n{"a":\n', "line 2: Expecting value at character 7"),
        ("rows.jsonl.gz", "text", "cannot be read"),
    ],
)
def test_rows_that_are_none_are_one_sentence(tmp_path, capsys, caplog, name, text, says):
    file = tmp_path / name
    file.write_text(text)
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match=says):
        read_file(str(file))
    assert not caplog.records
    assert capsys.readouterr().err == ""


def test_every_file_of_several_is_looked_for(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "more.txt").write_text("a line\n")
    task = Jsonl(DataConfig())
    files = f"{tmp_path}/more.txt,{tmp_path}/rows.jsonl:0.5"
    with pytest.raises(ConfigError, match="the rows have the columns a; name the ones"):
        task.check_sources(files, None)
    with pytest.raises(DataError, match=r"no\.csv: there is no such file"):
        task.check_sources(f"{tmp_path}/more.txt", f"{tmp_path}/more.txt,{tmp_path}/no.csv")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (TimeoutError("timed out"), r"the Hub cannot be asked \(timed out\)"),
        (RepositoryNotFoundError.__new__(RepositoryNotFoundError), "no dataset of this name"),
    ],
)
def test_a_dataset_that_cannot_be_had_is_asked_for_once(monkeypatch, error, says):
    asked = []

    def answer(url, **_):
        asked.append(url)
        raise error

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answer)
    with pytest.raises(DataError, match=f"no folder 'no/such', and .*{says}"):
        source.read_hub("no/such", None, "train")
    assert ["/datasets/no/such/" in url for url in asked] == [True]
