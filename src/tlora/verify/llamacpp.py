"""Run llama.cpp itself, through the xllamacpp package, to get next-token probabilities."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def is_installed() -> bool:
    """Return whether the package is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


def next_tokens(
    base: Path, adapter: Path | None, prompts: list[list[int]], rows: int, letter: int
) -> list[Tensor]:
    """Return the log probabilities (1, rows) of the next token of each prompt, on the CPU.

    Args:
        base: the base model's GGUF file.
        adapter: the adapter's GGUF file; None: the base alone.
        prompts: token ids.
        rows: size of the vocabulary.
        letter: a token that is a whole character. llama.cpp withholds the probabilities of other
            tokens, so sampling is biased to this one; the returned values exclude the bias.
    """
    server = _server(base, adapter, max(map(len, prompts)))
    found = []
    for ids in prompts:
        request = {"prompt": ids, "n_predict": 1, "temperature": 0.0, "cache_prompt": False}
        request |= {"n_probs": rows, "logit_bias": [[letter, 1000.0]]}
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        logs = torch.full((1, rows), -torch.inf)
        for each in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            logs[0, each["id"]] = each["logprob"]
        found.append(logs)
    return found


def _server(base: Path, adapter: Path | None, longest: int) -> Any:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(base)
    parameters.n_ctx, parameters.n_parallel = longest + 8, 1
    parameters.warmup = parameters.fit_params = parameters.endpoint_slots = False
    parameters.verbosity = -1
    if adapter is not None:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return xllamacpp.Server(parameters)
