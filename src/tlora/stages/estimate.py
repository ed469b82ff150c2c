"""What calibration and training will take: arithmetic on shapes, nothing else.

Memory is in bytes, time in seconds at a given rate. FLOPs count a product and its addition as two.
Symbols as in docs/method.md: W_i is m x d, r_i its rank, T tokens a sample, B samples a batch, n
calibration samples. "Rows" are the rows of a module's inputs in one batch, B T where every token
passes once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tlora.adapter.strategy import Strategy
from tlora.config import TLoraConfig
from tlora.linalg.streamed import PASSES, block_width
from tlora.linalg.subspace import Solver
from tlora.stages import basiscost as bases

FLOAT = 4  # bytes of a float32: second moments, planning, and adapters on half-precision weights


@dataclass(frozen=True)
class ModuleShape:
    """A targeted module.

    Attributes:
        name: its full name in the model.
        d_in: d.
        d_out: m.
        rank: r_i at the uniform budget.
        rows: rows of its inputs in one batch; 0 if it is never called.
        source: equal for modules that read the same tensors.
        parameter: the fused parameter that the module is an expert of, if it is one.
    """

    name: str
    d_in: int
    d_out: int
    rank: int
    rows: int
    source: int
    parameter: str | None = None

    @property
    def adapter(self) -> str:
        """Name of what PEFT adapts as one."""
        return self.parameter or self.name


@dataclass(frozen=True)
class Weights:
    """The base model's weights: how many, and the bytes of all and of one."""

    parameters: int
    bytes: int
    element: int


@dataclass(frozen=True)
class Work:
    """What a pass over one batch keeps (bytes) and computes (FLOPs); see `Forward`."""

    kept: int
    kept_if_checkpointed: int
    logits: int
    weight_flops: int
    attention_flops: int
    layers: int = 0


@dataclass(frozen=True)
class CalibrationEstimate:
    """Bytes and FLOPs of calibrating and planning.

    The peak is reached in one of two phases: a batch (``activations`` and the largest of what
    comes and goes on top of them), or planning one module, when the activations are gone.
    """

    weights: int
    strategy: Strategy
    """What is held when: `held` of the second moments' `total` at a time."""
    unshared: int
    """What they would take if none were shared."""
    means: int
    """Mean rows of each sample."""
    activations: int
    loss: int
    sensitivity: int
    planning: int
    factors: int
    """The A matrices, as planning fills them."""
    flops: float

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        batch = self.activations + max(self.loss, self.sensitivity)
        held = self.weights + self.strategy.held + self.means
        return held + max(batch, self.planning + self.factors)


@dataclass(frozen=True)
class TrainingEstimate:
    """Bytes and FLOPs of one training step (one batch forward and backward) of one way to train."""

    name: str
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    checkpointed: int
    flops: float
    checkpointed_flops: float

    def peak(self, checkpointing: bool) -> int:
        """Bytes at the peak, with or without gradient checkpointing."""
        kept = self.checkpointed if checkpointing else self.activations
        return self.weights + self.gradients + self.optimizer + kept


def once_per_source(modules: Sequence[ModuleShape]) -> list[ModuleShape]:
    """Return one module for each input that is read."""
    return list({module.source: module for module in modules}.values())


def moment_bytes(modules: Sequence[ModuleShape], shared: bool = True) -> int:
    """Bytes of the second moments: 4 sum d^2 over distinct inputs; if not shared, over modules."""
    return FLOAT * sum(m.d_in**2 for m in (once_per_source(modules) if shared else modules))


def mean_bytes(modules: Sequence[ModuleShape], samples: int) -> int:
    """Bytes of the mean rows kept beside the moments: 4 n sum d over distinct inputs."""
    return FLOAT * samples * sum(m.d_in for m in once_per_source(modules))


def loss_bytes(logits: int, element: int) -> int:
    """Bytes when a backward pass begins: the logits as stored, and two gradients in float32.

    Those are of the log-softmax's output and input. What the loss has saved for them counts among
    the activations.
    """
    return logits * (element + 2 * FLOAT)


def update_bytes(modules: Sequence[ModuleShape]) -> int:
    """Bytes while a batch is added to a moment: its rows in float32, as they are and centred."""
    return max((2 * FLOAT * m.rows * m.d_in for m in modules), default=0)


def sensitivity_bytes(modules: Sequence[ModuleShape], element: int) -> int:
    """Bytes of the largest dense matrix of the backward: W in float32, where it is converted.

    The gradient that it weighs, and |W|, are formed in blocks.
    """
    return 0 if element == FLOAT else max((FLOAT * m.d_in * m.d_out for m in modules), default=0)


def streaming_bytes(module: ModuleShape, element: int) -> int:
    """Bytes of a step of subspace iteration: W (where converted), W (C V), and two more blocks."""
    converted = 0 if element == FLOAT else module.d_in * module.d_out
    width = block_width(module.d_in, module.rank)
    return FLOAT * (converted + (module.d_out + 2 * module.d_in) * width)


def planning_bytes(module: ModuleShape, element: int, solver: Solver) -> int:
    """Bytes of solving one module beside its moment: W (where converted), W C, the solver's own.

    Exact: thin SVD by divide and conquer, a copy of W C, both factors, and 4 k^2, k = min(m, d).
    Randomised: about three sketches of max(m, d) and one of m + d rows, `Solver.width` wide.
    """
    m, d = module.d_out, module.d_in
    narrow, width = min(m, d), solver.width(module.rank)
    if solver.resolve(m, d, module.rank) == "exact":
        own = m * d + (m + d) * narrow + 4 * narrow**2
    else:
        own = (3 * max(m, d) + m + d) * width
    converted = 0 if element == FLOAT else m * d
    return FLOAT * (converted + m * d + own)


def planning_flops(module: ModuleShape, solver: Solver) -> float:
    """FLOPs of W C and of its singular vectors.

    W C: 2 m d^2. Exact, with p = max(m, d) and q = min(m, d): 6 p q^2 + 20 q^3 (Golub and Van
    Loan, R-SVD). Randomised: 2 k + 2 products 2 m d w with k iterations and the width w, and 4 (m +
    d) w^2 for the two QR of each and as many before and after.
    """
    m, d = module.d_out, module.d_in
    small, large, width = min(m, d), max(m, d), solver.width(module.rank)
    if solver.resolve(m, d, module.rank) == "exact":
        return 2 * m * d * d + 6 * large * small**2 + 20 * small**3
    products = (2 * solver.iterations + 2) * 2 * m * d * width
    return 2 * m * d * d + products + (solver.iterations + 1) * 4 * (m + d) * width**2


@dataclass(frozen=True)
class CalibrationPlan:
    """What is asked of calibration: n samples, B a batch, which statistics, and how.

    ``sensitivity`` stands for the backward pass, whatever it is run for; ``config`` says that.
    """

    samples: int
    batch_size: int
    moments: bool
    sensitivity: bool
    strategy: Strategy
    solver: Solver
    config: TLoraConfig = field(default_factory=TLoraConfig)

    @property
    def solves(self) -> bool:
        """Whether a matrix of the statistics is decomposed, or captured energy measured."""
        return self.moments or bases.accumulates(self.config)


def calibration(
    modules: Sequence[ModuleShape], weights: Weights, work: Work, plan: CalibrationPlan
) -> CalibrationEstimate:
    """Predict calibration and planning.

    Args:
        modules: the targets.
        weights: the base model's.
        work: of one calibration batch; ``kept`` includes the inputs of the targets.
        plan: what is asked.
    """
    solving = [
        streaming_bytes(m, weights.element)
        if m.name in plan.strategy.streamed
        else planning_bytes(bases.solved(m, plan.config), weights.element, plan.solver)
        + bases.root_bytes(m, plan.config)
        for m in modules
    ]
    loss = loss_bytes(work.logits, weights.element) if plan.sensitivity else 0
    loss = max(loss, bases.gradient_row_bytes(modules, plan.config))
    dense = plan.sensitivity and plan.config.needs_sensitivity
    unshared = moment_bytes(modules, shared=False) if plan.moments else 0
    return CalibrationEstimate(
        weights=weights.bytes,
        strategy=plan.strategy,
        unshared=unshared + bases.accumulated_bytes(modules, plan.config),
        means=mean_bytes(modules, plan.samples) if plan.moments else 0,
        activations=work.kept,
        loss=max(loss, update_bytes(modules) if plan.moments else 0),
        sensitivity=sensitivity_bytes(modules, weights.element) if dense else 0,
        planning=max(solving, default=0) if plan.solves else 0,
        factors=FLOAT * sum(m.rank * m.d_in for m in modules),
        flops=calibration_flops(modules, work, plan),
    )


def calibration_flops(modules: Sequence[ModuleShape], work: Work, plan: CalibrationPlan) -> float:
    """FLOPs of n / B batches, of the further forward passes, and of planning.

    A batch: forward; with sensitivities the backward to the inputs (as much again, attention
    twice) and delta^T X of every target, 2 rows m d; the second moments, rows d^2 for each
    distinct input (half of a full product, since they are symmetric); G and N, where the basis
    takes them. A later block: half a forward pass on average, since it stops after its last module;
    with gradients a forward and half a backward pass. A streaming pass: a forward pass, and
    4 rows d l.
    """
    forward = work.weight_flops + work.attention_flops
    streamed = [m for m in modules if m.name in plan.strategy.streamed]
    blocks, runs = len(plan.strategy.blocks), plan.strategy.stream_runs
    back = work.weight_flops + 2 * work.attention_flops
    later = forward + back / 2 if bases.accumulates(plan.config) else forward / 2
    batch = forward * (1 + PASSES * runs) + later * max(blocks - 1, 0)
    batch += bases.gradient_flops(modules, plan.config)
    batch += sum(4 * PASSES * m.rows * m.d_in * block_width(m.d_in, m.rank) for m in streamed)
    if plan.sensitivity:
        batch += back
        if plan.config.needs_sensitivity or plan.config.needs_fisher:
            batch += sum(2 * m.rows * m.d_in * m.d_out for m in modules)
    if not plan.solves:
        return batch * plan.samples / plan.batch_size
    exact = [m for m in modules if m.name not in plan.strategy.streamed]
    if plan.moments:
        batch += sum(m.rows * m.d_in**2 for m in once_per_source(exact))
    planning = sum(planning_flops(bases.solved(m, plan.config), plan.solver) for m in exact)
    planning += sum(bases.root_flops(m, plan.config) for m in exact)
    planning += sum(6 * m.d_in * m.d_out * block_width(m.d_in, m.rank) for m in streamed)
    return batch * plan.samples / plan.batch_size + planning


@dataclass(frozen=True)
class AdapterShape:
    """How the targets are adapted: is A frozen, bytes of an adapter weight, is there dropout."""

    frozen_a: bool
    element: int
    dropout: bool


def adapter_parameters(modules: Sequence[ModuleShape], frozen_a: bool) -> int:
    """Trainable parameters of the adapter: sum_i r_i m_i, plus r_i d_i where A trains too."""
    return sum(m.rank * (m.d_out + (0 if frozen_a else m.d_in)) for m in modules)


def adapter_activations(
    modules: Sequence[ModuleShape], adapter: AdapterShape, weights: Weights, shared: int
) -> int:
    """Bytes that the adapters keep for the backward beside what the base model keeps.

    B's gradient needs z = A x: rows r_i. A's needs x: the tensors that the targets read
    (``shared``, counted once) where adapter and weights have the same dtype, else a converted copy
    for each module. Dropout keeps a mask of one byte an entry, and its output where A trains.

    An expert of a fused parameter is adapted by forming W + s B A: that matrix is kept for the
    gradient at its input, and its input for the gradient of the matrix.
    """
    fused = [m for m in modules if m.parameter]
    modules = [m for m in modules if not m.parameter]
    kept = adapter.element * sum(m.rows * m.rank for m in modules)
    kept += weights.element * sum(m.d_in * (m.d_out + m.rows) for m in fused)
    entries = sum(m.rows * m.d_in for m in modules)
    if adapter.dropout:
        kept += entries
    if not adapter.frozen_a:
        same = adapter.element == weights.element and not adapter.dropout
        kept += shared if same else adapter.element * entries
    return kept


def adapter_training(
    name: str,
    modules: Sequence[ModuleShape],
    adapter: AdapterShape,
    base: tuple[Weights, Work],
    extra: tuple[int, int],
) -> TrainingEstimate:
    """Predict one step of training an adapter with AdamW.

    FLOPs: base forward and backward to the inputs; A x and B z of every target forward, to their
    inputs, and for the gradients of what trains: 2 rows r (2 d + 3 m), and 2 rows r d more for A.
    Of an expert: B A, the gradient of W + s B A, and from it that of B: 2 m d (2 r + rows), and
    2 m d r more for A.

    Args:
        name: of the way to train.
        modules: the targets.
        adapter: how they are adapted.
        base: the base model's weights, and what a training batch does with them frozen.
        extra: bytes of the targets' inputs beyond what the base keeps; and parameters trained
            outside the adapters (a head, biases): copies in float32, as the base keeps its own.
    """
    weights, work = base
    shared, others = extra
    trained = adapter_parameters(modules, adapter.frozen_a)
    all_of_it = adapter_parameters(modules, frozen_a=False)
    beside = adapter_activations(modules, adapter, weights, shared)
    loss = loss_bytes(work.logits, weights.element)
    through = sum(_adapter_flops(m, adapter.frozen_a) for m in modules)
    flops = 2 * work.weight_flops + 3 * work.attention_flops + through
    held = trained * adapter.element + others * FLOAT
    return TrainingEstimate(
        name=name,
        trainable=trained + others,
        weights=weights.bytes + all_of_it * adapter.element + others * FLOAT,
        gradients=held,
        optimizer=2 * held,
        activations=work.kept + beside + loss,
        checkpointed=work.kept_if_checkpointed + beside // max(1, work.layers) + loss,
        flops=flops,
        checkpointed_flops=flops + work.weight_flops + work.attention_flops,
    )


def _adapter_flops(module: ModuleShape, frozen_a: bool) -> int:
    rows, rank, m, d = module.rows, module.rank, module.d_out, module.d_in
    if module.parameter:
        return 2 * m * d * ((2 if frozen_a else 3) * rank + rows)
    return 2 * rows * rank * ((2 if frozen_a else 3) * d + 3 * m)


def full_training(weights: Weights, work: Work) -> TrainingEstimate:
    """Predict one step of training every parameter with AdamW, all in float32.

    Where the model's own dtype is narrower it computes under autocast, which keeps a copy of the
    weights in that dtype for the backward. FLOPs: forward, backward to the inputs, and as much
    again for the weights' gradients.
    """
    loss = loss_bytes(work.logits, weights.element)
    stored = FLOAT * weights.parameters
    copies = weights.bytes if weights.element < FLOAT else 0
    flops = 3 * (work.weight_flops + work.attention_flops)
    return TrainingEstimate(
        name="full",
        trainable=weights.parameters,
        weights=stored + copies,
        gradients=stored,
        optimizer=2 * stored,
        activations=work.kept + loss,
        checkpointed=work.kept_if_checkpointed + loss,
        flops=flops,
        checkpointed_flops=flops + work.weight_flops + work.attention_flops,
    )
