"""vLLM as lm-evaluation-harness asks it: models as they are, adapters merged into a folder first.

vLLM gives all modules of an adapter one rank and one scale, and would silently answer for another
model than the one that was trained (docs/evaluation.md).
"""

from __future__ import annotations

import tempfile

from lm_eval.models.vllm_causallms import VLLM

from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evaluated_models import EvaluatedModel
from tlora.evaluate.loading import load, load_tokenizer, release
from tlora.models.pretrained import check_weights


class MergedVLLM(VLLM):
    """One model of an evaluation in vLLM.

    Args:
        evaluated: the model; an adapter is merged on the device of `config`, and the merged model
            written to a temporary folder for as long as this object lives.
        config: precision, batch size and greatest length.
    """

    def __init__(self, evaluated: EvaluatedModel, config: EvalConfig) -> None:
        place = evaluated.model
        check_weights(place)
        if evaluated.kind == "merged":
            self._merged = tempfile.TemporaryDirectory(prefix="tlora-merged-")
            place = self._merged.name
            load(evaluated, config).save_pretrained(place)
            load_tokenizer(evaluated, config).save_pretrained(place)
            release()
        super().__init__(
            pretrained=place,
            tokenizer=config.tokenizer or place,
            dtype=config.dtype,
            batch_size=config.batch_size,
            max_length=config.max_length,
            trust_remote_code=config.trust_remote_code,
            seed=config.seed,
        )
