"""`tlora init --dry_run`: what a run would adapt and the memory it would take, by arithmetic.

The model is built from its config on `meta`: no weight is read, nothing is written or calibrated.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tlora.config import TaskType, TLoraConfig
from tlora.errors import ConfigError
from tlora.registry import TASKS
from tlora.training.activations import FLOAT, Layers, layers_of
from tlora.training.kinds import KINDS, check_trainer_fields
from tlora.training.meta import input_sources, model_on_meta
from tlora.training.runconfig import RunConfig

if TYPE_CHECKING:
    from tlora.adapter.strategy import Strategy
    from tlora.calibration.weights import Target

_TRAINING_BATCH = 8
"""The default of TRL and transformers for `per_device_train_batch_size`."""


@dataclass(frozen=True)
class ModuleShape:
    """A targeted module, m x d, with the rank that it gets at equal sensitivities."""

    name: str
    d_in: int
    d_out: int
    rank: int
    source: int
    """Equal for modules that read the same tensors."""
    parameter: str | None = None
    """The fused parameter that the module is an expert of, if it is one."""

    @property
    def adapter(self) -> str:
        """Name of what PEFT adapts as one."""
        return self.parameter or self.name


@dataclass(frozen=True)
class Batches:
    """Samples of calibration in all, of its batches, of training batches; tokens of a sample."""

    samples: int
    calibration: int
    training: int
    length: int
    unit: str
    """What `length` counts: tokens, or patches of an image."""


@dataclass(frozen=True)
class CalibrationMemory:
    """Bytes of calibrating and planning."""

    weights: int
    strategy: Strategy
    """Which second moments and gradients are held when, and their bytes."""
    means: int
    """Mean inputs of each sample."""
    activations: int
    """Of a batch, with the inputs of the targets, and the loss."""
    planning: int
    """W, W C and its factors of the largest module, and the A matrices."""

    @property
    def peak(self) -> int:
        """Bytes at the peak: of a batch, or of planning when its activations are gone."""
        return self.weights + self.strategy.held + self.means + max(self.activations, self.planning)


@dataclass(frozen=True)
class TrainingMemory:
    """Parameters that train, and the bytes of one way to train with AdamW."""

    name: str
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    checkpointed: int
    """Activations with gradient checkpointing."""

    def peak(self, checkpointing: bool) -> int:
        """Bytes at the peak, with or without gradient checkpointing."""
        kept = self.checkpointed if checkpointing else self.activations
        return self.weights + self.gradients + self.optimizer + kept


@dataclass
class DryRun:
    """What a run would adapt, and the memory it would take."""

    model: str
    dtype: str
    parameters: int
    """Of the base model."""
    modules: list[ModuleShape]
    rank: int
    calibration: CalibrationMemory
    training: list[TrainingMemory]
    """TLoRA, LoRA of the same rank, and full fine-tuning."""
    others: int
    """Parameters that train beside the adapters: a head, biases."""
    batches: Batches
    fused: list[str]
    """Fused expert parameters, which are not adapted."""
    notes: list[str]
    """What could not be seen, a sentence each."""


def run(config: RunConfig) -> DryRun:
    """Predict a run. Neither rows nor a tokenizer have to exist.

    Raises:
        ConfigError: a field is wrong, or there is no such model.
    """
    from tlora.calibration.targets import find_targets, left_out, unadapted_experts

    if not config.model:
        raise ConfigError("`model` is missing; give --model, a folder or a name on the Hub.", "run")
    task = TASKS.load(config.task)(config.data)
    kind = KINDS[task.kind]
    check_trainer_fields(kind, config.trainer)
    built = model_on_meta(config, kind, task.label_names)
    model, notes = built.model, built.notes
    options = adapter_options(config, built.task_type)
    targets = find_targets(model, options)
    sources = input_sources(model, targets)
    if unseen := sum(t.part is None and t.name not in sources for t in targets):
        notes.append(
            f"A forward pass without values reaches {len(targets) - unseen} of {len(targets)}"
            " modules; the others count with an input of their own, which they may share."
        )
    modules = module_shapes(targets, sources, options)
    fused = left_out(model, options)
    if fused:
        notes.append(unadapted_experts(model, options))
    memory = _Memory(modules, layers_of(model), _batches(config, model), options, *_sizes(model))
    # Last, because attaching changes the model.
    others = trained_beside(model, modules, options)
    return DryRun(
        model=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        parameters=memory.parameters,
        modules=modules,
        rank=options.r,
        calibration=memory.calibration(),
        training=memory.training(others),
        others=others,
        batches=memory.batches,
        fused=fused,
        notes=notes,
    )


def adapter_options(config: RunConfig, task_type: TaskType | None) -> TLoraConfig:
    """Return the method's options, of another method those it shares with `TLoraConfig`."""
    options = config.options()
    if not isinstance(options, TLoraConfig):
        names = [name for name in TLoraConfig.field_names() if hasattr(options, name)]
        options = TLoraConfig(**{name: getattr(options, name) for name in names})
    if options.task_type is None:
        options = dataclasses.replace(options, task_type=task_type)
    return options


def module_shapes(
    targets: Sequence[Target], sources: dict[str, int], options: TLoraConfig
) -> list[ModuleShape]:
    """Return the targets with the ranks that equal sensitivities would give, experts one by one."""
    from tlora.linalg.allocation import RankBounds, allocate_ranks

    adapters = {target.adapter: target for target in targets}
    highs = [min(t.d_in, t.d_out, options.rank_max or t.d_in) for t in adapters.values()]
    bounds = [RankBounds(min(options.rank_min, high), high) for high in highs]
    shared = allocate_ranks([1.0] * len(adapters), options.r, bounds).ranks
    ranks = dict(zip(adapters, shared, strict=True))
    return [
        ModuleShape(
            name=target.name,
            d_in=target.d_in,
            d_out=target.d_out,
            rank=ranks[target.adapter],
            source=sources.get(target.name, -1 - place),
            parameter=target.part.parameter if target.part else None,
        )
        for place, target in enumerate(targets)
    ]


def adapter_parameters(modules: Sequence[ModuleShape], frozen_a: bool) -> int:
    """Return the trainable parameters: sum_i r_i m_i, plus r_i d_i where A trains too."""
    return sum(m.rank * (m.d_out + (0 if frozen_a else m.d_in)) for m in modules)


def trained_beside(model: Any, modules: Sequence[ModuleShape], options: TLoraConfig) -> int:
    """Return the parameters that train outside the adapters, as PEFT attaches them.

    ``model`` is changed: it carries an adapter afterwards.
    """
    import torch

    from tlora.adapter.attach import attach
    from tlora.adapter.plan import AdapterPlan, ModulePlan

    experts = Counter(m.adapter for m in modules)
    with torch.device("meta"):
        planned = {
            m.adapter: ModulePlan(
                name=m.adapter,
                d_in=m.d_in,
                d_out=m.d_out,
                rank=m.rank,
                scale=1.0,
                lora_A=torch.empty(experts[m.adapter] * m.rank, m.d_in),
                captured_energy=None,
                sensitivity=None,
                solver="none",
                experts=experts[m.adapter],
            )
            for m in modules
        }
        plan = AdapterPlan(planned, dataclasses.replace(options, freeze_a=True))
        adapted = attach(model, plan)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return trained - adapter_parameters(modules, frozen_a=True)


def _sizes(model: Any) -> tuple[int, int]:
    """Return the parameters of ``model``, and their bytes."""
    sizes = [(p.numel(), p.element_size()) for p in model.parameters()]
    return sum(count for count, _ in sizes), sum(count * size for count, size in sizes)


def _batches(config: RunConfig, model: Any) -> Batches:
    images = model.main_input_name == "pixel_values"
    longest = getattr(model.config, "max_position_embeddings", None) or config.data.max_length
    length = min(config.data.max_length, longest)
    if images:
        side, patch = model.config.image_size, getattr(model.config, "patch_size", 0)
        length = (side // patch) ** 2 + 1 if isinstance(side, int) and patch else 1
    return Batches(
        samples=config.calibration.samples,
        calibration=min(config.calibration.batch_size, config.calibration.samples),
        training=config.trainer.get("per_device_train_batch_size", _TRAINING_BATCH),
        length=length,
        unit="patches" if images else "tokens",
    )


@dataclass(frozen=True)
class _Memory:
    """The arithmetic. PEFT keeps adapters in float32 at least, and what trains beside them too."""

    modules: list[ModuleShape]
    layers: Layers
    batches: Batches
    options: TLoraConfig
    parameters: int
    weights: int

    @property
    def element(self) -> int:
        """Bytes of an adapter's value."""
        return max(self.layers.element, FLOAT)

    def calibration(self) -> CalibrationMemory:
        """Return the memory of calibration."""
        from tlora.adapter.strategy import choose

        modules, options, batches = self.modules, self.options, self.batches
        tokens = batches.calibration * batches.length
        activations = self.layers.element * tokens * _widths(modules)
        if options.needs_backward:
            activations += self.layers.kept(tokens, batches.length) + self.layers.loss(tokens)
        largest = max(m.d_in * m.d_out for m in modules)
        return CalibrationMemory(
            weights=self.weights,
            strategy=choose(modules, {m.name: m.source for m in modules}, options),
            means=FLOAT * batches.samples * _widths(modules) if options.needs_moments else 0,
            activations=activations,
            planning=FLOAT * (3 * largest + sum(m.rank * m.d_in for m in modules)),
        )

    def training(self, others: int) -> list[TrainingMemory]:
        """Return the memory of each way to train; ``others`` train beside the adapters."""
        # LoRA takes rank r everywhere, whatever the weights' sizes.
        uniform = [dataclasses.replace(m, rank=self.options.r) for m in self.modules]
        return [
            self._adapters("tlora", self.modules, self.options.freeze_a, others),
            self._adapters("lora", uniform, False, others),
            self._full(),
        ]

    def _adapters(
        self, name: str, modules: list[ModuleShape], frozen_a: bool, others: int
    ) -> TrainingMemory:
        trained = adapter_parameters(modules, frozen_a)
        stored = adapter_parameters(modules, frozen_a=False) * self.element + others * FLOAT
        held = trained * self.element + others * FLOAT
        batch, length = self.batches.training * self.batches.length, self.batches.length
        beside, loss = self._beside(modules, frozen_a, batch), self.layers.loss(batch)
        again = self.layers.checkpointed(batch, length) + beside // max(1, self.layers.count)
        return TrainingMemory(
            name=name,
            trainable=trained + others,
            weights=self.weights + stored,
            gradients=held,
            optimizer=2 * held,
            activations=self.layers.kept(batch, length) + beside + loss,
            checkpointed=again + loss,
        )

    def _full(self) -> TrainingMemory:
        stored = FLOAT * self.parameters
        batch, length = self.batches.training * self.batches.length, self.batches.length
        loss = self.layers.loss(batch)
        return TrainingMemory(
            name="full",
            trainable=self.parameters,
            # Under autocast the backward pass reads a copy of the weights in 16 bits.
            weights=stored + (self.weights if self.layers.element < FLOAT else 0),
            gradients=stored,
            optimizer=2 * stored,
            activations=self.layers.kept(batch, length, trained=True) + loss,
            checkpointed=self.layers.checkpointed(batch, length, trained=True) + loss,
        )

    def _beside(self, modules: list[ModuleShape], frozen_a: bool, tokens: int) -> int:
        """Return the bytes of activations that adapters keep beside those of the base model.

        B's gradient needs z = A x, r_i values a token. A's needs x: the tensors that the targets
        read where adapter and weights have the same dtype, else a float32 copy a module. Dropout
        keeps a mask of a byte a value, and its output where A trains. An expert of a fused
        parameter is adapted by forming W + s B A, which is kept.
        """
        own = [m for m in modules if not m.parameter]
        kept = self.element * tokens * sum(m.rank for m in own)
        kept += self.layers.element * sum(m.d_in * m.d_out for m in modules if m.parameter)
        entries, dropout = tokens * sum(m.d_in for m in own), self.options.lora_dropout > 0
        if dropout:
            kept += entries
        if not frozen_a:
            shared = self.element == self.layers.element and not dropout
            kept += self.element * (tokens * _widths(own) if shared else entries)
        return kept


def _widths(modules: Sequence[ModuleShape]) -> int:
    """Return the values a token of the tensors that ``modules`` read, each counted once."""
    return sum({m.source: m.d_in for m in modules}.values())
