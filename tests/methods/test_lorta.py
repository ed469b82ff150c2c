"""LoRTA: every update is a slice of one tensor, and what is saved a plain LoRA."""

import peft
import pytest
import torch
from peft.utils.save_and_load import load_peft_weights

from tlora.adapter.freeze import lora_layers
from tlora.errors import ConfigError

HEADS, HEAD, WIDTH, LAYERS, R = 4, 4, 16, 2, 3
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


def randomized(prepared):
    """Give every factor random numbers; return those of each tensor by its number of heads."""
    found = {}
    for _, layer in lora_layers(prepared.model):
        tensor = layer.lora_A["default"].tensor
        if len(tensor.heads) not in found:
            with torch.no_grad():
                for factor in tensor.parameters():
                    factor.normal_()
            found[len(tensor.heads)] = {
                n: p.detach().double() for n, p in tensor.named_parameters()
            }
    return found


def test_every_update_is_a_slice_of_one_cp_tensor(prepared_by, tiny_llama):
    model = tiny_llama(num_key_value_heads=HEADS)
    prepared = prepared_by("lorta", model, r=R, lora_alpha=6)
    factors = randomized(prepared)
    assert list(factors) == [HEADS]
    # d x d_h x heads x layers x matrices, by its definition.
    names = ("wide", "head", "heads", "layers", "matrices")
    tensor = torch.einsum("ak,bk,hk,lk,pk->abhlp", *(factors[HEADS][name] for name in names))
    assert tensor.shape == (WIDTH, HEAD, HEADS, LAYERS, len(NAMES))
    for name, layer in lora_layers(prepared.model.base_model.model):
        slab = tensor[:, :, :, int(name.split(".")[2]), NAMES.index(name.rpartition(".")[2])]
        whole = slab.permute(0, 2, 1).reshape(WIDTH, HEADS * HEAD)  # d x (h, i)
        wanted = 2.0 * (whole if name.endswith("o_proj") else whole.T)
        found = layer.get_delta_weight("default").detach().double()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    trained = sum(p.numel() for p in prepared.model.parameters() if p.requires_grad)
    assert trained == R * (WIDTH + HEAD + HEADS + LAYERS + len(NAMES))


def test_fewer_keys_make_a_tensor_of_their_own(prepared_by, tiny_llama):
    prepared = prepared_by("lorta", tiny_llama(), r=R)
    factors = randomized(prepared)
    assert sorted(factors) == [2, 4]
    assert {len(each["matrices"]) for each in factors.values()} == {2}


def test_what_is_saved_is_a_plain_lora(prepared_by, tiny_llama, batches, tmp_path):
    prepared = prepared_by("lorta", tiny_llama(), r=R)
    randomized(prepared)
    with torch.no_grad():
        trained = prepared.model(**batches[0]).logits
        prepared.save(tmp_path)
        state = load_peft_weights(str(tmp_path))
        assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in state)
        again = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
        torch.testing.assert_close(again(**batches[0]).logits, trained, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_holds_the_factors(prepared_by, tiny_llama, tmp_path):
    first = prepared_by("lorta", tiny_llama(), r=R)
    randomized(first)
    first.model.save_pretrained(tmp_path)
    again = prepared_by("lorta", tiny_llama(), r=R)
    peft.set_peft_model_state_dict(again.model, load_peft_weights(str(tmp_path)))
    state = first.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in again.model.state_dict().items())
    tensors = {id(layer.lora_B["default"].tensor) for _, layer in lora_layers(again.model)}
    assert len(tensors) == 2


def test_it_says_what_it_does_not_find(prepared_by, tiny_gpt2, tiny_llama, tiny_bert_classifier):
    with pytest.raises(ConfigError, match="a fused matrix of q, k and v does not work"):
        prepared_by("lorta", tiny_gpt2(), r=2)
    with pytest.raises(ConfigError, match=r"pooler\.dense has no layer's number in its name"):
        prepared_by("lorta", tiny_bert_classifier(), r=2, head_modules=["pooler.dense"])
    model = tiny_llama(intermediate_size=30)
    with pytest.raises(ConfigError, match="up_proj has no heads of 4, and LoRTA"):
        prepared_by("lorta", model, r=2, head_modules=["up_proj"])
    assert not any("lora" in name for name, _ in model.named_modules())


def test_the_heads_of_t5_have_their_own_width(prepared_by, tiny_t5):
    model = tiny_t5(d_kv=4)  # 2 heads of 4, not of 16 / 2
    names = {"head_modules": ["q", "k", "v"], "output_modules": ["o"]}
    prepared = prepared_by("lorta", model, r=R, task_type="SEQ_2_SEQ_LM", **names)
    [(heads, factors)] = randomized(prepared).items()
    assert (heads, len(factors["head"])) == (2, 4)
