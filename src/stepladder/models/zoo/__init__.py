"""The zoo: named architectures, one file each. A new file here is found by itself; nothing else is edited.

Installed packages add theirs by an entry point in the group ``stepladder.architectures``: ``name = "module:Spec"``.
"""

from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

from stepladder.models.spec import ARCHITECTURES, Spec, architecture, spec

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

for _entry in entry_points(group="stepladder.architectures"):
    ARCHITECTURES.lazy(_entry.name, _entry.value, extra=_entry.name)

__all__ = ["ARCHITECTURES", "Spec", "architecture", "spec"]
