"""Memory that autograd keeps, and time of a training step, with a frozen A and without::

    python benchmarks/cost/training.py            # measures, writes training.json and prints
    python benchmarks/cost/training.py --table    # prints what is committed
    python benchmarks/cost/training.py --dtype bfloat16 --out gpu.json     # on a GPU: Liger too

Two tables. One layer of Llama-2-7B is counted without computing anything: PyTorch's fake tensors go
through the layer, and hooks see what autograd keeps of them. A small model is trained by
`tlora train`, a few steps on the same eight rows each way, so that losses can be compared; the same
hooks count, and seconds are CPU time (on a GPU, wall time).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tlora.adapter.freeze import freeze_a
from tlora.demo import corpus
from tlora.demo.run import BASE_MODEL
from tlora.files import read_json, write_json
from tlora.training import train
from tlora.training.runconfig import RunConfig
from tlora.training.runfolder import provenance

MIB = 2**20
LAYER = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
STEPS = 6

# What is counted: whether A is frozen, the adapter's precision, dropout. None: no adapter.
COUNTED: dict[str, tuple[bool, torch.dtype, float] | None] = {
    "base alone": None,
    "frozen A, adapter in bfloat16": (True, torch.bfloat16, 0.0),
    "frozen A, adapter in float32 under autocast": (True, torch.float32, 0.0),
    "LoRA, adapter in bfloat16": (False, torch.bfloat16, 0.0),
    "LoRA, adapter in float32 under autocast": (False, torch.float32, 0.0),
    "frozen A in float32, lora_dropout 0.05": (True, torch.float32, 0.05),
    "LoRA in float32, lora_dropout 0.05": (False, torch.float32, 0.05),
}


@dataclass(frozen=True)
class Way:
    """One way to train the small model."""

    flags: dict[str, Any]
    """Fields of the run; those with a dot are below `adapter` or `trainer`."""
    attention: str = "sdpa"
    gpu: bool = False
    """Whether it needs a GPU."""


WAYS = {
    "frozen A": Way({}),
    "LoRA": Way({"method": "lora"}),
    "frozen A, checkpointing": Way({"trainer.gradient_checkpointing": True}),
    "LoRA, checkpointing": Way({"method": "lora", "trainer.gradient_checkpointing": True}),
    "frozen A, lora_dropout 0.05": Way({"adapter.lora_dropout": 0.05}),
    "LoRA, lora_dropout 0.05": Way({"method": "lora", "adapter.lora_dropout": 0.05}),
    "frozen A, attention not fused": Way({}, attention="eager"),
    "frozen A, padding_free": Way({"trainer.padding_free": True}),
    "frozen A, packing": Way({"trainer.packing": True, "trainer.per_device_train_batch_size": 1}),
    "frozen A, adamw_bnb_8bit": Way({"trainer.optim": "adamw_bnb_8bit"}),
    "LoRA, adamw_bnb_8bit": Way({"method": "lora", "trainer.optim": "adamw_bnb_8bit"}),
    "frozen A, use_liger_kernel": Way({"trainer.use_liger_kernel": True}, gpu=True),
    "frozen A, flash attention, padding_free": Way(
        {"trainer.padding_free": True}, attention="flash_attention_2", gpu=True
    ),
}
PLAIN = "frozen A"


class Kept:
    """Bytes that autograd keeps while `watching`, each storage once, without the model's own."""

    def __init__(self, model: nn.Module) -> None:
        held = [*model.parameters(), *model.buffers()]
        self._own = {tensor.untyped_storage()._cdata for tensor in held}
        self._storages: dict[int, Any] = {}

    def watching(self) -> Any:
        """Return the context in which a forward pass is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._storages[storage._cdata] = storage  # held, so that no other takes its place
        return tensor

    @property
    def size(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


def counted_layer(
    kind: tuple[bool, torch.dtype, float] | None,
    shape: dict[str, int] | None = None,
    tokens: int = 4096,
    rank: int = 128,
) -> int:
    """Return the bytes that one layer of a bfloat16 Llama keeps; no value is computed.

    The cosines and sines of the positions, which all layers share, are left out.
    """
    config = transformers.LlamaConfig(
        **shape or LAYER, num_hidden_layers=1, attn_implementation="sdpa"
    )
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    if kind is not None:
        model = _adapted(model, rank, *kind)
    autocast = kind is not None and kind[1] == torch.float32
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _make_fake(model)
        layer = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0].train()
        heads = config.hidden_size // config.num_attention_heads
        angles = [torch.empty(1, tokens, heads, dtype=torch.bfloat16) for _ in range(2)]
        entered = torch.empty(
            1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True
        )
        kept = Kept(layer)
        with kept.watching():
            layer(entered, position_embeddings=angles, attention_mask=None)
        return kept.size - sum(angle.nbytes for angle in angles)


def _adapted(model: Any, rank: int, frozen: bool, dtype: torch.dtype, dropout: float) -> Any:
    config = peft.LoraConfig(r=rank, target_modules="all-linear", lora_dropout=dropout)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    if frozen:
        freeze_a(adapted)
    return adapted


def _make_fake(model: nn.Module) -> None:
    """Put a fake tensor on the CPU in the place of each tensor on meta."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                if isinstance(tensor, nn.Parameter):
                    fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                held[name] = fake


def trained(way: Way, folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """Train the small model one way by `tlora train`; return what a step takes, and the losses."""
    name = re.sub(r"\W+", "-", f"{way.flags} {way.attention}")
    fields: dict[str, dict[str, Any]] = {"adapter": {"r": 32}, "trainer": {}}
    fields["adapter"]["lora_alpha"] = 32
    run: dict[str, Any] = {"model": _model(folder, way.attention, dtype), "task": "jsonl"}
    run |= {"train_file": str(folder / "rows.jsonl"), "output_dir": str(folder / name)}
    trainer = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": dtype == "bfloat16",
    }
    for flag, value in way.flags.items():
        section, _, field = flag.rpartition(".")
        (fields[section] if section else run)[field] = value
    run |= {"adapter": fields["adapter"], "trainer": trainer | fields["trainer"]}
    run |= {"data": {"format": "raw", "max_length": 2048}, "calibration": {"samples": 8}}
    with _watched() as seen:
        done = train.run(RunConfig.from_dict(run))
    losses = [json.loads(line).get("loss") for line in done.log.read_text().splitlines()]
    return {
        "tokens": seen["tokens"][0],
        "kept": max(seen["kept"]),
        "seconds": min(seen["seconds"][1:]),
        "optimizer": seen["optimizer"][-1],
        "losses": [loss for loss in losses if loss is not None],
    }


def _model(folder: Path, attention: str, dtype: str) -> str:
    """Write the small model with the shipped tokenizer, and the eight rows beside it."""
    path = folder / f"model-{attention}"
    if path.exists():
        return str(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE_MODEL)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SMALL, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    written = read_json(path / "config.json")
    write_json(path / "config.json", written | {"attn_implementation": attention})
    _, rows = corpus.shifted_task(seed=0, train=0, test=8)
    for number, row in enumerate(rows):
        # Of different lengths, as rows are.
        row["prompt"] = " ".join([row["prompt"]] * (1 + number))
    lines = [json.dumps({name: row[name] for name in ("prompt", "response")}) for row in rows[:8]]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return str(path)


@contextlib.contextmanager
def _watched() -> Iterator[dict[str, list[Any]]]:
    """Note what each step of TRL's trainer takes."""
    seen: dict[str, list[Any]] = {"tokens": [], "kept": [], "seconds": [], "optimizer": []}
    step, loss_of = trl.SFTTrainer.training_step, trl.SFTTrainer.compute_loss

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = _clock()
        done = step(self, *args, **kwargs)
        seen["seconds"].append(_clock() - start)
        states = self.optimizer.state.values()
        held = [v for state in states for v in state.values() if isinstance(v, Tensor)]
        # 8-bit states share one table of the 256 values that a byte stands for.
        own = {value.untyped_storage()._cdata: value.nbytes for value in held if value.dim()}
        seen["optimizer"].append(sum(own.values()))
        return done

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        kept = Kept(model)
        with kept.watching():
            loss = loss_of(self, model, inputs, *args, **kwargs)
        seen["kept"].append(kept.size)
        seen["tokens"].append(inputs["input_ids"].numel())
        return loss

    trl.SFTTrainer.training_step, trl.SFTTrainer.compute_loss = training_step, compute_loss
    try:
        yield seen
    finally:
        trl.SFTTrainer.training_step, trl.SFTTrainer.compute_loss = step, loss_of


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def table(result: dict[str, Any]) -> str:
    """Return both tables as Markdown."""
    counted = result["counted"]
    first = counted["base alone"]
    lines = ["| one layer of Llama-2-7B, 4,096 tokens, r = 128 | MiB kept | above the base |"]
    lines += ["|---|---|---|"]
    lines += [f"| {n} | {v / MIB:,.1f} | {(v - first) / MIB:,.1f} |" for n, v in counted.items()]
    lines += ["", "| way | tokens | MiB kept | seconds a step | AdamW, MiB | losses |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, row in result["trained"].items():
        plain = result["trained"][PLAIN if name.startswith(PLAIN) else "LoRA"]["losses"]
        apart = max(abs(a - b) for a, b in zip(row["losses"], plain, strict=True))
        close = f"within {apart:.0e}" if row["losses"] != plain else "the same"
        sizes = f"{row['kept'] / MIB:.1f} | {row['seconds']:.3f} | {row['optimizer'] / MIB:.2f}"
        lines.append(f"| {name} | {row['tokens']:,} | {sizes} | {close} |")
    return "\n".join(lines)


def measure(dtype: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """Return both tables' figures, and where they were made."""
    found: dict[str, Any] = {"place": provenance(None), "dtype": dtype, "counted": {}}
    found["threads"] = torch.get_num_threads()
    for name, kind in COUNTED.items():
        found["counted"][name] = counted_layer(kind)
    found["trained"] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, way in WAYS.items():
            if way.gpu and not torch.cuda.is_available():
                continue
            found["trained"][name] = trained(way, Path(folder), dtype)
            tell(f"{name}: {found['trained'][name]}")
    return found


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("::")[0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("training.json"))
    parser.add_argument("--table", action="store_true", help="print the results only")
    flags = parser.parse_args()
    if not flags.table:
        write_json(flags.out, measure(flags.dtype, print))
    print(table(read_json(flags.out)))


if __name__ == "__main__":
    main()
