"""What is known of a file before its rows are read is what reading them gives."""

import gzip
import json
import logging
import math
import tracemalloc

import huggingface_hub
import pyarrow
import pytest
from datasets import Dataset
from huggingface_hub.errors import RepositoryNotFoundError
from pyarrow import parquet

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
def test_columns_are_those_of_all_rows(rows, tmp_path):
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


def packed(file, text):
    with pyarrow.output_stream(str(file), compression="zstd") as stream:
        stream.write(text.encode())
    return str(file)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl.zst", '{"text": "one"}\n{"text": "two"}\n'),
        ("rows.csv.zst", "text\none\ntwo\n"),
        ("rows.txt.zst", "one\n\ntwo\n"),
    ],
)
def test_files_packed_by_zstandard_are_read(name, text, tmp_path):
    rows = read_file(packed(tmp_path / name, text))
    assert rows["text"][:] == ["one", "two"]


@pytest.mark.parametrize("fields", [{"text": {"_type": "Value"}}, "text"])
def test_parquet_with_damaged_metadata_is_named(tmp_path, fields):
    described = json.dumps({"info": {"features": fields}})
    table = pyarrow.table({"text": ["one"]}).replace_schema_metadata({"huggingface": described})
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows.parquet: cannot be read as rows"):
        read_file(str(tmp_path / "rows.parquet"))


def test_a_damaged_zstandard_file_is_named(tmp_path):
    for content in (b"no zstandard", None):
        file = tmp_path / "rows.jsonl.zst"
        packed(file, '{"text": "one"}\n' * 1000)
        file.write_bytes(content or file.read_bytes()[:20])
        with pytest.raises(DataError, match=r"rows.jsonl.zst: cannot be read"):
            read_file(str(file))


def test_checking_columns_settles_nothing(tmp_path):
    task = Jsonl(DataConfig())
    task.check_columns(["question", "answer"])
    assert task.data == DataConfig()
    with pytest.raises(ConfigError, match="the column a is not recognized; say which"):
        task.check_columns(["a"])
    flags = r"\(--data.prompt_column promt --data.response_column response\), a chat "
    with pytest.raises(ConfigError, match=rf"{flags}.*Did you mean 'prompt'\?"):
        task.check_columns(["promt", "response"])


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
        ("rows.jsonl", '{"a": 1}\n{"a":\n', "line 2: Expecting value at character 6"),
        ("rows.jsonl", '{"a": 1}\nnull\n', "row 2 is null; make it an object with named columns"),
        ("rows.jsonl", "[1, 2]\n", "row 1 is 1; make it an object with named columns"),
        ("rows.json", '{"a": "b", "a": "c"}', "'a' appears twice in one object"),
        ("rows.jsonl", '{"a": [1]}\n{"a": ["\\ud800"]}\n', r"row 2 has '\\ud800', half of a"),
        ("rows.jsonl", '{"a": "1"}\n{"\\u0000": "1"}\n', r"row 2 has the column '\\x00'; remove"),
        ("rows.csv", "a,b\n1,2,3\n4,5,6\n", r"more fields than the header \(a, b\)"),
        ("rows.csv", "a,b\n1,2\n4,5,6\n", "Expected 2 fields in line 3, saw 3"),
        ("rows.csv", "a\0,b\0\n", "looks like UTF-16"),
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
    with pytest.raises(ConfigError, match="the column a is not recognized; say which"):
        task.check_sources(files, None)
    with pytest.raises(DataError, match=r"no\.csv: there is no such file"):
        task.check_sources(f"{tmp_path}/more.txt", f"{tmp_path}/more.txt,{tmp_path}/no.csv")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (TimeoutError("timed out"), r"the Hub cannot be reached \(timed out\)"),
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


def rows_of(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [*read_file(str(file))]


@pytest.mark.parametrize(
    "values",
    [
        ["2024-01-02", "2024-01-03T04:05:06Z"],
        [2.5, 3],
        [0.12345678901234567, "007", 12345678901234567890123],
        [{"at": None}, {"on": "2024-01-02"}],
        [None, ["", 1, None]],
    ],
)
def test_values_of_json_are_kept_to_the_letter(tmp_path, values):
    rows = [{"a": value, "b": "c"} for value in values]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name, text in (("rows.jsonl", lines), ("rows.json", json.dumps(rows, indent=1))):
        assert repr(rows_of(tmp_path, name, text)) == repr(rows)


def test_numbers_of_json_that_are_not_finite_are_missing(tmp_path):
    text = '{"a": NaN, "b": 1}\n{"a": -Infinity, "b": 1}\n'
    assert [row["a"] for row in rows_of(tmp_path, "rows.jsonl", text)] == [None, None]


@pytest.mark.parametrize(("name", "sep"), [("rows.csv", ","), ("rows.tsv", "\t")])
def test_cells_of_tables_are_kept_to_the_letter(tmp_path, name, sep):
    cells = [["007", "1.50"], ["12345678901234567890123", ""], ["", "True"], ["NA", "2024-01-02"]]
    text = "".join(f"{sep.join(row)}\n" for row in [["a", "b"], *cells])
    found = [[row["a"] or "", row["b"] or ""] for row in rows_of(tmp_path, name, text)]
    assert found == cells


def test_text_begins_behind_the_mark_of_the_encoding(tmp_path):
    rows = rows_of(tmp_path, "rows.txt", b"\xef\xbb\xbfone\r\n \r\ntwo\xe2\x80\xa8three")
    assert rows == [{"text": "one"}, {"text": "two\u2028three"}]


def test_rows_may_differ_late_and_a_list_may_stand_on_one_line(tmp_path):
    row = {"messages": [{"role": "user", "content": "x" * 10_000}], "system": None}
    rows = [row] * 1200 + [row | {"system": "s", "tools": [{"a": 1}]}]
    lines = "".join(json.dumps(each) + "\n" for each in rows)
    assert rows_of(tmp_path, "rows.jsonl", lines)[-1] == rows[-1]
    assert rows_of(tmp_path, "rows.JSONL", json.dumps(rows[-2:])) == [
        row | {"tools": None},
        rows[-1],
    ]


@pytest.mark.parametrize(("values", "said"), [([b"\xff"], "b'"), ([1.5, math.inf], "inf")])
def test_bytes_and_infinite_numbers_are_no_text(tmp_path, values, said):
    Dataset.from_dict({"text": values}).to_parquet(tmp_path / "rows.parquet")
    task = Jsonl(DataConfig())
    raw, _ = task.load(str(tmp_path / "rows.parquet"), None)
    with pytest.raises(DataError, match=f"column 'text' is {said}.*, not text"):
        task.rows(raw, "rows")


def test_a_jsonl_is_read_without_holding_its_text_beside_its_values(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n} " * 400, "completion": str(n)} for n in range(6_000)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read_file(str(file))  # imports
    tracemalloc.start()
    read = read_file(str(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read[-1] == rows[-1]
    # The values once, and a few pieces of 1 MiB.
    assert peak < 1.2 * file.stat().st_size + 4 * 2**20


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('\n{"a":\n"b"}\n', ["b"]),
        ('[{"a": "b"},\n\n {"a": "c"}]', ["b", "c"]),
        ('[{"a": "b"}]\n\n', ["b"]),
        ('{"a": "b"}\n\n{"a": "c"}', ["b", "c"]),
        ('\n\n{"a":\n"b"\n', "line 5: Expecting ',' delimiter"),
        ('{"a": "b"} 1\n{"a": "c"}', "line 1: Extra data at character 12"),
        ('\n{"a": "b"}\n\n{"a": c}', "line 4: Expecting value at character 7"),
        ('[{"a": "b"}]\n[{"a": "b"}]', "row 1 is "),
    ],
)
def test_rows_are_lines_or_one_value_over_several_lines(content, found, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    if isinstance(found, list):
        assert read_file(str(file))["a"] == found
        return
    with pytest.raises(DataError) as error:
        read_file(str(file))
    assert found in str(error.value)
