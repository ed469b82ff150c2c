"""`tlora export` and `tlora merge`: convert an adapter folder to a format, atomically."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tlora import extras
from tlora.adapter.head import HEAD_FILE
from tlora.adapter.load import targeted_names
from tlora.adapter.saved import SavedLora, read_lora, shape_of
from tlora.adapter.savedconfig import CONFIG
from tlora.errors import AdapterError, ConfigError, listed
from tlora.exporters import card, readers
from tlora.exporters.base import Export, Source, copy_beside, counted
from tlora.exporters.checkpoint import INDEX
from tlora.exporters.exportconfig import ExportConfig
from tlora.exporters.servers import SERVERS, Artifact
from tlora.exporters.truncate import Cut, truncated
from tlora.files import no_adapter, refuse_unusable, replacing_folder
from tlora.models.pretrained import Pretrained
from tlora.models.skeleton import layer_sizes
from tlora.registry import FORMATS
from tlora.sealed import DIGESTS, seal_beside
from tlora.training.checkpoints import MANIFEST
from tlora.training.runfolder import RunFolder

_NOT_COPIED = (CONFIG, DIGESTS, INDEX, "trainer_state.json", MANIFEST)


@dataclass
class Exported:
    """Summary of an export, for printing."""

    folder: Path
    format: str
    bytes: int
    notes: list[str]
    exact: list[str]
    """Titles of the readers that read it exactly."""
    command: str
    """The serving command."""
    todo: str = ""
    """What the command still needs."""


def run(config: ExportConfig) -> Exported:
    """Export an adapter.

    Raises:
        ConfigError: a field is invalid, the format or base is unknown, or the folder exists.
        AdapterError: the adapter is damaged, does not fit its base or cannot use the format.
    """
    name, folder = config.chosen, Path(config.output_dir)
    exporter = FORMATS.load(name)()
    if exporter.needs:
        extras.require(exporter.needs, where="format")
    _check_free(folder)
    source = read_source(config)
    notes, cut = [], None
    if config.max_rank:
        least = source.lora.least
        source.lora, cut = cut_to(source.lora, config.max_rank)
        notes += _lost(cut, config.max_rank, least)
    with replacing_folder(folder) as part:
        done = exporter.write(source, part)
        notes += done.notes
        exact = readers.exact(part, source.lora, name, config.server)
        _copy_beside(source.lora.path, part, done)
        artifact = Artifact(
            str(folder.absolute()),
            folder.name,
            source.base or "BASE",
            done.largest_rank or 0,
            merged=done.largest_rank is None,
        )
        command = serving_line(name, config.server, artifact, exact)
        shown = command.replace(artifact.folder, folder.name)
        todo = [done.todo.format(folder=folder.name)] if done.todo else []
        card.write(part, source, name, [*notes, *_each_lost(cut), *todo], exact, shown)
        seal_beside(part)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Exported(folder, name, size, notes, exact, command, done.todo.format(folder=folder))


def serving_line(form: str, server: str | None, artifact: Artifact, exact: list[str]) -> str:
    """Return the serving command for a format: of the given server, else the first that reads it,
    else PEFT; "" if none does."""
    others = [title for title in exact if "PEFT" not in title]
    serves = server or next((n for n, info in SERVERS.items() if form in info.formats), None)
    if serves and others:
        return SERVERS[serves].command(artifact)
    return f"peft.PeftModel.from_pretrained(base, {artifact.folder!r})" if exact else ""


def read_source(config: ExportConfig) -> Source:
    """Read the adapter at a path, and the layer sizes of its base if available.

    Raises:
        ConfigError: the path has no adapter, or `--model` no model.
        AdapterError: the adapter is damaged or does not fit its base.
    """
    lora = read_lora(adapter_folder(config.path))
    base = config.model or lora.base or ""
    if not base:
        return Source(lora, base, None, config)
    checkpoint = Pretrained(name=base, trust_remote_code=config.trust_remote_code)
    try:
        sizes = layer_sizes(checkpoint, lora.fields.get("task_type"))
    except ConfigError:
        if config.model or Path(base).is_dir():
            raise
        return Source(lora, base, None, config)
    _check_fit(lora, sizes, base)
    return Source(lora, base, sizes, config)


def adapter_folder(path: str) -> Path:
    """Return the adapter folder of a run, or the folder itself.

    Raises:
        ConfigError: there is no adapter.
    """
    folder = Path(path)
    if RunFolder(folder).exists and not (folder / CONFIG).is_file():
        folder = RunFolder(folder).adapter
    if not (folder / CONFIG).is_file():
        if not folder.exists():
            raise ConfigError(no_adapter(path), "path")
        what = "contains no adapter" if folder.is_dir() else "is not a folder"
        raise ConfigError(
            f"{path} {what}; give the folder of a run or of an adapter, with {CONFIG} (`hf"
            " download` fetches one from the Hub).",
            "path",
        )
    return folder


def _check_free(folder: Path) -> None:
    refuse_unusable(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"{folder} already exists; use another --output_dir, or delete it.", "output_dir"
        )


def _check_fit(lora: SavedLora, sizes: dict[str, tuple[int, int]], base: str) -> None:
    """Reject modules missing in the base, and matrices of other sizes."""
    if lora.fields.get("target_parameters") or lora.fields.get("layer_replication"):
        return  # the names are not layer names
    plain = {name: pair for name, pair in lora.keys.items() if pair[0].endswith(".lora_A.weight")}
    unknown = [n for n in plain if n not in sizes and len(shape_of(lora.tensors, plain[n][0])) == 2]
    if unknown:
        raise AdapterError(
            f"{lora.path} adapts {listed(unknown)}, which {base!r} does not have; give the base"
            " that it was trained on with --model."
        )
    if lacking := [n for n in targeted_names(lora.fields, sizes) if n not in lora.keys]:
        raise AdapterError(
            f"{lora.path} has no matrices for {listed(lacking)}, which its configuration adapts in"
            f" {base!r}; save or copy the adapter again, or give its base with --model."
        )
    for name, (a, b) in plain.items():
        found = (shape_of(lora.tensors, b)[0], shape_of(lora.tensors, a)[1])
        if found != sizes.get(name, found):
            raise AdapterError(
                f"{lora.path} does not fit {base!r}: {name} is {sizes[name][0]} x {sizes[name][1]}"
                f" there but {found[0]} x {found[1]} in the adapter; give the base that it was"
                " trained on with --model."
            )


def cut_to(lora: SavedLora, rank: int) -> tuple[SavedLora, Cut]:
    """Truncate a plain LoRA to at most ``rank``, as `truncated`.

    Raises:
        AdapterError: it has other parts.
    """
    lacking = [*lora.lacks()]
    if lacking:
        raise AdapterError(
            f"{lora.path} has {'; '.join(lacking)}, but only plain LoRA matrices can be truncated;"
            " remove --max_rank."
        )
    return truncated(lora, rank)


def _lost(cut: Cut, rank: int, least: int) -> list[str]:
    if cut.nested:
        said = [
            f"Truncated to the first {rank} ranks at scale alpha / {rank}, as trained by DyLoRA."
        ]
        if rank < least:
            said.append(
                f"Warning: DyLoRA never trained fewer than {least} ranks (`r_min`), so the first"
                f" {rank} alone may be bad; use --max_rank {least} or more."
            )
        return said
    worst = sorted(((lost, name) for name, lost in cut.lost.items() if lost), reverse=True)
    if not worst:
        return [f"No module has a rank above {rank}; nothing was truncated."]
    most = ", ".join(f"{name} {lost:.2%}" for lost, name in worst[:3])
    return [
        f"Truncated {counted(worst, 'module')} to rank {rank}, losing {cut.in_all:.2%} of the"
        f" energy of all updates (most in {most})."
    ]


def _each_lost(cut: Cut | None) -> list[str]:
    lost = {name: share for name, share in cut.lost.items() if share} if cut else {}
    each = ", ".join(f"{name} {share:.2%}" for name, share in lost.items())
    return [f"Energy lost by module: {each}."] if each else []


def _copy_beside(adapter: Path, folder: Path, done: Export) -> None:
    """Copy tokenizer, chat template and labels from the adapter folder.

    The labels of a merged model are in its configuration.

    Raises:
        AdapterError: one is a link out of the folder, which might lead to anything.
    """
    left = (*_NOT_COPIED, HEAD_FILE) if done.largest_rank is None else _NOT_COPIED
    copy_beside(adapter, folder, left)


Tell = Callable[[str], None]


def show(done: Exported, tell: Tell) -> None:
    """Print the summary of an export."""
    for note in done.notes:
        tell(note)
    tell(f"{done.format}: {done.folder} ({done.bytes / 2**20:.1f} MiB)")
    if done.exact:
        tell(f"exact in: {', '.join(done.exact)}")
    if done.command:
        tell(f"serve with: {done.command}")
    if done.todo:
        tell(done.todo)
