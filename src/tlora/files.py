"""Atomic writes: to a temporary name, then rename; a killed process keeps the last good state.

Tensors go to safetensors, everything else to JSON (in a safetensors file: in its header), each with
a digest that is checked on reading. Pickles are neither read nor written.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora import integrity
from tlora.errors import ArtifactError, ConfigError, did_you_mean

if TYPE_CHECKING:
    import torch

_HEADER_KEY = "tlora"
_STATE_KEY = "digest"
_LEFTOVER = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.(part|old)")


@contextlib.contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on a clean exit it replaces ``path`` at once."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        # mkstemp makes files private; the result should have the permissions of an ordinary new
        # file.
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on a clean exit it replaces ``path``.

    If ``path`` is a link, its target is replaced. Leftovers of a killed process are removed first.

    Raises:
        ArtifactError: ``path`` is a file, or another process is writing it.
    """
    path = Path(path)
    if path.is_symlink():
        path = path.resolve()
    if path.exists() and not path.is_dir():
        raise ArtifactError(f"{path}: this is a file; name a folder, or move the file away.")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    refusal = ArtifactError(f"{path}: another process is writing it; wait for it.")
    with locked(lock, refusal):
        clear_leftovers(path.parent, {path.name})
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        try:
            yield part
            part.chmod(0o755)
            if path.exists():
                # A folder cannot be replaced in one step: the old one is set aside meanwhile.
                old = part.with_suffix(".old")
                path.replace(old)
                part.replace(path)
                shutil.rmtree(old)
            else:
                part.replace(path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            with contextlib.suppress(OSError):
                lock.unlink()


def is_leftover(name: str) -> bool:
    """Return whether a name belongs to a file or folder that a killed process was writing."""
    return _LEFTOVER.fullmatch(name) is not None


def clear_leftovers(folder: Path, names: Collection[str] | None = None) -> None:
    """Remove what killed processes were writing directly in ``folder``, whose lock is held.

    A folder that was set aside for a new one is restored if the new one is not in place.

    Args:
        folder: where to search; it need not exist.
        names: the files and folders that are written there; None: any name.
    """
    found = {}
    for path in folder.glob(".*"):
        match = _LEFTOVER.fullmatch(path.name)
        if match and (names is None or match[1] in names):
            found[path] = folder / match[1]
    for path, target in found.items():
        if path.suffix == ".old" and not target.exists():
            # The old folder only moves once the new one is complete.
            new = path.with_suffix(".part")
            (new if new.exists() else path).replace(target)
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def no_adapter(path: str | Path, what: str = "run or adapter") -> str:
    """Return the sentence for a folder that is not there, with a similar one if any.

    Args:
        path: the folder.
        what: what it should hold.
    """
    return (
        f"there is no {what} {str(path)!r}; give the folder of one (`hf download` fetches"
        f" one from the Hub).{similar_folder(path)}"
    )


def similar_folder(path: str | Path) -> str:
    """Return `did_you_mean` for a missing folder, among the folders beside it."""
    folder = Path(path)
    names: list[str] = []
    with contextlib.suppress(OSError):  # a folder that may not be listed
        names = [each.name for each in folder.absolute().parent.iterdir() if each.is_dir()]
    return did_you_mean(folder.name, sorted(names))


def refuse_missing(path: str | Path) -> None:
    """Check that a file is there.

    Raises:
        ArtifactError: it is missing.
    """
    if not Path(path).is_file():
        raise ArtifactError(f"{path}: there is no such file.")


def refuse_unusable(folder: Path) -> None:
    """Check that ``folder``, an `output_dir`, is a writable folder or can be created.

    Raises:
        ConfigError: it cannot.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose another --output_dir.", "output_dir")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(
            f"{folder} cannot be written to; choose another --output_dir.", "output_dir"
        )


def refuse_unless_free(folder: Path, own: bool) -> None:
    """Check that results may be written into ``folder``, without writing anything.

    Args:
        folder: the `output_dir`.
        own: whether it already holds results of this kind, to be resumed.

    Raises:
        ConfigError: it is a file, cannot be written to, or holds something else.
    """
    refuse_unusable(folder)
    if not own and any(folder.glob("*.json")):
        raise ConfigError(
            f"{folder} holds something else; choose another --output_dir.", "output_dir"
        )


@contextlib.contextmanager
def locked(path: str | Path, refusal: Exception) -> Iterator[None]:
    """Lock out other processes by the lock file ``path`` for as long as this lives.

    The file stays; the holder of the lock may remove it.

    Raises:
        Exception: ``refusal``, if another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # this system has no such locks
        yield
        return
    handle = None
    while handle is None:
        handle = _opened(Path(path))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(handle)
            raise refusal from None
        except OSError:
            pass  # a file system without locks must not stop anyone
        if not _is_file_at(handle, Path(path)):
            # Its last holder removed it after it was opened: another process may lock a new one.
            os.close(handle)
            handle = None
    try:
        yield
    finally:
        os.close(handle)


def _opened(path: Path) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The folder may vanish with its lock file between these two lines.
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_CREAT | os.O_RDWR, 0o666)


def _is_file_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@functools.cache
def scratch_folder() -> Path:
    """Return the temporary folder of this process, which is removed when it exits.

    Unlike `atexit`, multiprocessing's finalizers also run in its child processes.
    """
    from multiprocessing.util import Finalize

    folder = tempfile.mkdtemp(prefix="tlora-")
    Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=0)
    return Path(folder)


def file_at(path: str | Path, name: str) -> Path:
    """Return ``path``, or the file ``name`` in it if it is an existing folder."""
    path = Path(path)
    return path / name if path.is_dir() else path


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with replacing_file(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: the file is missing or is not JSON.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise ArtifactError(
            f"{path}: has half of a surrogate pair, which no text may hold; the file is damaged."
        ) from None
    except FileNotFoundError:
        raise ArtifactError(f"{path}: there is no such file.") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not JSON ({error}); the file is damaged.") from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}).") from error


def write_state(path: str | Path, value: dict[str, Any]) -> None:
    """Write ``value`` like `write_json`, with a digest that `read_state` checks."""
    write_json(path, value | {_STATE_KEY: integrity.json_digest(value)})


def read_state(path: str | Path, advice: str = "restore it, or make it again") -> Any:
    """Read a file written by `write_state`, without its digest.

    Args:
        path: the file.
        advice: what the user should do about an edited or damaged file.

    Raises:
        ArtifactError: the file is missing, is not JSON, or does not match its digest.
    """
    try:
        found = read_json(path)
    except ArtifactError as error:
        raise ArtifactError(f"{str(error).removesuffix('.')}; {advice}.") from error
    if not isinstance(found, dict) or _STATE_KEY not in found:
        raise ArtifactError(f"{path}: not written by `tlora`, or without its digest; {advice}.")
    expected = found.pop(_STATE_KEY)
    if expected != integrity.json_digest(found):
        raise ArtifactError(
            f"{path}: {integrity.MISMATCH}, so it was edited or is damaged; {advice}."
        )
    return found


def write_tensors(path: str | Path, tensors: dict[str, torch.Tensor], header: Any) -> None:
    """Write tensors with a JSON ``header`` and a digest into one safetensors file, atomically."""
    from safetensors.torch import save_file

    # Space for the digest, which is then written in place.
    metadata = {_HEADER_KEY: json.dumps(header), integrity.DIGEST_KEY: "0" * 64}
    with replacing_file(path) as part:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            part,
            metadata=metadata,
        )
        seal_tensors(part)


def seal_tensors(path: str | Path) -> None:
    """Put the digest of a finished safetensors file, from any library, into its header.

    A file with space for it is changed in place; any other is rewritten and replaced.
    """
    path = Path(path)
    with path.open("r+b") as file:
        header = integrity.read_header(file)
        start = file.tell()
        digest = integrity.tensors_digest(header, file)
        metadata = header.get(integrity.METADATA, {}) | {integrity.DIGEST_KEY: digest}
        # safetensors writes the keys in an order that changes from file to file.
        header[integrity.METADATA] = dict(sorted(metadata.items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        if 8 + len(text) == start:
            file.seek(8)
            file.write(text)
            return
        file.seek(start)
        with replacing_file(path) as part, part.open("wb") as sealed:
            sealed.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(file, sealed, 2**20)


def read_tensors(
    path: str | Path, kind: str, version: int | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a file written by `write_tensors` whose header's "kind" is ``kind``.

    Args:
        path: the file.
        kind: the expected kind.
        version: the expected "format" of the header; None: the kind has no formats.

    Raises:
        ArtifactError: the file is missing, does not match its digest, has another format, or holds
            another kind of artifact.
    """
    from safetensors import SafetensorError, safe_open

    refuse_missing(path)
    try:
        whole = integrity.has_digest(path)
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER_KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise ArtifactError(
            f"{path}: not a readable safetensors file: {error}; the file is damaged, make it again."
        ) from error
    if not isinstance(header, dict):
        raise ArtifactError(f"{path}: its header is {header!r}, not one that tlora wrote.")
    if header.get("kind") != kind:
        raise ArtifactError(
            f"{path}: this is {header.get('kind', 'no tlora file')!r}, not {kind!r}."
        )
    if version is not None and header.get("format") != version:
        raise ArtifactError(
            f"{path}: it has format {header.get('format')!r} and this version of tlora reads"
            f" {version}; make it again, or read it with the version that wrote it."
        )
    if not whole:
        raise ArtifactError(
            f"{path}: it has no digest, so whether it is whole is unknown; make it again."
        )
    return tensors, header
