"""The paper's chat group, trained on WizardLM (Xu et al., arXiv 2304.12244)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from tlora.errors import DataError
from tlora.tasks.base import Row
from tlora.tasks.instruct import Instruct


class Chat(Instruct):
    """First turns of conversations, or Alpaca's columns, in the paper's prompt.

    A row of WizardLM has `conversations`, a list of {from: human or gpt, value}.
    """

    hub = ("WizardLMTeam/WizardLM_evol_instruct_V2_196k", None)

    def row(self, raw: Mapping[str, Any], where: str) -> Row:
        """Return {"prompt", "response"}."""
        if "conversations" in raw:
            raw = _first_turn(raw["conversations"], where)
        return super().row(raw, where)


def _first_turn(turns: Any, where: str) -> dict[str, str]:
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        said = [(turn.get("from"), turn.get("value")) for turn in turns]
        for (speaker, question), (answerer, answer) in itertools.pairwise(said):
            if speaker == "human" and answerer == "gpt" and question and answer:
                return {"instruction": question, "output": answer}
    raise DataError(
        f"{where}: `conversations` has no human turn followed by a gpt turn; fix or drop the row."
    )
