"""Every registered method, prepared, trained for ten steps and saved on a decoder and an encoder.

Each pair of method and model is run once a session; the tests look at what it left.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from running import KINDS, LENGTHS, PUBLIC_RUNS, Ran, inputs, logits, prepare, small_options, train
from safetensors.torch import load_file, save_file
from torch import Tensor

from support import Sample, causal_samples, classified_samples, in_batches
from tlora.registry import METHODS


@pytest.fixture(scope="session")
def make_model(tiny_llama: Any, tiny_bert_classifier: Any) -> Callable[[str], Any]:
    """Make the model of a kind, the same each time, with weights wide enough to matter."""
    factories = {"llama": tiny_llama, "bert": tiny_bert_classifier}
    return lambda kind: factories[kind](initializer_range=0.2)


@pytest.fixture(scope="session")
def batches_of() -> Callable[[str], list[Sample]]:
    """Return the calibration batches of a kind, with padding; the first is trained on."""
    samples = {"llama": causal_samples(LENGTHS), "bert": classified_samples(LENGTHS)}
    return lambda kind: in_batches(samples[kind], 3)


@pytest.fixture(scope="session")
def ran(
    make_model: Any, batches_of: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Ran]:
    """Run a method on a model, once."""

    @functools.cache
    def run(name: str, kind: str) -> Ran:
        method = METHODS.load(name)()
        options = small_options(method, KINDS[kind])
        batches = batches_of(kind)
        prepared = prepare(name, make_model(kind), options, batches)
        model = prepared.model
        leftovers = [f"{n} has a hook" for n, m in model.named_modules() if _hooked(m)]
        leftovers += [
            f"{n} has a gradient" for n, p in model.named_parameters() if p.grad is not None
        ]
        start = logits(model, batches[0])
        at_start = {key: value.clone() for key, value in model.state_dict().items()}
        trains = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
        model(**batches[0]).loss.backward()
        with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        losses = train(prepared, batches[0], tmp_path_factory.mktemp("trainer"))
        folder = tmp_path_factory.mktemp(f"{name}-{kind}")
        prepared.save(folder)
        return Ran(
            method=method,
            options=options,
            prepared=prepared,
            base=make_model(kind),
            at_start=at_start,
            start=start,
            trains=trains,
            with_gradient=with_gradient,
            leftovers=leftovers,
            losses=losses,
            trained=logits(model, batches[0]),
            folder=folder,
        )

    return run


def _hooked(module: torch.nn.Module) -> bool:
    """Whether a hook is on it that is not the adapter's own, which keeps A frozen."""
    hooks = [h for k, held in vars(module).items() if k.endswith("_hooks") for h in held.values()]
    return any(getattr(hook, "__module__", "") != "tlora.adapter.freeze" for hook in hooks)


READER = """
import json, sys
sys.modules["tlora"] = None  # importing it fails
import peft, torch, transformers
from safetensors.torch import load_file, save_file

found = {}
for job in json.load(open(sys.argv[1])):
    auto = getattr(transformers, job["auto"])
    inputs = load_file(job["inputs"])
    with torch.no_grad():
        if job["leaves"] == "model":
            model = auto.from_pretrained(job["folder"]).eval()
            found[job["key"] + ".merged"] = model(**inputs).logits
        else:
            base = auto.from_pretrained(job["base"])
            model = peft.PeftModel.from_pretrained(base, job["folder"]).eval()
        found[job["key"]] = model(**inputs).logits
        if job["leaves"] == "adapter":
            found[job["key"] + ".merged"] = model.merge_and_unload().eval()(**inputs).logits
save_file({key: value.contiguous().clone() for key, value in found.items()}, sys.argv[2])
"""


@pytest.fixture(scope="session")
def read_by_peft(
    ran: Any, saved: Any, make_model: Any, batches_of: Any, tmp_path_factory: Any
) -> dict[str, Tensor]:
    """Logits of every saved folder on the original base, by a process that has no tlora."""
    home = tmp_path_factory.mktemp("reader")
    autos = {
        "llama": "AutoModelForCausalLM",
        "bert": "AutoModelForSequenceClassification",
    }
    jobs = []
    for kind in KINDS:
        base = saved(make_model(kind))
        save_file(inputs(batches_of(kind)[0]), home / f"{kind}.safetensors")
        for name in (name for name, runs_on in PUBLIC_RUNS if runs_on == kind):
            run = ran(name, kind)
            jobs.append(
                {
                    "key": f"{name}-{kind}",
                    "auto": autos[kind],
                    "base": base,
                    "folder": str(run.folder),
                    "leaves": run.traits.leaves,
                    "inputs": str(home / f"{kind}.safetensors"),
                }
            )
    (home / "jobs.json").write_text(json.dumps(jobs))
    out = home / "logits.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", READER, str(home / "jobs.json"), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return load_file(out)
