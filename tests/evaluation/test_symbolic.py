from concurrent.futures import ThreadPoolExecutor

import pytest

from tlora.errors import ConfigError
from tlora.evaluation import symbolic
from tlora.evaluation.symbolic import MathVerify


@pytest.fixture(scope="module")
def verifier():
    with MathVerify() as made:
        yield made


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("0.25", r"\frac{1}{4}", True),
        ("1+x", "x+1", True),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt 2}", True),
        ("x=3", "3", True),
        ("(1,2)", "(2,1)", False),
        (r"\text{Monday}", r"\text{Tuesday}", False),
        ("4", r"\frac{1}{4}", False),
        (r"\frac{2}{2004!}", r"\frac{1}{2004!}", False),
        (r"\frac{1}{2004!}", r"\frac{1}{2004!}", True),
        ("0", "0.0000001", False),
    ],
)
def test_expressions_are_compared_as_mathematics(verifier, answer, reference, equal):
    assert verifier.equal(answer, reference) is equal


def test_threads_share_it(verifier):
    pairs = [(str(n % 5), str(n % 3)) for n in range(60)]
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(lambda pair: verifier.equal(*pair), pairs))
    assert verdicts == [one == other for one, other in pairs]


def test_an_endless_comparison_is_given_up_and_the_next_one_answered():
    with MathVerify(seconds=1.0) as verifier:
        assert verifier.equal("1", "1") is True
        before = verifier._process
        assert verifier.equal("9^{9^{9^{9}}}", "2") is None
        assert before.poll() is not None
        verifier.seconds = 10.0
        assert verifier.equal("2", "2") is True
        after = verifier._process
    assert after.poll() is not None


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(symbolic.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"math-verify is not installed; .*'tlora\[eval\]'"):
        MathVerify()
