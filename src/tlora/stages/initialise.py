"""`tlora init`: calibrate, plan and attach, then save the untrained adapter and its plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.errors import ConfigError
from tlora.files import replacing_folder
from tlora.runconfig import RunConfig
from tlora.runfolder import RunFolder
from tlora.stages.setup import Setup, settle, training_arguments

if TYPE_CHECKING:
    from tlora.methods.base import Prepared


def run(config: RunConfig) -> RunFolder:
    """Initialise an adapter for any other trainer; return the folder it is in.

    The adapter is a plain PEFT one that does not change the model's output yet.

    Raises:
        ConfigError: a field is wrong, or the folder is taken.
        DataError: rows are missing or not what the task expects.
    """
    folder = RunFolder(config.output_dir)
    if config.resume:
        raise ConfigError("`resume` continues a training; leave it out.", where="run")
    folder.refuse_unless_free()
    setup = settle(config)
    arguments = training_arguments(setup, folder.checkpoints)
    folder.start(config.resolved().to_dict(), verb="init")
    save_adapter(adapt(setup, folder, arguments.device), setup, folder.adapter)
    folder.finish()
    return folder


def adapt(setup: Setup, folder: RunFolder, device: Any) -> Prepared:
    """Load the model onto ``device`` and prepare it by the run's method.

    The plan is saved as soon as there is one. Where the folder has one already, from the start of
    a run that is resumed, the model is rebuilt from it and nothing is calibrated.
    """
    import transformers

    model = setup.load_model(device)
    # Again: what a new head has drawn must not shift the draws of the method.
    transformers.set_seed(setup.config.seed)
    if folder.plan.is_file():
        from tlora import AdapterPlan

        return setup.method.restore(model, setup.options, AdapterPlan.load(folder.plan))
    prepared = setup.method.prepare(model, setup.options, setup.calibration_batches())
    if prepared.plan is not None:
        prepared.plan.save(folder.plan)
    transformers.set_seed(setup.config.seed)
    return prepared


def save_adapter(prepared: Prepared, setup: Setup, path: Path) -> None:
    """Write the adapter and the tokenizer, all of it or nothing."""
    with replacing_folder(path) as part:
        prepared.model.save_pretrained(part)  # type: ignore[operator]
        setup.tokenizer.save_pretrained(part)
