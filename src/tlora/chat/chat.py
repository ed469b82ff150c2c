"""`tlora chat`: a conversation, one prompt, or what is piped in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, TextIO

from tlora import extras
from tlora.chat.chatconfig import ChatConfig
from tlora.errors import ConfigError, DataError, Faults
from tlora.evaluate.evaluated_models import sketch
from tlora.tasks.rendering import named_template

if TYPE_CHECKING:
    from tlora.evaluate.evaluated_models import EvaluatedModel

logger = logging.getLogger(__name__)

Show = Callable[[str], None]
_LEAVE, _CLEAR, _HELP = ("/exit", "/quit"), "/clear", "/help"


class Partner(Protocol):
    """Who is talked to."""

    says: str
    """What it does with a text, in a line."""

    def answer(self, text: str, show: Show) -> None:
        """Answer a text piece by piece.

        Raises:
            DataError: it cannot read the text.
        """

    def clear(self) -> None:
        """Forget what was said."""


def run(config: ChatConfig, stdin: TextIO, show: Show) -> None:
    """Answer the prompt, or what is piped in; else talk until the user leaves.

    Args:
        config: whom to talk to, and how.
        stdin: where a conversation comes from; of a pipe the whole text is one prompt.
        show: takes the pieces of a reply.

    Raises:
        ConfigError: there is no such model, or it cannot be asked in this way.
        AdapterError: an adapter does not fit its base.
        DataError: there is nothing to answer, or a chat template refuses it.
    """
    check(config)
    prompt = config.prompt
    if prompt is None and not stdin.isatty():
        try:
            prompt = stdin.read()
        except UnicodeDecodeError as error:
            raise DataError(f"what was piped in is not {error.encoding}; pipe in text.") from None
        if not prompt.strip():
            raise DataError("nothing was piped in to answer; give --prompt, or a text.")
    partner = make_partner(config)
    if prompt is not None:
        partner.answer(prompt.strip(), show)
        show("\n")
        return
    logger.info("%s /clear starts a new conversation, /exit quits.", partner.says)
    talk(partner, _lines(), show)


def check(config: ChatConfig) -> None:
    """Check what flags and files tell, before anything slow is imported.

    Raises:
        ConfigError: there is no such model, or no such template.
    """
    faults = Faults("chat")
    with faults:
        if config.quantization != "none":
            extras.require("quantized", where="quantization")
    with faults:
        if config.chat_template:
            named_template(config.chat_template)
    with faults:
        sketch(config.loading())
    faults.raise_found()


def make_partner(config: ChatConfig) -> Partner:
    """Load who is talked to.

    Raises:
        ConfigError, AdapterError: as `run`.
    """
    from tlora.chat.partners import Classifier, Writer
    from tlora.evaluate import evaluated_models

    evaluated: EvaluatedModel = evaluated_models.resolve(config.loading())[0]
    if config.label_names and evaluated.head != "labeled":
        raise ConfigError(
            f"{config.path} writes text and labels nothing; leave --label_names out.",
            where="label_names",
        )
    return (Classifier if evaluated.head == "labeled" else Writer)(evaluated, config)


def talk(partner: Partner, lines: Iterator[str], show: Show) -> None:
    """Answer lines until they end, the user leaves by a command, or by Ctrl-C."""
    try:
        for line in lines:
            text = line.strip()
            if text in _LEAVE:
                return
            if text == _CLEAR:
                partner.clear()
                logger.info("a new conversation begins.")
            elif text == _HELP:
                logger.info("%s /clear starts a new conversation, /exit quits.", partner.says)
            elif text:
                _answer(partner, text, show)
    except KeyboardInterrupt:
        show("\n")


def _answer(partner: Partner, text: str, show: Show) -> None:
    try:
        partner.answer(text, show)
    except DataError as error:  # the next line may do
        logger.warning("%s", error)
    show("\n")


def _lines() -> Iterator[str]:
    """Yield what the user types, with the terminal's editing where Python has it."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - `input` uses it
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            logger.warning("what was typed is not %s; write another text.", error.encoding)
