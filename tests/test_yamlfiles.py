import pytest

from tlora.errors import ConfigError
from tlora.yamlfiles import read_value, read_yaml

NO_YAML = {
    "alias within its own value": "trainer: &a {x: *a}",
    "list within itself": "adapter: {modules_to_save: &l [*l]}",
    "nested too deeply": "a: " + "[" * 5000,
    "number too long": "seed: " + "9" * 5000,
    "tag that does not fit": "seed: !!int x",
    "empty number": "seed: !!float ''",
    "truth that is none": "resume: !!bool x",
    "bytes": "model: !!binary aGk=",
    "set": "adapter: !!set {a, b}",
    "pairs": "adapter: !!omap [a: b]",
    "list as key": "[a, b]: 3",
    "other type": "a: !!python/object:os.system x",
}


@pytest.mark.parametrize("text", NO_YAML.values(), ids=NO_YAML)
def test_what_yaml_cannot_read_is_a_sentence_with_the_file(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml: not YAML \(") as caught:
        read_yaml(file)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["!!int x", "9" * 5000, "[" * 5000, "&a [*a]", "!!binary x"])
def test_a_flag_that_is_no_yaml_is_text(text):
    assert read_value(text) == text


def test_an_alias_of_another_value_is_that_value(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("trainer: &a {max_steps: 5}\nadapter: *a")
    assert read_yaml(file) == {"trainer": {"max_steps": 5}, "adapter": {"max_steps": 5}}


def test_the_line_of_a_mistake_is_named(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("methods: [a]\nseed: 3\n  resume: true\n")
    with pytest.raises(
        ConfigError, match=r"run\.yaml: not YAML \(line 3: mapping values"
    ) as caught:
        read_yaml(file)
    assert "unicode string" not in str(caught.value)
