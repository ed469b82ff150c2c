"""The paper's math group, trained on MetaMathQA (Yu et al., arXiv 2309.12284)."""

from __future__ import annotations

from tlora.tasks.instruct import Instruct, Layout


class Math(Instruct):
    """Worked answers that end in "The answer is: n", which the scoring extracts.

    Reads MetaMathQA's columns (query, response), or instruction, output and optionally input.
    """

    hub = ("meta-math/MetaMathQA", None)
    layouts = (Layout("query", "response"), Layout("instruction", "output", "input"))
