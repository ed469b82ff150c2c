import importlib.metadata
import string
import sys

import pytest

from tlora.errors import ConfigError
from tlora.registry import (
    CONVERSATIONS,
    EVALUATIONS,
    METHODS,
    TASKS,
    Entry,
    Registry,
)


@pytest.fixture
def registry():
    return Registry(
        "task", [Entry("pi", "math:pi", "a number"), Entry("gone", "math:nothing", "missing")]
    )


@pytest.fixture
def third_party(monkeypatch):
    def register(*points):
        known = [
            importlib.metadata.EntryPoint(name, target, "tlora.tasks") for name, target in points
        ]
        monkeypatch.setattr(
            importlib.metadata,
            "entry_points",
            lambda group: [point for point in known if point.group == group],
        )

    return register


def test_load_returns_the_object_behind_a_name(registry):
    assert registry.load("pi") == pytest.approx(3.14159, abs=1e-5)


def test_making_and_listing_a_registry_imports_no_target(registry):
    sys.modules.pop("colorsys", None)
    lazy = Registry("task", [Entry("late", "colorsys:rgb_to_hsv", "colors")])
    assert lazy.names() == ["late"]
    assert "colorsys" not in sys.modules
    lazy.load("late")
    assert "colorsys" in sys.modules


def test_an_unknown_name_is_a_config_error_with_a_suggestion(registry):
    with pytest.raises(ConfigError, match=r"there is no task 'pie'\. Did you mean 'pi'\?"):
        registry.load("pie")


def test_a_name_like_nothing_else_points_at_the_list(registry):
    with pytest.raises(ConfigError, match=r"there is no task 'zebra'\. Run `tlora list tasks`\."):
        registry.load("zebra")


def test_a_target_that_is_gone_names_itself(registry):
    with pytest.raises(ConfigError, match="'gone' cannot be imported from math:nothing"):
        registry.load("gone")


def test_an_entry_point_of_another_package_is_listed_and_loaded(registry, third_party):
    third_party(("tau", "math:tau"))
    assert registry.names() == ["pi", "gone", "tau"]
    assert registry.load("tau") == pytest.approx(6.28318, abs=1e-5)


@pytest.mark.parametrize("target", ["string:Formatter.format", "string:Formatter.format [more]"])
def test_an_entry_point_may_be_all_that_the_standard_lets_it_be(registry, third_party, target):
    third_party(("deep", target))
    assert registry.load("deep") is string.Formatter.format


def test_a_built_in_name_wins_over_an_entry_point(registry, third_party):
    third_party(("pi", "math:e"))
    assert registry.names() == ["pi", "gone"]
    assert registry.load("pi") == pytest.approx(3.14159, abs=1e-5)


@pytest.mark.parametrize(
    "registered", [METHODS, TASKS, EVALUATIONS, CONVERSATIONS], ids=lambda r: r.kind
)
def test_every_registered_name_loads_and_says_what_it_is(registered):
    assert all(registered.load(name) is not None for name in registered.names())
    for entry in registered.entries():
        assert 10 < len(entry.summary) < 70


def test_a_family_loads_by_what_comes_after_the_colon(third_party):
    family = Entry("unit:NAME", "operator:attrgetter", "an attribute")
    registry = Registry("task", [Entry("pi", "math:pi", "a number")], [family])
    assert registry.load("unit:real")(3) == 3
    assert [entry.name for entry in registry.entries()] == ["pi", "unit:NAME"]
    assert registry.names() == ["pi"]
    with pytest.raises(ConfigError, match="there is no task 'units:real'"):
        registry.load("units:real")
