"""`tlora train` by each config of examples/accelerate in two processes, against one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
from processes import Processes

from tlora.errors import ConfigError
from tlora.tasks.dataconfig import DataConfig
from tlora.training import train
from tlora.training.runconfig import TokensConfig
from tlora.training.runfolder import RunFolder

FAMILIES: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
    "gpt2": (
        {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
        {"adapter": {"bias": "all"}, "trainer": {"gradient_checkpointing": True}},
    ),
    "llama": (
        {},
        {"adapter": {"modules_to_save": ["lm_head"]}, "trainer": {"bf16": True, "use_cpu": True}},
    ),
    "t5": (
        {"dropout_rate": 0.0},
        {
            "data": DataConfig(kind="seq2seq", overlap="allow"),
            "early_stopping": 3,
            # transformers takes T5's loss, a mean of each process's tokens, for one over all.
            "trainer": {"average_tokens_across_devices": False, "learning_rate": 2e-4},
        },
    ),
}
"""What sets the tiny models of some families, and what a run on each sets."""


def launched(processes: Processes, engine: str, config: Any) -> RunFolder:
    said = processes.run(runs.trained, runs.environment(engine), config.to_dict())
    assert said == ["", ""]
    return RunFolder(config.output_dir)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_config_trains_in_two_processes_as_one_process_does(
    engine: str, rows: str, alone: RunFolder, processes: Processes, tmp_path: Path
) -> None:
    folder = launched(processes, engine, runs.config(runs.BASE, rows, str(tmp_path / "run"), 2))
    assert folder.finished
    runs.assert_same(folder, alone)
    checkpoint, own = folder.last_checkpoint(), alone.last_checkpoint()
    assert checkpoint is not None
    assert own is not None
    names = [{f.name for f in path.glob("[!r]*")} for path in (checkpoint, own)]
    assert names[0] == names[1]  # all but the random states, of which each process has one


@pytest.mark.parametrize("first", ["two", "one"])
def test_a_run_resumes_on_another_number_of_processes(
    first: str, rows: str, alone: RunFolder, processes: Processes, tmp_path: Path
) -> None:
    whole = runs.config(runs.BASE, rows, str(tmp_path / "run"), 4)
    halves = runs.config(runs.BASE, rows, str(tmp_path / "run"), 2)
    folder = RunFolder(whole.output_dir)
    if first == "two":
        launched(processes, "fsdp2", halves)
        runs.stop_at(folder, 2, processes=2)
        with pytest.raises(ConfigError, match=r"4 rows per step \(2 processes\).* on 2 \(1\)"):
            train.run(halves)
        train.run(whole)
    else:
        shutil.copytree(alone.path, folder.path)
        runs.stop_at(folder, 2, processes=1)
        launched(processes, "fsdp2", halves)
    runs.assert_same(folder, alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_and_fields_train_as_one_process_does(
    family: str, rows: str, saved: Any, request: Any, processes: Processes, tmp_path: Path
) -> None:
    sizes, fields = FAMILIES[family]
    base = saved(request.getfixturevalue(f"tiny_{family}")(**sizes))
    if "early_stopping" in fields:
        fields = fields | {"eval_file": rows}
    expected = train.run(runs.config(base, rows, str(tmp_path / "one"), 4, **fields))
    halves = runs.config(base, rows, str(tmp_path / "two"), 2, **fields)
    # Singular values of random weights lie close, so that rounding turns their vectors further.
    runs.assert_same(launched(processes, "fsdp2", halves), expected, tolerance=1e-4)


def test_two_machines_shard_as_one_does() -> None:
    one, two = (
        {k: v for k, v in runs.environment(name).items() if k.startswith(("FSDP_", "ACCELERATE_"))}
        for name in ("fsdp2", "two_nodes")
    )
    assert one == two
    assert one["FSDP_VERSION"] == "2"


def test_no_process_holds_more_than_its_part_and_what_runs(
    rows: str, alone: RunFolder, processes: Processes, tmp_path: Path
) -> None:
    # Asked for by fields this time, and with accumulated gradients.
    settings = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    trainer = {"fsdp": "full_shard", "fsdp_config": settings, "gradient_accumulation_steps": 2}
    config = runs.config(runs.BASE, rows, str(tmp_path / "run"), 1, trainer=trainer)
    for share, own, peak in processes.run(runs.held, {}, config.to_dict()):
        assert own
        assert share < 0.6
        assert 0 < peak < 0.5  # of five layers the one that runs and the next, and the embedding
    runs.assert_same(RunFolder(config.output_dir), alone)


def test_what_cannot_be_done_in_parts_is_refused_first(
    rows: str, processes: Processes, tmp_path: Path
) -> None:
    def refused(variables: dict[str, str], **fields: Any) -> str:
        config = runs.config(runs.BASE, rows, str(tmp_path / "run"), 2, **fields)
        variables = runs.environment("fsdp2") | variables
        [said, other] = processes.run(runs.trained, variables, config.to_dict())
        assert said == other
        assert not (tmp_path / "run").exists()
        return said

    assert "`fsdp_version: 2`" in refused({"FSDP_VERSION": "1"})
    assert "gradient_checkpointing true" in refused({"FSDP_ACTIVATION_CHECKPOINTING": "true"})
    assert "`fsdp_offload_params`" in refused({"FSDP_OFFLOAD_PARAMS": "true"})
    assert "TRANSFORMER_BASED_WRAP" in refused({"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"})
    assert "Invalid auto wrap policy: ALL" in refused({"FSDP_AUTO_WRAP_POLICY": "ALL"})
    assert "layer class NoLayer" in refused({"FSDP_TRANSFORMER_CLS_TO_WRAP": "NoLayer"})
    assert "`optim` 'adafactor'" in refused({}, trainer={"optim": "adafactor"})
    assert "the method 'lora'" in refused({}, method="lora")
    assert "single rows" in refused({}, tokens=TokensConfig(add=["<a>"]))
