"""Pretrain a Llama of 30 million parameters on text and on the demo's arithmetic, on one GPU.

    python scripts/pretrain_text_base.py OUT --text MATH_train.jsonl wiki_demo.txt ... [--steps 900]

This is the base for comparisons that need a larger model than the shipped one. Each row of a file
(JSON, JSONL, CSV, TSV; otherwise each line) is a text of its columns in order. Do not include files
to which the base will be adapted. Takes about three minutes on an H200. OUT is a Hugging Face
folder, with the texts' names and SHA-256 in `pretraining.json`; rerun the same command to resume
from OUT/checkpoints.
"""

import argparse
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import get_last_checkpoint

from pretrain_base import END, byte_level_bpe
from pretraining_corpus import pretraining_rows
from tlora.files import write_json
from tlora.tasks.source import READERS, read_file
from tlora.training.digests import file_digest
from tlora.training.runfolder import provenance

LENGTH = 512
VOCABULARY = 8192


def texts_of(file: Path) -> Iterator[str]:
    """Yield the texts of a file."""
    if READERS.keys().isdisjoint(file.suffixes):
        with file.open(encoding="utf-8") as lines:
            yield from (line.strip() for line in lines if line.strip())
        return
    for row in read_file(str(file)):
        parts = [value.strip() for value in row.values() if isinstance(value, str)]
        yield "\n".join(part for part in parts if part)


def sums(seed: int, count: int) -> list[str]:
    """Return rows of the demo's corpus, several to a text."""
    rows = islice(pretraining_rows(seed), count)
    return [row["prompt"] + row["response"] for row in rows]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with one token per digit."""
    tokenizer = byte_level_bpe(texts, VOCABULARY, [END])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


def blocks(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Return the concatenated texts as rows of LENGTH tokens, int64, dropping the rest."""
    end = tokenizer.eos_token_id
    rows = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    ids = [i for row in rows for i in (*row, end)]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a Llama with 30 million parameters and tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1440,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def arguments(flags: argparse.Namespace) -> TrainingArguments:
    """Return the training arguments."""
    return TrainingArguments(
        output_dir=str(flags.folder / "checkpoints"),
        max_steps=flags.steps,
        per_device_train_batch_size=flags.batch_size,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, flags.steps // 10),
        weight_decay=0.1,
        adam_beta2=0.95,
        bf16=torch.cuda.is_available(),
        save_steps=500,
        save_total_limit=1,
        logging_steps=25,
        report_to="none",
        dataloader_drop_last=True,
        seed=flags.seed,
    )


def pack(texts: list[str], flags: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, Dataset]:
    """Return the tokenizer and the training rows; texts repeat, sums do not."""
    tokenizer = train_tokenizer(texts + sums(flags.seed, 20_000))
    read = blocks(texts, tokenizer)
    wanted = flags.steps * flags.batch_size
    told = blocks(sums(flags.seed + 1, int(wanted * flags.sums * LENGTH / 30)), tokenizer)
    told = told[: int(wanted * flags.sums)]
    rows = torch.cat([read.repeat((wanted - len(told)) // len(read) + 1, 1), told])
    print(f"{read.numel():,} tokens of text, {told.numel():,} of sums, {wanted * LENGTH:,} to read")
    return tokenizer, Dataset.from_dict({"input_ids": rows.int().numpy()}).with_format("torch")


def main() -> None:
    """Tokenize, train, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch_size", type=int, default=128, help=f"rows of {LENGTH} tokens")
    parser.add_argument("--sums", type=float, default=0.4, help="fraction of the demo's arithmetic")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    texts = [text for file in flags.text for text in texts_of(file)]
    random.Random(flags.seed).shuffle(texts)
    tokenizer, rows = pack(texts, flags)
    torch.manual_seed(flags.seed)
    model = build_model(tokenizer)
    trainer = Trainer(
        model=model,
        args=arguments(flags),
        train_dataset=rows,
        data_collator=lambda batch: (
            (c := default_data_collator(batch))
            | {"input_ids": c["input_ids"].long(), "labels": c["input_ids"].long()}
        ),
    )
    checkpoints = flags.folder / "checkpoints"
    trainer.train(
        resume_from_checkpoint=get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None
    )
    model.to(torch.bfloat16).save_pretrained(flags.folder, max_shard_size="15MB")
    tokenizer.save_pretrained(flags.folder)
    record = {
        "files": {file.name: file_digest(file) for file in flags.text},
        "parameters": model.num_parameters(),
        "tokens": flags.steps * flags.batch_size * LENGTH,
        "losses": [
            (line["step"], line["loss"]) for line in trainer.state.log_history if "loss" in line
        ],
        "provenance": provenance(flags.seed),
    }
    write_json(flags.folder / "pretraining.json", record)


if __name__ == "__main__":
    main()
