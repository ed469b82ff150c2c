"""Facts about PEFT's adapter types: paper, learning rate, exceptions.

A type that is missing here works too, but without a paper. Nothing here imports PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_PROMPT = "it adds tokens, or their keys and values, and changes no weight"
_NEEDS_TASKS = "each of its batches has to name a task by `task_ids`, which rows do not have"


@dataclass(frozen=True, kw_only=True)
class PeftType:
    """A type of adapter that PEFT registers."""

    title: str
    """Title of its paper."""
    arxiv: str | None = None
    """The paper's number on arXiv, if it has one."""
    year: int
    """Year of the paper."""
    rate: float | None = None
    """Learning rate in PEFT's own comparison on Llama-3.2-3B (the lowest one)."""
    start: Literal["rounding", "moved"] = "rounding"
    """Whether the output before the first step equals the base's, or PEFT draws it at random."""
    targets: Literal["all-linear"] | None = "all-linear"
    """Default of `target_modules`; None: PEFT's choice for the architecture."""
    trains: str | None = None
    """A part of its parameters' names, if PEFT's prefix does not fit."""
    unmerged: str | None = None
    """Why PEFT does not merge it into the weights."""
    refused: str | None = None
    """Why it cannot be trained here."""


def _peft_type(title: str, arxiv: str | None, year: int = 0, **more: object) -> PeftType:
    year = year or 2000 + int(str(arxiv)[:2])
    return PeftType(title=title, arxiv=arxiv, year=year, **more)  # type: ignore[arg-type]


# fmt: off
KNOWN: dict[str, PeftType] = {
    "lora": _peft_type("LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685"),
    "adalora": _peft_type(
        "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", "2303.10512",
        refused="nothing would prune its ranks; the method `adalora` does"),
    "adamss": _peft_type(
        "AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning", None, 2025,
        rate=1e-4),
    "adaption_prompt": _peft_type(
        "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention",
        "2303.16199", rate=5e-4, targets=None, trains="adaption_",
        unmerged="it adds a gated attention to a prompt"),
    "beft": _peft_type(
        "BEFT: Bias-Efficient Fine-Tuning of Language Models in Low-Data Regimes", "2509.15974",
        unmerged="its biases merge only into base layers that have one"),
    "boft": _peft_type(
        "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", "2311.06243"),
    "c3a": _peft_type(
        "Parameter-Efficient Fine-Tuning via Circular Convolution", "2407.19342", rate=3e-1,
        start="moved"),
    "cartridge": _peft_type(
        "Cartridges: Lightweight and general-purpose long context representations via self-study",
        "2506.06266", start="moved", unmerged=_PROMPT),
    "cpt": _peft_type(
        "Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods",
        "2410.17222", unmerged=_PROMPT,
        refused="its loss reads logits, which TRL's trainer does not form"),
    "deft": _peft_type(
        "DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models", None, 2025),
    "delora": _peft_type(
        "Decoupling Angles and Strength in Low-rank Adaptation", "2503.18225", rate=1e-3),
    "fourierft": _peft_type(
        "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", "2405.03003",
        start="moved"),
    "frod": _peft_type(
        "Full-Rank Efficient Fine-Tuning with Rotational Degrees", None, 2026, rate=1e-3),
    "glora": _peft_type(
        "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", "2306.07967",
        rate=5e-4),
    "gralora": _peft_type(
        "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning", "2505.20355",
        rate=2e-4),
    "hira": _peft_type(
        "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", None,
        2025, rate=4.5e-3),
    "hra": _peft_type(
        "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection"
        " Adaptation", "2405.17484"),
    "ia3": _peft_type(
        "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
        "2205.05638", rate=1e-3, targets=None),
    "lily": _peft_type(
        "Low-Rank Interconnected Adaptation across Layers", "2407.09946",
        unmerged="a router weighs its parts by the input"),
    "ln_tuning": _peft_type(
        "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning",
        "2312.11420", targets=None),
    "loha": _peft_type(
        "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
        "2108.06098"),
    "lokr": _peft_type(
        "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
        "2309.14859", rate=3e-3),
    "miss": _peft_type(
        "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure",
        "2409.15371"),
    "multitask_prompt_tuning": _peft_type(
        "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning", "2303.02861",
        unmerged=_PROMPT, refused=_NEEDS_TASKS),
    "oft": _peft_type("Controlling Text-to-Image Diffusion by Orthogonal Finetuning", "2306.07280"),
    "osf": _peft_type(
        "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning",
        "2504.07097", rate=5e-5),
    "p_tuning": _peft_type("GPT Understands, Too", "2103.10385", start="moved", unmerged=_PROMPT),
    "peanut": _peft_type(
        "PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers", "2410.01870"),
    "poly": _peft_type("Combining Modular Skills in Multitask Learning", "2202.13914",
                unmerged="a router mixes its parts by the task", refused=_NEEDS_TASKS),
    "prefix_tuning": _peft_type(
        "Prefix-Tuning: Optimizing Continuous Prompts for Generation", "2101.00190", rate=1e-3,
        start="moved", unmerged=_PROMPT),
    "prompt_tuning": _peft_type(
        "The Power of Scale for Parameter-Efficient Prompt Tuning", "2104.08691", rate=1e-3,
        start="moved", unmerged=_PROMPT),
    "psoft": _peft_type(
        "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation", "2505.11235"),
    "pvera": _peft_type(
        "PVeRA: Probabilistic Vector-Based Random Matrix Adaptation", "2512.07703", rate=3e-3),
    "randlora": _peft_type(
        "RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of Large Models", "2502.00987"),
    "road": _peft_type(
        "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and"
        " Composability", "2409.00119", rate=1e-3),
    "shadow": _peft_type(
        "ShadowPEFT: Shadow Network for Parameter-Efficient Fine-Tuning", "2604.19254",
        targets=None, unmerged="it adds a network beside the layers, which reads the input"),
    "shira": _peft_type("Sparse High Rank Adapters", "2406.13175", rate=3e-4),
    "supertuning": _peft_type(
        "Super-Tuning: From Activation-Aware Pruning to Sparse Fine-Tuning", "2607.09287"),
    "tinylora": _peft_type("Learning to Reason in 13 Parameters", "2602.04118", rate=1e-3),
    "trainable_tokens": _peft_type(
        "PEFT's trainable rows of the embedding", None, 2025, rate=2e-1, targets=None),
    "unilora": _peft_type("Uni-LoRA: One Vector is All You Need", "2506.00799", start="moved"),
    "vblora": _peft_type(
        "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", "2405.15179",
        rate=5e-4, start="moved"),
    "vera": _peft_type("VeRA: Vector-based Random Matrix Adaptation", "2310.11454", rate=1e-3),
    "waveft": _peft_type(
        "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets", "2505.12532"),
    "xlora": _peft_type(
        "X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for Large Language"
        " Models with Applications in Protein Mechanics and Molecular Design", "2402.07148",
        unmerged="a router weighs its adapters by the input",
        refused="it mixes adapters that are trained already"),
}
# fmt: on
"""By PEFT's name in lower case. What stands in `start`, `unmerged` and `refused` is tested."""
