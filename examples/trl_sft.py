"""TRL's SFTTrainer with Task-aware LoRA: a standard script plus two lines (marked).

    python examples/trl_sft.py MODEL ROWS.jsonl OUTPUT

Each row has a `prompt` and a `completion`.
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from tlora import TLoraConfig, calibration_batches, get_tlora_model


def main(path: str, file: str, output: str, **fields: object) -> SFTTrainer:
    """Train an adapter for the model at ``path`` on the rows of ``file``, and save it."""
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = load_dataset("json", data_files=file, split="train")
    config = TLoraConfig.recommended(r=16, lora_alpha=16, task_type="CAUSAL_LM")  # added
    model = get_tlora_model(model, config, calibration_batches(tokenizer, rows))  # added
    arguments = SFTConfig(output, **{"learning_rate": 1e-3, "report_to": "none"} | fields)
    trainer = SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:4])
