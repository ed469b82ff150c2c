"""`tlora verify`: check how each reader interprets an adapter, or whether an export equals it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.adapter.saved import SavedLora, read_lora
from tlora.adapter.savedconfig import CONFIG
from tlora.errors import AdapterError, ArtifactError, ConfigError, VerificationError
from tlora.exporters import export
from tlora.exporters.exportconfig import ExportConfig
from tlora.exporters.gguf import ADAPTER
from tlora.exporters.servers import SERVERS
from tlora.files import write_json
from tlora.models.pretrained import Pretrained
from tlora.training.runfolder import RunFolder
from tlora.verify import adapters
from tlora.verify.verdicts import Verdict, outdated, table
from tlora.verify.verifyconfig import VerifyConfig

if TYPE_CHECKING:
    from tlora.verify.measure import Measured

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Artifact:
    """An artifact to verify.

    Attributes:
        path: its folder, or the GGUF file.
        kind: "adapter", "merged" or "gguf".
    """

    path: Path
    kind: str


def run(config: VerifyConfig, tell: Tell) -> None:
    """Verify an artifact and print the results.

    Raises:
        ConfigError: a path has nothing to verify, or the base is unknown.
        VerificationError: the verification fails, or a file is damaged.
    """
    found = _artifacts(config)
    subject = found[1] if found[1:] else None
    try:
        lora = read_lora(found[0].path)
        exported = _read(config, lora, subject)
        rank = config.max_rank or _leading_ranks(exported, lora)
        meant = export.cut_to(lora, rank)[0] if rank else lora
        verdicts = _by_files(config, meant, subject, exported)
    except (AdapterError, ArtifactError) as error:
        raise VerificationError(str(error)) from error
    if rank:
        tell(f"{found[-1].path} is compared with {found[0].path} cut to rank {rank}.")
    compares = subject is not None and subject.kind == "adapter"
    differs = compares and not verdicts[0].exact
    if compares and not differs:
        tell(f"{config.paths[1]} holds the same update as {config.paths[0]}.")
    if not differs:
        tell(table(verdicts))
    measured = _by_replies(config, lora, subject, verdicts, rank)
    for line in measured.lines if measured else ():
        tell(line)
    if config.output:
        record: dict[str, Any] = {
            "adapter": str(found[0].path),
            "compared": str(subject.path) if subject else None,
            "max_rank": rank,
            "readers": [verdict.record() for verdict in verdicts],
            "replies": measured.record if measured else None,
        }
        write_json(config.output, record)
        tell(f"numbers: {config.output}")
    replied = measured.faults if measured else []
    if differs:
        words = outdated(verdicts[0], config.paths[1], config.paths[0], len(meant.keys))
        raise VerificationError(" ".join([words, *replied]))
    faults = _wrong(config, verdicts) + replied
    if faults:
        cut = f" --max_rank {rank}" if rank else ""
        again = f"; run `tlora export {config.paths[0]} --for {config.server}{cut}` to convert it"
        raise VerificationError("; ".join(faults) + (again if config.server in SERVERS else ""))


def _artifacts(config: VerifyConfig) -> list[Artifact]:
    found = [artifact_at(path) for path in config.paths]
    if found[0].kind != "adapter":
        raise ConfigError(
            f"{found[0].path} has no PEFT adapter to compare with; give one first: tlora"
            f" verify ADAPTER {found[0].path}",
            "paths",
        )
    return found


def artifact_at(path: str) -> Artifact:
    """Return the artifact at a path; for a run, its adapter.

    Raises:
        ConfigError: there is nothing to verify.
    """
    folder = Path(path)
    if folder.suffix == ".gguf" and folder.is_file():
        return Artifact(folder, "gguf")
    if not (folder / CONFIG).is_file() and not RunFolder(folder).exists:
        if (folder / ADAPTER).is_file():
            return Artifact(folder / ADAPTER, "gguf")
        if (folder / "config.json").is_file():
            return Artifact(folder, "merged")
    return Artifact(export.adapter_folder(path), "adapter")


def _read(config: VerifyConfig, lora: SavedLora, subject: Artifact | None) -> SavedLora | None:
    """Return the export as a LoRA; None if there is none, or it is a merged model."""
    if subject is None or subject.kind == "merged":
        return None
    if subject.kind == "adapter":
        return read_lora(subject.path)
    from tlora import extras
    from tlora.verify import ggufs

    extras.require("gguf", where="verify")
    return ggufs.read(subject.path, lora, _base(config, lora).config().to_dict())


def _leading_ranks(exported: SavedLora | None, lora: SavedLora) -> int | None:
    """Return how many leading ranks of DyLoRA an export has; None if it has all of them."""
    if exported is None or not lora.nested or any(lora.lacks()):
        return None
    matrices = (exported.tensors[a].flatten(1) for a, _ in exported.keys.values())
    kept = max(int(a.any(dim=1).sum()) for a in matrices)  # a padded rank is a row of zeros
    return kept if 0 < kept < max(map(lora.rank, lora.keys)) else None


def _by_files(
    config: VerifyConfig, lora: SavedLora, subject: Artifact | None, exported: SavedLora | None
) -> list[Verdict]:
    if subject is None:
        return adapters.by_every_reader(lora)
    if exported is None:
        from tlora.verify import mergedweights

        return [mergedweights.check(subject.path, _base(config, lora), lora)]
    compare = adapters.by_every_reader if subject.kind == "adapter" else adapters.by_llama_cpp
    return compare(exported, lora)


def _base(config: VerifyConfig, lora: SavedLora) -> Pretrained:
    return Pretrained(name=base_of(config, lora), trust_remote_code=config.trust_remote_code)


def base_of(config: VerifyConfig, lora: SavedLora) -> str:
    """Return the base model.

    Raises:
        ConfigError: it is unknown.
    """
    base = config.model or lora.base
    if not base:
        raise ConfigError(f"{lora.path} does not name its base model; give --model.", "model")
    return base


def _by_replies(
    config: VerifyConfig,
    lora: SavedLora,
    subject: Artifact | None,
    verdicts: list[Verdict],
    rank: int | None,
) -> Measured | None:
    """Compare replies if a base or prompts are given, with those of the adapter cut to ``rank``."""
    if not (config.model or config.prompts):
        return None
    from tlora.verify import measure

    if rank:
        base, trust = base_of(config, lora), config.trust_remote_code
        with tempfile.TemporaryDirectory() as folder:
            cut = ExportConfig(
                path=str(lora.path),
                output_dir=f"{folder}/adapter",
                format="native",
                max_rank=rank,
                model=base,
                trust_remote_code=trust,
            )
            lora = read_lora(export.run(cut).folder)
            return _by_replies(config, lora, subject, verdicts, None)
    if subject is None:
        return measure.readers(config, lora, base_of(config, lora), verdicts)
    if subject.kind == "gguf":
        return measure.gguf(config, lora, base_of(config, lora), subject.path)
    return measure.export(config, lora, base_of(config, lora), subject.path)


def _wrong(config: VerifyConfig, verdicts: list[Verdict]) -> list[str]:
    """Return the faults relevant to the request, one clause each."""
    if config.server is None:
        asked = verdicts[:1]
    else:
        asked = [verdict for verdict in verdicts if config.server in verdict.servers]
    if not asked:
        return [f"{config.server} does not read this format"]
    return [f"{verdict.title}: {verdict.words()}" for verdict in asked if not verdict.exact]
