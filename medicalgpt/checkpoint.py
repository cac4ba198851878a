"""What a whole directory is: written beside, fsynced, renamed, with a manifest; found again; fingerprinted.

A directory is whole when its MANIFEST.json stands and every file has the size and sha256 that it lists. A
write that was interrupted leaves a `.partial` sibling, or nothing, and never something that looks whole.
"""

import contextlib
import ctypes
import difflib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from medicalgpt.errors import ConfigError, ModelError, RunError

from safetensors import SafetensorError

MANIFEST = "MANIFEST.json"
PARTIAL = ".partial"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
MEBIBYTE = 2**20
SAMPLE = 4096  # bytes of every tensor that a fingerprint reads
WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


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
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_write_error(error):
            raise RunError(
                f"{target} could not be written: {str(error).splitlines()[0]}; {free_space(target)} free; "
                "nothing was changed"
            ) from None
        raise


@contextlib.contextmanager
def whole_checkpoint(
    output_dir: Path, step: int, *, keep: int | None, is_main: bool, wait: Callable[[], None]
) -> Iterator[Path]:
    """Yield where all ranks write a checkpoint's files; it gets its name once it is whole.

    Args:
        keep: checkpoints that stay, the new one included; None: all.
        is_main: whether this rank makes and names directories.
        wait: waits for all ranks.

    Raises:
        RunError: the disk is full or not writable; older checkpoints are untouched.
    """
    name, saving = f"checkpoint-{step}", output_dir / f"saving{PARTIAL}"
    try:
        if is_main:
            shutil.rmtree(saving, ignore_errors=True)
            (saving / name).mkdir(parents=True)
        wait()
        yield saving
        wait()
        if is_main:
            seal(saving / name)
            replace_directory(saving / name, output_dir / name)
            rotate(output_dir, keep)
        wait()
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_write_error(error):
            raise
        raise RunError(
            f"{output_dir / name} could not be written: {str(error).splitlines()[0]}; "
            f"{free_space(output_dir)} free; older checkpoints are untouched"
        ) from None
    finally:
        if is_main:
            shutil.rmtree(saving, ignore_errors=True)


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


def is_write_error(error: BaseException) -> bool:
    """Return whether a disk, and not a mistake, kept something from being written."""
    if isinstance(error, SafetensorError):
        return "I/O" in str(error) or "os error" in str(error)
    if isinstance(error, RuntimeError):
        return "PytorchStreamWriter" in str(error)
    return isinstance(error, OSError) and error.errno in WRITE_ERRORS


def exchange(a: Path, b: Path) -> bool:
    """Let two paths change places in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0


def replace_directory(source: Path, target: Path) -> None:
    """Put `source` in the place of `target`; what `target` held is deleted only after.

    Both change places in one step where the file system can, so that a kill finds one or the other there.
    """
    if not target.is_dir():
        os.rename(source, target)
        fsync(target.parent)
        return
    if exchange(source, target):
        fsync(target.parent)
        shutil.rmtree(source, ignore_errors=True)
        return
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(target, old)
    try:
        os.rename(source, target)
    except OSError:
        os.rename(old, target)
        raise
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
    if limit and limit > 0:
        for old in checkpoints(output_dir)[:-limit]:
            shutil.rmtree(old, ignore_errors=True)


# ---- reading -----------------------------------------------------------------------------------------------


def why_not_whole(directory: Path) -> str | None:
    """Return why a directory is not whole, or None when it is."""
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return f"no {MANIFEST}"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        entries = [(name, int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    if not all(stays_inside(name) for name in files):
        return f"{MANIFEST} names a file outside the directory"
    for name, size, digest in entries:
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if sha256(path) != digest:
            return f"{name} has other content than was written"
    return None


def stays_inside(name: str) -> bool:
    """Return whether a relative path stays inside the directory it is relative to."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def manifest_files(directory: Path) -> list[str]:
    """Return the names of the files that a directory's manifest lists; none if it cannot be read."""
    try:
        names = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
        return [name for name in names if stays_inside(name)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


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
    """Return a fingerprint of a model's weights, quickly, whatever its size.

    sha256 over the header of every safetensors file, its first and last MiB, and the middle of every tensor:
    two fine-tunes of one model differ, also when they trained only a few of its layers.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = min(int.from_bytes(file.read(8), "little"), size)
            header = file.read(length)
            digest.update(size.to_bytes(8, "little") + header + file.read(MEBIBYTE))
            file.seek(max(0, size - MEBIBYTE))
            digest.update(file.read())
            for offset in tensor_middles(header):
                file.seek(8 + length + offset)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:32]


def tensor_middles(header: bytes) -> list[int]:
    """Return where the middle of every tensor lies behind a header; none if the header is damaged."""
    try:
        entries = json.loads(header)
        spans = [entry["data_offsets"] for name, entry in sorted(entries.items()) if name != "__metadata__"]
        return [(start + end) // 2 for start, end in spans]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def nearest_path(path: Path) -> str:
    """Return `; did you mean …?` for a path that does not exist, or nothing."""
    if not path.parent.is_dir():
        return ""
    names = [p.name for p in path.parent.iterdir() if p.is_dir() and p.name != path.name]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


# ---- one run at a time -------------------------------------------------------------------------------------


HELD_LOCKS: dict[Path, int] = {}  # directory → file descriptor; the system frees them when the process ends


def lock(directory: Path) -> None:
    """Hold a directory for this process until it ends, however it ends.

    Raises:
        ConfigError: another process holds it; names its pid and host.
    """
    if directory.resolve() in HELD_LOCKS:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"{directory} cannot be written to: {error.strerror}; use another directory"
        ) from None
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
