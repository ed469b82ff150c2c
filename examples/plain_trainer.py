"""transformers' Trainer with Task-aware LoRA: a standard script plus two lines (marked).

    python examples/plain_trainer.py MODEL ROWS.jsonl OUTPUT

Each row has a `text` and a `label`, 0 or 1. A is calibrated on the first 32 rows, collated as in
training.
"""

import sys

from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from tlora import TLoraConfig, get_tlora_model


def main(path: str, file: str, output: str, **fields: object) -> Trainer:
    """Train a classifier's adapter on the rows of ``file``, and save it in ``output``."""
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = load_dataset("json", data_files=file, split="train")
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True), remove_columns="text")
    collator = DataCollatorWithPadding(tokenizer)
    batches = DataLoader(rows.select(range(min(32, len(rows)))), 4, collate_fn=collator)  # added
    model = get_tlora_model(model, TLoraConfig.recommended(task_type="SEQ_CLS"), batches)  # added
    arguments = TrainingArguments(output, **{"learning_rate": 1e-3, "report_to": "none"} | fields)
    trainer = Trainer(model, arguments, collator, rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:4])
