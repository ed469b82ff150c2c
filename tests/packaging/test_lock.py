"""The lock files: what `make` and CI install, with hashes; the audit and the licenses of it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator

import pytest
from environment import PROJECT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ImportError:
    import tomli as tomllib

LOCKS = sorted((PROJECT / "requirements").glob("*.txt"))
TOML = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))


def script(name):
    """Import one of the project's scripts."""
    spec = importlib.util.spec_from_file_location(name, PROJECT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entries(lock) -> Iterator[tuple[Requirement, list[str]]]:
    """Yield each locked requirement with its hashes."""
    text = lock.read_text("utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line and not line.startswith("#"):
            requirement, *hashes = line.split("--hash=")
            yield Requirement(requirement.strip()), [each.strip() for each in hashes]


def names(lock):
    return {canonicalize_name(requirement.name) for requirement, _ in entries(lock)}


def direct(extra=None) -> list[Requirement]:
    """Return what the project asks for, by itself or for an extra, the extra's extras included."""
    project = TOML["project"]
    listed = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    found = [] if extra is None else direct()
    for requirement in map(Requirement, listed):
        if requirement.name == "tlora":
            found += [each for inner in requirement.extras for each in direct(inner)]
        else:
            found.append(requirement)
    return found


WANTED = {"library": direct(), "compare": direct("compare"), "dev": direct("dev")}
WANTED["tools"] = [Requirement(each) for each in TOML["dependency-groups"]["tools"]]


def test_the_lock_files_are_those_that_the_script_writes():
    assert {lock.stem for lock in LOCKS} == set(script("lock").LOCKS) == set(WANTED)


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_every_entry_is_pinned_and_hashed_and_names_no_index(lock):
    found = list(entries(lock))
    for requirement, hashes in found:
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), requirement
    assert not re.search(r"://|--\w*index|--find-links|file:", lock.read_text("utf-8"))
    assert not names(lock) & {"torch", "triton"}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_it_holds_every_direct_dependency_in_its_range(lock):
    locked: dict[str, list[Requirement]] = {}
    for requirement, _ in entries(lock):
        locked.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    for wanted in WANTED[lock.stem]:
        if wanted.name in {"torch", "triton"}:
            continue
        found = locked[canonicalize_name(wanted.name)]
        for each in found:
            (pin,) = each.specifier
            assert wanted.specifier.contains(pin.version, prereleases=True), (wanted, each)


def test_every_locked_version_is_the_same_in_all_files():
    (dev,) = (lock for lock in LOCKS if lock.stem == "dev")
    known = {str(requirement) for requirement, _ in entries(dev)}
    for name in ("library", "compare"):
        (lock,) = (lock for lock in LOCKS if lock.stem == name)
        versions = {(r.name, str(r.specifier)) for r, _ in entries(lock)}
        assert versions <= {(r.name, str(r.specifier)) for r in map(Requirement, known)}


def test_what_we_pin_is_what_is_locked_and_torch_and_triton_are_pinned_apart():
    lines = (PROJECT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    (dev,) = (lock for lock in LOCKS if lock.stem == "dev")
    locked = {(canonicalize_name(r.name), str(r.specifier)) for r, _ in entries(dev)}
    apart = [r for r in pinned if (canonicalize_name(r.name), str(r.specifier)) not in locked]
    assert [requirement.name for requirement in apart] == ["torch", "triton"]


@pytest.mark.parametrize("name", ["library", "compare", "dev"])
def test_the_build_needs_nothing_from_outside(name):
    """`make` builds without isolation, so the lock brings what builds the project."""
    (lock,) = (lock for lock in LOCKS if lock.stem == name)
    for wanted in map(Requirement, TOML["build-system"]["requires"]):
        assert canonicalize_name(wanted.name) in names(lock)


def package(name, *faults):
    return {"name": name, "version": "1.0", "vulns": [dict(f) for f in faults]}


FAULT = {"id": "PYSEC-1", "fix_versions": ["1.1"]}
SKIPPED = {"name": "b", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "failure", "code", "said"),
    [
        ([package("a")], "", 0, "1 packages, 0 known vulnerabilities"),
        ([package("a", FAULT), SKIPPED], "", 1, "a 1.0: PYSEC-1 (fixed in 1.1)"),
        ([SKIPPED], "", 3, "unreachable; nothing was audited (it knows none of the packages)."),
        ([], "no route", 3, "unreachable; nothing was audited (no route)."),
        ([package("a"), SKIPPED], "", 3, "does not know: b."),
        ([package("a")], "no route", 3, "The rest was not audited (no route)."),
    ],
)
def test_an_audit_tells_clean_from_vulnerable_from_unknown(packages, failure, code, said):
    found, lines = script("audit").verdict(packages, failure, "pypi")
    assert found == code
    assert said in "\n".join(lines)


def test_the_audit_is_of_every_locked_version_of_torch_and_of_triton():
    pins = [pin for pinned in script("audit").pins() for pin in pinned]
    for lock in LOCKS:
        assert {f"{r.name}{r.specifier}" for r, _ in entries(lock)} <= set(pins)
    assert {"torch", "triton"} <= {pin.split("==")[0] for pin in pins}


def test_the_licenses_name_every_locked_package_at_its_version():
    report = (PROJECT / "docs" / "licenses.md").read_text("utf-8")
    lines = [line for line in report.splitlines() if line.startswith("| ")][1:]
    rows = {line.split(" | ")[0].strip("| "): line for line in lines}
    for name, requirements in script("licenses").locked().items():
        _, version, license_name = rows.pop(name).strip("|").split("|")
        assert any(each.specifier.contains(version.strip()) for each in requirements) or (
            script("licenses").ELSEWHERE in license_name
        )
        assert license_name.strip()
    assert rows == {}
