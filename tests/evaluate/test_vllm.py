"""What reaches vLLM; the engine itself is not installed where the tests run."""

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tlora.demo.run import BASE_MODEL
from tlora.errors import ConfigError
from tlora.evaluate import evaluate, loading
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evaluated_models import resolve


@pytest.fixture
def engine(monkeypatch):
    """A stand-in that notes what it was made with."""

    class VLLM:
        def __init__(self, **made):
            self.made = made

    module = types.ModuleType("lm_eval.models.vllm_causallms")
    module.VLLM = VLLM
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "tlora.evaluate.vllm", raising=False)
    yield importlib.import_module("tlora.evaluate.vllm").MergedVLLM
    sys.modules.pop("tlora.evaluate.vllm", None)


def test_an_adapter_is_merged_into_a_folder_that_goes_with_the_model(engine, demo_adapter):
    config = EvalConfig(
        models=[demo_adapter],
        tasks=["t"],
        with_base=True,
        merge=True,
        backend="vllm",
        max_length=99,
    )
    base, merged = resolve(config)
    assert engine(base, config).made["pretrained"] == BASE_MODEL
    lm = engine(merged, config)
    place = lm.made["pretrained"]
    assert (lm.made["tokenizer"], lm.made["max_length"]) == (place, 99)
    ids = torch.tensor([AutoTokenizer.from_pretrained(place)("How many? 3+4=")["input_ids"]])
    with torch.no_grad():
        written = AutoModelForCausalLM.from_pretrained(place)(input_ids=ids).logits
        expected = loading.load(merged, config)(input_ids=ids).logits
    assert torch.equal(written, expected)
    del lm
    assert not Path(place).exists()


def test_what_vllm_cannot_do_is_refused_at_once(here, demo_adapter, demo_file, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name)
    )
    config = EvalConfig(
        models=[f"drawn={demo_adapter}"],
        tasks=["jsonl"],
        test_file=demo_file,
        backend="vllm",
        quantization="nf4",
    )
    with pytest.raises(ConfigError) as error:
        evaluate.run(config)
    assert [fault.split(";")[0] for fault in error.value.faults] == [
        "'vllm' is not installed",
        "vLLM knows one rank and one scale, and drawn may have many",
        "`quantization` and `parallelize` never reach vLLM",
    ]
    assert not Path("tlora-eval").exists()
