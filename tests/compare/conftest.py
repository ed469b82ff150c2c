"""A comparison of real runs, as small as can be."""

import pytest

from tlora.compare import compare
from tlora.compare.compareconfig import CompareConfig
from tlora.compare.comparefolder import CompareFolder
from tlora.training.runconfig import CalibrationConfig


@pytest.fixture(scope="session")
def shared(llama_folder, sums, other_sums):
    return {
        "model": llama_folder,
        "train_file": sums,
        "test_file": other_sums,
        "validation": 4,
        "methods": ["lora", "tlora"],
        "learning_rates": [1e-2],
        "tuning_seeds": [0],
        "final_seeds": [1],
        "adapter": {"r": 2},
        "calibration": CalibrationConfig(samples=4, batch_size=2),
        "threads": 1,
        "trainer": {
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "use_cpu": True,
        },
    }


@pytest.fixture(scope="session")
def compared(shared, tmp_path_factory):
    """Run a whole comparison once: two methods, one rate, a tuning and a final seed each."""
    path = tmp_path_factory.mktemp("compared") / "out"
    lines = []
    config = CompareConfig(**shared, output_dir=str(path), keep_adapters=True)
    progress = compare.run(config, tell=lines.append)
    return progress, CompareFolder(path), lines
