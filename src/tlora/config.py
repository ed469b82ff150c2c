"""Records that configure an adapter before it exists.

Users write ``TLoraConfig``. It uses PEFT's own field names where PEFT has one, and checks itself on
construction: all faults are reported in one ``ConfigError``. Nothing here imports torch, so that a
command line can parse and print configurations quickly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from tlora.checks import POSITIVE, PROBABILITY, SEED, Pattern, Record, Rule, at_least

# The paper's two come first; the others must hold their source matrices.
Basis = Literal[
    "weight-covariance",
    "random",
    "covariance",
    "weight-half-covariance",
    "gradient",
    "gradient-covariance",
    "gradient-moment",
    "weight-gradient-moment",
]
Whiten = bool | Literal["half"]
SensitivityRule = Literal["magnitude", "fisher"]
Budget = Literal["rank", "params"]
ScaleRule = Literal["released", "constant", "proportional"]
CovarianceMode = Literal["auto", "exact", "streamed"]
SubspaceMode = Literal["auto", "exact", "randomized"]
Bias = Literal["none", "all", "lora_only"]
TaskType = Literal[
    "CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"
]

_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

# The calibration statistics behind each basis: second moments of the inputs, the mean gradient, or
# the gradient-weighted second moment of the inputs.
_READS: dict[Basis, tuple[str, ...]] = {
    "weight-covariance": ("moments",),
    "random": (),
    "covariance": ("moments",),
    "weight-half-covariance": ("moments",),
    "gradient": ("gradient",),
    "gradient-covariance": ("gradient", "moments"),
    "gradient-moment": ("gradient_moment",),
    "weight-gradient-moment": ("gradient_moment",),
}

_OWNS_SCALE = "task-aware LoRA sets every module's scale itself, as alpha_pattern / rank_pattern"
_OWNS_INIT = "task-aware LoRA sets A from the calibration and B to zero"
_KEEPS_WEIGHTS = "task-aware LoRA leaves the base weights, and so the output at step 0, untouched"

# LoRA options of PEFT that would change a scale, an initialization or the form W + s B A.
REFUSED_OPTIONS: dict[str, str] = {
    "use_rslora": f"{_OWNS_SCALE}; choose the scale with `allocate_scale` and `scale_rule`",
    "rank_pattern": "task-aware LoRA allocates the ranks; bound them by `rank_min`, `rank_max`",
    "alpha_pattern": f"{_OWNS_SCALE}; choose the scale with `allocate_scale` and `scale_rule`",
    "use_dora": "DoRA trains a magnitude of the weight, which is not of the form W + s B A",
    "use_qalora": "QALoRA pools the inputs of A, which the calibrated A does not expect",
    "use_bdlora": "block-diagonal A or B cannot hold the calibrated subspace",
    "lora_bias": "a bias on B is not part of s B A x and does not merge into every base layer",
    "init_lora_weights": f"{_OWNS_INIT}; choose the subspace with `basis`",
    "loftq_config": f"LoftQ replaces the base weights; {_KEEPS_WEIGHTS}",
    "eva_config": f"EVA sets A from the inputs alone; {_OWNS_INIT}",
    "corda_config": f"CorDA replaces the base weights; {_KEEPS_WEIGHTS}",
    "lora_ga_config": f"LoRA-GA replaces the base weights; {_KEEPS_WEIGHTS}",
    "velora_config": "VeLoRA changes what A's backward keeps, and A has no backward here",
    "kasa_config": f"KaSA trains singular values of the weight; {_KEEPS_WEIGHTS}",
    "monteclora_config": "MonteCLoRA perturbs A, which is frozen here",
    "arrow_config": "Arrow routes between trained adapters and cannot be calibrated",
    "alora_invocation_tokens": "activated LoRA switches by token, which calibration cannot see",
    "layer_replication": "replicated layers share weights that calibration sees only once",
}


def parse_bytes(value: int | float | str) -> int:
    """Return the bytes in ``value``: a number, or text like ``"2GiB"``, ``"512 MB"``, ``"1e9"``.

    Raises:
        ValueError: the text is not a number with a known unit, or the size is not positive.
    """
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not a size")
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        size = int(value)
    else:
        match = re.fullmatch(
            r"\s*((?:\d+\.?\d*|\.\d+)(?:e\d+)?)\s*([a-z]*)\s*", str(value), re.I | re.A
        )
        if match is None or match[2].upper() not in _BYTES:
            raise ValueError(f"{value!r} is not a size like 2GiB, 512MB or a number of bytes")
        number = float(match[1]) * _BYTES[match[2].upper()]
        if math.isinf(number):
            raise ValueError(f"{value!r} is too large for a size")
        size = int(number)
    if size <= 0:
        raise ValueError(f"{value!r} is not a positive size")
    return size


def bytes_text(count: float) -> str:
    """Return bytes as text: "20.4 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def target_faults(options: Any) -> Iterator[str]:
    """Yield faults between the fields that choose modules, in any method's options."""
    targets = options.target_modules
    if targets == [] and not getattr(options, "target_parameters", None):
        yield "`target_modules` is []; name a module to adapt."
    if isinstance(targets, list) and (
        both := sorted({*targets} & {*(options.modules_to_save or ())})
    ):
        yield (
            "`target_modules` and `modules_to_save` both name "
            f"{', '.join(map(repr, both))}; a module is adapted or trained in full: "
            "remove it from one of them."
        )


def _is_size(value: int | str) -> bool:
    try:
        return parse_bytes(value) > 0
    except ValueError:
        return False


_INDEXES = Rule("a list of whole numbers, 0 or more", lambda values: values and min(values) >= 0)
_SIZE = Rule("a size like 2GiB, 512MB or a number of bytes", _is_size)


@dataclass(kw_only=True)
class TLoraConfig(Record):
    """How to adapt a model with Task-aware LoRA.

    Example:
        >>> TLoraConfig(r=128, lora_alpha=128, target_modules="all-linear").budget
        'rank'

    Raises:
        ConfigError: an option is unknown (with a suggestion), refused (with the reason) or out
            of range. All faults are collected into one error.
    """

    where: ClassVar[str] = "TLoraConfig"
    noun: ClassVar[str] = "option"

    r: Annotated[int, at_least(1)] = 8
    """Base rank r: the N targeted modules share N r ranks (PEFT: `r`)."""
    lora_alpha: Annotated[float, POSITIVE] = 8
    """Base alpha: with constant scales every module's output is multiplied by lora_alpha / r."""
    target_modules: Pattern | list[str] | None = "all-linear"
    """Modules to adapt, by PEFT's rules: a list of names or suffixes, a regex, "all-linear" (every
    Linear and Conv1D except the head; in a multimodal model, of its language model), or None for
    PEFT's default of the architecture."""
    exclude_modules: Pattern | list[str] | None = None
    """Modules to exclude, by PEFT's rules."""
    target_parameters: list[str] | None = None
    """Fused parameters of experts to adapt: a list of names or suffixes, as in PEFT
    (["experts.gate_up_proj", "experts.down_proj"]); None: none. All experts of a parameter get
    one rank and one scale."""
    layers_to_transform: Annotated[int, at_least(0)] | Annotated[list[int], _INDEXES] | None = None
    """Layer indexes to adapt (all, if None), as in PEFT."""
    layers_pattern: Pattern | list[Pattern] | None = None
    """Name of the layer list that `layers_to_transform` indexes, as in PEFT."""
    lora_dropout: Annotated[float, PROBABILITY] = 0.0
    """Dropout on the adapter's input during training."""
    modules_to_save: list[Pattern] | None = None
    """Modules trained in full and saved with the adapter (a new classifier head)."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Tokens whose rows of the embedding train: ids, or ids by the layer's name. Rows of a tied
    head follow. `tokens.add` sets it for the tokens it adds."""
    ensure_weight_tying: bool = False
    """Keep the head tied to an embedding that trains by `modules_to_save`."""
    bias: Bias = "none"
    """Which biases train, as in PEFT."""
    task_type: TaskType | None = None
    """PEFT's task type, or None: for no head that PEFT knows."""

    basis: Basis = "weight-covariance"
    """Span of the rows of A. "weight-covariance": the leading right singular vectors of W C (the
    paper); "random": LoRA's own random A (the paper's ablation without initialization). Not in the
    paper,
    the leading right singular vectors of: C ("covariance"), W C^(1/2) ("weight-half-covariance"),
    the mean gradient G ("gradient"), G C ("gradient-covariance"), N, the inputs' second moment with
    each token weighted by its squared gradient ("gradient-moment"), W N
    ("weight-gradient-moment")."""
    whiten: Whiten = False
    """Give the features A x equal variance: A' = c K^(-1/2) A with K = A C0 A^T; "half" takes
    K^(-1/4), which halves the spread of their variances on a logarithmic scale."""
    allocate_rank: bool = True
    """Allocate ranks by sensitivity; false: every module gets r."""
    allocate_scale: bool = True
    """Set scales by sensitivity; false: every module gets lora_alpha / r."""
    sensitivity_rule: SensitivityRule = "magnitude"
    """Sensitivity that ranks and scales follow: "magnitude", the mean of |w * dL/dw| (the paper),
    or "fisher", the mean of (dL/dw)^2."""
    scale_rule: ScaleRule = "released"
    """Rule used when `allocate_scale` is on: "released" (only ever raises a scale),
    "proportional" (keeps the mean), "constant"."""
    freeze_a: bool = True
    """Freeze A and train only B."""
    budget: Budget = "rank"
    """Quantity to keep equal to uniform rank r: "rank" (the sum of the ranks) or "params" (the
    trainable parameters sum_i m_i r_i do not exceed the uniform ones)."""
    rank_min: Annotated[int, at_least(0)] = 1
    """Smallest rank of a module; 0 lets the allocation skip modules."""
    rank_max: Annotated[int, at_least(1)] | None = None
    """Largest rank of a module, besides min(m, d)."""

    covariance: CovarianceMode = "auto"
    """How second moments are made: "exact" (d x d each; in blocks beyond the budget), "streamed"
    (not made: subspace iteration over the samples), or "auto" (exact without a budget; within one,
    the widest modules are streamed where that saves work or their own moment exceeds it)."""
    subspace: SubspaceMode = "auto"
    """Solver of the singular vectors: "exact", "randomized", or "auto" (by size)."""
    memory_budget: Literal["auto"] | Annotated[int | float | str, _SIZE] | None = "auto"
    """Memory limit for all second moments (and gradients, if `basis` needs them): bytes or "2GiB";
    None: no limit; "auto": no limit on the CPU, on an accelerator 1/20 of the memory that the
    weights leave, at most 4 GiB. The mean of each sample, d numbers per moment, comes on top."""
    seed: Annotated[int, SEED] = 0
    """Seed of all random draws in planning: the solver's sketch, the random basis."""

    @classmethod
    def recommended(cls, **options: Any) -> TLoraConfig:
        """Return the setting that this project's tables support; `TLoraConfig()` is the paper's.

        Equal ranks and scales, and A from W C and frozen; with `freeze_a=False` A trains from the
        same start, with as many parameters as LoRA. Equals the presets `recommended` and
        `recommended-train-a` of the command line.

        Args:
            options: fields that override the preset's.

        Raises:
            ConfigError: as for `TLoraConfig`.
        """
        from tlora import presets

        return cls(**presets.layers(presets.DEFAULT)[-1]["adapter"] | options)

    @classmethod
    def name_faults(cls, values: dict[str, Any], elsewhere: Sequence[str] = ()) -> list[str]:
        """Return a sentence for each name that is not a field: the refusal, or a suggestion."""
        refused = [name for name in values if name in REFUSED_OPTIONS]
        others = {name: value for name, value in values.items() if name not in REFUSED_OPTIONS}
        faults = [f"`{name}` is refused: {REFUSED_OPTIONS[name]}." for name in refused]
        return faults + super().name_faults(others, elsewhere)

    def relations(self) -> Iterator[str]:
        """Yield faults between fields."""
        if self.rank_max is not None and self.rank_max < self.rank_min:
            yield (
                f"`rank_max` is {self.rank_max!r}; give a whole number not below "
                f"`rank_min` ({self.rank_min!r}), or None."
            )
        yield from target_faults(self)
        yield from self._layer_faults()
        if self.target_parameters and self.lora_dropout:
            yield (
                "`lora_dropout` does not work with `target_parameters`: PEFT adapts a "
                "parameter by changing it, not its inputs; set it to 0."
            )
        if self.covariance == "streamed" and self.whiten:
            yield '`whiten` needs second moments, which covariance "streamed" avoids; drop one.'
        if self.covariance == "streamed" and not self.streams:
            yield (
                f"`basis` {self.basis!r} needs its statistics in memory, which covariance"
                ' "streamed" avoids; set `covariance` to "exact", or `basis` to'
                ' "weight-covariance".'
            )

    def _layer_faults(self) -> Iterator[str]:
        """Yield PEFT's objections to the layers to adapt."""
        given = [
            name
            for name in ("layers_to_transform", "layers_pattern")
            if getattr(self, name) is not None
        ]
        if given and isinstance(self.target_modules, str):
            yield (
                f"`{given[0]}` needs `target_modules` as a list of names, not "
                f"{self.target_modules!r}; give a list, or None for PEFT's default."
            )
        elif given == ["layers_pattern"]:
            yield "`layers_pattern` needs `layers_to_transform`; give both or neither."

    @property
    def bounds_moments(self) -> bool:
        """Whether the user limits second moments, so that calibration cannot keep all of them."""
        return self.memory_budget_bytes is not None or self.covariance == "streamed"

    @property
    def memory_budget_bytes(self) -> int | None:
        """`memory_budget` in bytes; None for no limit, and for "auto", which is resolved later."""
        unset = self.memory_budget in (None, "auto")
        return None if unset else parse_bytes(self.memory_budget)  # type: ignore[arg-type]

    @property
    def needs_sensitivity(self) -> bool:
        """Whether planning needs the sensitivities of the paper, mean |w * dL/dw|."""
        return self._allocates and self.sensitivity_rule == "magnitude"

    @property
    def needs_fisher(self) -> bool:
        """Whether planning needs the mean of (dL/dw)^2."""
        return self._allocates and self.sensitivity_rule == "fisher"

    @property
    def needs_moments(self) -> bool:
        """Whether planning needs the second moments of the inputs."""
        return self._basis_reads("moments") or bool(self.whiten)

    @property
    def needs_gradient(self) -> bool:
        """Whether planning needs the mean gradient of each weight."""
        return self._basis_reads("gradient")

    @property
    def needs_gradient_moment(self) -> bool:
        """Whether planning needs the gradient-weighted second moments."""
        return self._basis_reads("gradient_moment")

    @property
    def streams(self) -> bool:
        """Whether the basis only needs products with its source matrix."""
        return self.basis in get_args(Basis)[:2]

    @property
    def needs_backward(self) -> bool:
        """Whether planning needs the loss, and so calibration needs labels."""
        return self._allocates or self.needs_gradient or self.needs_gradient_moment

    @property
    def _allocates(self) -> bool:
        return self.allocate_rank or (self.allocate_scale and self.scale_rule != "constant")

    def _basis_reads(self, statistic: str) -> bool:
        return statistic in _READS[self.basis]
