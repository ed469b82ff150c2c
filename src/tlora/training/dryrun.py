"""`tlora init --dry_run`: the modules that a run would adapt and its memory, by arithmetic.

The model is built from its config on `meta`: no weights are read, nothing is written or calibrated.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tlora.checks import hints, takes
from tlora.config import TLoraConfig
from tlora.models.pretrained import Pretrained, dtype_of, positions_of, readable, set_token_ids
from tlora.registry import METHODS
from tlora.tasks.base import LONGEST
from tlora.training import preflight
from tlora.training.activations import FLOAT, Activations, activations_of
from tlora.training.kinds import KINDS, KindSpec, with_task_type
from tlora.training.quantized_bytes import weight_bytes
from tlora.training.runconfig import RunConfig

if TYPE_CHECKING:
    from tlora.adapter.strategy import Strategy
    from tlora.calibration.budget import MemoryBudget
    from tlora.calibration.weights import Target

logger = logging.getLogger(__name__)

_TRAINING_BATCH = 8
"""The default of TRL and transformers for `per_device_train_batch_size`."""


@dataclass(frozen=True)
class Memory:
    """Bytes of calibration, or of one way of training."""

    name: str
    trainable: int
    """Trainable parameters."""
    weights: int
    moments: int
    """Second moments (and gradients, if the basis needs them), and mean inputs."""
    activations: int
    """Activations and loss of a batch; for calibration, planning's memory if that is larger."""
    checkpointed: int
    """Activations with gradient checkpointing."""
    element: int = FLOAT
    """Bytes of the trainable parameters."""

    @property
    def gradients(self) -> int:
        """Bytes of the gradients."""
        return self.element * self.trainable

    @property
    def optimizer(self) -> int:
        """Bytes of the two states of AdamW."""
        return 2 * self.element * self.trainable

    def peak(self, checkpointing: bool = False) -> int:
        """Bytes at the peak, with or without gradient checkpointing."""
        kept = self.checkpointed if checkpointing else self.activations
        return self.weights + self.moments + self.gradients + self.optimizer + kept


@dataclass
class DryRun:
    """The modules that a run would adapt, and the memory it would take."""

    model: str
    dtype: str
    parameters: int
    """Bytes of the base model."""
    targets: list[Target]
    """The adapted modules, without weights; experts one by one."""
    ranks: dict[str, int]
    """The rank of each at equal sensitivities, by name."""
    sources: dict[str, int]
    """Numbers by name, equal for targets that read the same tensors."""
    strategy: Strategy
    """Second moments and gradients in memory during each calibration pass, and their bytes."""
    budget: MemoryBudget
    """Their memory limit on this machine."""
    calibration: Memory
    training: list[Memory]
    """TLoRA, LoRA of the same rank, and full fine-tuning."""
    batch: int
    """Samples per training batch."""
    length: int
    """Tokens per sample."""
    frozen_a: bool
    notes: list[str]
    """Sentences about everything that is not counted or unknown."""


def run(config: RunConfig) -> DryRun:
    """Predict a run. Neither rows nor a tokenizer need exist.

    Raises:
        ConfigError: a field is wrong, or there is no such model.
    """
    preflight.check_without_rows(config)
    from tlora.adapter.costs import work_of
    from tlora.adapter.strategy import choose
    from tlora.calibration.targets import find_targets

    kind = KINDS[(task := preflight.task_of(config)).kind]
    model, notes = on_meta(config, kind, task.label_names)
    options = _shared_options(config, kind)
    targets = find_targets(model, options)
    sources = _input_sources(model, targets)
    ranks = _ranks(targets, options)
    notes += _omissions(config, model, options)
    batch = config.trainer.get("per_device_train_batch_size", _TRAINING_BATCH)
    length = min(config.data.max_length or LONGEST, positions_of(model.config) or LONGEST)
    weights = weight_bytes(model, config.quantization)
    budget = _budget(config, options, targets, weights)
    within = dataclasses.replace(options, memory_budget=budget.bytes)
    work = work_of(model, targets, options, config.calibration.samples * length)
    first = budget.first if options.needs_backward else None
    strategy = choose(targets, sources, within, work, first)
    activations = activations_of(model, length)
    sizes = (batch * length, *_precision(config, kind))
    counted = _Counted(targets, ranks, sources, options, activations, *sizes)
    beside = _trained_beside(model, targets, options)
    return DryRun(
        model=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        parameters=model.num_parameters(),
        targets=targets,
        ranks=ranks,
        sources=sources,
        strategy=strategy,
        budget=budget,
        calibration=counted.calibration(config, weights, strategy.held, length),
        training=[
            counted.adapters("tlora", weights, beside),
            counted.lora(weights, beside),
            counted.full(model.num_parameters()),
        ],
        batch=batch,
        length=length,
        frozen_a=options.freeze_a,
        notes=notes,
    )


def _budget(
    config: RunConfig, options: TLoraConfig, targets: Sequence[Target], weights: int
) -> MemoryBudget:
    """Return the memory budget on this machine, with all weights on one device."""
    import torch

    from tlora.calibration.budget import given, on_devices

    if options.memory_budget != "auto":
        return given(options)
    device = None
    if torch.accelerator.is_available() and not config.trainer.get("use_cpu"):
        device = torch.accelerator.current_accelerator()
    return on_devices([(device or torch.device("cpu"), weights)], targets)


def _omissions(config: RunConfig, model: Any, options: TLoraConfig) -> list[str]:
    """Return a sentence for each omission of the tables."""
    from tlora.calibration.targets import left_out, unadapted_experts

    notes = [unadapted_experts(model, options)] if left_out(model, options) else []
    if METHODS.load(config.method).options is not TLoraConfig:
        notes.append(
            f"The run's method is {config.method!r}; targets, ranks and calibration "
            "are shown as those of task-aware LoRA."
        )
    return notes


def adapter_parameters(targets: Sequence[Target], ranks: dict[str, int], frozen_a: bool) -> int:
    """Return the trainable parameters: sum_i r_i m_i, plus r_i d_i if A trains too."""
    return sum(ranks[t.name] * (t.d_out + (0 if frozen_a else t.d_in)) for t in targets)


@dataclass(frozen=True)
class _Counted:
    """Computes the prediction."""

    targets: list[Target]
    ranks: dict[str, int]
    sources: dict[str, int]
    options: TLoraConfig
    activations: Activations
    tokens: int
    """Tokens of a training batch."""
    trained: int = FLOAT
    """Bytes per value of an adapter and of other trainable parameters."""
    autocast: bool = False
    """Whether training computes in 16 bits, whatever the adapter's precision."""

    def calibration(self, config: RunConfig, weights: int, held: int, length: int) -> Memory:
        rows, options, width = config.calibration, self.options, self._widths(self.targets)
        tokens = min(rows.batch_size, rows.samples) * length
        kept = self.activations.element * tokens * width
        if options.needs_backward:
            kept += tokens * (self.activations.frozen + self.activations.loss)
        # W, W C and its factors for the largest module, and all A.
        largest = max(t.d_in * t.d_out for t in self.targets)
        planning = FLOAT * (3 * largest + sum(self.ranks[t.name] * t.d_in for t in self.targets))
        moments = held + (FLOAT * rows.samples * width if options.needs_moments else 0)
        most = max(kept, planning)
        return Memory("calibration", 0, weights, moments, most, most)

    def adapters(self, name: str, weights: int, beside: int) -> Memory:
        trained = adapter_parameters(self.targets, self.ranks, self.options.freeze_a)
        stored = adapter_parameters(self.targets, self.ranks, frozen_a=False)
        kept = self.tokens * self.activations.frozen + self._adapter_activations()
        if self._cast:
            kept += self.activations.element * stored
        weights += self.trained * (stored + beside)
        return self._training(name, trained + beside, weights, kept)

    def lora(self, weights: int, beside: int) -> Memory:
        uniform = dict.fromkeys(self.ranks, self.options.r)
        options = dataclasses.replace(self.options, freeze_a=False)
        alike = dataclasses.replace(self, ranks=uniform, options=options)
        return alike.adapters("lora", weights, beside)

    def full(self, parameters: int) -> Memory:
        # Under autocast the backward pass reads a 16-bit copy of the weights.
        element = self.activations.element
        copied = element * parameters if element < FLOAT else 0
        kept = self.tokens * self.activations.full
        full = dataclasses.replace(self, trained=FLOAT)
        return full._training("full", parameters, FLOAT * parameters + copied, kept)

    def _training(self, name: str, trainable: int, weights: int, kept: int) -> Memory:
        loss = self.tokens * self.activations.loss
        again = self.activations.checkpointed(kept, self.tokens)
        return Memory(name, trainable, weights, 0, kept + loss, again + loss, self.trained)

    @property
    def _cast(self) -> bool:
        """Whether autocast copies the adapter's weights, which autograd keeps."""
        return self.autocast and self.trained > self.activations.element

    def _adapter_activations(self) -> int:
        """Return the bytes of activations that adapters keep besides those of the base model.

        B's gradient needs z = A x, r_i values per token. A's gradient needs x: the tensors that the
        targets read if the adapter has their precision, else one copy per module. Dropout keeps one
        byte per value, and its output if A trains. An expert of a fused parameter is adapted by
        forming W + s B A, which is kept.
        """
        own = [t for t in self.targets if t.part is None]
        element, dropout = self.activations.element, self.options.lora_dropout > 0
        value = element if self._cast else self.trained
        kept = value * self.tokens * sum(self.ranks[t.name] for t in own)
        kept += element * sum(t.d_in * t.d_out for t in self.targets if t.part)
        entries = sum(t.d_in for t in own)
        if dropout:
            kept += self.tokens * entries
        if not self.options.freeze_a:
            shared = self.trained == element and not dropout
            kept += value * self.tokens * (self._widths(own) if shared else entries)
        return kept

    def _widths(self, targets: Sequence[Target]) -> int:
        """Return the values per token of the tensors that ``targets`` read, each counted once."""
        return sum({self.sources.get(t.name, t.name): t.d_in for t in targets}.values())


def _precision(config: RunConfig, kind: KindSpec) -> tuple[int, bool]:
    """Return the bytes of a trainable value, and whether the trainer computes under autocast.

    Trainable parameters are float32, but on a quantized base TRL casts them to bfloat16.
    """
    from tlora.training.arguments import defaults
    from tlora.training.availability import asked

    narrow = config.quantization != "none" and kind.trainer.startswith("trl:")
    fields = defaults(kind) | asked(kind, config)
    # None: TRL turns it on if the GPU supports it; without a GPU, our default is False.
    autocast = fields["bf16"] is None or bool(fields["bf16"]) or bool(fields["fp16"])
    return (2 if narrow else FLOAT), autocast


def on_meta(config: RunConfig, kind: KindSpec, labels: Sequence[str] | None) -> tuple[Any, list]:
    """Return the model of a run without weights, and notes about omissions."""
    import torch

    code, notes = config.trust_remote_code, []
    checkpoint = Pretrained(name=str(config.model), trust_remote_code=code)
    found: Any = checkpoint.config()
    if kind.task_type == "SEQ_CLS" and labels:
        found.num_labels = len(labels)
    if getattr(found, "quantization_config", None):
        found.__dict__.pop("quantization_config", None)
        notes.append("The checkpoint is quantized already; its savings are not counted.")
    # Classifying decoders and encoder-decoders refuse a batch without a padding token.
    set_token_ids(found, ("pad_token_id", "decoder_start_token_id"), 0)
    dtype = config.dtype if config.dtype != "auto" else dtype_of(found)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    with readable(str(config.model), "model"), torch.device("meta"):
        auto = checkpoint.class_for(kind.auto_model, found)
        return auto.from_config(found, trust_remote_code=code, dtype=dtype), notes


def _input_sources(model: Any, targets: Sequence[Target]) -> dict[str, int]:
    """Return a number for each target that runs on `meta`, equal for targets with one input.

    A pass that needs values (for routing, say) ends there; targets that it does not reach count
    with inputs of their own. So do experts in fused parameters, which share no rows.
    """
    import torch

    from tlora.calibration.batches import TokenLayout
    from tlora.calibration.hooks import ModuleRecord, recording

    records = [ModuleRecord(target) for target in targets if target.part is None]
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.device("meta"),
            recording(model, records, TokenLayout(1, None), backward=False),
        ):
            ids = torch.empty(1, 8, dtype=torch.long)
            decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
            model(input_ids=ids, **decoder)
    except Exception:  # a model's own code may raise anything without values
        logger.debug("the forward pass on `meta` of %s ended early", type(model), exc_info=True)
    numbers: dict[Any, int] = {}
    sources = {}
    for record in records:
        # Tensors on `meta` have storages, but no addresses.
        inputs = [call.inputs for call in record.calls]
        seen = [(x.untyped_storage()._cdata, x.storage_offset(), x.stride()) for x in inputs]
        if seen:
            key = (record.target.d_in, *seen)
            sources[record.target.name] = numbers.setdefault(key, len(numbers))
    return sources


def _shared_options(config: RunConfig, kind: KindSpec) -> TLoraConfig:
    """Return the method's options, or for other methods those shared with `TLoraConfig`."""
    options = with_task_type(kind, config.options())
    if not isinstance(options, TLoraConfig):
        shared = {
            name: getattr(options, name)
            for name, kind in hints(TLoraConfig).items()
            if hasattr(options, name) and takes(kind, getattr(options, name))
        }
        options = TLoraConfig.recommended(**shared)
    return options


def _ranks(targets: Sequence[Target], options: TLoraConfig) -> dict[str, int]:
    """Return the ranks for equal sensitivities; one rank for all experts of a parameter."""
    from tlora.linalg.allocation import RankBounds, allocate_ranks

    adapters = {target.adapter: target for target in targets}
    highs = [min(t.d_in, t.d_out, options.rank_max or t.d_in) for t in adapters.values()]
    bounds = [RankBounds(min(options.rank_min, high), high) for high in highs]
    shared = allocate_ranks([1.0] * len(adapters), options.r, bounds).ranks
    ranks = dict(zip(adapters, shared, strict=True))
    return {target.name: ranks[target.adapter] for target in targets}


def _trained_beside(model: Any, targets: Sequence[Target], options: TLoraConfig) -> int:
    """Return the parameters that PEFT trains besides the adapters: heads and biases."""
    from tlora.calibration.targets import heads_of

    heads, adapted = set(heads_of(options)), {target.name for target in targets}

    def trains(name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        if heads.intersection(module.split(".")):
            return True
        if options.bias == "all":
            return "bias" in name
        return options.bias == "lora_only" and leaf == "bias" and module in adapted

    return sum(p.numel() for name, p in model.named_parameters() if trains(name))
