"""The table of docs/serving.md is what the readers' rules say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tlora.adapter.saved import read_lora
from tlora.exporters import export
from tlora.exporters.exportconfig import ExportConfig
from tlora.exporters.readers import READERS, Reading, reading
from tlora.exporters.servers import SERVERS, Artifact

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
FORMATS = ("native", "compact", "uniform")


def table(heading: str) -> list[list[str]]:
    """Return the cells of the rows of the table below a heading."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def word(found: Reading) -> str:
    if found.refused:
        return "refused"
    return "exact" if found.exact else "wrong"


@pytest.fixture(scope="module")
def folders(varied, tmp_path_factory):
    """The adapter in each format, uniform for TGI too."""
    made = {}
    for form, server in [*((form, None) for form in FORMATS), ("uniform", "tgi")]:
        folder = tmp_path_factory.mktemp("formats") / form
        path, out = str(varied.adapter), str(folder)
        export.run(ExportConfig(path=path, output_dir=out, format=form, server=server))
        made[server or form] = read_lora(folder)
    return made


def test_the_table_has_every_reader_and_says_what_its_rule_gives(folders):
    rows = {row[0]: row[1:4] for row in table("Formats and readers")}
    assert [*rows][: len(READERS)] == [reader.title for reader in READERS]
    for reader in READERS:
        found = [word(reading(reader, folders[form])) for form in FORMATS]
        if rows[reader.title][2] == "exact (`--for tgi`)":
            assert found[2] == "wrong"
            assert reading(reader, folders["tgi"]).exact
            found[2] = "exact (`--for tgi`)"
        assert rows[reader.title] == found, reader.title


def test_the_table_of_servers_has_the_formats_and_the_printed_lines():
    rows = {row[0].strip("`"): row[1:] for row in table("Servers")}
    assert [*rows] == [*SERVERS]
    for name, (form, line) in rows.items():
        assert form == SERVERS[name].formats[0]
        made = SERVERS[name].command(Artifact("served", "name", "BASE", 64, merged=False))
        assert line.strip("`") == made
