"""GPUs by the names that people and drivers write, and what is said about the others."""

from __future__ import annotations

import pytest

from lorafocal.errors import InputError
from lorafocal.hardware import GPUS, parse


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("1xRTX4090", "1xRTX4090"),
        ("8xA100-40", "8xA100-40"),
        ("2 x rtx 3090", "2xRTX3090"),
        ("h100", "1xH100"),
        ("4090", "1xRTX4090"),
        ("NVIDIA GeForce RTX 4090", "1xRTX4090"),
        ("NVIDIA A100-SXM4-40GB", "1xA100-40"),
        ("NVIDIA A100 80GB PCIe", "1xA100-80"),
        ("NVIDIA H100 80GB HBM3", "1xH100"),
        ("NVIDIA H100 PCIe", "1xH100-PCIe"),
        ("NVIDIA RTX 6000 Ada Generation", "1xRTX-6000-Ada"),
        ("AMD Instinct MI300X", "1xMI300X"),
        ("4x24GiB", "4x24 GiB"),
    ],
)
def test_names_are_read_as_people_and_drivers_write_them(written: str, read: str) -> None:
    assert str(parse(written)) == read


@pytest.mark.parametrize("name", GPUS)
def test_each_card_is_found_by_its_own_name_and_is_plausible(name: str) -> None:
    gpu = parse(name).gpu
    assert gpu is GPUS[name]
    assert 8 * 2**30 < gpu.memory_bytes < 300e9
    assert gpu.source
    # All of them multiply 60 to 420 times for each byte they read: a sparse peak, or GB for GiB, would stand out.
    assert 60 < gpu.bf16_tflops * 1e12 / (gpu.bandwidth_gb_s * 1e9) < 430
    assert 32 <= gpu.link_gb_s < gpu.bandwidth_gb_s / 4  # one way; makers print both together


def test_more_cards_than_a_machine_holds_send_over_a_network() -> None:
    assert [parse(f"{count}xA100-40").link_gb_s for count in (1, 8, 9)] == [300, 300, 25]
    assert parse("16x24GiB").link_gb_s is None


def test_a_card_of_known_memory_alone_is_taken_in_either_unit() -> None:
    assert parse("1x24GiB").gpu.memory_bytes == 24 * 2**30
    assert parse("1x24GB").gpu.memory_bytes == pytest.approx(24e9, rel=1e-4)
    assert parse("1x24GB").gpu.bf16_tflops is None


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("1xA100", "did you mean A100-40 or A100-80?"),
        ("1xRTX4091", "did you mean RTX4090"),
        ("1xbanana", "It has RTX3080"),
        ("T4", "no bf16 matrix units"),
        ("RTX 2080 Ti", "no bf16 matrix units"),
        ("0xH100", "names no GPU"),
        ("", "names no GPU"),
    ],
)
def test_other_names_are_refused_with_the_way_out(written: str, said: str) -> None:
    with pytest.raises(InputError, match="--gpus: ") as error:
        parse(written)
    assert said in str(error.value)
