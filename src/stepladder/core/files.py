"""Files that survive crashes and tell when they were changed: atomic writes, chained JSON lines, manifests.

Durability comes from order alone: write a temporary file, fsync it, rename it, fsync the directory. So a kill at any
instant leaves the old content or the new, never a mixture. ``OSError`` (a full disk, a read-only folder) passes
through with the old content intact.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from stepladder.core.errors import UserError
from stepladder.core.trees import canonical, parse_json, read_text

MANIFEST = "manifest.json"
_CHAIN_LENGTH = 16
_TAIL = 4096  # bytes looked at first when searching for the last line
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


class Corrupt(UserError):
    """A file is not what was written: truncated, changed, missing or unlisted."""


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Replace the file at ``path`` (folders are made as needed) by ``data``, text as UTF-8, durably and at once.

    On any failure the temporary file is removed, what was at ``path`` stays, and the error is raised.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _write_all(handle, data.encode() if isinstance(data, str) else data)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename == str(temporary):  # which nobody has heard of
            error.filename, error.filename2 = str(path), None
        raise
    _sync_folder(path.parent)


def _write_all(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented strict JSON, atomically; NaN and infinities raise ValueError."""
    write_atomic(path, json.dumps(value, indent=1, allow_nan=False, default=_plain) + "\n")


def read_json(path: str | Path) -> Any:
    """The value of a strict JSON file; a missing or flawed file is a UserError with the line."""
    return parse_json(read_text(Path(path)), str(path))


def append_line(path: str | Path, line: Mapping[str, Any], durable: bool = False) -> None:
    """Append one JSON line; see ``append_lines``."""
    append_lines(path, [line], durable)


def append_lines(path: str | Path, lines: Iterable[Mapping[str, Any]], durable: bool = False) -> None:
    """Append JSON lines to a chained file, in one write; ``durable`` waits until the disk has them.

    Each line gets a ``chain``: the first 16 hex digits of SHA-256 over the previous line's chain ('' at the
    start) and the canonical form of the line. Values are those of ``canonical``; NaN raises ValueError. One
    process writes a file at a time. A torn last line must first be cut by ``trim_lines``. If the write fails,
    the file is as before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        end = os.lseek(handle, 0, os.SEEK_END)
        chain = _last_chain(handle, end, path)
        text = []
        for line in lines:
            if "chain" in line:
                raise ValueError("'chain' is the name of the hash; call the entry something else")
            chain = _link(chain, line)
            text.append(json.dumps({**line, "chain": chain}, allow_nan=False, default=_plain) + "\n")
        try:
            _write_all(handle, "".join(text).encode())
            if durable:
                os.fsync(handle)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, end)
            raise
    finally:
        os.close(handle)
    if durable and end == 0:
        _sync_folder(path.parent)


def _plain(value: Any) -> Any:
    return json.loads(canonical(value))  # NumPy scalars, paths: what the chain accepts, the line does too


def _link(previous: str, line: Mapping[str, Any]) -> str:
    return hashlib.sha256((previous + canonical(line)).encode()).hexdigest()[:_CHAIN_LENGTH]


def _last_chain(handle: int, end: int, path: Path) -> str:
    """The chain of the last line ('' in an empty file), reading no more than the file's end."""
    size = 0
    last: list[bytes] = []
    while size < end and len(last) < 3:  # wanted: what is before the last line, the line, and nothing after it
        size = min(max(2 * size, _TAIL), end)
        last = os.pread(handle, size, end - size).rsplit(b"\n", 2)
    if not last:
        return ""
    chain = (_parsed(last[-2]) or {}).get("chain") if last[-1] == b"" else None
    if not isinstance(chain, str):
        raise Corrupt(f"{path}: the last line is torn or not ours; resuming the run cuts off a torn line")
    return chain


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The mapping on a line of JSON; None if it is anything else."""
    try:
        entry = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _whole(data: bytes) -> list[bytes]:
    """The lines of a file without a torn last one: one that lacks its newline, or is no JSON."""
    *lines, rest = data.split(b"\n")
    if not rest and lines and _parsed(lines[-1]) is None:
        lines.pop()
    return lines


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a chained file, without their ``chain``; a torn last line (a crash) is left out.

    A line that was edited, removed, added or moved breaks the chain: Corrupt, naming the file and the line.
    Lines missing at the *end* cannot be told from lines never written.
    """
    entries, chain = [], ""
    for number, line in enumerate(_whole(_bytes(Path(path))), start=1):
        entry = _parsed(line)
        if entry is None:
            raise Corrupt(f"{path}: line {number}: not a line of JSON; restore the file or repeat the run")
        given = entry.pop("chain", None)
        try:
            chain = _link(chain, entry)
        except ValueError:  # NaN, which we never write
            chain = ""
        if given != chain:
            raise Corrupt(
                f"{path}: line {number}: the hash chain breaks: this line or the one before it was edited, "
                f"added or removed; restore the file or repeat the run"
            )
        entries.append(entry)
    return entries


def trim_lines(path: str | Path) -> None:
    """Cut a torn last line off a chained file, so that lines can be appended; no file, nothing to do."""
    path = Path(path)
    if not path.exists():
        return
    data = _bytes(path)
    size = sum(len(line) + 1 for line in _whole(data))
    if size < len(data):
        with path.open("r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())


def truncate_lines(path: str | Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Keep a chained file's lines up to the first for which ``keep`` is false, atomically; no file, no-op.

    For resuming: metrics written after the checkpoint are written anew.
    """
    path = Path(path)
    if not path.exists():
        return
    count = 0
    for entry in read_lines(path):
        if not keep(entry):
            break
        count += 1
    data = _bytes(path)
    kept = b"".join(line + b"\n" for line in _whole(data)[:count])
    if kept != data:
        write_atomic(path, kept)


def _files_in(folder: Path) -> dict[str, Path]:
    """The files below ``folder`` that a manifest speaks of: all but itself and hidden ones, by relative name."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: found[name] for name in sorted(found) if name != MANIFEST and "/." not in f"/{name}"}


def _hash(path: Path, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: str | Path) -> None:
    """Write ``manifest.json``: size and SHA-256 of every file in ``folder``, each fsynced first.

    The manifest comes last, so a folder that has one is complete.
    """
    folder = Path(folder)
    present = _files_in(folder)
    entries = {name: {"sha256": _hash(path, sync=True), "size": path.stat().st_size} for name, path in present.items()}
    for inner in {path.parent for path in present.values()}:
        _sync_folder(inner)
    write_json(folder / MANIFEST, {"files": entries})


def verify_manifest(folder: str | Path) -> None:
    """Check every file of ``folder`` against its manifest; raise Corrupt naming the first that differs."""
    folder = Path(folder)
    try:
        manifest = read_json(folder / MANIFEST)
    except UserError as error:
        raise Corrupt(str(error)) from None
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(listed, dict):
        raise Corrupt(f"{folder / MANIFEST}: not a manifest")
    present = _files_in(folder)
    for name in sorted({*listed, *present}):
        path = folder / name
        if name not in present:
            raise Corrupt(f"{path}: listed in the manifest but missing")
        if name not in listed:
            raise Corrupt(f"{path}: not listed in the manifest")
        expected = listed[name]
        if not isinstance(expected, dict) or set(expected) != {"sha256", "size"}:
            raise Corrupt(f"{folder / MANIFEST}: the entry '{name}' is malformed")
        size = path.stat().st_size
        if size != expected["size"]:
            raise Corrupt(f"{path}: has {size} bytes, not the {expected['size']} that were written")
        if _hash(path) != expected["sha256"]:
            raise Corrupt(f"{path}: the content is not what was written (SHA-256 differs)")


def safe_name(name: str) -> str:
    """``name`` if it is a safe name for a folder on every system, else a UserError with a name that is.

    1 to 100 of ``A-Z a-z 0-9 . _ -``, starting with a letter, digit or ``_``, not ending in a dot, and not a
    name that Windows reserves (CON, NUL, ...).
    """
    reserved = name.split(".")[0].lower() in _RESERVED
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name) and not name.endswith(".") and not reserved:
        return name
    proposal = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".-")[:100].rstrip(".-")
    if not proposal or proposal.split(".")[0].lower() in _RESERVED:
        proposal = f"run-{proposal}"[:100].rstrip(".-")
    shown = name if len(name) <= 40 else name[:37] + "..."
    why = "is a name that Windows reserves" if reserved else "cannot be a name"
    raise UserError(
        f"{shown!r} {why}: use 1 to 100 of A-Z a-z 0-9 . _ - and start with a letter or a digit; "
        f"for example '{proposal}'"
    )


def publish_dir(temporary: str | Path, final: str | Path) -> bool:
    """Rename a finished folder to ``final``; False, and ``temporary`` removed, if somebody else was first.

    The rename is atomic (both on one file system): nobody ever sees half a folder. The files in it should have
    been fsynced by ``write_manifest``.
    """
    temporary, final = Path(temporary), Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    _sync_folder(temporary)
    try:
        os.rename(temporary, final)
    except OSError as error:
        if not final.is_dir() or error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        shutil.rmtree(temporary)
        return False
    _sync_folder(final.parent)
    return True


def source_digest(package: Path) -> str:
    """SHA-256 over a package's Python files: uncommitted changes show, and no version control is needed."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
