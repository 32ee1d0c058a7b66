"""A run on a stored reference that its own ranks have computed, by each of them or by one process alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafocal.model.head import causal_lm
from tests.engine.ragged_run import HELD_OUT, PAIRS, make
from tests.tiny import pairs


def cached_run(root: Path) -> dict[str, Any]:
    """Compute the store, train to the end; what this rank saw. The store is `root`/references."""
    settings = {"reference": "cached", "reference_store": str(root / "references")}
    made = make(root / "run", **settings)
    report = made.cache_reference()
    stored = made.stored.store.look_up([*pairs(PAIRS), *pairs(HELD_OUT, seed=2)])
    made.look_up_reference()
    counts = {"forwards": 0, "packs": 0}
    part_loss = made._part_loss

    def counted(*arguments: Any) -> Any:
        counts["packs"] += 1
        return part_loss(*arguments)

    def count(*_: Any) -> None:
        counts["forwards"] += made.model.training  # evaluation's are not counted

    made._part_loss = counted  # type: ignore[method-assign]
    causal_lm(made.model).base_model.register_forward_pre_hook(count)  # PEFT 0.18 calls its base past hooks
    made.train()
    return {
        "world": made.args.world_size,
        "computed": report.computed,
        "again": made.cache_reference().computed,
        "stored": [pair.reference for pair in stored],
        "logs": [line for line in made.state.log_history if "loss" in line or "eval_loss" in line],
        **counts,
    }
