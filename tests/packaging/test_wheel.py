"""What is in the wheel: the source with its data, and seven dependencies."""

import configparser
import zipfile

import environment
from packaging.utils import canonicalize_name


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
    assert whole == {"train", "compare", "eval", "judge", "quantized"}
