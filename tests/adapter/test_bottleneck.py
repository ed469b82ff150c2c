"""Bottleneck adapters: what they compute, and that their folder is read by tlora alone."""

import json

import peft
import pytest
import torch
from torch.nn.functional import gelu

from tlora import cli, load_adapter
from tlora.adapter.freeze import lora_layers
from tlora.errors import AdapterError, ArtifactError, ConfigError
from tlora.methods.houlsby import Houlsby, HoulsbyOptions

IDS = torch.tensor([[5, 6, 7, 8]])
ENDS = ("self_attn.o_proj", "mlp.down_proj")


def adapted(base, **options):
    torch.manual_seed(0)
    prepared = Houlsby().prepare(base, HoulsbyOptions(r=3, **options), iter(()))
    with torch.no_grad():
        for name, value in prepared.model.named_parameters():
            if value.requires_grad:
                value.add_(0.3 * torch.randn(value.shape))
                assert "lora_" in name or "norm" in name
    return prepared


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def test_it_is_the_papers_adapter_behind_each_layer(tiny_llama):
    """The same by hooks on the bare model: y + U gelu(D y + b) + c, and the trained norms."""
    model = adapted(tiny_llama()).model
    plain = tiny_llama()
    seen = []
    for name, layer in lora_layers(model.base_model.model):
        down, up = layer.lora_A["default"], layer.lora_B["default"]

        def behind(_, __, y, down=down, up=up):
            inner = gelu(y @ down.weight.T + down.shift, approximate="tanh")
            return y + inner @ up.weight.T + up.shift

        plain.get_submodule(name).register_forward_hook(behind)
        seen.append(name)
    for name, value in model.named_parameters():
        if ".modules_to_save.default." in name:
            own = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            plain.get_parameter(own).data.copy_(value.detach())
    assert [name.endswith(ENDS) for name in seen] == [True] * 4
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    assert (logits(model) - logits(tiny_llama())).abs().max() > 0.01


def test_norms_train_unless_they_are_left_out(tiny_llama):
    for train_norms in (True, False):
        model = adapted(tiny_llama(), train_norms=train_norms).model
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        norms = {name for name in trained if "layernorm" in name}
        assert len(norms) == 4 * train_norms
        assert len(trained - norms) == 4 * 4  # D, b, U and c of two adapters in two layers


def test_the_saved_folder_gives_the_same_output_and_trains_further(tiny_llama, tmp_path):
    prepared = adapted(tiny_llama())
    prepared.save(tmp_path)
    again = load_adapter(tiny_llama(), tmp_path)
    assert torch.equal(logits(again), logits(prepared.model))
    assert not any(value.requires_grad for value in again.parameters())
    further = load_adapter(tiny_llama(), tmp_path, is_trainable=True)
    trained, before = (
        {name for name, value in model.named_parameters() if value.requires_grad}
        for model in (further, prepared.model)
    )
    assert trained == before


def test_nobody_else_reads_merges_or_exports_it(tiny_llama, saved, tmp_path, capsys):
    prepared, base = adapted(tiny_llama()), saved(tiny_llama())
    prepared.save(tmp_path / "adapter")
    fields = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert fields["peft_type"] == "BOTTLENECK"
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    with pytest.raises(NotImplementedError, match="not linear"):
        load_adapter(tiny_llama(), tmp_path / "adapter").merge_and_unload()
    for verb in (["export", "--format", "native"], ["merge", "--model", base]):
        words = [*verb, str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "out")]
        assert cli.main(words) == 2
        said = capsys.readouterr().err
        assert "BOTTLENECK, not a LoRA; it is not linear" in said
        assert "`tlora chat` and `tlora eval` load it" in said


def test_another_base_or_a_cut_off_file_is_named(tiny_llama, tmp_path):
    adapted(tiny_llama()).save(tmp_path)
    with pytest.raises(AdapterError, match="onto its own base"):
        load_adapter(tiny_llama(hidden_size=32), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors: damaged"):
        load_adapter(tiny_llama(), tmp_path)


def test_a_model_of_other_names_needs_the_modules(tiny_llama):
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.last, layer.mlp.last = layer.self_attn.o_proj, layer.mlp.down_proj
        del layer.self_attn.o_proj, layer.mlp.down_proj
    with pytest.raises(ConfigError, match="`after_modules`"):
        adapted(model)
    named = adapted(model, after_modules=["mlp.last"]).model
    assert [name for name, _ in lora_layers(named.base_model.model)] == [
        f"model.layers.{number}.mlp.last" for number in (0, 1)
    ]
