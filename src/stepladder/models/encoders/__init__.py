"""Image encoders: what turns an image into the embeddings that stand at its positions, one file each."""

from importlib import import_module
from pkgutil import iter_modules

from stepladder.models.encoders.base import ENCODERS, Encoder, EncoderSpec, encoder

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

__all__ = ["ENCODERS", "Encoder", "EncoderSpec", "encoder"]
