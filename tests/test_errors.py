"""Errors that are nobody's bug are told apart by one rule each."""

from __future__ import annotations

from pathlib import Path

import lorafocal
from lorafocal.errors import ran_out
from tests.no_memory import whoever_says_it


@whoever_says_it
def test_a_device_without_memory_is_known_whoever_says_it(error: RuntimeError) -> None:
    assert ran_out(error)


def test_another_error_of_a_device_is_none_of_memory() -> None:
    assert not ran_out(RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm`"))
    assert not ran_out(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not ran_out(MemoryError())


def test_no_other_file_has_a_rule_of_its_own() -> None:
    """One that knows torch's error alone takes cuBLAS's for another fault: of weights, of a kernel, of a model."""
    package = Path(lorafocal.__file__).parent
    named = [file.name for file in package.rglob("*.py") if "OutOfMemoryError" in file.read_text(encoding="utf-8")]
    assert named == ["errors.py"]
