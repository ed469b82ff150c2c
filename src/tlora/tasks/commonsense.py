"""The paper's commonsense group: eight question sets combined as commonsense_170k.

Source: LLM-Adapters (Hu et al., arXiv 2304.01933), whose rows put BoolQ, PIQA, SIQA, HellaSwag,
WinoGrande, ARC-e, ARC-c and OBQA into one form: a question with its choices, and the answer as
"the correct answer is answer2".
"""

from __future__ import annotations

import re

from tlora.errors import DataError, shortened
from tlora.tasks.instruct import Instruct

_ANSWER = re.compile(r"the correct answer is \w+\.?$")


class Commonsense(Instruct):
    """Rows with the columns instruction, output, and an empty input."""

    hub = ("zwhe99/commonsense_170k", None)

    def response(self, text: str, where: str) -> str:
        """Return the answer, checked to be in the form that scoring expects."""
        text = text.strip()
        if not _ANSWER.search(text):
            raise DataError(
                f"{where}: column 'output' is {shortened(text)!r}, which does not end in"
                " 'the correct answer is ...'; fix or drop the row."
            )
        return text
