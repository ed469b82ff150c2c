"""Wrong inputs as data: reading the cases, writing their files, running them, recording sentences.

A file of `bad_inputs/` holds the cases of one area; `Case` describes the fields of a case. `before`
of a file holds for the cases that give none, and `<word>` in a command stands for an entry of its
`commands`. `{dir}` is the folder of the case, which is the working folder too, and `{shared}` the
one with the tiny models, adapters and rows that no case may change.

What a case writes is text, a list of rows (JSONL), or one of the actions of `Bench`: `copy` a
shared file or folder, change `fields` of a JSON file, `cut` it to a number of bytes, and so on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent / "bad_inputs"
STAGES = ("imports", "weights", "computation", "training")
"""What a command must not reach before it refuses, the strictest first."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One wrong input.

    Attributes:
        area: name of the file that holds it.
        name: what is wrong, as an identifier of the test.
        argv: the command, with placeholders.
        says: the whole of standard error, with placeholders, and "{...}" for the words of another
            library.
        before: the stage that is not reached.
        files: what is written into the folder of the case, in this order.
        env: environment variables.
        code: the exit code.
    """

    area: str
    name: str
    argv: str
    says: str = ""
    before: str
    files: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    code: int = 2


def cases() -> list[Case]:
    """Return the cases of all files, their commands written out."""
    return [case for file in sorted(HERE.glob("*.yaml")) for case in _cases_of(file)]


def _cases_of(file: Path) -> Iterator[Case]:
    content = yaml.safe_load(file.read_text("utf-8"))
    for item in content["cases"]:
        argv = item.pop("argv")
        for word, command in content.get("commands", {}).items():
            argv = argv.replace(f"<{word}>", command)
        given = {"before": content.get("before")} | item
        yield Case(area=file.stem, argv=argv, **given)


def matches(case: Case, error: str) -> bool:
    """Return whether a case says an error, but for what stands there as "{...}"."""
    return re.fullmatch(re.escape(case.says).replace(re.escape("{...}"), ".*?"), error) is not None


def record(case: Case, says: str, code: int) -> None:
    """Put what a command said into the file of its case, unless it matches."""
    if matches(case, says):
        return
    file = HERE / f"{case.area}.yaml"
    head, name, rest = file.read_text("utf-8").partition(f"- name: {case.name}\n")
    body, dash, others = rest.partition("\n- name:")
    body = re.sub(r"\n  (says|code): .*", "", body).rstrip("\n")
    body += "\n  code: 1" * (code == 1) + f"\n  says: {json.dumps(says, ensure_ascii=False)}"
    file.write_text(f"{head}{name}{body}{dash or chr(10)}{others}", "utf-8")


@dataclass
class Said:
    """How a command ended.

    Attributes:
        code: the exit code.
        error: standard error, with placeholders for paths.
        reached: stages that it reached.
        changed: files of the case, or shared ones, that are not as before.
    """

    code: int
    error: str
    reached: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


class Bench:
    """Writes the files of cases, each in a folder of its own, beside what all of them share."""

    def __init__(self, shared: Path, folder: Path) -> None:
        self.shared = shared
        self._folder = folder

    def prepared(self, case: Case) -> tuple[Path, list[str]]:
        """Write the files of a case; return its folder and its command."""
        folder = self._folder / f"{case.area}-{case.name}"
        folder.mkdir()
        for name, content in self.filled(case.files, folder).items():
            self._write(folder / name, content)
        return folder, self.filled(shlex.split(case.argv), folder)

    def filled(self, value: Any, folder: Path) -> Any:
        """Put paths in place of placeholders, in texts at any depth."""
        if isinstance(value, str):
            return value.replace("{dir}", str(folder)).replace("{shared}", str(self.shared))
        if isinstance(value, list):
            return [self.filled(item, folder) for item in value]
        if isinstance(value, dict):
            return {k: self.filled(v, folder) for k, v in value.items()}
        return value

    def emptied(self, text: str, folder: Path) -> str:
        """Put placeholders in place of paths."""
        return text.replace(str(folder), "{dir}").replace(str(self.shared), "{shared}")

    def _write(self, path: Path, content: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_bytes(content.encode())
        elif isinstance(content, list):
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            ((action, value),) = content.items()
            getattr(self, f"_{action}")(path, value)

    def _copy(self, path: Path, name: str) -> None:
        source = self.shared / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, path)

    def _json(self, path: Path, value: Any) -> None:
        path.write_text(json.dumps(value))

    def _fields(self, path: Path, fields: dict[str, Any]) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    def _without(self, path: Path, names: list[str]) -> None:
        left = {k: v for k, v in json.loads(path.read_text()).items() if k not in names}
        path.write_text(json.dumps(left))

    def _fifo(self, path: Path, _: Any) -> None:
        os.mkfifo(path)

    def _hex(self, path: Path, digits: str) -> None:
        path.write_bytes(bytes.fromhex(digits))

    def _encoded(self, path: Path, value: dict[str, str]) -> None:
        ((encoding, text),) = value.items()
        path.write_bytes(text.encode(encoding))

    def _repeated(self, path: Path, value: dict[str, int]) -> None:
        path.write_text("".join(text * count for text, count in value.items()))

    def _link(self, path: Path, target: str) -> None:
        path.symlink_to(target)

    def _folder_at(self, path: Path, _: Any) -> None:
        path.mkdir()

    def _removed(self, path: Path, _: Any) -> None:
        path.unlink()

    def _cut(self, path: Path, size: int) -> None:
        path.write_bytes(path.read_bytes()[:size])

    def _flipped(self, path: Path, place: int) -> None:
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)

    def _tensors(self, path: Path, changes: dict[str, str]) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(path)
        for name, change in changes.items():
            tensors |= _changed(name, tensors.pop(name), change)
        save_file(tensors, path, {"format": "pt"})


def _changed(name: str, tensor: Any, change: str) -> dict[str, Any]:
    """Return what a tensor of a file becomes; "as NAME" renames it."""
    if change == "dropped":
        return {}
    if change.startswith("as "):
        return {change.removeprefix("as "): tensor}
    if change.startswith("also "):
        return {name: tensor, change.removeprefix("also "): tensor.clone()}
    import torch

    makers = {
        "nan": lambda: tensor.fill_(float("nan")),
        "inf": lambda: tensor.fill_(float("inf")),
        "int": tensor.int,
        "bool": tensor.bool,
        "float8": lambda: tensor.to(torch.float8_e4m3fn),
        "flat": tensor.flatten,
        "wider": lambda: tensor.repeat(1, 2),
        "taller": lambda: tensor.repeat(2, 1),
        "empty": tensor[:0].clone,
        "scalar": tensor.flatten()[0].clone,
    }
    return {name: makers[change]()}


def contents(folder: Path) -> dict[str, str]:
    """Return by name what each file of a folder holds, to the bit; links are not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"-> {path.readlink()}"
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path)] = "folder" if path.is_dir() else "special"
    return found


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Return the names of what was changed, removed or left."""
    names = before | after
    return [name for name in names if before.get(name) != after.get(name)]


class TooLateError(BaseException):
    """A command went beyond the stage before which it has to refuse."""


def spoken(argv: list[str]) -> tuple[int, str]:
    """Run a command in this process; return its exit code and standard error."""
    from tlora import cli

    error = io.StringIO()
    with redirect_stderr(error), redirect_stdout(io.StringIO()):
        code = cli.main(argv)
    return code, error.getvalue()


def distinct(case: Case) -> str:
    """Return what makes a case another one than all others."""
    given = dataclasses.asdict(case)
    return json.dumps([given[name] for name in ("argv", "files", "env")], sort_keys=True)
