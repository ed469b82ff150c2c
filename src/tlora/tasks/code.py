"""The paper's code group, trained on CodeFeedback-Filtered (Zheng et al., arXiv 2402.14658)."""

from __future__ import annotations

from tlora.tasks.instruct import Instruct, Layout


class Code(Instruct):
    """Programs for instructions: CodeFeedback's columns (query, answer), or Alpaca's."""

    hub = ("m-a-p/CodeFeedback-Filtered-Instruction", None)
    layouts = (
        Layout("query", "answer"),
        Layout("instruction", "output", "input"),
        Layout("instruction", "response", "input"),
    )
