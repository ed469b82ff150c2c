"""Ask a model MT-Bench: both turns, the second after the model's own first answer.

Grading happens later (`tlora.evaluate.grade`), with no model in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError
from tlora.evaluate.evalconfig import EvalConfig
from tlora.evaluate.evaluated_models import EvaluatedModel
from tlora.evaluate.harness_task import TaskResult, check_room
from tlora.evaluations.rows import Source
from tlora.scoring.mtbench.judging import answer_lines
from tlora.scoring.mtbench.questions import Question, read_questions
from tlora.tasks import rendering
from tlora.tasks.base import INSTRUCTION_PROMPT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class ChatForm:
    """One way to format a conversation as a prompt."""

    says: str
    """Description for the protocol line of a result."""
    render: Callable[[Any, Messages], str]
    """(tokenizer, messages ending with the user's) -> the prompt."""
    stops: Callable[[Any], list[str]] = lambda _: []
    """Tokenizer -> stop sequences."""


_TURN = "\n\n### Instruction:\n{instruction}\n\n### Response:"


def _templated(tokenizer: Any, messages: Messages) -> str:
    return rendering.written(tokenizer, {"messages": messages}, prompt=True)


def _instructed(_: Any, messages: Messages) -> str:
    text, prompt = "", INSTRUCTION_PROMPT
    for message in messages:
        if message["role"] == "system":
            text += f"{message['content']}\n\n"
        elif message["role"] == "assistant":
            text += message["content"]
        else:
            text += prompt.format(instruction=message["content"])
            prompt = _TURN
    return text


TEMPLATE = ChatForm("the model's chat template", _templated, rendering.stops)
INSTRUCTION = ChatForm(
    "the instruction prompt of arXiv 2604.18124, the first turn standing before the second",
    _instructed,
    lambda _: ["### Instruction:"],
)
RAW = ChatForm(
    "the text as it is, a blank line after each turn",
    lambda _, messages: "\n\n".join(message["content"] for message in messages),
)
FORMS = {"template": TEMPLATE, "instruction": INSTRUCTION, "raw": RAW}

_TOKENS = 1024
_FASTCHAT = "https://github.com/lm-sys/FastChat, fastchat/llm_judge/data/mt_bench"


class MtBench:
    """MT-Bench's two-turn questions (Zheng et al., arXiv 2306.05685).

    Raises:
        ConfigError: a setting is not supported.
        DataError: the files of questions and references are missing or damaged.

    Source: turns, temperatures and answer length follow FastChat's script.
    Departure: questions are batched, so samples differ from FastChat's.
    """

    shots = 0
    questions = Source(
        ("mt_bench/question.jsonl", "question.jsonl", "chat/mt_bench_question.jsonl"),
        f"{_FASTCHAT}/question.jsonl",
    )
    references = Source(
        (
            "mt_bench/reference_answer/gpt-4.jsonl",
            "reference_answer/gpt-4.jsonl",
            "chat/mt_bench_reference_gpt4.jsonl",
        ),
        f"{_FASTCHAT}/reference_answer/gpt-4.jsonl",
    )

    def __init__(self, name: str, config: EvalConfig) -> None:
        self.name, self._config = name, config
        self._tokens, self._greedy = _generation(config.gen_kwargs)
        sources = (self.questions, self.references)
        found = read_questions(*(source.rows(name, config.data_dir)[1] for source in sources))
        self._questions = found[: config.limited(len(found))]
        self._forms: dict[str, ChatForm] = {}
        self.items = 2 * len(self._questions)

    @property
    def protocol(self) -> str:
        """One line with name and source; `check` determines the form of the prompts."""
        sampling = "greedy" if self._greedy else "the published temperatures by category"
        said = [f"{form.says} ({name})" for name, form in self._forms.items()]
        forms = {form.says for form in self._forms.values()}
        prompts = "; ".join(forms if len(forms) == 1 else said)
        return (
            f"MT-Bench, two turns (Zheng et al., arXiv 2306.05685), {sampling}, up to"
            f" {self._tokens} tokens; prompts: {prompts}"
        )

    def check(
        self, evaluated: EvaluatedModel, tokenizer: PreTrainedTokenizerBase, longest: int
    ) -> None:
        """Check before loading the model that it supports MT-Bench, and choose the prompt form.

        Args:
            evaluated: the model.
            tokenizer: its tokenizer.
            longest: its context length in tokens, prompt and reply.

        Raises:
            ConfigError: it lacks a required chat template, or has no room for a prompt.
        """
        wanted = self._config.chat_prompt
        if wanted == "template" and not tokenizer.chat_template:
            raise ConfigError(
                f"{evaluated.name}: the tokenizer has no chat template; give --chat_prompt auto or"
                " instruction.",
                where=self.name,
            )
        check_room(self.name, evaluated, self._tokens, longest)
        self._forms[evaluated.name] = self._form(tokenizer)

    def evaluate(self, lm: Any) -> TaskResult:
        """Generate the answers to all first turns, then to all second turns, without scores.

        Args:
            lm: the model, wrapped for the harness.
        """
        system = self._config.system_instruction or self._config.data.system
        start = [{"role": "system", "content": system}] if system else []
        chats: list[Messages] = [[*start] for _ in self._questions]
        form = self._form(lm.tokenizer)
        stops = form.stops(lm.tokenizer)
        # vLLM truncates prompts without counting them.
        before, prompts, replies = getattr(lm, "truncated", 0), [], []
        for turn in (0, 1):
            for chat, question in zip(chats, self._questions, strict=True):
                chat.append({"role": "user", "content": question.turns[turn]})
            prompts.append([form.render(lm.tokenizer, chat) for chat in chats])
            replies.append(self._written(lm, prompts[turn], stops))
            for chat, reply in zip(chats, replies[turn], strict=True):
                chat.append({"role": "assistant", "content": reply})
        pairs = zip(zip(*replies, strict=True), zip(*prompts, strict=True), strict=True)
        asked = zip(self._questions, pairs, strict=True)
        lines = [line for question, pair in asked for line in answer_lines(question, *pair)]
        return TaskResult(lines, {}, getattr(lm, "truncated", 0) - before)

    def _form(self, tokenizer: PreTrainedTokenizerBase) -> ChatForm:
        """Return the form that the user chose, else the chat template, if there is one."""
        wanted = self._config.chat_prompt
        own = "template" if tokenizer.chat_template else "instruction"
        return FORMS[own if wanted == "auto" else wanted]

    def _written(self, lm: Any, prompts: list[str], stops: list[str]) -> list[str]:
        import transformers
        from lm_eval.api.instance import Instance

        transformers.set_seed(self._config.seed)
        requests = []
        for index, (prompt, question) in enumerate(zip(prompts, self._questions, strict=True)):
            options = self._options(question, stops)
            requests.append(Instance("generate_until", {}, (prompt, options), index))
        return [reply.strip() for reply in lm.generate_until(requests)]

    def _options(self, question: Question, stops: list[str]) -> dict[str, Any]:
        temperature = 0.0 if self._greedy else question.temperature
        return {
            "until": stops,
            "max_gen_toks": self._tokens,
            "do_sample": temperature > 0,
            "temperature": temperature,
        }


def _generation(options: dict[str, Any]) -> tuple[int, bool]:
    faults = [
        f"`gen_kwargs.{name}` does not apply to MT-Bench, which sets its own temperatures; use"
        " max_gen_toks, or do_sample=false for greedy answers."
        for name in options
        if name not in ("max_gen_toks", "do_sample")
    ]
    if faults:
        raise ConfigError(faults, where="eval")
    return options.get("max_gen_toks", _TOKENS), not options.get("do_sample", True)
