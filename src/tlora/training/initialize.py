"""`tlora init`: calibrate, plan and attach, then save the untrained adapter and its plan."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.adapter.head import ADAPTER_CONFIG, HEAD_FILE
from tlora.config import TLoraConfig
from tlora.errors import ConfigError
from tlora.files import replacing_folder, seal_tensors, write_json
from tlora.sealed import seal_beside
from tlora.training import continuing, model_card
from tlora.training.arguments import training_arguments
from tlora.training.kinds import KindSpec
from tlora.training.precision import widen
from tlora.training.resume import Todo, continued
from tlora.training.runconfig import RunConfig
from tlora.training.runfolder import RunFolder
from tlora.training.setup import Setup, settle

if TYPE_CHECKING:
    from tlora.methods.base import Plan, Prepared

logger = logging.getLogger(__name__)

LOW_ENERGY = 0.75
"""Mean captured energy below which a larger rank is advised (docs/choosing.md)."""


def run(config: RunConfig) -> RunFolder:
    """Initialize an adapter for any other trainer; return the folder it is in.

    The adapter is a plain PEFT one that does not change the model's output yet. An unfinished
    initialization in the folder starts over; a finished one does not change.

    Raises:
        ConfigError: a field is wrong, another process or other files occupy the folder, or its
            initialization was started with another configuration, other rows or another base model.
        DataError: rows are missing or not what the task expects.
    """
    folder = RunFolder(config.output_dir)
    with folder.locked():
        todo = continued(config, folder, "init")
        if todo is not None:
            _initialize(todo, folder)
    return folder


def _initialize(todo: Todo, folder: RunFolder) -> None:
    if todo.resumes:
        logger.info("the initialization in %s was not finished; it starts over.", folder.path)
    setup = settle(todo.config)
    if todo.resumes:
        keep_budget(setup, folder)
    arguments = training_arguments(setup, folder.checkpoints)
    prepared = prepare(setup, setup.load_model(arguments.device))
    if arguments.process_index == 0:
        warn(setup, prepared.plan)
        folder.clear()
        folder.start(setup.record(), "init", prepared.plan, todo.inputs)
        save_adapter(prepared, setup, folder.adapter, verb="init")
        folder.finish()


def warn(setup: Setup, plan: Plan | None) -> None:
    """Warn of a scale and of a captured energy that the user may not want."""
    warn_of_scale(setup.config)
    warn_of_low_energy(setup.options, plan)


def warn_of_scale(config: RunConfig) -> None:
    """Warn if r is given without alpha, which changes the scale alpha / r of the adapter."""
    options = config.options()
    options = options.of_link() if hasattr(options, "of_link") else options  # of a chain
    own = {field.name: field.default for field in dataclasses.fields(options)}
    if not {"r", "lora_alpha"} <= own.keys() or "lora_alpha" in config.adapter:
        return
    r, alpha = options.r, options.lora_alpha
    # The scales follow the samples, or divide by sqrt(r), which a larger r needs.
    if getattr(options, "allocate_scale", False) or getattr(options, "use_rslora", False):
        return
    if r == own["r"] or getattr(options, "scale", alpha / r) != alpha / r:
        return
    logger.warning(
        "r is %d and alpha is still %g, so the adapter's output is scaled by %g/%d = %.3g."
        " To keep the scale at %g, give --alpha %g.",
        *(r, alpha, alpha, r, alpha / r, alpha / own["r"], alpha / own["r"] * r),
    )


def warn_of_low_energy(options: Any, plan: Plan | None) -> None:
    """Warn if the frozen A of a calibrated plan captures little of the task."""
    energy = getattr(plan, "mean_energy", None)
    # A random A always captures little, an A that trains can leave its start, and a chain adds
    # links.
    calibrated = isinstance(options, TLoraConfig) and options.basis != "random"
    if not calibrated or not options.freeze_a or energy is None or energy >= LOW_ENERGY:
        return
    logger.warning(
        "the mean captured energy, %.3f, is below %g: the frozen A misses much of what the layers"
        " compute on this task; double --r and --alpha, or use --method lora, which trains A.",
        energy,
        LOW_ENERGY,
    )


def keep_budget(setup: Setup, folder: RunFolder) -> None:
    """Make a resumed run calibrate within its earlier memory budget, on any machine."""
    recorded = folder.calibration()
    if recorded and getattr(setup.options, "memory_budget", None) == "auto":
        setup.options = dataclasses.replace(setup.options, memory_budget=recorded["memory_budget"])


def adapt(setup: Setup, device: Any, plan: Plan | None = None) -> Prepared:
    """Load the model onto ``device`` and prepare it for training; nothing is written.

    With the ``plan`` of a resumed run the model is rebuilt from it, without calibration.

    Raises:
        ConfigError: as `check_targets`.
    """
    model = setup.load_model(device)
    check_targets(setup.kind, setup.options, model)
    return prepare(setup, model, plan)


def check_targets(kind: KindSpec, options: Any, model: Any) -> None:
    """Check the modules that ``options`` choose in ``model``, which may be on `meta`.

    Raises:
        ConfigError: a name matches nothing, the output layer is chosen but this trainer bypasses
            it, or no module of a multimodal model's language model is chosen.
    """
    from tlora.adapter.stock import targets_of
    from tlora.calibration.language_model import check_reached

    if not hasattr(options, "target_modules"):
        return
    targets = targets_of(model, options)
    head = None if kind.adapts_head else model.get_output_embeddings()
    for target in targets if head is not None else ():
        if target.module is head:
            raise ConfigError(
                f"`target_modules` chooses {target.name!r}, the output layer, but the "
                "trainer bypasses the module, so an adapter on it would never train; "
                "exclude it, or train it in full by `modules_to_save`.",
                where="adapter",
            )
    check_reached(model, [target.name for target in targets])


def prepare(setup: Setup, model: Any, plan: Plan | None = None) -> Prepared:
    """Prepare a freshly loaded ``model`` by the run's method; it may change in place.

    Trainable parameters are float32 afterwards.
    """
    import transformers

    # Seeded twice: a new head's draws must not shift the method's, and calibration's draws must not
    # shift the training's.
    transformers.set_seed(setup.config.seed)
    if setup.config.continue_from:
        prepared = continuing.load(setup, model)
    else:
        prepared = setup.method.prepare(model, setup.options, setup.calibration_batches(), plan)
    widen(prepared.model)
    transformers.set_seed(setup.config.seed)
    return prepared


def save_adapter(prepared: Prepared, setup: Setup, path: Path, verb: str = "train") -> None:
    """Write the adapter, with digests in its tensors' headers, tokenizer and card, or nothing.

    Raises:
        AdapterError: a weight is not finite.
    """
    from tlora.adapter.load import check_finite

    with replacing_folder(path) as part:
        prepared.save(part)
        for file in part.glob("*.safetensors"):
            check_finite(file, f"the adapter for {path}")
            seal_tensors(file)
        setup.tokenizer.save_pretrained(part)
        if (fields := setup.head_fields()) and (part / ADAPTER_CONFIG).is_file():
            write_json(part / HEAD_FILE, fields)
        model_card.write(part, setup, verb=verb)
        seal_beside(part)
        for file in part.iterdir():
            # safetensors makes files private; a server under another user must read adapters too.
            file.chmod(0o644)
