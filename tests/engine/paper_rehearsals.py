"""Every full-parameter recipe rehearsed in one launch: started by torchrun with a folder for the findings."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

from lorafocal import launch
from lorafocal.config import load_config
from lorafocal.rehearsal import rehearse

PAPER = Path(__file__).resolve().parents[2] / "configs/paper"


def main(out: Path, names: list[str]) -> None:
    for name in names:
        found = rehearse(load_config(PAPER / f"{name}.yaml", ["engine.kind=zero3"]), quiet=True)
        gc.collect()
        if found is not None:
            (out / f"{name}.json").write_text(json.dumps({"said": str(found), "made": found.made}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    launch.shutdown()
