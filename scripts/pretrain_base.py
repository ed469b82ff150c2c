"""Train the base model of `tlora demo` and write it as a Hugging Face folder.

    python scripts/pretrain_base.py --scratch /tmp/pretrain_base

Trains a byte-level BPE tokenizer and a Llama of about one million parameters on
`scripts/pretraining_corpus.py`, in about ten minutes on one core. Rerun the same command to resume
from the checkpoint in `--scratch`; delete that folder to start over.
"""

import argparse
import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from pretraining_corpus import FORMS, held_out_rows, pretraining_rows
from tlora.demo.corpus import Row, shifted_task

BASE = Path(__file__).parents[1] / "src" / "tlora" / "demo" / "base"
END, PAD = "<|end|>", "<|pad|>"
BATCHES_PER_CHUNK = 16
IGNORE = -100


def byte_level_bpe(texts: Iterable[str], size: int, special_tokens: list[str]) -> Tokenizer:
    """Train a byte-level BPE with at most ``size`` tokens and one token per digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with at most 512 tokens and one token per digit."""
    texts = (row["prompt"] for row in islice(pretraining_rows(seed), 20_000))
    tokenizer = byte_level_bpe(texts, 512, [END, PAD])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        padding_side="right",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Return a small Llama with tied embeddings and grouped-query attention."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


Batch = tuple[torch.Tensor, torch.Tensor]


def collate(encoded: list[tuple[list[int], int]], pad: int) -> Batch:
    """Return ids (batch, length), padded on the right, and prompt lengths (batch,)."""
    length = max(len(ids) for ids, _ in encoded)
    ids = torch.tensor([row + [pad] * (length - len(row)) for row, _ in encoded])
    return ids, torch.tensor([prompt for _, prompt in encoded])


def chunk_of_batches(
    tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, chunk: int
) -> list[Batch]:
    """Return the batches of one chunk, grouped by length; depends only on its arguments.

    The first `--bare_steps` only have symbols: the model learns arithmetic many times faster from
    rows of eight tokens than from stories, which then build on it.
    """
    batch_size = args.batch_size
    names = ("symbols",) if chunk * BATCHES_PER_CHUNK < args.bare_steps else FORMS
    stream = pretraining_rows(args.seed * 1_000_003 + chunk, names)
    rows = list(islice(stream, BATCHES_PER_CHUNK * batch_size))
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    answers = tokenizer([row["response"] for row in rows])["input_ids"]
    encoded = [
        (prompt + answer + [tokenizer.eos_token_id], len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    encoded.sort(key=lambda row: len(row[0]))
    order = torch.randperm(BATCHES_PER_CHUNK, generator=torch.Generator().manual_seed(chunk))
    return [
        collate(encoded[i * batch_size : (i + 1) * batch_size], tokenizer.pad_token_id)
        for i in order.tolist()
    ]


def batches(
    tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, start: int
) -> Iterator[Batch]:
    """Yield the batches from step `start` on, independent of interruptions."""
    chunk, skip = divmod(start, BATCHES_PER_CHUNK)
    while True:
        yield from chunk_of_batches(tokenizer, args, chunk)[skip:]
        chunk, skip = chunk + 1, 0


def loss_of(model: LlamaForCausalLM, batch: Batch, prompt_weight: float) -> torch.Tensor:
    """Return the mean cross-entropy of the response plus `prompt_weight` times the prompt's.

    Padding is on the right and the model is causal, so no attention mask is needed.
    """
    ids, prompt_length = batch
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    targets = ids[:, 1:].masked_fill(ids[:, 1:] == model.config.pad_token_id, IGNORE)
    in_prompt = torch.arange(1, ids.shape[1]) < prompt_length[:, None]

    def part(mask: torch.Tensor) -> torch.Tensor:
        kept = targets.masked_fill(~mask, IGNORE)
        return cross_entropy(logits.flatten(0, 1), kept.flatten(), ignore_index=IGNORE)

    return part(~in_prompt) + prompt_weight * part(in_prompt)


def rate(step: int, steps: int, warmup: int = 100) -> float:
    """Return the fraction of the peak learning rate: linear warm-up, then cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def pretrain(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Run or resume the training loop, writing a checkpoint every 200 steps."""
    torch.manual_seed(args.seed)
    model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, args.steps))
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    checkpoint, start = args.scratch / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        start = saved.pop("step")
        for name, state in saved.items():
            parts[name].load_state_dict(state)
    stream = batches(tokenizer, args, start)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="pretraining")
    for step in bar:
        loss = loss_of(model, next(stream), args.prompt_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            states = {name: part.state_dict() for name, part in parts.items()}
            partial = checkpoint.with_suffix(".partial")
            torch.save({"step": step + 1, **states}, partial)
            partial.replace(checkpoint)
    return model


@torch.no_grad()
def exact_match(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[Row]
) -> float:
    """Return the fraction of rows whose greedy continuation is the response and then EOS."""
    prompts = tokenizer(
        [row["prompt"] for row in rows], padding=True, padding_side="left", return_tensors="pt"
    )
    out = model.generate(**prompts, max_new_tokens=10, do_sample=False)
    new = tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :])
    return sum(
        text.startswith(row["response"] + END) for text, row in zip(new, rows, strict=True)
    ) / len(rows)


CARD = """\
---
license: apache-2.0
---
# The base model of `tlora demo`

A Llama of {parameters:,} parameters ({layers} layers of width {width}, grouped-query attention,
tied embeddings) with a byte-level BPE tokenizer of {vocabulary} tokens in which every digit is a
token. It answers sums, differences and comparisons of numbers below 100, stated in the nine
forms of `scripts/pretraining_corpus.py`, as well as the table below says, and nothing else.
To a sum told in words it answers with the sum and its value (`30-14=16`). It exists so that a
demonstration of fine-tuning needs no download.

Made by `scripts/pretrain_base.py`: {steps:,} steps of {batch_size} generated rows, the first
{bare_steps:,} of them of the form `symbols` alone, AdamW with a peak rate of {learning_rate:g},
warm-up and cosine decay, seed {seed}. The loss is that of the
response plus {prompt_weight:g} times that of the prompt. All of the data is generated; none was
collected.

Exact match of greedy decoding, {rows} rows a form, on problems that no training row states:

| form | exact match |
|---|---|
{table}

The last form is the one the demonstration adapts to. Pretraining never shows it.
"""


def write_folder(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> None:
    """Save the folder, evaluate the reloaded model, and write the model card."""
    model.generation_config.do_sample = False
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    samples = {form: held_out_rows(form, args.seed, args.rows) for form in FORMS}
    samples["shifted"] = shifted_task(args.seed, train=1, test=args.rows)[1]
    scores = {form: exact_match(model, tokenizer, rows) for form, rows in samples.items()}
    table = "\n".join(f"| {form} | {score:.3f} |" for form, score in scores.items())
    card = CARD.format(
        parameters=model.num_parameters(),
        layers=model.config.num_hidden_layers,
        width=model.config.hidden_size,
        vocabulary=len(tokenizer),
        table=table,
        **vars(args),
    )
    (args.out / "MODEL_CARD.md").write_text(card)
    print(table)


def main() -> None:
    """Read the flags, train, measure and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=BASE, help="folder to write the model to")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--bare_steps", type=int, default=800, help="first steps: symbols only")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--prompt_weight", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=200, help="rows per form in the final figures")
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(args.seed)
    model = pretrain(args, tokenizer)
    write_folder(model.eval(), tokenizer, args)


if __name__ == "__main__":
    main()
