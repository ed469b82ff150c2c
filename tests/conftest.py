"""Shared fixtures: models of a few thousand parameters and a tokenizer trained on the spot.

Each ``tiny_*`` model fixture is a factory: every call gives a fresh model with the same seeded
float32 weights, in eval mode, and keyword arguments override fields of its configuration.
"""

from __future__ import annotations

import os
import tempfile

# Before `datasets` is imported: what the tests read leaves nothing in the user's cache.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="tlora-tests-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import shutil
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import support

pytest_plugins = ["browsers", "run_fixtures"]

VOCABULARY = 160

ModelFactory = Callable[..., Any]

# A shell lets its background jobs ignore it, and the processes that tests interrupt inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    """Remove the cache of the session."""
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


def seeded(build: Callable[[], Any]) -> Any:
    """Build a model with the same weights every time, leaving the global generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().float().eval()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE of 160 tokens that knows every printable character."""
    return support.byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama() -> ModelFactory:
    """Llama: 2 layers, hidden 16, grouped-query attention, untied head."""

    def make(**overrides: Any) -> Any:
        config = transformers.LlamaConfig(
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
            }
            | overrides
        )
        return seeded(lambda: transformers.LlamaForCausalLM(config))

    return make


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> ModelFactory:
    """Save a model with the tokenizer, as a user has it on disk; return the folder's path."""

    def save(model: Any) -> str:
        folder = tmp_path_factory.mktemp(type(model).__name__)
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def tiny_gpt2() -> ModelFactory:
    """GPT-2: 2 layers, hidden 16, its projections are transformers' ``Conv1D``."""

    def make(**overrides: Any) -> Any:
        config = transformers.GPT2Config(
            **{
                "vocab_size": VOCABULARY,
                "n_embd": 16,
                "n_layer": 2,
                "n_head": 2,
                "n_positions": 256,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
            }
            | overrides
        )
        return seeded(lambda: transformers.GPT2LMHeadModel(config))

    return make


@pytest.fixture(scope="session")
def tiny_bert_classifier() -> ModelFactory:
    """BERT with a classification head: 2 layers, hidden 16, two labels."""

    def make(**overrides: Any) -> Any:
        config = transformers.BertConfig(
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 256,
                "num_labels": 2,
                "pad_token_id": 0,
            }
            | overrides
        )
        return seeded(lambda: transformers.BertForSequenceClassification(config))

    return make


@pytest.fixture(scope="session")
def tiny_t5() -> ModelFactory:
    """T5: 2 + 2 layers, hidden 16."""

    def make(**overrides: Any) -> Any:
        config = transformers.T5Config(
            **{
                "vocab_size": VOCABULARY,
                "d_model": 16,
                "d_kv": 8,
                "d_ff": 32,
                "num_layers": 2,
                "num_heads": 2,
                "pad_token_id": 0,
                "eos_token_id": 2,
                "decoder_start_token_id": 0,
            }
            | overrides
        )
        return seeded(lambda: transformers.T5ForConditionalGeneration(config))

    return make


@pytest.fixture
def interrupted(monkeypatch):
    """Run until the end of a step, then let the user press Ctrl-C; return the folder."""

    from tlora.training import train
    from tlora.training.runfolder import RunFolder
    from tlora.training.trainers import LogCallback

    def run(config, step):
        def stop(self, args, state, control, **_):
            if state.global_step == step:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(LogCallback, "on_step_end", stop)
            with pytest.raises(KeyboardInterrupt):
                train.run(config)
        return RunFolder(config.output_dir)

    return run


@pytest.fixture
def tlora(capsys):
    """Run a command in this process; return exit code, standard output and standard error."""

    from tlora import cli

    def run(*argv):
        code = cli.main([str(word) for word in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
