"""`tlora init --dry_run`: what a run would adapt and take, from the model's config alone.

The model is built on `meta`: no weight is read, nothing is written, nothing is calibrated.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tlora.config import TaskType, TLoraConfig
from tlora.errors import ConfigError
from tlora.registry import TASKS
from tlora.runconfig import CalibrationConfig, RunConfig
from tlora.stages import estimate as sums
from tlora.stages.arguments import check_trainer_fields
from tlora.stages.estimate import CalibrationEstimate, ModuleShape, TrainingEstimate, Weights, Work
from tlora.stages.kinds import KINDS
from tlora.stages.meta import batch_spec, model_on_meta

if TYPE_CHECKING:
    from tlora.calibration.shapes import Forward
    from tlora.calibration.weights import Target

_TRAINING_BATCH = 8
"""What TRL and transformers take where `per_device_train_batch_size` is not given."""
_EPOCHS = 3
"""The same of `num_train_epochs`."""


@dataclass(frozen=True)
class Assumptions:
    """What the numbers rest on."""

    dtype: str
    samples: int
    calibration_batch: int
    tokens: int | None
    """Tokens a sample; None for images."""
    training_batch: int
    batches: int | None
    """Batches of the training, where the number of steps or of training rows is given."""
    rate: float
    """FLOP/s."""
    rate_source: str

    def batch(self, size: int) -> str:
        """Say what a batch of ``size`` samples is."""
        return f"{size} images" if self.tokens is None else f"{size} x {self.tokens} tokens"

    def rows(self, size: int) -> int:
        """Rows of a batch where no forward pass has counted them."""
        return size * (self.tokens or 1)


@dataclass
class DryRun:
    """What a run would adapt, and what it would take."""

    model: str
    weights: Weights
    modules: list[ModuleShape]
    """The targets, with the rows of a calibration batch."""
    rank: int
    calibration: CalibrationEstimate
    training: list[TrainingEstimate]
    others: int
    """Parameters that train beside the adapters: a head, biases."""
    assumptions: Assumptions
    fused: list[str]
    """Fused expert parameters, which are not adapted."""
    notes: list[str] = field(default_factory=list)
    """What could not be seen, a sentence each."""


def run(config: RunConfig, rate: float | None = None) -> DryRun:
    """Predict a run. Neither rows nor a tokenizer have to exist.

    Args:
        config: the run.
        rate: FLOP/s that turn work into time; None: measured by a short product.

    Raises:
        ConfigError: a field is wrong, or there is no such model.
    """
    from tlora.calibration.expert_parameters import left_out, unadapted_experts
    from tlora.calibration.targets import find_targets

    if not config.model:
        raise ConfigError("`model` is missing; give --model, a folder or a name on the Hub.", "run")
    if rate is not None and not rate > 0:
        raise ConfigError(f"`flops` is {rate!r}; give a positive number.", "run")
    task = TASKS.load(config.task)(config.data)
    kind = KINDS[task.kind]
    check_trainer_fields(kind, config.trainer)
    built = model_on_meta(config, kind, task.label_names)
    model, notes = built.model, built.notes
    options = adapter_options(config, built.task_type)
    targets = find_targets(model, options)
    assumed = _assumptions(config, model, rate)
    passes = _passes(model, targets, assumed, notes)
    weights, rows = weights_of(model), assumed.rows(assumed.calibration_batch)
    modules = module_shapes(targets, options, passes.get("calibration"), rows)
    fused = left_out(model, options)
    if fused:
        notes.append(unadapted_experts(model, options))
    # Last, because attaching changes the model.
    others = trained_beside(model, modules, options)
    return DryRun(
        model=type(model).__name__,
        weights=weights,
        modules=modules,
        rank=options.r,
        calibration=calibration_of(
            modules, weights, passes.get("calibration"), (config.calibration, options)
        ),
        training=_training(targets, weights, passes, (assumed, options, others)),
        others=others,
        assumptions=assumed,
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


def weights_of(model: Any) -> Weights:
    """Count the parameters of ``model`` and their bytes."""
    parameters = list(model.parameters())
    return Weights(
        parameters=sum(p.numel() for p in parameters),
        bytes=sum(p.numel() * p.element_size() for p in parameters),
        element=model.dtype.itemsize,
    )


def measured_rate(dtype: Any, seconds: float = 0.2) -> tuple[float, str]:
    """Return the FLOP/s of a square product in ``dtype`` on this machine, and how it was run."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 4096 if device.type == "cuda" else 512
    matrix = torch.ones(size, size, dtype=dtype, device=device)

    def multiply() -> None:
        _ = matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize()

    multiply()
    runs, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < seconds:
        multiply()
        runs += 1
    return runs * 2 * size**3 / taken, f"products of {size} x {size} on this {device.type}"


def trained_beside(model: Any, modules: list[ModuleShape], options: TLoraConfig) -> int:
    """Return the parameters that train outside the adapters, as PEFT attaches them.

    ``model`` is changed: it carries an adapter afterwards.
    """
    import torch

    from tlora.adapter.attach import attach
    from tlora.adapter.plan import AdapterPlan, ModulePlan

    frozen = dataclasses.replace(options, freeze_a=True)
    with torch.device("meta"):
        experts = Counter(m.adapter for m in modules)
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
        adapted = attach(model, AdapterPlan(planned, frozen))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return trained - sums.adapter_parameters(modules, frozen_a=True)


def _assumptions(config: RunConfig, model: Any, rate: float | None) -> Assumptions:
    longest = getattr(model.config, "max_position_embeddings", None) or config.data.max_length
    tokens = min(config.data.max_length, longest)
    source = "given"
    if rate is None:
        rate, source = measured_rate(model.dtype)
    return Assumptions(
        dtype=str(model.dtype).removeprefix("torch."),
        samples=config.calibration.samples,
        calibration_batch=min(config.calibration.batch_size, config.calibration.samples),
        tokens=None if model.main_input_name == "pixel_values" else tokens,
        training_batch=config.trainer.get("per_device_train_batch_size", _TRAINING_BATCH),
        batches=_training_batches(config),
        rate=rate,
        rate_source=source,
    )


def _training_batches(config: RunConfig) -> int | None:
    """Return the batches of one device that trains alone; None where the rows are not counted."""
    steps, rows = config.trainer.get("max_steps"), config.data.max_train_rows
    if steps and steps > 0:
        return steps * config.trainer.get("gradient_accumulation_steps", 1)
    if rows is None:
        return None
    size = config.trainer.get("per_device_train_batch_size", _TRAINING_BATCH)
    return math.ceil(rows * config.trainer.get("num_train_epochs", _EPOCHS) / size)


def _passes(
    model: Any, targets: list[Target], assumed: Assumptions, notes: list[str]
) -> dict[str, Forward]:
    """Return forward passes of shapes by name; none where the model cannot be run so."""
    from tlora.calibration.shapes import Untraceable, forward_of

    try:
        small = batch_spec(model, assumed.calibration_batch, assumed.tokens or 1)
        large = batch_spec(model, assumed.training_batch, assumed.tokens or 1)
        return {
            "calibration": forward_of(model.eval(), small, targets),
            "frozen": forward_of(model.train(), large, targets),
            "full": forward_of(model, large, targets, trained=True),
        }
    except Untraceable as error:
        notes.append(
            f"This model does not run without numbers ({error}): each module is counted with an"
            " input of its own, activations as inputs and outputs of the targets, work as 2 FLOPs"
            " a parameter and token."
        )
        return {}


def module_shapes(
    targets: list[Target], options: TLoraConfig, passed: Forward | None, rows: int
) -> list[ModuleShape]:
    """Return the targets with the ranks that equal sensitivities would give, experts one by one.

    ``rows`` are the rows of a batch, where no forward pass of shapes has counted them.
    """
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
            rows=passed.rows.get(target.name, 0) if passed else rows,
            # A module that is never called has a moment of its own, all zero.
            source=passed.sources.get(target.name, -1 - i) if passed else i,
            parameter=target.part.parameter if target.part else None,
        )
        for i, target in enumerate(targets)
    ]


def _work(
    passed: Forward | None, modules: list[ModuleShape], weights: Weights, kept: int | None = None
) -> Work:
    """Return what a pass keeps (by default what autograd saves) and computes."""
    if passed is None:
        guess = weights.element * sum(m.rows * (m.d_in + m.d_out) for m in modules)
        most = max((m.rows for m in modules), default=0)
        return Work(guess, guess, 0, 2 * most * weights.parameters, 0)
    again = passed.outside + passed.boundaries + passed.largest_layer
    return Work(
        kept=passed.saved if kept is None else kept,
        kept_if_checkpointed=min(again, passed.saved),
        logits=passed.logits,
        weight_flops=passed.weight_flops,
        attention_flops=passed.attention_flops,
        layers=passed.layers,
    )


def calibration_of(
    modules: list[ModuleShape],
    weights: Weights,
    passed: Forward | None,
    asked: tuple[CalibrationConfig, TLoraConfig],
) -> CalibrationEstimate:
    """Predict calibration and planning of ``modules``, as a forward pass of shapes shows them.

    Args:
        modules: the targets.
        weights: the base model's.
        passed: of a calibration batch; None where the model does not run without numbers.
        asked: how many samples, how many a batch; and the adapter.
    """
    from tlora.adapter.strategy import choose
    from tlora.linalg.subspace import Solver

    samples, options = asked
    wanted = sums.CalibrationPlan(
        samples=samples.samples,
        batch_size=min(samples.batch_size, samples.samples),
        moments=options.needs_moments,
        sensitivity=options.needs_backward,
        strategy=choose(modules, {m.name: m.source for m in modules}, options),
        solver=Solver(mode=options.subspace),
        config=options,
    )
    kept = None
    if passed:
        kept = passed.held if options.needs_backward else passed.inputs
    work = _work(passed, modules, weights, kept)
    return sums.calibration(modules, weights, work, wanted)


def _training(
    targets: list[Target],
    weights: Weights,
    passes: Mapping[str, Forward],
    asked: tuple[Assumptions, TLoraConfig, int],
) -> list[TrainingEstimate]:
    assumed, options, others = asked
    passed = passes.get("frozen")
    rows = assumed.rows(assumed.training_batch)
    # The rows of a training batch; LoRA takes rank r everywhere, whatever the weights' sizes.
    modules = module_shapes(targets, options, passed, rows)
    uniform = [dataclasses.replace(m, rank=options.r) for m in modules]
    base = weights, _work(passed, modules, weights)
    extra = (passed.held - passed.saved if passed else 0, others)
    element = max(weights.element, sums.FLOAT)  # PEFT keeps adapters in float32 at least
    dropout = options.lora_dropout > 0
    ours = sums.AdapterShape(options.freeze_a, element, dropout)
    lora = sums.AdapterShape(False, element, dropout)
    return [
        sums.adapter_training("tlora", modules, ours, base, extra),
        sums.adapter_training("lora", uniform, lora, base, extra),
        sums.full_training(weights, _work(passes.get("full"), modules, weights)),
    ]
