"""Evaluation: one decoder, and suites that turn a trained model into records and results without changing it.

One file for every suite; a new file here is found by itself and registers its suite.
"""

from importlib import import_module
from pkgutil import iter_modules

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
