"""Chat partners: a generative model or a classifier."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import transformers

from tlora.calibration.limits import within_positions
from tlora.chat.chatconfig import ChatConfig
from tlora.errors import ConfigError, DataError
from tlora.evaluate import loading, run_format
from tlora.evaluate.class_order import class_names, run_of
from tlora.evaluate.evaluated_models import EvaluatedModel
from tlora.models.greedy import end_tokens, greedy
from tlora.models.pretrained import positions_of, set_token_ids
from tlora.registry import TASKS
from tlora.tasks import formats, rendering, tokens
from tlora.tasks.base import LONGEST
from tlora.tasks.dataconfig import DataConfig, Format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Show = Callable[[str], None]
_SAYS: dict[str, str] = {
    "chat": "The chat template formats each prompt; the model sees the conversation so far.",
    "alpaca": "Each prompt becomes an Alpaca instruction; the model does not see earlier ones.",
    "raw": "The model continues each prompt as it is; it does not see earlier ones.",
}


class Writer:
    """A model that generates answers token by token.

    Raises:
        ConfigError: the model cannot be loaded, or lacks a required chat template.
        AdapterError: the adapter does not fit its base.
    """

    def __init__(self, evaluated: EvaluatedModel, config: ChatConfig) -> None:
        given, self._config = config.loading(), config
        recorded = run_format.recorded(evaluated) or {}
        self.tokenizer = run_format.template_tokenizer(evaluated, given)
        self._system = config.system or recorded.get("system")
        self._template = recorded.get("prompt_template")
        self._decodes = evaluated.head == "seq2seq"
        self.style = self._style(recorded.get("format", "auto"))
        self.model = loading.load(evaluated, given)
        self.messages: list[dict[str, Any]] = []
        self.says = _SAYS[self.style]
        self._stops = self._closings()
        transformers.set_seed(config.seed)

    def clear(self) -> None:
        """Forget what was said."""
        self.messages = []

    def answer(self, text: str, show: Show) -> None:
        """Answer a text; in a chat, in the context of earlier turns."""
        asked, ids = self._prompt(text)
        stream = Stream(self.tokenizer, show, self._stops)
        drawn = self._config.temperature > 0
        options: dict[str, Any] = {"do_sample": drawn}
        if drawn:
            options["temperature"] = self._config.temperature
        if self._stops:
            options |= {"stop_strings": self._stops, "tokenizer": self.tokenizer}
        inputs = torch.tensor([ids], device=self.model.device)
        call = {
            "input_ids": inputs,
            "attention_mask": torch.ones_like(inputs),
            "max_new_tokens": self._room(len(ids)),
            "eos_token_id": self._ends() or None,
            "pad_token_id": self.tokenizer.pad_token_id or next(iter(self._ends()), None),
            "streamer": stream,
            **options,
        }
        if drawn:
            self.model.generate(**call)
        else:
            with greedy(self.model, self.tokenizer):
                self.model.generate(**call)
        if self.style == "chat":
            self.messages = [*asked, {"role": "assistant", "content": stream.reply}]

    def _style(self, recorded: Format) -> Format:
        """Return the prompt format.

        Raises:
            ConfigError: it needs a chat template, but there is none.
        """
        asked = self._config.format
        template = self.tokenizer.chat_template is not None
        if self._decodes:
            return "raw"
        if asked == "chat" and not template:
            raise ConfigError(
                f"{self._config.path} has no chat template; give --chat_template chatml (or"
                " another name, or a file), or remove --format.",
                where="format",
            )
        if asked != "auto":
            return asked
        if recorded != "auto":
            return recorded
        return "chat" if template else "raw"

    def _prompt(self, text: str) -> tuple[list[dict[str, Any]], list[int]]:
        """Return the turns of a prompt and their tokens, dropping the oldest turns if too long.

        Raises:
            DataError: the model has no room for it, or the chat template rejects it.
        """
        if self.style != "chat":
            return [], self._fitting(self._single(text))
        asked = [*self.messages, {"role": "user", "content": text}]
        while True:
            start = [{"role": "system", "content": self._system}] if self._system else []
            row = {"messages": [*start, *asked]}
            words = rendering.written(self.tokenizer, row, prompt=True)
            ids = self.tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
            if len(asked) == 1 or len(ids) + self._config.max_new_tokens <= self._longest():
                return asked, self._fitting(ids)
            asked = asked[2:]

    def _single(self, text: str) -> list[int]:
        if self._decodes:
            return list(self.tokenizer(self._filled(text), verbose=False)["input_ids"])
        if self.style == "alpaca":
            form = {"instruction": text, "response": ""}
            text = formats.write(form, "alpaca", self._system)["prompt"]
        else:
            text = "\n\n".join(filter(None, [self._system, self._filled(text)]))
        return tokens.prompt_ids(self.tokenizer, text)

    def _filled(self, text: str) -> str:
        """Insert a text into the run's prompt template, which has a single column."""
        fields = string.Formatter().parse(self._template or "")
        names = {name for _, name, _, _ in fields if name}
        if self._template is None or len(names) != 1:
            return text
        return self._template.format(**dict.fromkeys(names, text))

    def _fitting(self, ids: list[int]) -> list[int]:
        if not ids:
            raise DataError("the text has no tokens; type another.")
        if not self._decodes and len(ids) >= self._longest():
            raise DataError(
                f"the prompt has {len(ids)} tokens, but the model has room for {self._longest()}"
                " including the reply; shorten it."
            )
        return ids

    def _room(self, prompt: int) -> int:
        """Return the maximum number of reply tokens for a prompt of ``prompt`` tokens."""
        most = self._config.max_new_tokens
        return most if self._decodes else min(most, self._longest() - prompt)

    def _longest(self) -> int:
        longest: int = self.tokenizer.model_max_length
        return min(longest, positions_of(self.model.config) or longest)

    def _closings(self) -> list[str]:
        """Return the stop sequences besides the EOS token."""
        if self.style == "alpaca":
            return [formats.TURN.partition("{")[0].strip()]
        return rendering.stops(self.tokenizer) if self.style == "chat" else []

    def _ends(self) -> list[int]:
        return end_tokens(self.model, self.tokenizer)


class Stream(transformers.TextStreamer):
    """A transformers streamer that hides the stop sequence of a reply.

    Args:
        tokenizer: decodes tokens.
        show: receives the pieces of the reply.
        stops: stop sequences, which are not part of the reply.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Show, stops: list[str]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show, self._stops = show, stops
        self._text, self._shown = "", 0

    @property
    def reply(self) -> str:
        """The reply, without surrounding white space."""
        return self._until(len(self._text)).strip()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show new text that certainly belongs to the reply."""
        self._text += text
        held = 0 if stream_end else max(map(self._begun, self._stops), default=0)
        said = self._until(len(self._text) - held).strip()
        self._show(said[self._shown :])
        self._shown = max(self._shown, len(said))

    def _until(self, end: int) -> str:
        places = [place for stop in self._stops if (place := self._text.find(stop)) >= 0]
        return self._text[: min([end, *places])]

    def _begun(self, stop: str) -> int:
        """Return how many final characters could start a stop sequence."""
        sizes = range(min(len(stop), len(self._text)), 0, -1)
        return next((size for size in sizes if self._text.endswith(stop[:size])), 0)


class Classifier:
    """A model that labels a text, or a pair of texts separated by a tab.

    Raises:
        ConfigError: the model cannot be loaded, or its classes are unknown.
        AdapterError: the adapter has no trained head, or does not fit its base.
    """

    def __init__(self, evaluated: EvaluatedModel, config: ChatConfig) -> None:
        given = config.loading()
        run = run_of(evaluated)
        values = run.config() if run else {}
        data = DataConfig.from_dict(values["data"]) if values else given.data
        task = TASKS.load(values["task"])(data) if values.get("task") in TASKS.names() else None
        self._numbers = task is not None and task.kind == "regression"
        names = None if self._numbers else class_names(evaluated, given)
        if evaluated.adapter and not (names or self._numbers):
            raise ConfigError(
                f"the classes of {config.path} are unknown; list them in the order of training.",
                where="label_names",
            )
        head: dict[str, Any] = task.head if task is not None else {}
        if names:
            head |= {"num_labels": len(names), "problem_type": "single_label_classification"}
        self.tokenizer = loading.load_tokenizer(evaluated, given)
        self.model = loading.load(evaluated, given, **head)
        self._longest = within_positions(self.model, data.max_length or LONGEST)
        set_token_ids(self.model.config, ["pad_token_id"], self.tokenizer.pad_token_id)
        by_id = self.model.config.id2label
        self._names = names or [str(by_id[number]) for number in sorted(by_id)]
        self._numbers = self._numbers or len(self._names) == 1
        self.says = "Each text gets a number." if self._numbers else "Each text gets a label."
        self.says += " A tab separates the texts of a pair."

    def clear(self) -> None:
        """Do nothing: no state is kept between texts."""

    def answer(self, text: str, show: Show) -> None:
        """Show the most likely label and its probability, or the number."""
        first, _, second = text.partition("\t")
        encoded = self.tokenizer(
            first, second or None, truncation=True, max_length=self._longest, return_tensors="pt"
        )
        with torch.no_grad():
            logits = self.model(**encoded.to(self.model.device)).logits[0].float()
        if self._numbers:
            show(f"{logits.item():.6g}")
            return
        probabilities = logits.softmax(dim=0)
        best = int(probabilities.argmax())
        show(f"{self._names[best]} ({probabilities[best]:.1%})")
