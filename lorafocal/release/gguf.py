"""GGUF by llama.cpp's own `convert_hf_to_gguf.py`, where the user has it: run as it is, its output checked."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lorafocal.errors import InputError
from lorafocal.model.saved import read_config

LOSSLESS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
OUTTYPES = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto")  # the converter's, November 2026
_HEADER = struct.Struct("<4sIQQ")  # magic, version, tensors, metadata entries
_VERSIONS = (2, 3)


@dataclass(frozen=True, slots=True)
class Converted:
    """A GGUF file that the converter wrote: its name, what it stores, and how many tensors its header counts."""

    name: str
    outtype: str
    tensors: int

    def as_dict(self) -> dict[str, str | int]:
        return {"file": self.name, "outtype": self.outtype, "tensors": self.tensors}


def check_converter(converter: Path | None, outtype: str | None) -> Path:
    """The converter's path. Raises InputError where it is not given, no file, or does not know `outtype`."""
    if converter is None:
        raise InputError(
            "--as gguf needs --converter FILE: the convert_hf_to_gguf.py of a checkout of llama.cpp, with what its"
            " requirements file asks for installed beside lorafocal"
        )
    if not converter.is_file() or converter.suffix != ".py":
        raise InputError(f"--converter {converter}: there is no such script; name the convert_hf_to_gguf.py itself")
    if outtype is not None and outtype not in OUTTYPES:
        raise InputError(f"--outtype {outtype!r}: choose one of {', '.join(OUTTYPES)}")
    return converter


def convert(merged: Path, folder: Path, converter: Path, *, name: str, dtype: str, outtype: str | None) -> Converted:
    """Run the converter on the model in `merged`; `folder` gets `name`-`outtype`.gguf.

    `outtype` is by default the one that holds `dtype` exactly. The converter is another program: it gets one model
    folder, a name for the model that is not this folder's, and no network.

    Raises InputError with its last words where it fails, writes nothing, or something that is no GGUF.
    """
    outtype = outtype or LOSSLESS[dtype]
    target = folder / f"{name}-{outtype}.gguf"
    command = [sys.executable, str(converter.resolve()), str(merged.resolve())]  # it runs elsewhere
    command += ["--outfile", str(target.resolve()), "--outtype", outtype, "--model-name", name]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(command, env=offline, cwd=merged, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise InputError(
            f"--converter {converter} failed (exit code {done.returncode}): {_last_words(done.stderr or done.stdout)}"
        )
    tensors = tensor_count(target, converter)
    layers = read_config(str(merged)).get_text_config().num_hidden_layers
    if not layers <= tensors <= target.stat().st_size:
        raise InputError(f"--converter {converter} wrote a GGUF of {tensors} tensors for {layers} layers: look at it")
    return Converted(target.name, outtype, tensors)


def tensor_count(path: Path, converter: Path) -> int:
    """How many tensors a GGUF file says it holds. Raises InputError, naming the converter, where it is none."""
    header = b""
    if path.is_file():
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise InputError(f"--converter {converter} said that all went well, but wrote no {path.name}: look at it")
    magic, version, tensors, _ = _HEADER.unpack(header)
    if magic != b"GGUF" or version not in _VERSIONS:
        raise InputError(f"--converter {converter} wrote something that is no GGUF of version 2 or 3: look at it")
    return int(tensors)


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(line[:200] for line in lines[-3:]) or "it said nothing"
