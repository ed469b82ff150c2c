from __future__ import annotations

from collections.abc import Iterator

import pytest

from tlora.evaluations import utils
from tlora.scoring.symbolic import MathVerify


class Kept(MathVerify):
    """Keeps its worker, whose start takes seconds, beyond the ``with`` block."""

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(scope="session", autouse=True)
def one_worker() -> Iterator[None]:
    """Compare expressions in one process for all tests."""
    kept = Kept(seconds=600.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "MathVerify", lambda: kept)
        yield
    kept.close()
