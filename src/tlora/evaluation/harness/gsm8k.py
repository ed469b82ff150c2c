"""GSM8K's 1,319 test problems (Cobbe et al., arXiv 2110.14168), one file under four protocols."""

from __future__ import annotations

from tlora.evaluation.answers import MARK, PROTOCOLS
from tlora.evaluation.harness.base import AnswerTask, Doc
from tlora.evaluation.harness.rows import Raw, Source
from tlora.runconfig import DataConfig
from tlora.tasks.gsm8k import Gsm8k


class Gsm8kPaper(AnswerTask):
    """The paper's: its prompt, the number after the last "The answer is: ".

    The paper does not say how long a reply may be; MetaMath's script, which its lineage starts
    from, generates 512 tokens.
    """

    source = Source(
        ("gsm8k/test.jsonl", "gsm8k/main/test.jsonl", "test.jsonl"),
        "https://github.com/openai/grade-school-math",
        hub="openai/gsm8k",
        configs=("main",),
    )
    rule = PROTOCOLS["answer-is"]

    def doc(self, raw: Raw, where: str) -> Doc:
        """Return the training task's prompt, and the number of its answer."""
        row = Gsm8k(DataConfig()).row(raw, where)
        return {"prompt": row["prompt"], "target": row["response"].rpartition(MARK)[2]}


class Gsm8kMetaMath(Gsm8kPaper):
    """MetaMath's own script: thinking step by step is begun for the model, numbers are rounded."""

    rule = PROTOCOLS["metamath-gsm8k"]
    protocol = f'zero-shot, "Let\'s think step by step." begun, greedy; {rule.source}'
    stops = (
        *("Question:", "Question", "USER:", "USER", "ASSISTANT:", "ASSISTANT"),
        *("Instruction:", "Instruction", "Response:", "Response"),
    )

    def doc(self, raw: Raw, where: str) -> Doc:
        """Return the paper's doc with MetaMath's opening of the response."""
        doc = super().doc(raw, where)
        return doc | {"prompt": f"{doc['prompt']} Let's think step by step."}


class Gsm8kHashes(Gsm8kPaper):
    """For models that learned GSM8K's own answers: what follows the first "####"."""

    rule = PROTOCOLS["gsm8k"]


class Gsm8kLlmAdapters(Gsm8kPaper):
    """LLM-Adapters': the last number of the reply, right within 0.001.

    Departures: the paper's prompt in place of that script's, whose lines are indented; greedy,
    where the script searches four beams while sampling at temperature 0.1.
    """

    rule = PROTOCOLS["llm-adapters-number"]
    max_gen_toks = 256
