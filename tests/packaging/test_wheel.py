"""What is in the wheel: the source with its data, and seven dependencies."""

import configparser
import zipfile
from importlib import metadata

import environment
import pytest
from packaging.utils import canonicalize_name

from tlora import extras


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel):
    source = environment.PROJECT / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in (source / "tlora").rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    assert {"tlora/demo/base/model.safetensors", "tlora/presets/paper-math.yaml"} <= expected
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_the_command_is_named_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith("entry_points.txt"))
        parser = configparser.ConfigParser()
        parser.read_string(archive.read(name).decode())
    assert dict(parser["console_scripts"]) == {"tlora": "tlora.cli:main"}


def test_a_bare_install_requires_seven_packages(wheel, tmp_path):
    found = environment.requirements(wheel, tmp_path)
    bare = {canonicalize_name(each.name) for each in found if environment.applies(each)}
    assert bare == {
        *("torch", "transformers", "peft", "accelerate", "safetensors", "tqdm", "attrs"),
    }


def test_all_holds_every_extra_that_a_user_needs(wheel, tmp_path):
    found = environment.requirements(wheel, tmp_path)
    (whole,) = (each.extras for each in found if str(each.marker) == 'extra == "all"')
    assert whole == {"train", "compare", "eval", "judge", "quantized", "gguf", "ray"}


def direct(found, extra):
    """Return what an extra lists, and what the extras that it is made of list."""
    listed = set()
    for each in found:
        if environment.applies(each, [extra]) and not environment.applies(each):
            inner = {name for other in each.extras for name in direct(found, other)}
            listed |= inner if each.name == "tlora" else {canonicalize_name(each.name)}
    return listed


@pytest.mark.parametrize("extra", extras.MODULES)
def test_a_verb_looks_for_what_its_extra_installs(wheel, tmp_path, extra):
    found = environment.requirements(wheel, tmp_path)
    sources = metadata.packages_distributions()
    looked_for = {canonicalize_name(sources[module][0]) for module in extras.MODULES[extra]}
    assert looked_for == direct(found, extra)
