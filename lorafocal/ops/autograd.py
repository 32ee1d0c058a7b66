"""What the forwards and backwards of autograd functions have in common, as decorators."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_Method = TypeVar("_Method", bound=Callable[..., Any])


def first_order(method: _Method) -> _Method:
    """A backward that refuses to be differentiated, also where no incoming gradient asks for it: what is kept has no
    graph, so a second derivative would lack terms without a word."""
    plain = once_differentiable(method)

    @wraps(method)
    def first(ctx: Any, *upstream: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "log-prob heads, fused functions and attention in packs have no second derivative, which"
                " `create_graph=True` asks for: compute it from the logits of a model with eager attention, outside"
                " packs and after `lorafocal.model.fused.unfuse(policy)`"
            )
        return plain(ctx, *upstream)

    return cast(_Method, first)


def own_outputs(method: _Method) -> _Method:
    """A forward that gives tensors of its own to a compiler.

    Dynamo of torch 2.11 returns every step of a forward beside its outputs, and an output that is also a step (`y` and
    `y.addmm_(...)`, `y` and `y.to` its own dtype) then loses its gradient to it without a word.
    """

    def own(*given: Any) -> Any:
        found = method(*given)
        if not torch.compiler.is_compiling():
            return found
        return found.view_as(found) if isinstance(found, Tensor) else tuple(y.view_as(y) for y in found)

    return cast(_Method, own)


def without_autocast(method: _Method) -> _Method:
    """A function's forward or backward in the dtypes it is given, whatever autocast it is called under.

    Its parameters are not told apart: torch.compile counts them to find out whether `ctx` is among them, and variable
    ones mislead it.
    """

    def plain(*given: Any) -> Any:
        with torch.autocast(given[1].device.type, enabled=False):
            return method(*given)

    return cast(_Method, plain)
