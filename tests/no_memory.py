"""What a device without memory says: torch's allocator, and libraries and kernels that ask the driver themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import pytest
import torch

NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported later"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
)


def lacking(error: RuntimeError) -> Callable[..., NoReturn]:
    """What a function does on such a device."""

    def lacks(*_: object, **__: object) -> NoReturn:
        raise error

    return lacks


whoever_says_it = pytest.mark.parametrize("error", NO_MEMORY, ids=["torch", "cublas", "driver", "triton"])
