"""`--continue_from ADAPTER`: trains an existing adapter further instead of making a new one.

A plain PEFT folder does not record whether its A is frozen; the run that made it does. So if the
run's method freezes A, its method and options apply; any other adapter trains A and B, as LoRA
does.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.adapter.savedconfig import CONFIG, check_fields
from tlora.errors import ConfigError
from tlora.registry import METHODS
from tlora.sealed import adapter_fields
from tlora.training.kinds import KINDS
from tlora.training.preflight import task_of
from tlora.training.runconfig import CalibrationConfig, RunConfig, TokensConfig
from tlora.training.runfolder import RunFolder

if TYPE_CHECKING:
    from tlora.methods.base import Prepared
    from tlora.training.setup import Setup

logger = logging.getLogger(__name__)

_WHERE = "continue_from"
_METHOD = "lora"
"""How an adapter trains if nothing says that its A is frozen."""


def with_adapter(config: RunConfig) -> RunConfig:
    """Return ``config`` with the method, options and classes of the adapter that it continues.

    Without `continue_from` it is returned unchanged.

    Raises:
        ConfigError: there is no LoRA adapter in the folder, or ``config`` requests another method,
            other options, calibration or other classes; all faults are reported.
    """
    if config.continue_from is None:
        return config
    path, run = _found(Path(config.continue_from))
    own = adapter_fields(path / CONFIG)
    method, options = _settings(path, own, run)
    if faults := _faults(config, own, method, options, run):
        raise ConfigError(faults, where=_WHERE)
    names = config.data.label_names or (run.data.label_names if run else None)
    data = dataclasses.replace(config.data, label_names=names)
    return dataclasses.replace(
        config,
        model=config.model or own.get("base_model_name_or_path"),
        continue_from=str(path),
        method=method,
        adapter=options,
        data=data,
        tokens=run.tokens if run else config.tokens,
    )


def _faults(
    config: RunConfig,
    own: dict[str, Any],
    method: str,
    options: dict[str, Any],
    run: RunConfig | None,
) -> list[str]:
    """Return a sentence for each field of ``config`` that contradicts the adapter."""
    names = run.data.label_names if run else None
    kind = KINDS[task_of(config).kind].task_type
    faults = []
    if own.get("task_type") not in (None, kind):
        faults.append(
            f"the adapter is for {own['task_type']!r}, but this task is {kind!r}; give --data.kind,"
            " or another adapter."
        )
    if config.method not in (RunConfig.method, method):
        faults.append(
            f"the adapter trains by the method {method!r}, not {config.method!r}; remove --method."
        )
    if other := [name for name, value in config.adapter.items() if options.get(name) != value]:
        faults.append(
            "the adapter has its own options, so "
            f"{', '.join(f'`adapter.{n}`' for n in other)} cannot be set; remove them."
        )
    if config.calibration != CalibrationConfig():
        faults.append("nothing is calibrated, so `calibration` has no effect; remove it.")
    if names and config.data.label_names not in (None, names):
        faults.append(f"the adapter's classes are {names}; remove `data.label_names`.")
    tokens = run.tokens if run else TokensConfig()
    if config.tokens.add and config.tokens != tokens:
        faults.append(
            f"the adapter has trained rows for the added tokens {tokens.add}, and no "
            "others can be added; remove `tokens.add`."
        )
    return faults


def _found(path: Path) -> tuple[Path, RunConfig | None]:
    """Return the adapter's folder, and the configuration of its run, if available.

    Args:
        path: folder of a run, an adapter or a checkpoint.
    """
    if not path.is_dir():
        raise ConfigError(
            f"there is no folder {str(path)!r}; give a run's or an adapter's.", _WHERE
        )
    folders = [RunFolder(each) for each in (path, *path.absolute().parents[:2])]
    folder = next((each for each in folders if each.exists), None)
    if folder is not None and folder.path == path:
        path = folder.adapter
    if not (path / CONFIG).is_file():
        raise ConfigError(
            f"{path} holds no adapter_config.json; give the folder of an adapter, or "
            "of a finished run whose method saves an adapter.",
            _WHERE,
        )
    return path, RunConfig.from_dict(folder.config()) if folder else None


def _settings(path: Path, own: dict[str, Any], run: RunConfig | None) -> tuple[str, dict[str, Any]]:
    """Return the method and options for further training of an adapter with the config ``own``."""
    if own.get("peft_type") != "LORA":
        raise ConfigError(
            f"{path} holds an adapter of the type {own.get('peft_type')!r}; only "
            "those of the type 'LORA' can be trained further.",
            _WHERE,
        )
    check_fields(path, own)
    if run is not None and freezes_a(METHODS.load(run.method), run.options()):
        return run.method, run.adapter
    known = METHODS.load(_METHOD).options.field_names()
    return _METHOD, {name: own[name] for name in known if name in own and name != "task_type"}


def freezes_a(method: Any, options: Any) -> bool:
    """Return whether only B trains with this method and these options."""
    return method.traits.trains == ("lora_B",) and getattr(options, "freeze_a", True)


def load(setup: Setup, model: Any) -> Prepared:
    """Load the adapter that a run continues onto its base model, ready to train.

    Raises:
        AdapterError: it is damaged, or does not match the model's sizes.
    """
    from tlora.adapter.freeze import FrozenACallback
    from tlora.adapter.load import load_adapter
    from tlora.methods.base import Prepared

    path = str(setup.config.continue_from)
    frozen = freezes_a(setup.method, setup.options)
    adapted = load_adapter(model, path, is_trainable=True, freeze=frozen)
    what = "B trains; A stays frozen" if frozen else "A and B train"
    if not frozen and _found(Path(path))[1] is None:
        what += f" ({path} does not record whether A was frozen; continue from the run to keep it"
        what += " frozen)"
    logger.info("Continuing %s. %s. No calibration is needed.", path, what)
    return Prepared(model=adapted, callbacks=[FrozenACallback()] if frozen else [])
