"""Plugins: Python files outside the package that register architectures, tasks or suites."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from stepladder.core.errors import UserError

_LOADED: dict[Path, list[str]] = {}


def load(files: Iterable[str | Path]) -> list[str]:
    """Import plugin files, each once in a process; returns the names of the architectures that they registered.

    Whatever a plugin raises is a UserError that names the file, the line and the error.
    """
    names: list[str] = []
    for file in files:
        path = Path(file).resolve()
        if path not in _LOADED:
            _LOADED[path] = _import(path, str(file))
        names += _LOADED[path]
    return list(dict.fromkeys(names))


def _import(path: Path, said: str) -> list[str]:
    from stepladder.models.zoo import ARCHITECTURES

    if not path.is_file():
        raise UserError(f"plugin '{said}' is not a file; give the path of a Python file")
    # Two plugins of one file name are two modules.
    name = f"stepladder_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"plugin '{said}' is not a Python file; its name must end in .py")
    before = set(ARCHITECTURES.names())
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        text = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
        raise UserError(
            f"plugin '{said}' failed at line {_line(error, path)}: {type(error).__name__}: {text}"
        ) from error
    return [name for name in ARCHITECTURES.names() if name not in before]


def _line(error: Exception, path: Path) -> int:
    """The last line of the plugin itself that the error went through."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno or 1
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return (frames[-1].lineno or 1) if frames else 1
