"""The synthetic tasks, one file each. A new file here is found by itself and registers its task in ``TASKS``."""

from importlib import import_module
from pkgutil import iter_modules

from stepladder.data.base import TASKS

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

__all__ = ["TASKS"]
