"""One measurement in a process of its own: `python worker.py MODULE '{...}'` prints its result as JSON, last line."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.util import find_spec

from harness import cpu_name, measured


def device_name(settings: dict) -> str:
    if settings.get("device") != "cuda":
        return cpu_name()
    import torch

    return torch.cuda.get_device_name()


def begin(settings: dict) -> None:
    """unsloth asks to be imported before what it changes, and is slower otherwise."""
    if settings.get("implementation") == "unsloth" and settings["device"] == "cuda" and find_spec("unsloth"):
        import_module("unsloth")


def main() -> None:
    module, settings = sys.argv[1], json.loads(sys.argv[2])
    begin(settings)
    print(json.dumps({"result": measured(module, settings), "device": device_name(settings)}))


if __name__ == "__main__":
    main()
