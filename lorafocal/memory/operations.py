"""Floating-point operations of a pair."""

from __future__ import annotations

from lorafocal.memory.activations import trains_head
from lorafocal.memory.residents import low_rank_tensors
from lorafocal.memory.setup import Lengths, Setup
from lorafocal.memory.shape import Shape


def flops_per_pair(
    shape: Shape,
    setup: Setup,
    lengths: Lengths | None = None,
    *,
    tier: str = "none",
    live_reference: bool | None = None,
    shared: bool = True,
) -> float:
    """Operations (a product and its sum are 2) of one pair's training step, for `lengths` or the setup's.

    Through frozen matrices of N entries, 2N a row forward and 2N backward; trained ones and adapters 4N backward;
    attention 4 a visible pair, head and dimension, two and a half times that backward; the head 4HV a completion token,
    8HV where it is trained, whose logits are computed again for the gradient of its weights.
    Divergences take one product with the head more: for the second gradient, or where the head is trained for the
    reference's logits again (its own pass leaves their first time to the policy's).
    `shared`: the prompt is computed once, not once an answer. `live_reference` adds a forward without adapters (by
    default one for each reference and guide that the setup says).
    """
    at = lengths or setup.lengths
    live = setup.reference_passes if live_reference is None else int(live_reference)
    rows, seen = at.rows, at.visible(shape.sliding_window)
    if not shared:
        alone = Lengths(at.prompt, 0, 0)
        rows, seen = rows + at.prompt, seen + alone.visible(shape.sliding_window)
    base = 2 * shape.linear_parameters * rows
    attention = 4 * shape.query_size * seen * shape.layers
    adapters = 2 * sum(low_rank_tensors(shape, setup)) * rows
    linears = (named for layer in range(shape.layers) for named in shape.layer_linears(layer))
    of_whole_weights = 2 * sum(linear.entries for name, linear in linears if setup.saves(name)) * rows
    head = 2 * shape.head_parameters * at.answers
    head_passes = (4 if trains_head(shape, setup) else 2) + setup.divergences
    total = 2 * base + of_whole_weights + 3 * adapters + 3.5 * attention + head_passes * head
    if tier == "full":
        total += base + adapters + attention
    elif tier == "mlp":
        again = sum(linear.entries for linear in shape.linears if linear.reads == "hidden")
        total += 2 * shape.layers * again * rows
    return total + live * (base + attention + head)


def minimum_flops_per_pair(shape: Shape, setup: Setup, lengths: Lengths | None = None) -> float:
    """The least that the exact result needs: the prompt once, nothing computed again, no reference forward."""
    return flops_per_pair(shape, setup, lengths, live_reference=False)
