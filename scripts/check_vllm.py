"""Serve an adapter with real vLLM, and compare its answers with PEFT's::

    pip install ".[eval]" vllm  # without a GPU, a CPU build of vLLM: docs/serving.md
    python scripts/check_vllm.py --model BASE --data_dir DATA [--adapter ADAPTER]

DATA contains HumanEval (code/HumanEval.jsonl.gz). Without ``--adapter``, the script trains one with
varied ranks and scales for a few steps. It serves each format through a LoRA request, and also the
base alone, whose differences come from vLLM's own kernels. Then `tlora eval` answers the same
problems with transformers and with vLLM. Prints tables in Markdown; docs/serving.md has its output.
It is not a test because vLLM is large.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from tlora import TLoraConfig, calibration_batches, get_tlora_model
from tlora.adapter.saved import read_lora
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evaluate import run as evaluate
from tlora.exporters.export import run as export
from tlora.exporters.exportconfig import ExportConfig
from tlora.exporters.readers import READERS, reading
from tlora.integrations.vllm import vllm_rank

FORMATS = ("native", "compact", "uniform")
STEPS, LEARNING_RATE = 12, 3e-3
Answers = list[tuple[list[int], list[float]]]
"""Greedy tokens of each prompt and their log probabilities."""


def problems(data_dir: str) -> list[dict[str, str]]:
    """Return HumanEval's problems."""
    with gzip.open(Path(data_dir) / "code" / "HumanEval.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def trained(base: str, rows: list[dict[str, str]], folder: str) -> str:
    """Train an adapter for a few steps; return its folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    pairs = [{"prompt": row["prompt"], "response": row["canonical_solution"]} for row in rows]
    batches = list(calibration_batches(tokenizer, pairs))
    torch.manual_seed(0)
    adapted = get_tlora_model(model, TLoraConfig(r=8, lora_alpha=8), batches)
    optimizer = torch.optim.AdamW(
        (each for each in adapted.parameters() if each.requires_grad), lr=LEARNING_RATE
    )
    for step in range(STEPS):
        adapted(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(folder)
    return folder


@torch.no_grad()
def expected(model: Any, prompts: list[list[int]], tokens: int) -> Answers:
    """Answer greedily with transformers, one prompt at a time."""
    answers = []
    for prompt in prompts:
        made = model.generate(
            input_ids=torch.tensor([prompt]),
            max_new_tokens=tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        reply = made.sequences[0, len(prompt) :]
        found = torch.cat(made.logits).double().log_softmax(-1)
        answers.append((reply.tolist(), found.gather(1, reply[:, None])[:, 0].tolist()))
    return answers


@torch.no_grad()
def rated(model: Any, prompts: list[list[int]], answers: Answers) -> Answers:
    """Return another model's answers with this model's log probabilities."""
    found = []
    for prompt, (tokens, _) in zip(prompts, answers, strict=True):
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        each = logits.double().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])
        found.append((tokens, each[:, 0].tolist()))
    return found


def served(engine: Any, folder: str | None, prompts: list[list[int]], target: Answers) -> Answers:
    """Answer greedily with vLLM; log probabilities are for the target's tokens while both agree.

    A token beyond the top 20 counts as the last of them, so the difference is a lower bound.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    request = LoRARequest(folder, abs(hash(folder)) % 2**31 + 1, folder) if folder else None
    greedy = SamplingParams(temperature=0, max_tokens=max(len(t) for t, _ in target), logprobs=20)
    starts = [{"prompt_token_ids": each} for each in prompts]
    answers = []
    replies = engine.generate(starts, greedy, use_tqdm=False, lora_request=request)
    for reply, (tokens, _) in zip(replies, target, strict=True):
        found: list[float] = []
        for token, own, likely in zip(
            tokens, reply.outputs[0].token_ids, reply.outputs[0].logprobs, strict=False
        ):
            least = min(each.logprob for each in likely.values())
            found.append(likely[token].logprob if token in likely else least)
            if own != token:
                break
        answers.append((list(reply.outputs[0].token_ids), found))
    return answers


def row(title: str, found: Answers, target: Answers, foretold: str) -> str:
    """Return a row of the table."""
    same = sum(a[0] == b[0] for a, b in zip(found, target, strict=True))
    off = max(
        abs(x - y)
        for a, b in zip(found, target, strict=True)
        for x, y in zip(a[1], b[1], strict=False)
    )
    return f"| {title} | {same} of {len(found)} | {off:.1e} | {foretold} |"


def compare_formats(base: str, adapter: str, rows: list[dict[str, str]], tokens: int) -> None:
    """Print the differences between each format's answers and PEFT's."""
    import vllm

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    prompts = [tokenizer(each["prompt"])["input_ids"] for each in rows]
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    bare = expected(model, prompts, tokens)
    model = PeftModel.from_pretrained(model, adapter).eval()
    target = expected(model, prompts, tokens)
    with model.disable_adapter():
        left_out = [
            (own, found)
            for (own, _), (_, found) in zip(bare, rated(model, prompts, target), strict=True)
        ]
    del model
    lora = read_lora(adapter)
    ranks = [lora.rank(name) for name in lora.keys]
    scales = [lora.scale(name) for name in lora.keys]
    engine = vllm.LLM(
        model=base,
        dtype="float32",
        max_model_len=max(map(len, prompts)) + tokens + 1,
        max_num_seqs=len(prompts),
        max_num_batched_tokens=128,  # a CPU copies the LoRA's matrices for each token of a batch
        enable_lora=True,
        max_lora_rank=vllm_rank(max(ranks)),
    )
    print(
        f"vLLM {vllm.__version__}, float32: {len(lora.keys)} modules, ranks {min(ranks)} to"
        f" {max(ranks)}, scales {min(scales):.2g} to {max(scales):.2g}\n"
    )
    print("| served | same greedy tokens | log probability off by | by its rule |")
    print("|---|---|---|---|")
    print(row("the base alone, against itself", served(engine, None, prompts, bare), bare, "exact"))
    name = "vllm" if vllm.__version_tuple__ >= (0, 32) else "vllm-0.31"
    reader = next(each for each in READERS if each.name == name)
    with tempfile.TemporaryDirectory() as place:
        for form in FORMATS:
            folder = f"{place}/{form}"
            export(ExportConfig(path=adapter, output_dir=folder, format=form, model=base))
            error = reading(reader, read_lora(folder)).error
            rule = "exact" if error == 0 else f"wrong by {error:.2g} of the effect"
            print(
                row(f"`{form}`", served(engine, folder, prompts, target), target, rule), flush=True
            )
    print(row("the base alone, by transformers", left_out, target, "-"), flush=True)


def compare_evaluations(base: str, adapter: str, data_dir: str, items: int, tokens: int) -> None:
    """Print how many replies of `tlora eval` are equal with transformers and vLLM."""
    replies = {}
    with tempfile.TemporaryDirectory() as place:
        for backend in ("hf", "vllm"):
            config = EvalConfig(
                models=[f"adapted={adapter}"],
                model=base,
                tasks=["humaneval-paper"],
                data_dir=data_dir,
                backend=backend,
                limit=items,
                gen_kwargs={"max_gen_toks": tokens},
                allow_code_execution=True,
                output_dir=f"{place}/{backend}",
            )
            folder = Path(evaluate(config).path)
            lines = (folder / "samples/adapted/humaneval-paper.jsonl").read_text().splitlines()
            replies[backend] = [json.loads(line)["reply"] for line in lines]
    same = sum(a == b and bool(a) for a, b in zip(replies["hf"], replies["vllm"], strict=True))
    print(
        f"\n`tlora eval --backend vllm`: {same} of {items} replies to HumanEval are transformers'."
    )


def main() -> None:
    """Read the command line, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--items", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    rows = problems(given.data_dir)
    importlib.import_module("vllm")  # fail before training if it is missing
    with tempfile.TemporaryDirectory() as place:
        adapter = given.adapter or trained(given.model, rows[-8:], place)
        compare_formats(given.model, adapter, list(islice(rows, given.items)), given.tokens)
        compare_evaluations(given.model, adapter, given.data_dir, given.items, given.tokens)


if __name__ == "__main__":
    main()
