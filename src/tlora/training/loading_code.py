"""Python code that loads a run's adapter with PEFT and transformers alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tlora.tasks import formats
from tlora.tasks.base import Row

if TYPE_CHECKING:
    from tlora.training.setup import Setup

_ASKED = "Name three primary colors."
_CLASSES = {
    "CAUSAL_LM": "CausalLM",
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
    "SEQ_CLS": "SequenceClassification",
}
"""Suffixes of PEFT's and transformers' class names for a kind of task."""


@dataclass(frozen=True)
class Code:
    """Pieces of Python; each later piece continues after the first one."""

    load: str
    """Loads the model and sends it a prompt."""
    pipeline: str | None
    """The same by a pipeline; transformers 5 has none for text to text."""
    merge: str | None
    """Writes a whole model; None if it already is one."""


def of(setup: Setup, adapter: bool, base: str) -> Code:
    """Return the code for a run's folder `adapter`.

    Args:
        setup: the run.
        adapter: whether the run saved an adapter, not a whole model.
        base: name to use for the base model.
    """
    kind = setup.kind.task_type
    library, auto = ("peft", "AutoPeftModelFor") if adapter else ("transformers", "AutoModelFor")
    name = f"{auto}{_CLASSES[kind]}"
    remote = ", trust_remote_code=True" if setup.config.trust_remote_code else ""
    lines = [f"from {library} import {name}"]
    if adapter:
        lines.append("from transformers import AutoTokenizer")
    else:
        lines = [f"from transformers import {name}, AutoTokenizer"]
    head = _head(setup) if kind == "SEQ_CLS" and adapter else ""
    loaded = f'{name}.from_pretrained("adapter"{head}{remote})'
    own = setup.method.traits.leaves == "own"
    if own:
        name = f"AutoModelFor{_CLASSES[kind]}"
        lines = [
            "from tlora import load_adapter",
            f"from transformers import {name}, AutoTokenizer",
        ]
        loaded = f'{name}.from_pretrained("{base}"{head}{remote})'
        loaded = f'load_adapter({loaded}, "adapter")'
    lines += [
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("adapter"{remote})',
        f"model = {loaded}",
    ]
    labeled = kind == "SEQ_CLS"
    asks, pipeline = _labels(setup) if labeled else _writes(setup, _prompt(setup))
    merge = [
        'model.merge_and_unload().save_pretrained("merged")',
        'tokenizer.save_pretrained("merged")',
    ]
    return Code(
        load="\n".join([*lines, *asks]),
        pipeline=None if pipeline is None or own else "\n".join(pipeline),
        merge="\n".join(merge) if adapter else None,
    )


def _head(setup: Setup) -> str:
    """Return the arguments that give the base the trained head's shape and labels."""
    fields = setup.head_fields() | {"ignore_mismatched_sizes": True}
    given = [f"    {name}={value!r},\n" for name, value in fields.items()]
    return f",\n{''.join(given)}"


def _labels(setup: Setup) -> tuple[list[str], list[str]]:
    asks = [
        "model.config.pad_token_id = tokenizer.pad_token_id  # decoders find the last token by it",
        'inputs = tokenizer("A text", return_tensors="pt")',
        "print(model(**inputs).logits)",
    ]
    regression = setup.task.kind == "regression"
    raw = ', function_to_apply="none"' if regression else ""
    pipeline = [
        "from transformers import pipeline",
        "",
        'classify = pipeline("text-classification", model=model, tokenizer=tokenizer)',
        f'print(classify("A text"{raw}))',
    ]
    return asks, pipeline


def _prompt(setup: Setup) -> str | None:
    """Return a prompt in the format of the run's rows, as a literal; None for a chat."""
    data = setup.task.data
    if data.format == "chat":
        return None
    asked: Row = {"instruction": _ASKED, "response": ""}
    text = data.prompt_template or formats.write(asked, data.format, data.system)["prompt"]
    return json.dumps(text, ensure_ascii=False)


def _writes(setup: Setup, prompt: str | None) -> tuple[list[str], list[str] | None]:
    system = setup.task.data.system
    if prompt is None:
        turns = [{"role": "system", "content": system}] if system else []
        chat = json.dumps([*turns, {"role": "user", "content": _ASKED}], ensure_ascii=False)
        asks = [
            f"chat = {chat}",
            "inputs = tokenizer.apply_chat_template(",
            '    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    else:
        asks = [f"prompt = {prompt}", 'inputs = tokenizer(prompt, return_tensors="pt")']
    asks.append("reply = model.generate(**inputs, max_new_tokens=100, do_sample=False)[0]")
    if setup.task.kind == "causal":
        asks.append('reply = reply[inputs["input_ids"].shape[1] :]')
    asks.append("print(tokenizer.decode(reply, skip_special_tokens=True))")
    if setup.task.kind != "causal":
        return asks, None
    asked = "prompt, return_full_text=False" if prompt is not None else "chat"
    reply = '["generated_text"]' + ('[-1]["content"]' if prompt is None else "")
    pipeline = [
        "from transformers import pipeline",
        "",
        'write = pipeline("text-generation", model=model, tokenizer=tokenizer)',
        f"print(write({asked}, max_new_tokens=100)[0]{reply})",
    ]
    return asks, pipeline
