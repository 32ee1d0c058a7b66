"""Tensors in safetensors files: how they are called, read whole, compared by name, shape, dtype, value, both ways."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lorafocal.errors import InputError

PEFT_PREFIX = "base_model.model."  # before a module's own name, in a policy and in an adapter's file
WAY_OUT = (
    "The checkpoint belongs to another model, adapter configuration or library version: "
    "resume with what it was saved with, or start a new run under another name."
)


def dtype_word(dtype: torch.dtype) -> str:
    """As configs, manifests and messages say it: bfloat16."""
    return str(dtype).removeprefix("torch.")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file. Raises InputError where it cannot be read."""
    try:
        return load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file} is damaged: {error}. Copy it again from where it was written.") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror or error})") from error


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hexadecimal sha256 over names, dtypes, shapes and bits, whatever the device and the order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_saved(file: Path, expected: Mapping[str, Tensor], *, trained: bool = False) -> None:
    """Reopens a written safetensors file and refuses it (`InputError`) unless it holds exactly `expected`.

    Each tensor must be there with its shape and dtype, not empty, finite and equal, and nothing else may be.
    With `trained` (a step with a learning rate above 0 was taken), the `lora_B` tensors must not all be zero.
    A file that fails must not be published: the checkpoint before it stays the newest.
    """
    if not expected:
        raise InputError(f"{file.name}: nothing to save: no trainable tensor was gathered")
    with safe_open(file, framework="pt") as saved:
        check_keys(saved.keys(), expected, file.name)
        for name, tensor in expected.items():
            where = f"{file.name}: {name!r}"
            if tensor.numel() == 0:
                raise InputError(f"{where} is empty: gather the partitioned parameters before saving")
            found = saved.get_tensor(name)
            check_like(found, tensor, where)
            if found.is_floating_point() and not found.isfinite().all():
                raise InputError(f"{where} holds NaN or infinity: not saved, the last checkpoint is kept")
            if not torch.equal(found, tensor.detach().cpu()):
                raise InputError(f"{where} read back differs from what was written: check the disk")
    lora_b = [tensor for name, tensor in expected.items() if "lora_B" in name]
    if trained and lora_b and not any(tensor.any() for tensor in lora_b):
        raise InputError(f"{file.name}: every lora_B is zero after training: the adapter holds nothing")


def check_keys(found: Iterable[str], expected: Iterable[str], where: str) -> None:
    found, expected = set(found), set(expected)
    problems = [f"missing {key!r}" for key in sorted(expected - found)]
    problems += [f"unexpected {key!r}" for key in sorted(found - expected)]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise InputError(f"{where}: {', '.join(problems[:8])}{more}. {WAY_OUT}")


def check_like(found: Tensor, expected: Tensor, where: str) -> None:
    if found.shape != expected.shape:
        raise InputError(differs(where, found.shape, expected.shape))
    if found.dtype != expected.dtype:
        raise InputError(f"{where} is {found.dtype}, expected {expected.dtype}. {WAY_OUT}")


def differs(where: str, found: torch.Size, expected: torch.Size) -> str:
    return f"{where} has shape {tuple(found)}, expected {tuple(expected)}. {WAY_OUT}"
