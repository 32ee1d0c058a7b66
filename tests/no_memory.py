"""What a device without memory says: torch's allocator, and cuBLAS, which asks the driver for its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import pytest
import torch

NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
)


def lacking(error: RuntimeError) -> Callable[..., NoReturn]:
    """What a function does on such a device."""

    def lacks(*_: object, **__: object) -> NoReturn:
        raise error

    return lacks


whoever_says_it = pytest.mark.parametrize("error", NO_MEMORY, ids=["torch", "cublas"])
