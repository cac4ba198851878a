"""What a whole directory is: written beside, fsynced, renamed, with a manifest; found again; fingerprinted.

A directory is whole when its MANIFEST.json stands and every file has the size and sha256 that it lists. A
write that was interrupted leaves a `.partial` sibling, or nothing, and never something that looks whole.
"""

import contextlib
import difflib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from medicalgpt.errors import ConfigError, ModelError, RunError

MANIFEST = "MANIFEST.json"
PARTIAL = ".partial"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
MEBIBYTE = 2**20


# ---- writing -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staged(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a sibling directory to write into; on success it gets its manifest and becomes `target`.

    Raises:
        ConfigError: `target` exists and is not empty, and `overwrite` is False.
        RunError: the disk is full or not writable; the half is removed.
    """
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; expected a new directory")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ConfigError(f"{target} exists and is not empty; use --overwrite True or another directory")
    partial = target.with_name(target.name + PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        seal(partial)
        replace_directory(partial, target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(
            f"{target} could not be written: {error.strerror or error}; "
            f"{free_space(target)} free; nothing was changed"
        ) from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def seal(directory: Path) -> None:
    """Make a directory's files durable and readable by umask, and write its manifest last."""
    umask = os.umask(0)
    os.umask(umask)
    entries = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST):
        path.chmod(stat.S_IMODE(0o666 & ~umask))
        entries[path.relative_to(directory).as_posix()] = {
            "size": path.stat().st_size,
            "sha256": sha256(path),
        }
        fsync(path)
    write_json(directory / MANIFEST, {"files": entries})
    fsync(directory)


def replace_directory(source: Path, target: Path) -> None:
    """Rename `source` to `target`; what `target` held is deleted only after."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.is_dir():
        os.rename(target, old)
    os.rename(source, target)
    fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def publish(partial: Path, target: Path) -> None:
    """Seal `partial` and move its files into `target`, an existing directory, the manifest last."""
    seal(partial)
    (target / MANIFEST).unlink(missing_ok=True)
    for path in sorted(partial.iterdir(), key=lambda p: p.name == MANIFEST):
        destination = target / path.name
        if destination.is_dir():
            shutil.rmtree(destination)
        os.replace(path, destination)
    fsync(target)
    partial.rmdir()


def write_json(path: Path, value: object) -> None:
    """Write a JSON file beside, fsync it, rename it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    fsync(temporary)
    os.replace(temporary, path)


def fsync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Return a file's sha256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_space(path: Path) -> str:
    """Return the free space where `path` is or would be, as text."""
    while not path.exists():
        path = path.parent
    return f"{shutil.disk_usage(path).free / 1e9:.2f} GB"


def rotate(output_dir: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, by step, after a new one is whole."""
    if limit:
        for old in checkpoints(output_dir)[:-limit]:
            shutil.rmtree(old, ignore_errors=True)


# ---- reading -----------------------------------------------------------------------------------------------


def why_not_whole(directory: Path) -> str | None:
    """Return why a directory is not whole, or None when it is."""
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return f"no {MANIFEST}"
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError):
        return f"{MANIFEST} is damaged"
    for name, entry in entries.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes, not {entry['size']}"
        if sha256(path) != entry["sha256"]:
            return f"{name} has other content than was written"
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoint directories of a run, oldest step first."""
    if not output_dir.is_dir():
        return []
    found = [
        (int(match[1]), path)
        for path in output_dir.iterdir()
        if path.is_dir() and (match := CHECKPOINT.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def newest_whole(output_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint and a line about each newer one that is not.

    Raises:
        ModelError: checkpoints exist, and none is whole.
    """
    skipped = []
    for path in reversed(checkpoints(output_dir)):
        why = why_not_whole(path)
        if why is None:
            return path, skipped
        skipped.append(f"{path.name}: {why}")
    if skipped:
        raise ModelError(
            f"{output_dir}: no checkpoint is whole ({'; '.join(skipped)}); remove them, or start anew with "
            "--overwrite_output_dir True"
        )
    return None, []


def fingerprint(directory: Path) -> str:
    """Return a fingerprint of weights: sha256 over header, first and last MiB of every safetensors file.

    Fast on any size, and different for two fine-tunes of one model.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            digest.update(size.to_bytes(8, "little"))
            digest.update(file.read(min(length, size)))
            digest.update(file.read(MEBIBYTE))
            file.seek(max(0, size - MEBIBYTE))
            digest.update(file.read())
    return digest.hexdigest()[:32]


def nearest_path(path: Path) -> str:
    """Return `; did you mean …?` for a path that does not exist, or nothing."""
    if not path.parent.is_dir():
        return ""
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()], n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


# ---- one run at a time -------------------------------------------------------------------------------------


HELD_LOCKS: dict[Path, int] = {}  # directory → file descriptor; the system frees them when the process ends


def lock(directory: Path) -> None:
    """Hold a directory for this process until it ends, however it ends.

    Raises:
        ConfigError: another process holds it; names its pid and host.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if directory.resolve() in HELD_LOCKS:
        return
    handle = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(handle, 200).decode(errors="replace").strip()
        os.close(handle)
        raise ConfigError(
            f"{directory} is in use by {holder or 'another run'}; wait for it or use another --output_dir"
        ) from None
    os.truncate(handle, 0)
    os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    HELD_LOCKS[directory.resolve()] = handle
