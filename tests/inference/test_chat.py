"""Conversations to prompts and replies, by models with random weights."""

import copy

import pytest
import torch

from tlora.evaluation.mtbench.questions import Question
from tlora.inference.chat import (
    INSTRUCTION,
    TEMPLATE,
    ChatForm,
    Decoding,
    form_of,
    write_replies,
)
from tlora.inference.mtbench import Asking, answer
from tlora.tasks.base import INSTRUCTION_PROMPT

SHORT = Decoding(max_new_tokens=6, batch_size=2)
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chatty(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="module")
def model(tiny_llama):
    """Weights large enough that replies depend on the prompts."""
    return tiny_llama(initializer_range=0.5, max_position_embeddings=512)


def plain(texts, temperature=0.0):
    return [(text, temperature) for text in texts]


def alone(model, tokenizer, text, tokens=6):
    """What generation says of one prompt, without any of our code."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    out = model.generate(ids, do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


TEXTS = ["short", "a longer prompt of several words", "the answer is", "x", "one more of them"]
BARE = ChatForm("bare", lambda _, messages: messages[-1]["content"], special_tokens=True)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batches_change_no_reply(model, tiny_tokenizer, size):
    decoding = Decoding(max_new_tokens=6, batch_size=size)
    written = write_replies(model, tiny_tokenizer, plain(TEXTS), BARE, decoding)
    expected = [alone(model, tiny_tokenizer, text) for text in TEXTS]
    assert written.replies == expected
    assert len(set(expected)) > 1
    assert written.shortened == 0


def test_an_encoder_decoder_model_replies_too(tiny_t5, tiny_tokenizer):
    model = tiny_t5(initializer_factor=3.0)
    written = write_replies(model, tiny_tokenizer, plain(TEXTS), BARE, SHORT)
    ids = tiny_tokenizer(TEXTS[1], return_tensors="pt")["input_ids"]
    out = model.generate(ids, do_sample=False, max_new_tokens=6)
    assert written.replies[1] == tiny_tokenizer.decode(out[0], skip_special_tokens=True).strip()


def test_sampling_has_a_seed_and_leaves_the_global_generator_alone(model, tiny_tokenizer):
    def sampled(seed):
        decoding = Decoding(max_new_tokens=6, batch_size=5, seed=seed)
        return write_replies(model, tiny_tokenizer, plain(TEXTS, 2.0), BARE, decoding).replies

    state = torch.random.get_rng_state()
    first = sampled(0)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    assert sampled(0) == first
    assert sampled(1) != first


def test_each_prompt_has_its_own_temperature(model, tiny_tokenizer):
    mixed = [(text, 2.0 if n % 2 else 0.0) for n, text in enumerate(TEXTS)]
    replies = write_replies(model, tiny_tokenizer, mixed, BARE, SHORT).replies
    greedy = write_replies(model, tiny_tokenizer, plain(TEXTS), BARE, SHORT).replies
    assert replies[::2] == greedy[::2]
    assert replies[1::2] != greedy[1::2]


def test_what_does_not_fit_into_the_context_loses_its_beginning(tiny_llama, tiny_tokenizer):
    model = tiny_llama(initializer_range=0.5, max_position_embeddings=32)
    long = "the answer is " * 20
    ids = tiny_tokenizer(long)["input_ids"]
    assert len(ids) > 32
    written = write_replies(model, tiny_tokenizer, plain(["x", long]), BARE, SHORT)
    assert written.shortened == 1
    kept = torch.tensor([ids[-26:]])  # 32 less the 6 of the reply
    out = model.generate(kept, do_sample=False, max_new_tokens=6, pad_token_id=0)
    expected = tiny_tokenizer.decode(out[0, 26:], skip_special_tokens=True).strip()
    assert written.replies[1] == expected
    greedy = Decoding(max_new_tokens=1024)
    written = write_replies(model, tiny_tokenizer, plain([long]), BARE, greedy)
    assert len(tiny_tokenizer(written.replies[0])["input_ids"]) <= 16


def test_a_reply_ends_before_the_next_turn(model, tiny_tokenizer):
    whole = alone(model, tiny_tokenizer, TEXTS[1], tokens=12)
    stop = whole[4:6]
    form = ChatForm("stopping", BARE.render, special_tokens=True, stops=(stop, "never"))
    decoding = Decoding(max_new_tokens=12)
    replies = write_replies(model, tiny_tokenizer, plain(TEXTS), form, decoding).replies
    assert replies[1] == whole[: whole.index(stop)].strip()
    assert all(stop not in reply for reply in replies)


def test_the_model_is_as_it_was(model, tiny_tokenizer):
    model.train()
    try:
        write_replies(model, tiny_tokenizer, plain(TEXTS[:1]), BARE, SHORT)
        assert model.training
    finally:
        model.eval()


def test_a_tokenizer_without_padding_will_do(model, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = None
    written = write_replies(model, tokenizer, plain(TEXTS), BARE, SHORT)
    assert (
        written.replies == write_replies(model, tiny_tokenizer, plain(TEXTS), BARE, SHORT).replies
    )


CHAT = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Two?"},
]


def test_prompts_are_the_chat_template_or_the_papers(tiny_tokenizer, chatty):
    assert form_of(chatty) is TEMPLATE
    assert TEMPLATE.render(chatty, CHAT) == "<user>One?\n<assistant>Yes.\n<user>Two?\n<assistant>"
    assert form_of(tiny_tokenizer) is INSTRUCTION
    first = INSTRUCTION_PROMPT.format(instruction="One?")
    assert INSTRUCTION.render(tiny_tokenizer, CHAT[:1]) == first
    assert INSTRUCTION.render(tiny_tokenizer, CHAT) == (
        f"{first}Yes.\n\n### Instruction:\nTwo?\n\n### Response:"
    )
    system = {"role": "system", "content": "Be brief."}
    assert INSTRUCTION.render(tiny_tokenizer, [system, CHAT[0]]) == f"Be brief.\n\n{first}"


def test_braces_in_a_question_stay(tiny_tokenizer):
    messages = [{"role": "user", "content": "What is {x}?"}]
    assert "What is {x}?" in INSTRUCTION.render(tiny_tokenizer, messages)


QUESTIONS = [
    Question("1", "math", ("What is 1?", "And 2?"), ("1", "2")),
    Question("2", "writing", ("Write of the sea at night.", "Shorter.")),
    Question("3", "math", ("x", "y"), ("1", "2")),
]


@pytest.mark.parametrize("kind", ["template", "instruction"])
def test_the_second_turn_follows_the_models_own_first_answer(model, tiny_tokenizer, chatty, kind):
    tokenizer = chatty if kind == "template" else tiny_tokenizer
    form = form_of(tokenizer)
    answers = answer(QUESTIONS, model, tokenizer, Asking(form, SHORT, greedy=True))
    for question, given in zip(QUESTIONS, answers.answered, strict=True):
        assert given.question is question
        first = [{"role": "user", "content": question.turns[0]}]
        second = [
            *first,
            {"role": "assistant", "content": given.answers[0]},
            {"role": "user", "content": question.turns[1]},
        ]
        rendered = tuple(form.render(tokenizer, messages) for messages in (first, second))
        assert given.prompts == rendered
        for prompt, reply in zip(rendered, given.answers, strict=True):
            assert reply == alone(model, tokenizer, prompt)


def test_only_categories_with_a_temperature_are_sampled(model, chatty):
    def texts(**fields):
        asking = Asking(TEMPLATE, Decoding(max_new_tokens=6, batch_size=4, **fields))
        return [each.answers for each in answer(QUESTIONS, model, chatty, asking).answered]

    one, other = texts(seed=0), texts(seed=1)
    assert one[0] == other[0]
    assert one[2] == other[2]
    assert one[1] != other[1]


def test_an_adapter_and_its_merged_model_answer(tiny_llama, chatty):
    from peft import LoraConfig, get_peft_model

    base = tiny_llama(initializer_range=0.5, max_position_embeddings=512)
    plain_texts = answer(QUESTIONS, base, chatty, Asking(TEMPLATE, SHORT, greedy=True)).answered
    adapted = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False)).eval()
    beside = answer(QUESTIONS, adapted, chatty, Asking(TEMPLATE, SHORT, greedy=True)).answered
    merged = adapted.merge_and_unload()
    assert answer(QUESTIONS, merged, chatty, Asking(TEMPLATE, SHORT, greedy=True)).answered == (
        beside
    )
    assert beside != plain_texts
