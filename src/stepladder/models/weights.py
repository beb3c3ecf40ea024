"""Tensors in files: safetensors and nothing else, checked before memory is taken, loaded strictly.

No pickle is ever opened, whatever a file is called. A file's header must be bounded, plain JSON and describe exactly
the bytes that follow it, before a single tensor is allocated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from stepladder.core.errors import UserError
from stepladder.core.files import Corrupt, write_atomic
from stepladder.models.lm import LanguageModel

MAX_HEADER = 16 << 20
"""Bytes of a header: 100,000 tensors need about 10 MB."""


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write named tensors to ``path``, atomically. Equal tensors give equal bytes."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, save(plain))


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a safetensors file, on the CPU. Anything else, or a flawed one, is Corrupt."""
    path = Path(path)
    try:
        _check_header(path)
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise Corrupt(f"{path}: not a sound safetensors file ({error}); use another checkpoint") from None


def _check_header(path: Path) -> None:
    """Refuse a header that is too long, or one whose tensors do not fill the rest of the file exactly."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise Corrupt(
                f"{path}: not a safetensors file: its first 8 bytes announce a header of {length} bytes in a file of "
                f"{size}; only .safetensors files are read, never pickles"
            )
        try:
            header = json.loads(file.read(length))
            spans = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
            at = 0
            for start, end in spans:
                if start != at or end < start:
                    raise Corrupt(f"{path}: its tensors overlap or leave gaps; use another checkpoint")
                at = end
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise Corrupt(f"{path}: the header is not that of a safetensors file; use another checkpoint") from None
    if at != size - 8 - length:
        raise Corrupt(f"{path}: holds {size - 8 - length} bytes of tensors, not {at}; use another checkpoint")


def named_weights(model: LanguageModel) -> dict[str, Tensor]:
    """Parameters and buffers by name; a tensor that two modules share has the first name only."""
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    return {name: state[name] for name in first.values()}


def save_weights(model: LanguageModel, path: str | Path) -> None:
    """Write all weights of ``model`` to a safetensors file, shared ones once."""
    save_tensors(named_weights(model), path)


def load_weights(model: LanguageModel, path: str | Path, strict: bool = True) -> list[str]:
    """Copy the weights in ``path`` into ``model``, in place; returns what did not fit, one line each.

    Strict (the default): if any name is missing, extra, or of another shape or type, nothing is copied and a
    UserError lists them. Otherwise those are left as they were and the caller records the list.
    """
    wanted, given = named_weights(model), load_tensors(path)
    misfits = [f"missing {name} {_form(wanted[name])}" for name in wanted if name not in given]
    misfits += [f"extra {name} {_form(given[name])}" for name in given if name not in wanted]
    fits = [name for name in wanted if name in given]
    reshaped = [name for name in fits if _form(wanted[name]) != _form(given[name])]
    misfits += [f"reshaped {name}: file {_form(given[name])}, model {_form(wanted[name])}" for name in reshaped]
    if misfits and strict:
        shown = "; ".join(misfits[:12]) + (f"; and {len(misfits) - 12} more" if len(misfits) > 12 else "")
        raise UserError(f"{path} holds other weights than this model: {shown}; give the configuration they came from")
    with torch.no_grad():
        for name in fits:
            if name not in reshaped:
                wanted[name].copy_(given[name])
    return misfits


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters and buffers, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
