"""Two processes of which one runs out of memory inside a step: started by torchrun."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from lorafocal import comparison, launch
from lorafocal.errors import InputError
from tests import tiny

if __name__ == "__main__":
    run = tiny.trainer(Path(sys.argv[1]), tiny.pairs(16), pairs_per_step=16, tokens_per_pack=60)
    calls: list[Any] = []
    token_logps = comparison.token_logps

    def runs_out(model: Any, pack: Any, *more: Any) -> Any:
        calls.append(pack)
        if launch.rank() == 1 and len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return token_logps(model, pack, *more)

    comparison.token_logps = runs_out
    try:
        run.train()
    except InputError as error:
        print(f"rank {launch.rank()}: {error}", flush=True)
        sys.exit(2)
