"""Only what the assistant says is learned, whatever the chat template; no row is split in vain."""

import copy
import logging
import re

import chat_templates
import pytest
from chats import ASKED, CALLS, CHAT, SYSTEM, THOUGHT
from datasets import Dataset

from tlora.errors import ConfigError, DataError
from tlora.tasks import rendering, tokens
from tlora.tasks.dataconfig import DataConfig
from tlora.tasks.jsonl import Jsonl

SPECIAL = re.compile(r"<\|?[a-zA-Z_]+\|?>|\[/?INST\]")


@pytest.fixture
def encoded(tiny_tokenizer):
    """Return the rows of a chat as they are trained on, with the trained part in «»."""

    def encode(template, messages, **row):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = getattr(chat_templates, template, template)
        special = sorted({*SPECIAL.findall(tokenizer.chat_template)} - {"<think>"})
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        row |= {"messages": messages}
        found = tokens.encodings(tokens.causal, tokenizer, row, DataConfig())
        return [tokens.marked(tokenizer, each["input_ids"], each["labels"]) for each in found]

    return encode


IM = "<|im_start|>"
TWO_TURNS = {
    "SMOLLM2": f"{IM}system\nYou are SmolLM<|im_end|>\n{IM}user\nhi<|im_end|>\n{IM}assistant\n"
    f"«hello<|im_end|>»\n{IM}user\nbye<|im_end|>\n{IM}assistant\n«so long<|im_end|>»\n",
    "LLAMA3": "<s><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«hello<|eot_id|>»"
    "<|start_header_id|>user<|end_header_id|>\n\nbye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«so long<|eot_id|>»",
    "GEMMA3": "<s><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n«hello<end_of_turn>»"
    "\n<start_of_turn>user\nbye<end_of_turn>\n<start_of_turn>model\n«so long<end_of_turn>»\n",
    "MISTRAL": "<s>[INST] hi[/INST]« hello</s>»[INST] bye[/INST]« so long</s>»",
    "PHI3": "<|user|>\nhi<|end|>\n<|assistant|>\n«hello<|end|>»\n<|user|>\nbye<|end|>\n"
    "<|assistant|>\n«so long<|end|>\n</s>»",
    "QWEN25": f"{IM}system\nYou are Qwen<|im_end|>\n{IM}user\nhi<|im_end|>\n{IM}assistant\n"
    f"«hello<|im_end|>»\n{IM}user\nbye<|im_end|>\n{IM}assistant\n«so long<|im_end|>»\n",
}


@pytest.mark.parametrize("template", TWO_TURNS)
def test_both_answers_of_a_chat_are_learned_in_one_row(encoded, template):
    assert encoded(template, CHAT) == [TWO_TURNS[template]]


def test_a_template_that_drops_earlier_thinking_gives_a_row_for_each_answer(encoded):
    start = f"{IM}user\nhi<|im_end|>\n{IM}assistant\n"
    assert encoded("QWEN3", THOUGHT) == [
        f"{start}«<think>\ngreet\n</think>\n\nhello<|im_end|>»\n",
        f"{start}hello<|im_end|>\n{IM}user\nbye<|im_end|>\n{IM}assistant\n"
        "«<think>\npart\n</think>\n\nso long<|im_end|>»\n",
    ]


def test_without_thinking_the_empty_one_is_learned_where_the_model_would_write_it(encoded):
    (row,) = encoded("QWEN3", CHAT[:2])
    assert row == (
        f"{IM}user\nhi<|im_end|>\n{IM}assistant\n«<think>\n\n</think>\n\nhello<|im_end|>»\n"
    )
    assert [row.count("<think>") for row in encoded("QWEN3", CHAT)] == [1, 1]


def test_a_template_that_moves_the_system_message_gives_a_row_for_each_answer(encoded):
    assert encoded("MISTRAL", [SYSTEM, *CHAT]) == [
        "<s>[INST] Be brief.\n\nhi[/INST]« hello</s>»",
        "<s>[INST] hi[/INST] hello</s>[INST] Be brief.\n\nbye[/INST]« so long</s>»",
    ]


def test_a_system_message_that_only_prompts_have_is_trained_with_as_the_model_is_asked(encoded):
    assert encoded("MISTRAL_V3", [SYSTEM, *CHAT]) == encoded("MISTRAL", [SYSTEM, *CHAT])
    echo = [SYSTEM, CHAT[0], {"role": "assistant", "content": "hi hi"}]
    assert encoded("MISTRAL_V3", echo) == ["<s>[INST] Be brief.\n\nhi[/INST]« hi hi</s>»"]


def test_an_answer_is_learned_from_where_it_leaves_the_prompt_for_it(encoded):
    assert encoded("DEEPSEEK_R1", THOUGHT)[-1] == (
        "<s><User>hi<Assistant>\n\nhello</s><User>bye<Assistant>«\n\nso long</s>»"
    )


@pytest.mark.parametrize("template", ["SMOLLM2", "LLAMA3", "PHI3", "QWEN25"])
def test_an_assistant_that_opens_the_chat_is_not_learned_nor_is_anything_the_user_says(
    encoded, template
):
    (row,) = encoded(template, [{"role": "assistant", "content": "Welcome!"}, *CHAT])
    learned = "".join(re.findall("«(.*?)»", row, re.DOTALL))
    assert SPECIAL.sub("", learned).replace("</s>", "").split() == ["helloso", "long"]


def test_turns_before_the_first_to_learn_are_prompt(encoded):
    (row,) = encoded("SMOLLM2", CHAT, first=2)
    assert re.findall("«(.*?)»", row) == ["so long<|im_end|>"]


def test_tools_and_calls_are_written_by_the_template_and_calls_are_learned(encoded):
    (row,) = encoded("QWEN25", CALLS, tools=[{"type": "function", "function": {"name": "get"}}])
    assert row.startswith(f'{IM}system\n{{"type": "function", "function": {{"name": "get"}}}}')
    assert re.findall("«(.*?)»", row) == [
        '<tool_call>get {"city": "Rome"}</tool_call><|im_end|>',
        "sunny<|im_end|>",
    ]


@pytest.mark.parametrize("row", [{"messages": CALLS}, {"messages": CHAT, "tools": [ASKED]}])
def test_a_template_that_would_drop_tools_is_refused(encoded, row):
    with pytest.raises(DataError, match=r"has `tool.*does not render; remove them"):
        encoded("SMOLLM2", **row)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_a_template_that_would_drop_thoughts_is_refused(encoded, field):
    chat = [CHAT[0], CHAT[1] | {field: "greet"}]
    named = chat_templates.SMOLLM2 + "{# no thinking, no reasoning #}"
    with pytest.raises(DataError, match=f"has `{field}`, which .* or move the text to `content`"):
        encoded(named, chat)
    writes = "{% for m in messages %}{{ (m." + field + " or '') + m.content }}{% endfor %}"
    assert encoded(writes, chat) == ["hi«greethello»"]


MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% generation %}|{% endgeneration %}{% else %}{{ m.content }}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endif %}{% endfor %}"
)
WHOLE = MARKED.replace("{% endgeneration %}{% generation %}", "")


def test_turns_with_several_marks_before_the_first_to_learn_are_prompt(encoded):
    assert encoded(MARKED, CHAT, first=2) == ["hihello|bye«so long|»"]


def test_marks_of_a_turn_that_opens_the_chat_are_not_learned(encoded):
    messages = [{"role": "assistant", "content": "A"}, *CHAT]
    assert encoded(MARKED, messages) == ["A|hi«hello|»bye«so long|»"]
    assert encoded(WHOLE, messages, first=3) == ["A|hihello|bye«so long|»"]


def test_a_template_with_marks_gets_the_chat_in_the_form_that_it_wants(encoded):
    parts = WHOLE.replace("m.content }}", "m.content[0].text }}")
    assert encoded(parts, CHAT) == ["hi«hello|»bye«so long|»"]


@pytest.mark.parametrize("fault", ["{% endfr %}", "{{ 1 / 0 }}", "{{ [][0].x }}", ""])
def test_a_marked_template_that_raises_is_one_sentence(encoded, fault):
    with pytest.raises(DataError, match=r"^the chat template rejects the chat \("):
        encoded(MARKED + fault, [CHAT[0], {"role": "tool", "content": "x"}, CHAT[1]])


@pytest.mark.parametrize("template", ["SMOLLM2", "QWEN3", WHOLE])
def test_turns_of_weight_0_are_not_learned(encoded, template):
    chat = [CHAT[0], CHAT[1] | {"weight": 0}, CHAT[2], CHAT[3] | {"weight": 1}]
    learned = re.findall("«(.*?)»", "".join(encoded(template, chat)), re.DOTALL)
    assert len(learned) == 1
    assert "so long" in learned[0]


def test_turns_of_weight_0_need_marks_of_whole_turns(encoded):
    with pytest.raises(
        DataError, match="turns of weight 0, but the chat template does not mark whole turns"
    ):
        encoded(MARKED, [CHAT[0], CHAT[1] | {"weight": 0}])


def test_arguments_are_text_where_the_template_wants_text(encoded):
    template = (
        "{% for m in messages %}{{ m['content'] if 'content' in m else"
        " m.tool_calls[0].function.name + m.tool_calls[0].function.arguments }}{% endfor %}"
    )
    assert encoded(template, CALLS) == ['weather?«get{"city": "Rome"}»sun«sunny»']


def test_a_template_that_raises_is_one_sentence_with_the_row(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = chat_templates.GEMMA3
    task = Jsonl(DataConfig())
    task.settle(True, None)
    raw = Dataset.from_list([{"messages": CHAT}, {"messages": [CHAT[0], *CHAT, *CHAT]}])
    task.settle_columns(raw.column_names)
    rows = task.rows(raw, "train.jsonl")
    with pytest.raises(DataError) as error:
        tokens.tokenized(raw, rows, task, tokens.causal, tokenizer, "train.jsonl")
    assert re.fullmatch(
        r"train\.jsonl, row 2: the chat template rejects the chat \(Conversation roles must"
        r" alternate user/assistant/user/assistant/\): \[\{'role': 'user'.{170,190}\.\.\.; fix or"
        r" drop the row, or use another --data\.chat_template\.",
        str(error.value),
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }",
        "{{ 1 // (messages | length - 2) }}",
        "{{ messages[7].content.strip() }}",
        "{{ messages[0].content.index('~') }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ messages | nosuch }}",
    ],
)
def test_a_template_with_a_fault_of_its_own_is_one_sentence(encoded, template):
    with pytest.raises(DataError, match=r"^the chat template rejects the chat \(.+\): \[\{"):
        encoded(template, CHAT[:2])


def test_chat_rows_without_any_template_are_refused_with_the_way_out(tiny_tokenizer):
    with pytest.raises(DataError, match=r"no chat template.*--data\.chat_template chatml"):
        tokens.causal(tiny_tokenizer, {"messages": CHAT}, DataConfig())


NAMES = sorted(file.stem for file in rendering._TEMPLATES.glob("*.jinja"))


@pytest.mark.parametrize("name", NAMES)
def test_a_template_by_name_teaches_each_answer_and_the_end_of_it(tiny_tokenizer, name):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    rendering.set_template(tokenizer, name)
    row = {"messages": [SYSTEM, *CHAT]}
    (encoded,) = tokens.encodings(tokens.causal, tokenizer, row, DataConfig())
    text = tokens.marked(tokenizer, encoded["input_ids"], encoded["labels"])
    learned = re.findall("«(.*?)»", text, re.DOTALL)
    assert [part.strip().split("<")[0] for part in learned] == ["hello", "so long"]
    # The model's own closing token ends each answer, so that generation stops there.
    assert all(part.endswith("</s>") for part in learned)
    assert "Be brief." in text
    prompt = rendering.written(tokenizer, {"messages": [SYSTEM, *CHAT[:3]]}, prompt=True)
    whole = rendering.written(tokenizer, row)
    assert whole.startswith(prompt)
    assert whole[len(prompt) :].lstrip().startswith("so long")


def test_another_name_gets_a_suggestion():
    with pytest.raises(ConfigError, match=r"is 'chatlm'; .*Did you mean 'chatml'"):
        rendering.named_template("chatlm")


def test_a_template_by_name_opens_with_the_token_that_the_tokenizer_opens_with(opening):
    rendering.set_template(opening, "chatml")
    encoded = tokens.causal(opening, {"messages": CHAT}, DataConfig())
    assert encoded["input_ids"].count(opening.bos_token_id) == 1
    assert encoded["input_ids"][0] == opening.bos_token_id


@pytest.fixture
def opening(tiny_tokenizer):
    """A tokenizer that opens each text with <s>."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize(
    "row",
    [{"text": "<s>a journey"}, {"text": "a journey"}, {"prompt": "<s>a", "response": " journey"}],
)
def test_an_opening_token_in_the_text_is_not_doubled(opening, row):
    encoded = tokens.causal(opening, row, DataConfig())
    assert opening.decode(encoded["input_ids"]) == "<s>a journey</s>"


def test_an_empty_answer_is_called_that(chatml, caplog):
    def tokenized(*answers):
        raw = Dataset.from_list([{"prompt": "hi", "response": answer} for answer in answers])
        task = Jsonl(DataConfig(format="chat", loss_on="response"))
        task.settle(True, 64)
        rows = task.rows(raw, "train.jsonl")
        return tokens.tokenized(raw, rows, task, tokens.causal, chatml, "train.jsonl")

    with caplog.at_level(logging.WARNING):
        assert len(tokenized("yes", "")) == 1
    assert "skipping 1 of 2 rows with nothing to train on (an empty response)" in caplog.text
    with pytest.raises(DataError, match="no row has a token to train on: the responses are empty"):
        tokenized("", "")
    with pytest.raises(DataError, match=r"within 64 tokens; shorten the rows"):
        tokenized_long = "hi " * 99
        raw = Dataset.from_list([{"prompt": tokenized_long, "response": "yes"}])
        task = Jsonl(DataConfig(format="chat"))
        task.settle(True, 64)
        tokens.tokenized(raw, task.rows(raw, "t"), task, tokens.causal, chatml, "t")


@pytest.fixture
def chatml(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    # Without an end of its own, an empty answer has nothing that could be learned.
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    return tokenizer


def test_a_template_that_reads_lists_of_parts_gets_them(encoded):
    template = "{% for m in messages %}{% for p in m['content'] %}{{ p.text }}{% endfor %}|"
    template += "{% endfor %}"
    assert encoded(template, CHAT) == ["hi|«hello|»bye|«so long|»"]
