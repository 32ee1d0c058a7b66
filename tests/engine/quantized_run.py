"""Runs on quantised bases whose steps are uneven over two processes: in each of them, or in one alone."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from lorafocal import launch
from lorafocal.model.load import load_base
from lorafocal.publish import sha256
from tests.engine.ragged_run import Record
from tests.tiny import lora, pairs, trainer

BASES = ("nf4", "int8")
PAIRS, PAIRS_PER_STEP = 17, 8  # three steps; the last one has one pair, so a rank has none


def quantized_run(root: Path, word: str) -> None:
    """An epoch with a fresh adapter at weights that hardly move; what this rank saw, in `root`.

    The base is that of the folder `root`/base. Rank 0 writes the gradients of every step.
    """
    folder, name = root / word, f"{word}-{launch.rank()}"
    model = load_base(str(root / "base"), dtype="float32", quantization=word)
    settings = {"pairs_per_step": PAIRS_PER_STEP, "num_train_epochs": 1, "max_steps": -1, "tokens_per_pack": 40}
    small = {"learning_rate": 1e-6, "max_grad_norm": 0.0}
    made = trainer(folder, pairs(PAIRS), model=model, peft_config=lora(), **settings, **small)
    bases = [_written(made.model, root / f"{name}-before.safetensors")]
    seen = Record(made)
    made.add_callback(seen)
    made.train()
    bases.append(_written(made.model, root / f"{name}-after.safetensors"))
    losses = [line["loss"] for line in made.state.log_history if "loss" in line]
    result = {"world": made.args.world_size, "engine": seen.engine, "losses": losses, "bases": bases}
    (root / f"{name}.json").write_text(json.dumps(result))
    if launch.is_main():
        save_file(seen.gradients, root / f"{word}.safetensors")


def _written(model, file: Path) -> str:  # type: ignore[no-untyped-def]
    """Digest of the base's tensors, its quantisation scales included."""
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items() if ".lora_" not in k}, file)
    return sha256(file)
