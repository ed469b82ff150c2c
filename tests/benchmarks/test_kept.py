"""The measurement of what a frozen A keeps of later gradients takes A as the comparison has it."""

from __future__ import annotations

import pytest

from tlora.compare.compareconfig import CompareConfig


@pytest.fixture
def kept(script):
    return script("quality", "kept")


@pytest.mark.parametrize("basis", ["weight-covariance", "gradient"])
def test_a_basis_has_the_ranks_and_modules_of_the_comparison(
    kept, basis, tiny_llama, saved, tmp_path
):
    rows = tmp_path / "rows.jsonl"
    line = '{"prompt": "a b c", "response": "%d"}\n'
    rows.write_text("".join(line % number for number in range(12)))
    config = CompareConfig.from_dict(
        {
            "model": saved(tiny_llama()),
            "task": "jsonl",
            "data": {"kind": "causal", "overlap": "allow"},
            "train_file": str(rows),
            "test_file": str(rows),
            "validation": 4,
            "methods": ["tlora", "lora"],
            "learning_rates": [1e-3],
            "tuning_seeds": [0],
            "final_seeds": [1],
            "adapter": {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]},
            "calibration": {"samples": 4, "batch_size": 2},
            "trainer": {"max_steps": 1, "use_cpu": True},
            "output_dir": "unused",
        }
    )
    found = kept.basis_of(config, basis, seed=0)
    assert {name.rsplit(".", 1)[-1] for name in found} == {"q_proj", "down_proj"}
    assert {len(rows_of_a) for rows_of_a in found.values()} == {3}
