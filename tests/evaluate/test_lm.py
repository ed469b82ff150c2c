"""The replies are those of the plain model, one prompt at a time, whatever the batch."""

import pytest
import torch
from lm_eval.api.instance import Instance
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from transformers import AutoTokenizer

from tlora.demo.run import BASE_MODEL
from tlora.evaluate import loading
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evaluated_models import EvaluatedModel, resolve
from tlora.evaluate.lm import TransformersLM


def settings(**fields):
    return EvalConfig(**{"models": [BASE_MODEL], "tasks": ["t"]} | fields)


def requests(prompts, **generation):
    generation = {"until": [], "max_gen_toks": 12, "do_sample": False} | generation
    return [
        Instance("generate_until", {}, (prompt, dict(generation)), 0, metadata=("t", n, 1))
        for n, prompt in enumerate(prompts)
    ]


def replies(evaluated, config, prompts, **generation):
    lm = TransformersLM(
        loading.load(evaluated, config),
        loading.load_tokenizer(evaluated, config),
        config,
        evaluated.head,
    )
    return lm.generate_until(requests(prompts, **generation))


def one_by_one(model, tokenizer, prompts, tokens):
    """What the definition says: no padding, no batch, greedy."""
    said = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        for _ in range(tokens):
            with torch.no_grad():
                token = model(input_ids=ids).logits[0, -1].argmax()
            if token == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token.reshape(1, 1)], dim=1)
        new = ids[0, len(tokenizer(prompt)["input_ids"]) :]
        said.append(tokenizer.decode(new, skip_special_tokens=True))
    return said


@pytest.fixture(scope="module")
def prompts(demo_rows):
    return [row["prompt"] for row in demo_rows]


@pytest.fixture(scope="module")
def models(demo_adapter):
    return resolve(settings(models=[demo_adapter], with_base=True, with_merged=True))


def test_batches_of_1_and_32_give_the_replies_of_the_plain_model(models, prompts):
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    said = {}
    for evaluated in models:
        alone = one_by_one(loading.load(evaluated, settings()), tokenizer, prompts, 12)
        for size in (1, 32):
            found = replies(evaluated, settings(batch_size=size), prompts)
            assert found == alone, (evaluated.name, size)
        said[evaluated.kind] = alone
    assert said["adapter"] == said["merged"]
    changed = sum(a != b for a, b in zip(said["base"], said["adapter"], strict=True))
    assert changed > len(prompts) // 4  # else the adapter would show nothing


WISHES = {"repetition_penalty": 5.0, "num_beams": 3, "no_repeat_ngram_size": 1, "min_new_tokens": 9}


def test_a_checkpoints_own_wishes_of_generation_do_not_count(models, prompts):
    evaluated = models[1]
    some = prompts[:12]
    plain = replies(evaluated, settings(), some)
    model = loading.load(evaluated, settings())
    bare = model.get_base_model()
    bare.generation_config.update(**WISHES)
    before = bare.generation_config.to_dict()
    lm = TransformersLM(model, loading.load_tokenizer(evaluated, settings()), settings(), "causal")
    assert lm.generate_until(requests(some)) == plain
    assert bare.generation_config.to_dict() == before
    # Given by the user they count, one and all.
    given = lm.generate_until(requests(some, **WISHES))
    assert given != plain
    bare.generation_config.update(**dict.fromkeys(WISHES))
    assert lm.generate_until(requests(some, **WISHES)) == given


def test_an_encoder_decoder_begins_as_its_checkpoint_says_in_any_batch(saved, tiny_t5):
    folder = saved(tiny_t5())
    evaluated = EvaluatedModel("t5", "base", folder, None, "seq2seq")
    plain = replies(evaluated, settings(batch_size=1), PROMPTS, max_gen_toks=6)
    assert plain == replies(evaluated, settings(batch_size=3), PROMPTS, max_gen_toks=6)
    model = loading.load(evaluated, settings())
    model.generation_config.update(**WISHES)
    lm = TransformersLM(model, loading.load_tokenizer(evaluated, settings()), settings(), "seq2seq")
    assert lm.generate_until(requests(PROMPTS, max_gen_toks=6)) == plain
    for start in (0, 5):
        model.generation_config.decoder_start_token_id = start
        ids = torch.tensor([lm.tok_encode(PROMPTS[0])])
        out = lm._model_generate(ids, ids.shape[1] + 1, [])
        assert out[0, 0] == start


def test_each_row_ends_at_its_own_stop_sequence(models, prompts):
    base = models[0]
    whole = replies(base, settings(), prompts, max_gen_toks=20)
    stop = ["1", "?:"]
    cut = [min((text.split(s)[0] for s in stop), key=len) for text in whole]
    assert len({len(text) for text in cut}) > 5
    for size in (1, 32):
        assert replies(base, settings(batch_size=size), prompts, max_gen_toks=20, until=stop) == cut


def test_a_prompt_that_is_too_long_loses_its_beginning_and_is_counted(models, prompts):
    base = models[0]
    config = settings(max_length=32)
    lm = TransformersLM(
        loading.load(base, config), loading.load_tokenizer(base, config), config, base.head
    )
    long = [prompt * 3 for prompt in prompts[:6]]
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    kept = [tokenizer.decode(tokenizer(prompt)["input_ids"][-20:]) for prompt in long]
    assert lm.generate_until(requests([*long, "1+1="])) == [
        *replies(base, settings(), kept),
        *replies(base, settings(), ["1+1="]),
    ]
    assert lm.truncated == len(long)


def test_prompts_are_tokenized_as_in_training_without_a_closing_token(saved, tiny_llama):
    from tokenizers.processors import TemplateProcessing

    folder = saved(tiny_llama())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = tokenizer("a b")["input_ids"]
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert tokenizer("a b")["input_ids"] == [1, *plain, 2]
    lm = TransformersLM(tiny_llama(), tokenizer, settings(), "causal")
    assert lm.tok_encode("a b") == [1, *plain]
    ids, mask = lm.tok_batch_encode(["a b", "a b a b a b"])
    assert ids[0, mask[0].bool()].tolist() == [1, *plain]
    assert mask[0].tolist() == sorted(mask[0].tolist())  # padded on the left


def likelihoods(model, tokenizer, pairs, head, size):
    lm = TransformersLM(model, tokenizer, settings(batch_size=size), head)
    asked = [
        Instance("loglikelihood", {}, pair, 0, metadata=("t", n, 1)) for n, pair in enumerate(pairs)
    ]
    return lm.loglikelihood(asked)


PROMPTS = ["a", "The answer is: 72", "Natalia sold clips to 48 of her friends in April."]
PAIRS = [("The answer is:", " 72"), ("a", " charming and often"), ("Natalia sold", " clips to 48")]


def test_likelihoods_are_the_models(tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    for (context, text), (found, _) in zip(
        PAIRS, likelihoods(model, tiny_tokenizer, PAIRS, "causal", 32), strict=True
    ):
        start = len(tiny_tokenizer(context)["input_ids"])
        ids = torch.tensor([tiny_tokenizer(context + text)["input_ids"]])
        with torch.no_grad():
            logs = model(input_ids=ids).logits.log_softmax(-1)
        expected = sum(logs[0, n - 1, ids[0, n]].item() for n in range(start, ids.shape[1]))
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("head", ["causal", "seq2seq"])
def test_an_adapter_of_adalora_is_scored_from_logits(head, tiny_llama, tiny_t5, tiny_tokenizer):
    model = (tiny_llama if head == "causal" else tiny_t5)()
    plain = likelihoods(model, tiny_tokenizer, PAIRS, head, 2)
    config = AdaLoraConfig(
        init_r=4,
        total_step=10,
        target_modules=["q_proj"] if head == "causal" else ["q"],
        task_type="CAUSAL_LM" if head == "causal" else "SEQ_2_SEQ_LM",
        inference_mode=True,
    )
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_E" in name:
                value.fill_(3.0)
    one = likelihoods(adapted, tiny_tokenizer, PAIRS, head, 1)
    assert [v for v, _ in one] == pytest.approx(
        [v for v, _ in likelihoods(adapted, tiny_tokenizer, PAIRS, head, 32)], abs=1e-4
    )
    assert one != plain


def test_a_head_that_the_adapter_replaces_is_not_tied_back(tiny_llama, tiny_tokenizer):
    model = tiny_llama(tie_word_embeddings=True)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    head = adapted.base_model.model.lm_head.modules_to_save["default"].weight
    with torch.no_grad():
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(0)))
    kept = head.clone()
    lm = TransformersLM(adapted, tiny_tokenizer, settings(), "causal")
    assert torch.equal(lm.model.get_output_embeddings().modules_to_save["default"].weight, kept)
    assert "tie_weights" not in vars(adapted)
