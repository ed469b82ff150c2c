"""The rules of layering and size, read from the source itself."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
FILES = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))

MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 50

Rule = Callable[[str, ast.Module, str], Iterator[str]]
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def imported(path: str, tree: ast.Module) -> Iterator[str]:
    """Yield the full name of everything imported, anywhere; relative ones are resolved.

    "from a.b import c" gives both a.b and a.b.c, since c may be a module.
    """
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            home = ".".join([*parents, *([node.module] if node.module else [])])
            yield home
            yield from (f"{home}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            values = [a.value for a in node.args if isinstance(a, ast.Constant)]
            yield from (value for value in values if isinstance(value, str))


def _called(node: ast.Call) -> str:
    function = node.func
    return getattr(function, "attr", None) or getattr(function, "id", "")


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def linalg_imports_torch_alone(path: str, tree: ast.Module, _: str) -> Iterator[str]:
    if not path.startswith("tlora/linalg/"):
        return
    for name in imported(path, tree):
        top = name.split(".", maxsplit=1)[0]
        # Of torch's builds for CUDA; the one file is imported where a GPU runs its kernel.
        kernels = top == "triton" and path == "tlora/linalg/kernels.py"
        known = top in {"torch", *sys.stdlib_module_names} or within(name, "tlora.linalg")
        if not known and not kernels:
            yield f"imports {name}"


_SCORING = ("tlora.scoring", "tlora.checks", "tlora.errors", "tlora.files", "math_verify", "pebble")
_SCORING += ("openai", "httpx2", "numpy", "tqdm", "rouge_score", "sacrebleu")


def scoring_stands_alone(path: str, tree: ast.Module, _: str) -> Iterator[str]:
    """It looks at texts and programs: no torch, no models."""
    if not path.startswith("tlora/scoring/"):
        return
    for name in imported(path, tree):
        top = name.split(".", maxsplit=1)[0]
        if top not in sys.stdlib_module_names and not any(within(name, it) for it in _SCORING):
            yield f"imports {name}"


LAYERS = (
    ("credentials",),
    ("errors", "extras", "files", "integrity", "registry", "sealed"),
    ("checks", "presets", "shortnames", "yamlfiles"),
    ("config",),
    ("linalg",),
    ("calibration",),
    ("adapter",),
    ("integrations", "methods", "models", "scoring", "tasks"),
    ("evaluations",),
    ("training",),
    ("compare", "evaluate", "exporters"),
    ("chat", "verify"),
    ("report",),
    ("demo",),
    ("verbconfig", "flags", "parsing"),
    ("cli",),
)
"""From the bottom up: a part imports of its own layer and of those below it."""
_HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}


def nothing_imports_upward(path: str, tree: ast.Module, _: str) -> Iterator[str]:
    parts = path.removesuffix(".py").split("/")
    if parts[1] == "__init__":
        return  # public names, loaded when first used
    for name in imported(path, tree):
        _, _, rest = name.partition("tlora.")
        part = rest.split(".")[0]
        if within(name, "tlora") and _HEIGHT.get(part, -1) > _HEIGHT[parts[1]]:
            yield f"imports {name}"


def hooks_are_set_in_calibration_alone(path: str, tree: ast.Module, _: str) -> Iterator[str]:
    # What keeps A frozen is a hook of the adapter itself.
    if path.startswith("tlora/calibration/") or path == "tlora/adapter/freeze.py":
        return
    for node in ast.walk(tree):
        name = getattr(node, "attr", None) or getattr(node, "id", None) or ""
        if re.fullmatch(r"register_\w*hook", str(name)):
            yield f"line {node.lineno}: {name}"


def nothing_imports_the_command_line(path: str, tree: ast.Module, _: str) -> Iterator[str]:
    if path != "tlora/cli.py":
        yield from (n for n in imported(path, tree) if within(n, "tlora.cli"))


def peft_internals_stay_where_they_belong(path: str, tree: ast.Module, _: str) -> Iterator[str]:
    homes = ("tlora/adapter/", "tlora/methods/", "tlora/calibration/targets.py")
    if path.startswith(homes):
        return
    internal = {"tuners", "utils", "mapping", "mapping_func", "peft_model", "config", "helpers"}
    for name in imported(path, tree):
        parts = name.split(".")
        if parts[0] == "peft" and len(parts) > 1 and (parts[1] in internal or parts[1][0] == "_"):
            yield f"imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in internal:
            owner = node.value
            if isinstance(owner, ast.Name) and owner.id == "peft":
                yield f"line {node.lineno}: peft.{node.attr}"


def files_are_short(_: str, __: ast.Module, text: str) -> Iterator[str]:
    if (lines := len(text.splitlines())) > MOST_LINES_OF_A_FILE:
        yield f"{lines} lines"


def functions_are_short(_: str, tree: ast.Module, __: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, _FUNCTIONS):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > MOST_LINES_OF_A_FUNCTION:
                yield f"{node.name} has {lines} lines"


def what_is_public_has_a_docstring(_: str, tree: ast.Module, __: str) -> Iterator[str]:
    if not ast.get_docstring(tree):
        yield "the module"
    yield from _undocumented(tree, "")


def _undocumented(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    for node in parent.body:
        if not isinstance(node, (*_FUNCTIONS, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield f"{prefix}{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from _undocumented(node, f"{prefix}{node.name}.")


RULES: list[Rule] = [
    linalg_imports_torch_alone,
    scoring_stands_alone,
    nothing_imports_upward,
    hooks_are_set_in_calibration_alone,
    nothing_imports_the_command_line,
    peft_internals_stay_where_they_belong,
    files_are_short,
    functions_are_short,
    what_is_public_has_a_docstring,
]


@functools.cache
def parsed(path: str) -> tuple[ast.Module, str]:
    text = (SOURCE / path).read_text(encoding="utf-8")
    return ast.parse(text), text


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_source_file_keeps_the_rule(rule):
    faults = []
    for path in FILES:
        faults += [f"{path}: {fault}" for fault in rule(path, *parsed(path))]
    assert faults == []


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or in a circle."""
    reached = {start: _reached(graph, start) for start in graph}
    groups = {
        tuple(sorted(name for name in found if start in reached[name]))
        for start, found in reached.items()
        if start in found
    }
    return sorted(map(list, groups))


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return found


def test_no_modules_import_each_other_in_a_circle():
    """Imports within functions and for types count too; the package's own names do not."""
    modules = {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in FILES
    }
    graph = {
        name: {
            other
            for other in imported(path, parsed(path)[0])
            if other in modules and other not in (name, "tlora")
        }
        for name, path in modules.items()
        if name != "tlora"
    }
    assert cycles(graph) == []


def test_a_circle_is_seen():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}, "e": {"e"}}) == [
        ["b", "c"],
        ["e"],
    ]


BAD = [
    (linalg_imports_torch_alone, "tlora/linalg/x.py", "from ..files import write_json", 2),
    (linalg_imports_torch_alone, "tlora/linalg/x.py", "def f():\n    import scipy.linalg", 1),
    (scoring_stands_alone, "tlora/scoring/x.py", "def f():\n    import torch", 1),
    (nothing_imports_upward, "tlora/training/x.py", "from tlora.report import svg", 2),
    (nothing_imports_upward, "tlora/tasks/x.py", "if T:\n    import tlora.training.setup", 1),
    (hooks_are_set_in_calibration_alone, "tlora/methods/x.py", "m.register_forward_hook(f)", 1),
    (hooks_are_set_in_calibration_alone, "tlora/x.py", "node.register_prehook(f)", 1),
    (nothing_imports_the_command_line, "tlora/training/x.py", "from .. import cli", 1),
    (nothing_imports_the_command_line, "tlora/x.py", "importlib.import_module('tlora.cli')", 1),
    (peft_internals_stay_where_they_belong, "tlora/training/x.py", "import peft.tuners.lora", 1),
    (peft_internals_stay_where_they_belong, "tlora/training/x.py", "peft.tuners.lora.Linear", 1),
    (files_are_short, "tlora/x.py", "x = 1\n" * 401, 1),
    (functions_are_short, "tlora/x.py", "class A:\n  async def f():\n" + "    x = 1\n" * 50, 1),
    (what_is_public_has_a_docstring, "tlora/x.py", "'''M.'''\nclass A:\n  def f(self): ...", 2),
]
GOOD = [
    (linalg_imports_torch_alone, "tlora/linalg/x.py", "import math\nfrom . import moments"),
    (scoring_stands_alone, "tlora/scoring/x.py", "import re\nimport tlora.errors"),
    (nothing_imports_upward, "tlora/report/x.py", "from tlora.compare import trials"),
    (hooks_are_set_in_calibration_alone, "tlora/calibration/x.py", "m.register_forward_hook(f)"),
    (nothing_imports_the_command_line, "tlora/training/x.py", "import tlora.client"),
    (peft_internals_stay_where_they_belong, "tlora/training/x.py", "from peft import PeftModel"),
    (peft_internals_stay_where_they_belong, "tlora/adapter/x.py", "import peft.tuners"),
    (files_are_short, "tlora/x.py", "x = 1\n" * 400),
    (functions_are_short, "tlora/x.py", "def f():\n" + "    x = 1\n" * 49),
    (what_is_public_has_a_docstring, "tlora/x.py", "'''M.'''\nclass _A:\n  def f(self): ..."),
]


@pytest.mark.parametrize(("rule", "path", "text", "count"), BAD)
def test_the_rule_sees_a_breach(rule, path, text, count):
    assert len(list(rule(path, ast.parse(text), text))) == count


@pytest.mark.parametrize(("rule", "path", "text"), GOOD)
def test_the_rule_lets_the_rest_be(rule, path, text):
    assert list(rule(path, ast.parse(text), text)) == []


def test_importing_the_package_imports_nothing_heavy():
    heavy = ["torch", "transformers", "peft", "numpy", "datasets", "safetensors", "accelerate"]
    code = f"import sys, tlora; print(*[n for n in {heavy} if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.split() == []
