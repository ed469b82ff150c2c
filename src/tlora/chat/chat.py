"""`tlora chat`: a conversation, a single prompt, or piped input."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from tlora import extras
from tlora.chat.chatconfig import ChatConfig
from tlora.errors import ConfigError, DataError, Faults
from tlora.evaluate.evaluated_models import sketch
from tlora.files import no_adapter
from tlora.tasks.rendering import named_template

if TYPE_CHECKING:
    from tlora.evaluate.evaluated_models import EvaluatedModel

logger = logging.getLogger(__name__)

Show = Callable[[str], None]
_LEAVE, _CLEAR, _HELP = ("/exit", "/quit"), "/clear", "/help"


class Partner(Protocol):
    """Interface of a chat partner."""

    says: str
    """One line about how it treats a text."""

    def answer(self, text: str, show: Show) -> None:
        """Answer a text piece by piece.

        Raises:
            DataError: the text is invalid.
        """

    def clear(self) -> None:
        """Forget the conversation."""


def run(config: ChatConfig, stdin: TextIO, show: Show) -> None:
    """Answer the prompt or piped input; otherwise chat until the user leaves.

    Args:
        config: the model and its options.
        stdin: source of the conversation; the whole text of a pipe is one prompt.
        show: receives the pieces of a reply.

    Raises:
        ConfigError: there is no such model, or it does not support the options.
        AdapterError: an adapter does not fit its base.
        DataError: there is nothing to answer, or the chat template rejects it.
    """
    check(config)
    prompt = config.prompt
    if prompt is None and not stdin.isatty():
        try:
            prompt = stdin.read()
        except UnicodeDecodeError as error:
            raise DataError(
                f"the piped input is not valid {error.encoding}; pipe in text."
            ) from None
        if not prompt.strip():
            _refuse_missing(config.path)
            raise DataError("the piped input is empty; give --prompt, or pipe in text.")
    partner = make_partner(config)
    if prompt is not None:
        partner.answer(prompt.strip(), show)
        show("\n")
        return
    logger.info("%s /clear starts a new conversation, /exit quits.", partner.says)
    talk(partner, _lines(), show)


def _refuse_missing(path: str) -> None:
    """Check that there is a model, here or on the Hub.

    Raises:
        ConfigError: there is none.
    """
    from tlora.models.pretrained import check_hub

    try:
        if not Path(path).exists():
            check_hub(path, "config.json", "adapter_config.json")
    except ConfigError:
        if path.count("/") == 1 and not path.startswith(("/", ".")):
            raise  # a name on the Hub
        raise ConfigError(no_adapter(path, "model, run or adapter"), "path") from None


def check(config: ChatConfig) -> None:
    """Check flags and files before any slow import.

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
    """Load the chat partner.

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
    """Answer lines until they end or the user leaves with a command or Ctrl-C."""
    try:
        for line in lines:
            text = line.strip()
            if text in _LEAVE:
                return
            if text == _CLEAR:
                partner.clear()
                logger.info("started a new conversation.")
            elif text == _HELP:
                logger.info("%s /clear starts a new conversation, /exit quits.", partner.says)
            elif text:
                _answer(partner, text, show)
    except KeyboardInterrupt:
        show("\n")


def _answer(partner: Partner, text: str, show: Show) -> None:
    try:
        partner.answer(text, show)
    except DataError as error:  # the next line may work
        logger.warning("%s", error)
    show("\n")


def _lines() -> Iterator[str]:
    """Yield lines typed by the user, with line editing if Python supports it."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - `input` uses it
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            logger.warning("the input is not valid %s; type another text.", error.encoding)
