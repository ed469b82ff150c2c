"""The model card in an adapter's folder: its description, its training, how to load it.

It is made for publishing with the adapter: local paths are shortened to their last part, and no
credential is shown. The publisher must add a license.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora import presets
from tlora.config import TLoraConfig
from tlora.credentials import redacted
from tlora.files import read_json, replacing_file
from tlora.integrations.vllm import vllm_rank
from tlora.shortnames import short_names
from tlora.training import loading_code
from tlora.training.runconfig import RunConfig

if TYPE_CHECKING:
    from tlora.training.setup import Setup

CARD = "README.md"
_TEMPLATE = Path(__file__).with_name("model_card.md.j2")
_FILES = ("train_file", "eval_file")
_TEXTS = ("data.system", "data.prompt_template")
"""Fields that are not names, even if they start like paths: Qwen's "/no_think"."""
_OF_THE_MACHINE = ("output_dir", "resume")
_SHORT = {full: short for short, full in short_names(RunConfig).items()}
_LOCAL = ("/", "./", "../", "~")
_PACKAGES = ("tlora", "torch", "transformers", "peft", "trl")


def write(
    folder: Path, setup: Setup, scores: Mapping[str, Any] | None = None, verb: str = "train"
) -> None:
    """Write the card of a saved adapter, replacing PEFT's.

    Args:
        folder: the adapter, or with the method `full` the model.
        setup: its run.
        scores: results of the evaluation after training.
        verb: "train" or "init", which does not train.
    """
    text = card(folder, setup, scores or {}, verb)
    with replacing_file(folder / CARD) as part:
        part.write_text(text, encoding="utf-8")
    (folder / CARD).chmod(0o644)


def card(folder: Path, setup: Setup, scores: Mapping[str, Any], verb: str) -> str:
    """Return the text of the card; arguments as for `write`."""
    import jinja2

    file = folder / "adapter_config.json"
    fields = read_json(file) if file.is_file() else None
    ranks = ranks_of(folder)
    base = public(str(setup.config.model))
    code = loading_code.of(setup, fields is not None, base)
    own = setup.method.traits.leaves == "own"
    vllm = _vllm(fields, ranks, base) if setup.task.kind == "causal" and not own else None
    again = command(setup.config, verb)
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True)
    text = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        front=_front_matter(setup, base, fields),
        title=_cell(f"{_name(base)}, {_task_text(setup)}"),
        summary=_summary(setup, base, fields, verb),
        facts=[(name, _cell(value)) for name, value in _facts(setup, base, fields, ranks)],
        scored=_cell(_rows(setup.config.eval_file, setup.held_out, "the rows held out")),
        scores=[(_cell(name), value) for name, value in _scores(setup, scores)],
        local_base=fields is not None and base != setup.config.model,
        load=code.load,
        pipeline=code.pipeline,
        merges=code.merge if setup.method.traits.merges else None,
        whole=fields is None,
        own=own,
        vllm=vllm,
        vllm_since=" from 0.32 on" if fields and _uneven(fields) else "",
        command=again,
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", again)), default=0)),
    )
    return redacted(re.sub(r"\n{3,}", "\n\n", text))


_LIBRARIES = {"adapter": "peft", "model": "transformers", "own": "tlora"}


def public(path: str) -> str:
    """Return a name on the Hub unchanged, and the last part of a local path."""
    return Path(path).name or Path(path).resolve().name if _is_local(path) else path


def _is_local(path: str) -> bool:
    return path.startswith(_LOCAL) or os.path.exists(path)  # noqa: PTH110 - a long text raises


def command(config: RunConfig, verb: str = "train") -> str:
    """Return a command line that starts such a run in a folder `run`, with shortened names."""
    import shlex

    words = ["tlora", verb]
    for name, value in _changed_flags(config):
        words += [f"--{name}", value]
    return shlex.join([*words, "--output_dir", "run"])


def ranks_of(folder: Path) -> dict[str, int]:
    """Return the rank of each adapted module in a PEFT folder, by the module's name."""
    from tlora.adapter.saved import PREFIX, Tensors
    from tlora.adapter.savedconfig import WEIGHTS

    return {
        key.removeprefix(PREFIX).partition(".lora_A")[0]: shape[0]
        for file in folder.glob(WEIGHTS)
        for key, shape in Tensors(file).shapes.items()
        if ".lora_A" in key
    }


def span(numbers: Collection[float]) -> str:
    """Return "2", or "2 to 3.5"."""
    low, high = min(numbers), max(numbers)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def _changed_flags(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the flags that differ from the defaults, including those of the default preset."""
    fixed = {} if config.continue_from else presets.default_options(config.method)
    default = RunConfig(adapter=fixed).to_dict()
    own = config.resolved().adapter if fixed else {}
    config = dataclasses.replace(config, adapter={n: own[n] for n in fixed} | config.adapter)
    for name, value in config.to_dict().items():
        if name in _OF_THE_MACHINE or value == default[name]:
            continue
        if not isinstance(value, dict):
            local = name == "model" and _is_local(value)
            yield name, f"{'path/to/' * local}{_word(value, files=name in _FILES)}"
            continue
        for inner, each in value.items():
            if inner not in default[name] or default[name][inner] != each:
                said = f"{name}.{inner}"
                yield _SHORT.get(said, said), each if said in _TEXTS and each else _word(each)


def _word(value: Any, files: bool = False) -> str:
    if isinstance(value, str):
        if files:
            return ",".join(word.strip().rpartition("/")[2] for word in value.split(","))
        return public(value)
    return json.dumps(value)


def _front_matter(setup: Setup, base: str, fields: Mapping[str, Any] | None) -> str:
    import yaml

    labeled = setup.kind.task_type == "SEQ_CLS"
    tags = [f"base_model:{'adapter' if fields else 'finetune'}:{base}"]
    tags += [str(fields["peft_type"]).lower()] if fields else []
    tags = [*dict.fromkeys([*tags, setup.config.method, "tlora"])]
    front: dict[str, Any] = {
        "base_model": base,
        "library_name": _LIBRARIES[setup.method.traits.leaves],
        "pipeline_tag": "text-classification" if labeled else "text-generation",
        "tags": tags,
    }
    if setup.config.data.dataset:
        front["datasets"] = [public(setup.config.data.dataset)]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()


def _summary(setup: Setup, base: str, fields: Mapping[str, Any] | None, verb: str) -> str:
    traits = setup.method.traits
    made = "trained" if verb == "train" else "initialized, and not trained yet,"
    what = "An adapter of" if fields else "A fine-tuned"
    paper = f" ([{traits.title}](https://arxiv.org/abs/{traits.arxiv}))" if traits.arxiv else ""
    return f"{what} `{base}`, {made} by the method `{setup.config.method}`{paper}."


def _facts(
    setup: Setup, base: str, fields: Mapping[str, Any] | None, ranks: Mapping[str, int]
) -> Iterator[tuple[str, str]]:
    config, data = setup.config, setup.task.data
    quantized = {"none": "", "nf4": ", quantized to NF4", "int8": ", quantized to 8 bits"}
    yield "base model", f"`{base}`{quantized[config.quantization]}"
    yield "method", f"`{config.method}`: {_in_words(setup)}{setup.method.traits.formula}"
    if ranks:
        kinds = sorted({name.rpartition(".")[2] for name in ranks})
        yield "ranks", f"{span(ranks.values())} in {len(ranks)} modules ({', '.join(kinds)})"
    if fields and fields.get("lora_alpha") is not None:
        own = ", and scales of their own" if fields.get("alpha_pattern") else ""
        yield "lora_alpha", f"{fields['lora_alpha']}{own}"
    yield "task", f"`{config.task}` ({setup.task.kind})"
    yield "data", _rows(config.train_file or data.dataset, setup.train, "training rows")
    if setup.kind.task_type != "SEQ_CLS":
        yield "format of prompts", f"`{data.format}`"
    if data.system:
        yield "system message", data.system
    yield "tokens of a row, at most", str(data.max_length)
    yield "seed", str(config.seed)
    yield "packages", ", ".join(f"{name} {version(name)}" for name in _PACKAGES)


def _in_words(setup: Setup) -> str:
    """Say in a sentence how task-aware LoRA sets A and what trains; "" for other methods."""
    options, config = setup.options, setup.config
    if not isinstance(options, TLoraConfig) or config.continue_from:
        return ""
    samples = min(config.calibration.samples, len(setup.train))
    drawn = options.basis == "random"
    origin = "drawn at random" if drawn else f"set from {samples} samples of the task"
    trains = "frozen; only B trains" if options.freeze_a else "trained with B"
    return f"LoRA whose A is {origin} and then {trains}. "


def _rows(files: str | None, rows: Any, otherwise: str) -> str:
    name = _word(files, files=True) if files else otherwise
    return f"{name} ({len(rows):,} rows)" if rows is not None else name


def _scores(setup: Setup, scores: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in scores.items():
        if isinstance(value, (int, float)) and name != "epoch":
            yield name, f"{value:.4g}"
    loss = scores.get("loss")
    if setup.task.kind == "causal" and isinstance(loss, float) and loss < math.log(1e6):
        yield "perplexity", f"{math.exp(loss):.4g}"


def _task_text(setup: Setup) -> str:
    files = setup.config.train_file or setup.config.data.dataset
    return f"adapted to {_word(files, files=True) if files else setup.config.task}"


def _vllm(fields: Mapping[str, Any] | None, ranks: Mapping[str, int], base: str) -> str | None:
    """Return the command that serves the adapter; None if vLLM cannot read it."""
    lacking = ("modules_to_save", "use_dora", "target_parameters", "trainable_token_indices")
    plain = fields is not None and fields["peft_type"] == "LORA" and fields["bias"] == "none"
    if not plain or not ranks or any((fields or {}).get(name) for name in lacking):
        return None
    most = vllm_rank(max(ranks.values()))
    if most is None:
        return None
    lora = f"--enable-lora --max-lora-rank {most} --lora-modules adapted=adapter"
    return f"vllm serve {base} {lora}"


def _uneven(fields: Mapping[str, Any]) -> bool:
    return bool(fields.get("rank_pattern") or fields.get("alpha_pattern"))


def _name(base: str) -> str:
    return base.rpartition("/")[2]


def _cell(text: str) -> str:
    """Return a text as one table cell, without page markup."""
    plain = " ".join(text.split())
    return plain.replace("|", "\\|").replace("<", "&lt;")
