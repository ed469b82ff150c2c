"""The record of `tlora chat`. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from tlora.checks import SEED, Record, at_least
from tlora.evaluate.evalconfig import EvalConfig
from tlora.tasks.dataconfig import DataConfig, Format
from tlora.training.runconfig import Dtype, Quantization


@dataclass(kw_only=True)
class ChatConfig(Record):
    """Talk to a run, an adapter or a model; a classifier labels what you write.

    /clear starts a new conversation, /exit leaves.

    Raises:
        ConfigError: values are missing or out of range; all faults are collected into one error.
    """

    where: ClassVar[str] = "chat"

    path: str = field(metadata={"positional": True})
    """Folder of `tlora train`, or folder or Hub name of an adapter or a model."""
    prompt: str | None = None
    """Answer this and leave. What is piped in is answered too: echo Hello | tlora chat run."""
    max_new_tokens: Annotated[int, at_least(1)] = 512
    """Tokens of a reply, at most."""
    temperature: Annotated[float, at_least(0)] = 0.0
    """How freely tokens are drawn; 0 takes the likeliest one each time."""
    system: str | None = None
    """System message; by default the one of the run, if it has one."""
    format: Format = "auto"
    """How prompts are written: "chat", "alpaca" or "raw"; "auto" as in the run, else the chat
    template where the model has one, else raw."""
    chat_template: str | None = None
    """Chat template in place of the model's: a name or a file, as in `tlora train`."""
    label_names: list[str] | None = None
    """Classes of a classifier in the order of its outputs, where its run does not tell them."""
    base: str | None = None
    """Base model of the adapter, in place of the one that it names."""
    dtype: Dtype = "auto"
    """Precision to load the model in; "auto" takes the checkpoint's own, on a CPU float32."""
    quantization: Quantization = "none"
    """Quantize the base while loading, by bitsandbytes: "nf4" or "int8"."""
    device: str | None = None
    """Where to compute ("cuda:1"); by default the first accelerator."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    seed: Annotated[int, SEED] = 0
    """Seed of replies that are drawn."""

    def relations(self) -> Iterator[str]:
        """Yield what is wrong between fields."""
        if self.prompt is not None and not self.prompt.strip():
            yield "`prompt` is empty; give a text, or leave it out to talk."

    def loading(self) -> EvalConfig:
        """Return how `tlora eval` would load the same model."""
        data = DataConfig(
            format=self.format,
            system=self.system,
            chat_template=self.chat_template,
            label_names=self.label_names,
        )
        return EvalConfig(
            models=[self.path],
            model=self.base,
            tasks=["chat"],
            dtype=self.dtype,
            quantization=self.quantization,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            seed=self.seed,
            data=data,
        )
