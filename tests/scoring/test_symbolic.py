import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tlora.scoring.symbolic import MathVerify


@pytest.fixture(scope="module")
def verifier():
    with MathVerify(seconds=600.0) as made:
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


def workers():
    return {child.pid for child in multiprocessing.active_children()}


def test_an_endless_comparison_is_given_up_and_the_next_one_answered():
    others = workers()
    with MathVerify(seconds=600.0, memory=64 << 20) as verifier:
        assert verifier.equal("1", "1") is True
        (before,) = workers() - others
        verifier.seconds = 1.0
        assert verifier.equal("9^{9^{9^{9}}}", "2") is None
        verifier.seconds = 600.0
        assert verifier.equal("2^{10000000000}", "3") is not True  # memory is bounded
        (worker,) = workers() - others
        size = os.sysconf("SC_PAGE_SIZE") * int(
            Path(f"/proc/{worker}/statm").read_text().split()[0]
        )
        limits = Path(f"/proc/{worker}/limits").read_text().splitlines()
        (space,) = (line.split()[3:5] for line in limits if line.startswith("Max address space"))
        assert space == [space[0]] * 2
        assert int(space[0]) - size <= 64 << 20
        assert verifier.equal("2", "2") is True
        assert worker != before
    assert workers() == others
