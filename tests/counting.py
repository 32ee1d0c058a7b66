"""What a computation really did, seen operator by operator: multiplications, allocations, waits for the device.

Torch's own `FlopCounterMode` misses products that add into memory which is there (`addmm_`, `baddbmm_`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# Operators whose result depends on what lies in the device's memory: the host must wait for it.
WAITING = (
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten._unique2,
    aten.unique_consecutive,
)


def _product(left: Tensor, right: Tensor) -> int:
    """(..., M, K) by (..., K, N)."""
    return 2 * left.numel() * right.shape[-1]


def _attention(query: Tensor, key: Tensor, value: Tensor, causal: bool, products: tuple[int, int]) -> int:
    """Products over the widths of keys and of values, at the query-key pairs that the kernel computes."""
    *heads, queries, width = query.shape
    keys = key.shape[-2]
    pairs = queries * (queries + 1) // 2 if causal else queries * keys
    return 2 * prod(heads) * pairs * (products[0] * width + products[1] * value.shape[-1])


def _attention_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> int:
    causal = options.get("is_causal", rest[1] if len(rest) > 1 else False)
    return _attention(query, key, value, causal, (1, 1))


def _attention_backward(upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **_: Any) -> int:
    """The scores again, and the gradients of queries and keys; of the weights and of values."""
    causal = rest[3]
    return _attention(query, key, value, causal, (3, 2))


FORMULAS: dict[Any, Callable[..., int]] = {
    aten.mm: lambda left, right, *_, **__: _product(left, right),
    aten.bmm: lambda left, right, *_, **__: _product(left, right),
    aten.addmm: lambda _, left, right, *__, **___: _product(left, right),
    aten.addmm_: lambda _, left, right, *__, **___: _product(left, right),
    aten.baddbmm: lambda _, left, right, *__, **___: _product(left, right),
    aten.baddbmm_: lambda _, left, right, *__, **___: _product(left, right),
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Counter(TorchDispatchMode):
    """Within, counts operations (2 a multiplication and addition) and keeps an eye on every allocation.

    `waits` are the names of operators that waited; `largest(width)` is the most entries of any tensor with a dimension
    of that size, but for those that were there before; `live_bytes` is what of the allocations is still held.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.waits: list[str] = []
        self.shapes: set[tuple[int, ...]] = set()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        out = func(*args, **options)
        packet = func.overloadpacket
        if packet in FORMULAS:
            self.flops += FORMULAS[packet](*args, **options)
        if packet in WAITING:
            self.waits.append(str(func))
        given = {_storage(t) for t in _tensors([*args, *options.values()])}
        for tensor in _tensors([out]):
            if _storage(tensor) not in given:
                self.shapes.add(tuple(tensor.shape))
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if len(self._storages) > 4096:
            self._forget()
        return out

    def largest(self, width: int) -> int:
        return max((prod(shape) for shape in self.shapes if width in shape), default=0)

    @property
    def live_bytes(self) -> int:
        self._forget()
        return sum(size for _, size in self._storages.values())

    def _forget(self) -> None:
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found
