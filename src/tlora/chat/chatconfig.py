"""Configuration of `tlora chat`. Nothing here imports torch."""

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
    """Chat with a run, an adapter or a model; a classifier labels your text.

    /clear starts a new conversation, /exit leaves.

    Raises:
        ConfigError: values are missing or out of range; one error lists all faults.
    """

    where: ClassVar[str] = "chat"

    path: str = field(metadata={"positional": True})
    """Folder of a `tlora train` run, or folder or Hub name of an adapter or a model."""
    prompt: str | None = None
    """Answer this prompt and exit; piped input works too: echo Hello | tlora chat run."""
    max_new_tokens: Annotated[int, at_least(1)] = 512
    """Maximum number of tokens per reply."""
    temperature: Annotated[float, at_least(0)] = 0.0
    """Sampling temperature; 0 always picks the most likely token."""
    system: str | None = None
    """System message; by default, the run's, if it has one."""
    format: Format = "auto"
    """Prompt format: "chat", "alpaca", "raw" or "auto" (as in the run, else the chat template if
    the model has one, else raw)."""
    chat_template: str | None = None
    """Chat template to use instead of the model's: a name or a file, as in `tlora train`."""
    label_names: list[str] | None = None
    """Class names of a classifier in the order of its outputs, if its run does not record them."""
    base: str | None = None
    """Base model for the adapter, instead of the one it names."""
    dtype: Dtype = "auto"
    """Precision to load the model in; "auto" uses the checkpoint's own, or float32 on a CPU."""
    quantization: Quantization = "none"
    """Quantize the base model with bitsandbytes while loading: "nf4" or "int8"."""
    device: str | None = None
    """Device to compute on ("cuda:1"); by default, the first accelerator."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    seed: Annotated[int, SEED] = 0
    """Seed for sampling replies."""

    def relations(self) -> Iterator[str]:
        """Yield errors in combinations of fields."""
        if self.prompt is not None and not self.prompt.strip():
            yield "`prompt` is empty; give a text, or remove it to chat."

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
