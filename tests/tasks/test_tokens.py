import logging

import pyarrow
import pytest
from datasets import Dataset

from tlora.errors import DataError
from tlora.tasks import tokens
from tlora.tasks.dataconfig import DataConfig
from tlora.tasks.jsonl import Jsonl

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}.{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]


@pytest.fixture
def chat_tokenizer(tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def learned_text(tokenizer, encoded):
    return tokenizer.decode([label for label in encoded["labels"] if label != tokens.IGNORED])


def test_only_the_response_and_its_end_are_learned(tiny_tokenizer):
    row = {"prompt": "The answer", "response": " is: 72"}
    encoded = tokens.causal(tiny_tokenizer, row, DataConfig())
    assert tiny_tokenizer.decode(encoded["input_ids"]) == "The answer is: 72</s>"
    assert learned_text(tiny_tokenizer, encoded) == " is: 72</s>"
    prompt = tiny_tokenizer("The answer")["input_ids"]
    assert encoded["input_ids"][: len(prompt)] == prompt
    assert encoded["labels"][: len(prompt)] == [tokens.IGNORED] * len(prompt)


def test_loss_on_all_learns_the_prompt_too(tiny_tokenizer):
    row = {"prompt": "The answer", "response": " is: 72"}
    encoded = tokens.causal(tiny_tokenizer, row, DataConfig(loss_on="all"))
    assert encoded["labels"] == encoded["input_ids"]


def test_plain_text_is_learned_whole_and_ended_once(tiny_tokenizer):
    encoded = tokens.causal(tiny_tokenizer, {"text": "a journey"}, DataConfig())
    assert encoded["labels"] == encoded["input_ids"]
    assert encoded["input_ids"].count(tiny_tokenizer.eos_token_id) == 1


def test_what_is_too_long_loses_its_end(tiny_tokenizer):
    row = {"prompt": "The answer", "response": " is: 72"}
    whole = tokens.causal(tiny_tokenizer, row, DataConfig())
    cut = tokens.causal(tiny_tokenizer, row, DataConfig(max_length=7))
    assert (whole.pop("cut"), cut.pop("cut")) == (False, True)
    assert cut == {name: values[:7] for name, values in whole.items()}
    assert len(whole["input_ids"]) > 7


@pytest.mark.parametrize(
    "row",
    [
        {"text": "hi " * 200},
        {"prompt": "hi " * 200, "response": "yo " * 200},
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "y" * 600},
            ]
        },
    ],
    ids=["text", "pair", "chat"],
)
def test_the_tokenizer_does_not_warn_of_what_is_cut_anyway(chat_tokenizer, row):
    chat_tokenizer.deprecation_warnings.clear()
    encode = tokens.seq2seq if "prompt" in row else tokens.causal
    for make in {encode, tokens.causal}:
        make(chat_tokenizer, row, DataConfig(max_length=64))
    # The tokenizer warns once, and notes it.
    assert not chat_tokenizer.deprecation_warnings


def test_every_assistant_turn_of_a_chat_is_learned_and_nothing_else(chat_tokenizer):
    encoded = tokens.causal(chat_tokenizer, {"messages": CHAT}, DataConfig())
    text = chat_tokenizer.decode(encoded["input_ids"])
    assert text == "user:hiassistant:hello.user:byeassistant:so long."
    assert learned_text(chat_tokenizer, encoded) == "hello.so long."


def test_a_chat_may_be_learned_whole_by_a_template_without_marks(chat_tokenizer):
    chat_tokenizer.chat_template = TEMPLATE.replace("{% generation %}", "").replace(
        "{% endgeneration %}", ""
    )
    encoded = tokens.causal(chat_tokenizer, {"messages": CHAT}, DataConfig(loss_on="all"))
    assert encoded["labels"] == encoded["input_ids"]


def test_seq2seq_has_source_and_target(tiny_tokenizer):
    row = {"prompt": "The answer", "response": "72"}
    encoded = tokens.seq2seq(tiny_tokenizer, row, DataConfig())
    assert encoded["input_ids"] == tiny_tokenizer("The answer")["input_ids"]
    assert encoded["labels"] == tiny_tokenizer("72")["input_ids"]


def test_a_pair_is_tokenized_together_and_cut_to_length(tiny_tokenizer):
    row = {"text": "a journey", "text_pair": "the task", "label": 1}
    encoded = tokens.labeled(tiny_tokenizer, row, DataConfig(max_length=6))
    assert len(encoded["input_ids"]) == 6
    assert encoded["labels"] == 1


def test_the_collator_masks_padding(tiny_tokenizer):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5], "labels": [5]}]
    batch = tokens.causal_collator(tiny_tokenizer)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [5, -100, -100]]


@pytest.fixture
def tokenize(tiny_tokenizer):
    def run(prompts, max_length):
        data = DataConfig(max_length=max_length, format="raw")
        task = Jsonl(data)
        task.settle_columns(["prompt", "response"])
        raw = Dataset.from_list([{"prompt": prompt, "response": "72"} for prompt in prompts])
        rows = task.rows(raw, "train.jsonl")
        return tokens.tokenized(raw, rows, task, tokens.causal, tiny_tokenizer, "train.jsonl")

    return run


def test_rows_without_a_token_to_learn_are_left_out_and_counted(tokenize, caplog):
    with caplog.at_level(logging.WARNING):
        kept = tokenize(["hi", "a charming and often affecting journey" * 9], max_length=20)
    assert len(kept) == 1
    assert sorted(kept.column_names) == ["input_ids", "labels"]
    assert "train.jsonl: skipping 1 of 2 rows without a token to train on" in caplog.text


def test_no_row_left_is_an_error(tokenize):
    with pytest.raises(DataError, match="no row has a token to train on within 3 tokens"):
        tokenize(["a charming journey"], max_length=3)


def test_rows_whose_response_is_cut_are_counted(tokenize, caplog, tiny_tokenizer):
    whole = tokenize(["hi", "a charming journey"], max_length=256)
    longest = max(map(len, whole["input_ids"]))
    assert not caplog.records
    assert whole.column_names == ["input_ids", "labels"]
    tokenize(["hi", "a charming journey"], max_length=longest)
    assert not caplog.records
    # One token less, and the closing one is lost.
    tokenize(["hi", "a charming journey"], max_length=longest - 1)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"train.jsonl: the responses of 1 of 2 rows are truncated at `data.max_length`,"
        f" {longest - 1} tokens; raise --data.max_length."
    )


def test_a_cut_that_costs_nothing_to_learn_is_not_counted(chat_tokenizer):
    row = {"messages": [*CHAT, {"role": "user", "content": "and then?"}]}
    length = len(tokens.causal(chat_tokenizer, row, DataConfig())["input_ids"])
    assert not tokens.causal(chat_tokenizer, row, DataConfig(max_length=length - 1))["cut"]


def test_many_rows_are_kept_in_a_file_and_few_bytes_a_token(tokenize, monkeypatch):
    prompts = ["a" * 40 + str(number) for number in range(300)]
    few = tokenize(prompts, max_length=100)
    monkeypatch.setattr(tokens, "_IN_MEMORY", 100)
    before = pyarrow.total_allocated_bytes()
    many = tokenize(prompts, max_length=100)
    count = sum(map(len, many["input_ids"]))
    # In memory, the token ids alone take four bytes each.
    assert pyarrow.total_allocated_bytes() - before < count
    assert many[:] == few[:]
    assert many.data.nbytes < 10 * count
