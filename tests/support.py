"""Small inputs, toy models and an independent definition of the statistics, for several folders."""

from __future__ import annotations

import copy
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

VOCABULARY = 160
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SENTENCES = (
    "Natalia sold clips to 48 of her friends in April.",
    "Below is an instruction that describes a task.",
    "The answer is: 72",
    "a charming and often affecting journey",
    "unflinchingly bleak and desperate",
)
Sample = dict[str, Any]
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}


@dataclass(frozen=True)
class Expected:
    """What docs/method.md, 2 says of one module, in float64."""

    sensitivity: float
    covariance: Tensor
    uncentered: Tensor
    tokens: int


def one_at_a_time(
    model: nn.Module, samples: Sequence[Sample], names: Iterable[str]
) -> dict[str, Expected]:
    """Follow the definition: one sample at a time, weights that require a gradient."""
    model = copy.deepcopy(model).double().eval().requires_grad_(False)
    modules = {name: model.get_submodule(name) for name in names}
    rows: dict[str, list[Tensor]] = {name: [] for name in modules}
    for name, module in modules.items():
        module.weight.requires_grad_(True)
        module.register_forward_hook(
            lambda _, x, kw, __, to=rows[name]: to.append((x[0] if x else kw["input"]).detach()),
            with_kwargs=True,
        )
    sensitivity = dict.fromkeys(modules, 0.0)
    tokens = dict.fromkeys(modules, 0)
    centered: dict[str, Any] = dict.fromkeys(modules, 0.0)
    uncentered: dict[str, Any] = dict.fromkeys(modules, 0.0)
    for sample in samples:
        for seen in rows.values():
            seen.clear()
        model.zero_grad(set_to_none=True)
        loss = model(**as_double(sample)).loss
        if loss.requires_grad:
            loss.backward()
        for name, module in modules.items():
            width = getattr(module, "in_features", None) or module.nx
            x = torch.cat([torch.zeros(0, width), *(r.reshape(-1, width) for r in rows[name])])
            if len(x):
                around = x - x.mean(dim=0)
                centered[name] = centered[name] + around.T @ around / len(samples)
                uncentered[name] = uncentered[name] + x.T @ x / len(samples)
            tokens[name] += len(x)
            if module.weight.grad is not None:
                product = (module.weight * module.weight.grad).abs().mean().item()
                sensitivity[name] += product / len(samples)
    return {
        name: Expected(sensitivity[name], centered[name], uncentered[name], tokens[name])
        for name in modules
    }


def as_double(sample: Sample) -> Sample:
    return {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in sample.items()
    }


def distance(value: Tensor, expected: Tensor) -> float:
    """The relative Frobenius distance; absolute where the expectation is zero."""
    expected = torch.as_tensor(expected, dtype=torch.float64).cpu()
    norm = expected.norm().item() or 1.0
    return (value.double().cpu() - expected).norm().item() / norm


def assert_agrees(stats: Any, expected: dict[str, Expected], tolerance: float = 1e-4) -> None:
    assert list(stats.modules) == list(expected)
    for name, module in stats.modules.items():
        want = expected[name]
        assert module.tokens == want.tokens, name
        assert abs(module.sensitivity - want.sensitivity) <= tolerance * want.sensitivity, name
        assert distance(module.covariance(), want.covariance) < tolerance, name
        assert distance(module.uncentered(), want.uncentered) < tolerance, name


def ids(length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=generator)


def causal_samples(lengths: Sequence[int] = (7, 3, 10, 5, 2), seed: int = 0) -> list[Sample]:
    """Texts whose first third is a prompt, masked in the labels."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length in lengths:
        text = ids(length, generator)
        labels = text.clone()
        labels[:, : length // 3] = -100
        mask = torch.ones_like(text)
        samples.append({"input_ids": text, "attention_mask": mask, "labels": labels})
    return samples


def labeled_samples(
    label: Callable[[torch.Generator], Tensor], lengths: Sequence[int] = (7, 1, 10, 5, 3)
) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for length in lengths:
        text = ids(length, generator)
        samples.append(
            {
                "input_ids": text,
                "attention_mask": torch.ones_like(text),
                "labels": label(generator),
            }
        )
    return samples


def classified_samples(lengths: Sequence[int] = (7, 1, 10, 5, 3)) -> list[Sample]:
    return labeled_samples(lambda g: torch.randint(0, 2, (1,), generator=g), lengths)


def translated_samples(
    lengths: Sequence[tuple[int, int]] = ((7, 4), (3, 9), (10, 2), (5, 6), (2, 1)),
) -> list[Sample]:
    generator = torch.Generator().manual_seed(2)
    samples = []
    for source, target in lengths:
        text = ids(source, generator)
        mask, labels = torch.ones_like(text), ids(target, generator)
        samples.append({"input_ids": text, "attention_mask": mask, "labels": labels})
    return samples


def image_samples(count: int = 5) -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "pixel_values": torch.randn(1, 3, 8, 8, generator=generator),
            "labels": torch.randint(0, 2, (1,), generator=generator),
        }
        for _ in range(count)
    ]


def demo_samples(count: int) -> list[Sample]:
    """The first rows of the demo's task, as its base reads them."""
    from tlora.demo import corpus
    from tlora.demo.run import BASE_MODEL

    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE_MODEL)
    samples = []
    for row in corpus.shifted_task(0)[0][:count]:
        prompt, response = (tokenizer(row[key])["input_ids"] for key in ("prompt", "response"))
        text = torch.tensor([prompt + response])
        labels = text.clone()
        labels[:, : len(prompt)] = -100
        mask = torch.ones_like(text)
        samples.append({"input_ids": text, "attention_mask": mask, "labels": labels})
    return samples


def padded(samples: Sequence[Sample], side: str = "right", length: int = 0) -> Sample:
    """Join samples into one batch: padding of 0, labels of -100, positions where on the left."""
    batch = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if values[0].dim() == 2 and values[0].dtype == torch.long:
            columns = max(length, *(value.shape[1] for value in values))
            fill = -100 if key == "labels" else 0
            values = [_pad(value, columns, fill, side) for value in values]
        batch[key] = torch.cat(values)
    if side == "left":
        mask = batch["attention_mask"]
        batch["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return batch


def _pad(value: Tensor, columns: int, fill: int, side: str) -> Tensor:
    missing = columns - value.shape[1]
    return nn.functional.pad(
        value, (missing, 0) if side == "left" else (0, missing), value=float(fill)
    )


def in_batches(samples: Sequence[Sample], size: int, side: str = "right") -> list[Sample]:
    return [padded(samples[i : i + size], side) for i in range(0, len(samples), size)]


def seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().float().eval()


def byte_tokenizer() -> Any:
    """Return a byte-level BPE of 160 tokens that knows every printable character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE(unk_token=SPECIAL["unk_token"]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL.values()), show_progress=False
    )
    core.train_from_iterator([*SENTENCES, string.printable], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=256, **SPECIAL
    )


def tiny_vit(**overrides: Any) -> Any:
    fields = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "num_labels": 2,
        "initializer_range": 0.2,
    }
    config = transformers.ViTConfig(**(fields | overrides))
    return seeded(lambda: transformers.ViTForImageClassification(config))


def tiny_bart_classifier() -> Any:
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        num_labels=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        init_std=0.2,
    )
    return seeded(lambda: transformers.BartForSequenceClassification(config))


class Toy(nn.Module):
    """Base of the toy classifiers: `encode` maps B x T x 8 to B x T x 8, then a masked mean.

    The loss is the mean over samples; the name of a subclass says so, as transformers' names do.
    """

    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(self.width, self.width)
        self.head = nn.Linear(self.width, 3)

    def encode(self, x: Tensor, **_: Any) -> Tensor:
        return self.first(x).tanh()

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **extra: Any,
    ) -> SequenceClassifierOutput:
        hidden = self.encode(inputs_embeds, **extra)
        keep = torch.ones_like(hidden[..., :1])
        if attention_mask is not None:
            keep = attention_mask[..., None].to(hidden.dtype)
        # where: a model does not look at what stands in the padding.
        hidden = torch.where(keep != 0, hidden, torch.zeros_like(hidden))
        logits = self.head(hidden.sum(dim=1) / keep.sum(dim=1))
        loss = None if labels is None else self.loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels)


def toy_samples(lengths: Sequence[int] = (4, 1, 6, 3), seed: int = 4) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "inputs_embeds": torch.randn(1, length, Toy.width, generator=generator) + 1.0,
            "attention_mask": torch.ones(1, length, dtype=torch.long),
            "labels": torch.randint(0, 3, (1,), generator=generator),
        }
        for length in lengths
    ]


def toy_batch(samples: Sequence[Sample], fill: float = 0.0) -> Sample:
    """Join toy samples, padded on the right by ``fill``."""
    columns = max(s["inputs_embeds"].shape[1] for s in samples)
    padding = [columns - s["inputs_embeds"].shape[1] for s in samples]
    pad = nn.functional.pad
    return {
        "inputs_embeds": torch.cat(
            [
                pad(s["inputs_embeds"], (0, 0, 0, p), value=fill)
                for s, p in zip(samples, padding, strict=True)
            ]
        ),
        "attention_mask": torch.cat(
            [pad(s["attention_mask"], (0, p)) for s, p in zip(samples, padding, strict=True)]
        ),
        "labels": torch.cat([s["labels"] for s in samples]),
    }


FAMILIES = {
    "llama-right": ("tiny_llama", "right"),
    "llama-left": ("tiny_llama", "left"),
    "gpt2-right": ("tiny_gpt2", "right"),
    "gpt2-left": ("tiny_gpt2", "left"),
    "bert": ("tiny_bert_classifier", "right"),
    "bert-regression": ("tiny_bert_classifier", "right"),
    "bert-multilabel": ("tiny_bert_classifier", "right"),
    "t5": ("tiny_t5", "right"),
    "t5-equal": ("tiny_t5", "right"),
    "bart-classifier": (tiny_bart_classifier, "right"),
    "vit": (tiny_vit, "right"),
}


@dataclass
class Family:
    model: Any
    samples: list[Sample]
    side: str
    config: dict[str, Any]

    def batches(self, size: int) -> list[Sample]:
        return in_batches(self.samples, size, self.side)


def make_family(name: str, fixture: Callable[[str], Any]) -> Family:
    """Return a fresh model of a family with samples; ``fixture`` finds a fixture by its name."""
    factory, side = FAMILIES[name]
    if isinstance(factory, str):
        factory = fixture(factory)
    kind = {"bert": "SEQ_CLS", "bart": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
    config = {"r": 2, "task_type": kind.get(name.split("-", maxsplit=1)[0])}
    return Family(_build(factory, name), _samples(name), side, config)


def _build(factory: Callable[..., Any], name: str) -> Any:
    # Weights large enough that attention is far from uniform.
    if name.startswith("t5"):
        return factory(initializer_factor=1.5)
    if name in ("vit", "bart-classifier"):
        return factory()
    overrides: dict[str, Any] = {"initializer_range": 0.2}
    if name == "bert-regression":
        overrides["num_labels"] = 1
    if name == "bert-multilabel":
        overrides |= {"num_labels": 3, "problem_type": "multi_label_classification"}
    return factory(**overrides)


def _samples(name: str) -> Sequence[Sample]:
    if name in ("t5", "vit"):
        return translated_samples() if name == "t5" else image_samples()
    if name == "t5-equal":
        return translated_samples(((6, 2), (2, 6), (4, 3), (1, 5), (6, 6)))
    if name == "bart-classifier":
        samples = classified_samples()
        for sample in samples:
            sample["input_ids"][:, -1] = 2
        return samples
    if name == "bert-regression":
        return labeled_samples(lambda g: torch.randn(1, generator=g))
    if name == "bert-multilabel":
        return labeled_samples(lambda g: torch.rand(1, 3, generator=g).round())
    return classified_samples() if name == "bert" else causal_samples()


def logits_of(model: Any, batch: Sample) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def train(model: Any, batch: Sample, steps: int, lr: float = 1e-2) -> list[float]:
    """Take real optimizer steps on the parameters that require a gradient; return the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
