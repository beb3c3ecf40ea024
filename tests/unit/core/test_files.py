"""Atomic files, chained lines, manifests, names."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepladder.core import files
from stepladder.core.errors import UserError
from stepladder.core.files import (
    Corrupt,
    append_line,
    append_lines,
    publish_dir,
    read_json,
    read_lines,
    safe_name,
    trim_lines,
    truncate_lines,
    verify_manifest,
    write_atomic,
    write_json,
    write_manifest,
)


def failing(code: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


# --- write_atomic


def test_a_failed_write_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as caught:
        files.write_atomic(tmp_path, "x")
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path), None)
    with pytest.raises(OSError, match="No such file") as caught:
        files.write_atomic("/proc/x.svg", "x")
    assert caught.value.filename == "/proc/x.svg"


def test_write_atomic_writes_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_atomic(path, "first é")
    assert path.read_bytes() == "first é".encode()
    write_atomic(str(path), b"\x00second")
    assert path.read_bytes() == b"\x00second"
    assert os.listdir(path.parent) == ["b.txt"]


def test_write_atomic_respects_the_umask_and_long_names(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    before = os.umask(0o027)
    try:
        write_atomic(path, "x")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_write_atomic_orders_its_steps_for_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    folders: set[int] = set()

    def spy(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            if name == "open" and os.path.isdir(args[0]):
                folders.add(result)
            events.append(f"{name} folder" if name == "fsync" and args[0] in folders else name)
            return result

        monkeypatch.setattr(os, name, call)

    for name in ("open", "write", "fsync", "replace"):
        spy(name)
    write_atomic(tmp_path / "x", b"data")
    assert [e for e in events if e != "open"] == ["write", "fsync", "replace", "fsync folder"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_K2_a_failing_disk_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(code))
        with pytest.raises(OSError) as caught:
            write_atomic(path, "new")
    assert caught.value.errno == code
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]
    write_atomic(path, "new")
    assert path.read_text() == "new"


def test_K2_a_disk_that_fills_up_midway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, "old")
    real, written = os.write, 0

    def write(handle: int, data: bytes) -> int:
        nonlocal written
        if written >= 100:
            raise OSError(errno.ENOSPC, "full")
        written += (count := real(handle, data[:7]))  # short writes are legal too
        return count

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        write_atomic(tmp_path / "short", "0123456789" * 5)
        with pytest.raises(OSError, match="full"):
            write_atomic(path, "n" * 1000)
    assert (tmp_path / "short").read_text() == "0123456789" * 5
    assert path.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["short", "state.json"]


def test_an_interrupt_leaves_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "x", "new")
    assert os.listdir(tmp_path) == []


WRITER = """
import sys
from stepladder.core.files import append_line, write_atomic
print("ready", flush=True)
for n in range(10**9):
    write_atomic(sys.argv[1], bytes([65 + n % 26]) * 300_000)
    append_line(sys.argv[2], {"n": n, "text": "x" * 3000})
"""


def test_K1_kills_leave_whole_files(tmp_path: Path) -> None:
    whole, lines = tmp_path / "whole", tmp_path / "lines"
    delays = random.Random(0)
    for _ in range(6):
        lines.unlink(missing_ok=True)
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(whole), str(lines)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        while not lines.exists():
            time.sleep(0.001)
        time.sleep(delays.uniform(0, 0.03))
        writer.kill()
        writer.wait()
        writer.stdout.close()
        data = whole.read_bytes()
        assert len(data) == 300_000
        assert len(set(data)) == 1
        trim_lines(lines)
        count = len(read_lines(lines))
        append_line(lines, {"n": count})
        assert [entry["n"] for entry in read_lines(lines)] == list(range(count + 1))


# --- JSON


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True, "é\ud800"], "a": {"n": np.int64(3), "x": np.float64(0.1)}, "p": Path("q")}
    write_json(tmp_path / "v.json", value)
    back = read_json(tmp_path / "v.json")
    assert back == {"b": [1, 2.5, None, True, "é\ud800"], "a": {"n": 3, "x": 0.1}, "p": "q"}
    assert list(back) == ["b", "a", "p"]


@pytest.mark.parametrize("bad", [float("nan"), [float("inf")], {"x": np.float64("nan")}])
def test_json_refuses_to_write_what_is_not_finite(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "v.json", bad)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{\n"a": NaN}', "line 2: NaN is not a finite number"),
        ('{"a": 1,\n"a": 2}', "line 2: duplicate key 'a'"),
        ('{"a": 1', "line 1: not valid JSON"),
        ("", "line 1: not valid JSON"),
    ],
)
def test_json_errors_name_file_and_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "v.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: {expected}")


def test_a_missing_json_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "v.json")


# --- chained lines


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "records" / "log.jsonl"
    for step in range(5):
        append_line(path, {"step": step, "loss": 1 / (step + 1), "sizes": (1, 2)}, durable=step == 0)
    return path


def steps(path: Path) -> list[int]:
    return [entry["step"] for entry in read_lines(path)]


def test_lines_come_back_as_they_were(log: Path) -> None:
    assert read_lines(log) == [{"step": s, "loss": 1 / (s + 1), "sizes": [1, 2]} for s in range(5)]
    assert all(len(json.loads(line)["chain"]) == 16 for line in log.read_text().splitlines())


def test_the_chain_is_what_the_format_says(tmp_path: Path) -> None:
    path = tmp_path / "x"
    append_lines(path, [{"b": 1, "a": -0.0}, {"c": np.float32(0.5)}])
    first = hashlib.sha256(b'{"a":0.0,"b":1}').hexdigest()[:16]
    second = hashlib.sha256(f'{first}{{"c":0.5}}'.encode()).hexdigest()[:16]
    assert [json.loads(line)["chain"] for line in path.read_text().splitlines()] == [first, second]
    assert len(read_lines(path)) == 2


def test_many_lines_at_once_equal_one_by_one(tmp_path: Path) -> None:
    lines = [{"n": n, "text": "x" * (n * 700)} for n in range(20)]  # longer than the first look at the end
    append_lines(tmp_path / "once", lines)
    for line in lines:
        append_line(tmp_path / "each", line)
    append_lines(tmp_path / "each", [])
    assert (tmp_path / "once").read_bytes() == (tmp_path / "each").read_bytes()
    assert read_lines(tmp_path / "once") == lines


def test_a_hundred_thousand_lines_are_fast(tmp_path: Path) -> None:
    path = tmp_path / "x"
    append_lines(path, ({"task": "parity", "size": n, "question": "0101^=", "ticks": 1.5} for n in range(100_000)))
    start = time.process_time()
    assert len(read_lines(path)) == 100_000
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: [*lines[:2], lines[2].replace("0.33", "0.34"), *lines[3:]], 3),
        (lambda lines: lines[1:], 1),
        (lambda lines: [*lines[:2], *lines[3:]], 3),
        (lambda lines: [lines[0], lines[0], *lines[1:]], 2),
        (lambda lines: [lines[1], lines[0], *lines[2:]], 1),
        (lambda lines: [*lines[:-1], lines[-1].replace("0.2", "0.1")], 5),
        (lambda lines: [*lines[:3], "", *lines[3:]], 4),
        (lambda lines: [*lines[:1], "[1]", *lines[1:]], 2),
        (lambda lines: [*lines[:1], lines[1][:20], *lines[2:]], 2),
        (lambda lines: [*lines[:4], '{"step": 4}'], 5),
        (lambda lines: [lines[0].replace("1.0", "NaN"), *lines[1:]], 1),
        (lambda lines: [lines[0].replace("1.0", "1"), *lines[1:]], 1),
    ],
)
def test_a_changed_line_is_named(log: Path, change: Callable[[list[str]], list[str]], line: int) -> None:
    log.write_text("\n".join(change(log.read_text().splitlines())) + "\n")
    with pytest.raises(Corrupt, match=rf"log\.jsonl: line {line}: "):
        read_lines(log)


def test_a_line_rewritten_with_its_own_chain_breaks_the_next(log: Path) -> None:
    lines = log.read_text().splitlines()
    entry = json.loads(lines[1])
    entry.pop("chain")
    entry["loss"] = 0.0
    forged = files._link(json.loads(lines[0])["chain"], entry)
    lines[1] = json.dumps({**entry, "chain": forged})
    log.write_text("\n".join(lines) + "\n")
    with pytest.raises(Corrupt, match="line 3: the hash chain breaks"):
        read_lines(log)


@pytest.mark.parametrize("torn", ['{"step": 5, "lo', '{"step": 5', "\0" * 50, '{"step": 5, "lo\n', "{"])
def test_a_torn_last_line_is_dropped_cut_and_written_anew(log: Path, torn: str) -> None:
    before = log.read_bytes()
    log.write_bytes(before + torn.encode())
    assert steps(log) == [0, 1, 2, 3, 4]
    with pytest.raises(Corrupt, match="the last line is torn"):
        append_line(log, {"step": 5})
    trim_lines(log)
    assert log.read_bytes() == before
    append_line(log, {"step": 5})
    assert steps(log) == [0, 1, 2, 3, 4, 5]


def test_a_file_that_is_one_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text('{"step": 0, "chain": "00')
    assert read_lines(path) == []
    trim_lines(path)
    append_line(path, {"step": 0})
    assert steps(path) == [0]


def test_every_cut_of_the_file_can_go_on(log: Path) -> None:
    data = log.read_bytes()
    for size in range(data.index(b"\n", 200) + 1):  # a few lines of it
        log.write_bytes(data[:size])
        trim_lines(log)
        kept = steps(log)
        assert kept == list(range(data[:size].count(b"\n")))
        append_line(log, {"step": len(kept)})
        assert steps(log) == [*kept, len(kept)]


def test_trim_leaves_whole_files_and_no_files_alone(log: Path, tmp_path: Path) -> None:
    before = log.read_bytes()
    trim_lines(log)
    assert log.read_bytes() == before
    trim_lines(tmp_path / "none")
    truncate_lines(tmp_path / "none", lambda _: True)
    assert not (tmp_path / "none").exists()


def test_truncate_keeps_a_prefix_that_can_go_on(log: Path) -> None:
    whole = log.read_bytes()
    truncate_lines(log, lambda line: line["step"] <= 2)
    assert steps(log) == [0, 1, 2]
    for step in (3, 4):
        append_line(log, {"step": step, "loss": 1 / (step + 1), "sizes": [1, 2]})
    assert log.read_bytes() == whole  # as if there had been no interruption
    truncate_lines(log, lambda line: line["step"] != 1)
    assert steps(log) == [0]
    truncate_lines(log, lambda _: False)
    assert log.read_bytes() == b""


def test_truncate_also_cuts_a_torn_line_and_refuses_an_edited_file(log: Path) -> None:
    log.write_bytes(log.read_bytes() + b'{"st')
    truncate_lines(log, lambda _: True)
    append_line(log, {"step": 5})
    assert steps(log) == [0, 1, 2, 3, 4, 5]
    log.write_text(log.read_text().replace('"step": 1', '"step": 7'))
    with pytest.raises(Corrupt, match="line 2"):
        truncate_lines(log, lambda _: True)


def test_K2_a_failed_append_leaves_the_file_as_it_was(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = log.read_bytes(), os.write
    calls = 0

    def write(handle: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(errno.ENOSPC, "full")
        return real(handle, data[:10])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(OSError, match="full"):
            append_line(log, {"step": 5})
    assert calls == 2
    assert log.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(errno.EIO))
        with pytest.raises(OSError):
            append_line(log, {"step": 5}, durable=True)
    assert log.read_bytes() == before


@pytest.mark.parametrize("bad", [{"loss": float("nan")}, {"loss": [float("inf")]}, {"chain": 1}, {"x": {1, 2}}])
def test_lines_that_cannot_be_written(log: Path, bad: dict[str, Any]) -> None:
    before = log.read_bytes()
    with pytest.raises((ValueError, TypeError)):
        append_lines(log, [{"step": 5}, bad])
    assert log.read_bytes() == before


def test_a_foreign_file_is_not_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text('{"a": 1}\n')
    with pytest.raises(Corrupt, match="torn or not ours"):
        append_line(path, {"a": 2})


def test_a_missing_log(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_lines(tmp_path / "none")


# --- manifests


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "step-1"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.bin").write_bytes(bytes(range(24)))
    (folder / "sub" / "b.bin").write_bytes(b"")
    write_manifest(folder)
    return folder


def test_a_fresh_manifest_verifies(folder: Path) -> None:
    verify_manifest(folder)
    assert sorted(read_json(folder / "manifest.json")["files"]) == ["a.bin", "sub/b.bin"]
    (folder / ".DS_Store").write_text("left by a file browser")
    verify_manifest(folder)
    write_manifest(folder)  # again, the manifest itself not included
    verify_manifest(folder)


@pytest.mark.parametrize("name", ["a.bin", "manifest.json"])
def test_K3_every_flipped_bit_is_found(folder: Path, name: str) -> None:
    path = folder / name
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(Corrupt):
            verify_manifest(folder)
    path.write_bytes(data)
    verify_manifest(folder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda f: (f / "a.bin").unlink(), "a.bin: listed in the manifest but missing"),
        (lambda f: (f / "a.bin").write_bytes(b"short"), "a.bin: has 5 bytes, not the 24 that were written"),
        (lambda f: (f / "sub/b.bin").write_bytes(b"x"), "b.bin: has 1 bytes, not the 0"),
        (lambda f: (f / "extra").write_bytes(b""), "extra: not listed in the manifest"),
        (lambda f: (f / "a.bin").write_bytes(bytes(24)), "a.bin: the content is not what was written"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json: no such file"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: line 1: not valid JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json: not a manifest"),
        (lambda f: (f / "manifest.json").write_text('{"files": {"a.bin": 3, "sub/b.bin": 3}}'), "malformed"),
        (lambda f: (f / "manifest.json").write_text('{"files": {"../../x": {}}}'), "missing"),
        (lambda f: shutil.rmtree(f), "no such file"),
    ],
)
def test_a_changed_folder_is_refused_by_name(folder: Path, change: Callable[[Path], Any], expected: str) -> None:
    change(folder)
    with pytest.raises(Corrupt, match=expected):
        verify_manifest(folder)


def test_the_manifest_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("x")
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError):
        write_manifest(tmp_path)
    assert os.listdir(tmp_path) == ["a"]


# --- names and folders


@pytest.mark.parametrize("name", ["run", "a.b-c_D9", "_x", "0", "x" * 100, "console", "com10", "loop-s0"])
def test_safe_names_pass(name: str) -> None:
    assert safe_name(name) == name


@pytest.mark.parametrize(
    ("name", "proposal"),
    [("../../x", "x"), ("my run", "my-run"), ("a/b", "a-b"), ("con", "run-con"), ("🪜", "run"), ("x" * 101, "x" * 100)],
)
def test_unsafe_names_come_with_a_proposal(name: str, proposal: str) -> None:
    with pytest.raises(UserError, match=f"for example '{proposal}'$"):
        safe_name(name)


def test_publish_dir_moves_a_folder_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    final = tmp_path / "cache" / "final"
    assert publish_dir(tmp_path / "one", final)
    assert not publish_dir(tmp_path / "two", final)
    assert (final / "who").read_text() == "one"
    assert os.listdir(tmp_path) == ["cache"]


def test_D10_one_of_many_publishers_wins(tmp_path: Path) -> None:
    start, won = threading.Barrier(8), []

    def publish(name: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
        start.wait()
        if publish_dir(tmp_path / name, tmp_path / "final"):
            won.append(name)

    threads = [threading.Thread(target=publish, args=(f"t{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [(tmp_path / "final" / "who").read_text()]
    assert os.listdir(tmp_path) == ["final"]


def test_publish_dir_refuses_what_is_no_race(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        publish_dir(tmp_path / "none", tmp_path / "final")
    (tmp_path / "mine").mkdir()
    (tmp_path / "final").write_text("a file")
    with pytest.raises(NotADirectoryError):
        publish_dir(tmp_path / "mine", tmp_path / "final")
    assert (tmp_path / "mine").is_dir()
