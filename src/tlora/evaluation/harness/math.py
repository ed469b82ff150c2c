"""MATH's 5,000 test problems (Hendrycks et al., arXiv 2103.03874), and the 500 of MATH-500."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from tlora.errors import DataError
from tlora.evaluation.answers import PROTOCOLS, after_mark, math_answer, math_verdicts
from tlora.evaluation.harness.base import PAPER_PROMPT, Doc, Reading, ReplyTask
from tlora.evaluation.harness.rows import Raw, Source
from tlora.evaluation.latex import boxed
from tlora.evaluation.symbolic import MathVerify
from tlora.runconfig import DataConfig
from tlora.tasks.base import text_of
from tlora.tasks.math import Math


class MathPaper(ReplyTask):
    """The paper's prompt; two scores, of which the first is the paper's.

    - "exact_match": what follows the last "The answer is: " is the reference's characters once
      both are normalised, as in the published figures;
    - "math_verify": what follows it, or else the last ``\\boxed`` holds, is mathematically the
      reference.

    The paper does not say how long a reply may be; the script of PiSSA (arXiv 2404.02948), of
    its lineage, generates 1,024 tokens.
    """

    source = Source(
        ("math/test.jsonl", "math/MATH_test.jsonl", "MATH/test.jsonl"),
        "https://github.com/hendrycks/math, as one file of JSON lines",
        hub="EleutherAI/hendrycks_math",
        configs=(
            *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
            *("number_theory", "prealgebra", "precalculus"),
        ),
    )
    protocol = f"{PAPER_PROMPT}; {PROTOCOLS['math'].source}; math_verify: math-verify's equality"
    reads = PROTOCOLS["math"].name
    metrics = ("exact_match", "math_verify")
    max_gen_toks = 1024
    item_column = "unique_id"

    def doc(self, raw: Raw, where: str) -> Doc:
        """Return the training task's prompt, and what the solution's last box holds."""
        problem, solution = text_of(raw, "problem", where), text_of(raw, "solution", where)
        target = str(raw.get("answer", boxed(solution)) or "")
        if not target:
            raise DataError(f"{where}: column 'solution' has no \\boxed answer; drop the row.")
        prompt = Math(DataConfig()).row({"instruction": problem, "output": solution}, where)
        return {"prompt": prompt["prompt"], "target": target}

    def read(self, docs: Sequence[Doc], replies: Sequence[Sequence[str]]) -> list[Reading]:
        """Score the first reply to each doc by both rules."""
        with MathVerify() as verifier:
            pairs = zip(docs, replies, strict=True)
            bar = tqdm(pairs, total=len(docs), desc="answers", disable=None)
            return [_reading(doc, first, verifier) for doc, (first, *_) in bar]


def _reading(doc: Doc, reply: str, verifier: MathVerify) -> Reading:
    verdicts = math_verdicts(reply, doc["target"], verifier)
    scores = {
        # The published rule knows no box.
        "exact_match": float(verdicts["string"] and after_mark(reply) is not None),
        "math_verify": float(verdicts["symbolic"]),
    }
    return Reading(reply, math_answer(reply), scores)


class Math500Paper(MathPaper):
    """The same of the 500 problems that Lightman et al. (arXiv 2305.20050) held out."""

    source = Source(
        ("math500/test.jsonl", "math/math500.jsonl", "math/math500_test.jsonl"),
        "https://github.com/openai/prm800k, prm800k/math_splits/test.jsonl",
        hub="HuggingFaceH4/MATH-500",
    )
