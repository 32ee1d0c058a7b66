"""GPUs that people train on: memory as the card reports it, dense bf16 peak, bandwidths, each with its source.

The peak is that of matrix products of bf16 inputs with fp32 sums, without sparsity (makers like to print twice that).
Nothing is asked of the machine: `parse` reads what a person wrote.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from lorafocal.errors import InputError


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card. `memory_mib` is the total of nvidia-smi (rocm-smi); speeds are None for a bare amount of memory.

    `link_gb_s` is what it sends to the other cards of its machine while it receives as much: half of what is printed.
    """

    name: str
    memory_mib: int
    bf16_tflops: float | None
    bandwidth_gb_s: float | None
    link_gb_s: float | None
    source: str

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib * 2**20


@dataclass(frozen=True, slots=True)
class Machine:
    """Some cards of one kind: up to 8 in one machine, more in several of 8."""

    count: int
    gpu: Gpu

    @property
    def link_gb_s(self) -> float | None:
        """What a card sends to the others: between machines, what a network of NETWORK_GB_S a card lets through."""
        if self.gpu.link_gb_s is None or self.count <= IN_ONE_MACHINE:
            return self.gpu.link_gb_s
        return min(self.gpu.link_gb_s, NETWORK_GB_S)

    def __str__(self) -> str:
        return f"{self.count}x{self.gpu.name}"


IN_ONE_MACHINE = 8
NETWORK_GB_S = 25  # InfiniBand of 200 Gbit/s a card, as in DGX A100
PCIE_4, PCIE_5 = 32, 64  # 16 lanes, one way

_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper"
_ADA = "NVIDIA Ada GPU Architecture whitepaper"
_GB202 = "NVIDIA RTX Blackwell GPU Architecture whitepaper"

GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("RTX3080", 10240, 59.5, 760, PCIE_4, _GA102),
        Gpu("RTX3090", 24576, 71, 936, PCIE_4, _GA102),
        Gpu("RTX4080", 16376, 97.5, 717, PCIE_4, _ADA),
        Gpu("RTX4090", 24564, 165.2, 1008, PCIE_4, _ADA),
        Gpu("RTX5080", 16303, 112.6, 960, PCIE_5, _GB202),
        Gpu("RTX5090", 32607, 209.5, 1792, PCIE_5, _GB202),
        Gpu("RTX-A6000", 49140, 154.8, 768, PCIE_4, "NVIDIA RTX A6000 data sheet; half of its sparse peak of 309.7"),
        Gpu(
            "RTX-6000-Ada",
            49140,
            364.2,
            960,
            PCIE_4,
            "NVIDIA RTX 6000 Ada data sheet; half of its sparse peak of 728.5",
        ),
        Gpu("A10", 23028, 125, 600, PCIE_4, "NVIDIA A10 data sheet"),
        Gpu("A30", 24576, 165, 933, PCIE_4, "NVIDIA A30 data sheet"),
        Gpu("A40", 46068, 149.7, 696, PCIE_4, "NVIDIA A40 data sheet"),
        Gpu("L4", 23034, 121, 300, PCIE_4, "NVIDIA L4 data sheet; half of its sparse peak of 242"),
        Gpu("L40S", 46068, 362.05, 864, PCIE_4, "NVIDIA L40S data sheet"),
        Gpu("A100-40", 40960, 312, 1555, 300, "NVIDIA A100 data sheet, SXM, 40 GB"),
        Gpu("A100-80", 81920, 312, 2039, 300, "NVIDIA A100 data sheet, SXM, 80 GB"),
        Gpu("H100", 81559, 989.4, 3350, 450, "NVIDIA H100 data sheet, SXM; half of its sparse peak of 1979"),
        Gpu("H100-PCIe", 81559, 756, 2000, PCIE_5, "NVIDIA H100 data sheet, PCIe; half of its sparse peak of 1513"),
        Gpu("H200", 143771, 989.4, 4800, 450, "NVIDIA H200 data sheet, SXM; half of its sparse peak of 1979"),
        Gpu("B200", 183359, 2250, 7700, 900, "NVIDIA DGX B200 data sheet; half of its sparse peak of 4500"),
        Gpu("MI300X", 196592, 1307.4, 5300, 448, "AMD Instinct MI300X data sheet"),
    )
}

_WITHOUT_BF16 = re.compile(r"(TESLA)?(T4|V100.*|P100.*)|(RTX)?20[678]0.*|(GTX)?10[678]0.*")
_FORMS = re.compile(r"(?:(?P<count>\d+)\s*[x*]\s*)?(?P<name>.+)", re.IGNORECASE)
_AMOUNT = re.compile(r"(?P<size>\d+(?:\.\d+)?)(?P<unit>GIB|GB)")
_TRIMMINGS = re.compile(r"NVIDIA|AMD|GEFORCE|INSTINCT|TESLA|GENERATION|SXM\d?|HBM\d?E?|(?<=\d)GB")


def parse(text: str) -> Machine:
    """`1xRTX4090`, `8xA100-40`, `H100` (one), or `1x24GiB` for a card of which only the memory is known.

    Spaces, dashes, case and the maker's name do not matter. Raises InputError with the nearest names.
    """
    form = _FORMS.fullmatch(text.strip())
    count = int(form["count"] or 1) if form else 0
    if form is None or count < 1:
        raise InputError(f"--gpus: {text!r} names no GPU; write a number and a name, such as 1xRTX4090 or 8xA100-40")
    return Machine(count, _card(form["name"]))


def _card(name: str) -> Gpu:
    if amount := _AMOUNT.fullmatch(name.replace(" ", "").upper()):
        mib = float(amount["size"]) * (1024 if amount["unit"] == "GIB" else 1e9 / 2**20)
        return Gpu(f"{amount['size']} {amount['unit'].replace('I', 'i')}", round(mib), None, None, None, "as given")
    plain = _plain(name)
    if _WITHOUT_BF16.fullmatch(plain):
        raise InputError(
            f"--gpus: {name} has no bf16 matrix units, and float16 overflows in preference losses: take a card of"
            " compute capability 8.0 or later (RTX 30 series, A10, L4 and newer)"
        )
    found = [gpu for gpu in GPUS.values() if plain in _spellings(gpu)]
    if found:
        return next((gpu for gpu in found if plain == _plain(gpu.name)), found[0])
    several = [gpu.name for gpu in GPUS.values() if plain and _plain(gpu.name).startswith(plain)]
    near = several or _nearest(plain)
    raise InputError(
        f"--gpus: {name!r} is {'more than one card' if len(several) > 1 else 'no card of the table'}"
        f"{f': did you mean {_either(near)}?' if near else '.'} It has {', '.join(GPUS)}. For any other card write its"
        " memory, such as 1x24GiB, and with --tflops what it computes"
    )


def _spellings(gpu: Gpu) -> set[str]:
    """What `_plain` makes of the ways to write a card's name, drivers' own among them."""
    key, size = _plain(gpu.name), str(round(gpu.memory_mib / 1024))
    return {key, key + size, key + "PCIE", key.removeprefix("RTX"), key.removesuffix(size) + "PCIE" + size}


def _plain(name: str) -> str:
    return _TRIMMINGS.sub("", re.sub(r"[\s_-]", "", name.upper()))


def _nearest(plain: str) -> list[str]:
    keys = {_plain(gpu.name): gpu.name for gpu in GPUS.values()}
    return [keys[key] for key in difflib.get_close_matches(plain, keys, n=3, cutoff=0.5)]


def _either(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
