"""Merging a LoRA adapter (r 16, all linear layers) into a sharded bfloat16 checkpoint: time, and memory of the host.

    python benchmarks/bench_merge.py [--model llama-3-8b] [--peers]

The checkpoint has random weights and is written shard by shard, its adapter beside it; both are deleted in the end (a
model of 8 billion parameters needs 32 GB of disk). What is measured begins with the check of the base's hash and ends
when the merged files are written; the gate, which computes log-probs, is not part of it.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness import OURS, Benchmark, Case, Result, options, run, session
from measuring import peak_gib
from shapes import SEED, config_of, lora_config

MOST_GIB = 6.0  # of host memory, for a model of 8 billion parameters
_BLOCK = 1 << 22  # random numbers that are drawn; larger tensors repeat them
_SHARD_BYTES = {"tiny": 4_000_000}


def measure(settings: dict[str, Any]) -> Result:
    """One merge of `settings["base"]` and `settings["adapter"]`, into a folder that is deleted."""
    base, adapter = Path(settings["base"]), Path(settings["adapter"])
    with tempfile.TemporaryDirectory(dir=base.parent) as out, _anonymous() as anonymous:
        start = time.perf_counter()
        MERGES[settings["how"]](base, adapter, Path(out), settings["dtype"])
        taken = time.perf_counter() - start
        written = _bytes(Path(out))
    read = _bytes(base)
    if settings["dtype"] == "bfloat16" and abs(written / read - 1) > 0.01:
        raise RuntimeError(f"{written} bytes were written of a base of {read}")
    return {
        "s": taken,
        "base GiB/s": read / 2**30 / taken,
        "peak GiB": peak_gib("cpu"),
        "peak GiB, anonymous": max(anonymous),
    }


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@contextmanager
def _anonymous() -> Iterator[list[float]]:
    """Samples of the memory that no file backs, in GiB, every 5 ms: the kernel keeps no maximum of it."""
    seen, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            seen.append(int(status.partition("RssAnon:")[2].split()[0]) / 2**20)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def _ours(base: Path, adapter: Path, out: Path, dtype: str) -> None:
    from lorafocal.model.saved import read_adapter
    from lorafocal.release.weights import write_merged

    written = write_merged(read_adapter(adapter, base=str(base)), out, dtype=dtype)
    if written.notes:
        raise RuntimeError(written.notes[0])


def _pefts(base: Path, adapter: Path, out: Path, dtype: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


MERGES = {"ours": _ours, "peft": _pefts}


@torch.no_grad()
def write_model(folder: Path, name: str) -> tuple[Path, Path]:
    """A base of random weights in `folder`/base, written tensor by tensor, and its adapter in `folder`/adapter."""
    from transformers import AutoModelForCausalLM

    from lorafocal.release.shards import MAX_SHARD_BYTES, ShardWriter, Stored

    base, config = folder / "base", config_of(name)
    base.mkdir()
    config.dtype, config.architectures = torch.bfloat16, ["LlamaForCausalLM"]
    config.save_pretrained(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plan = {key: Stored(tuple(tensor.shape), torch.bfloat16) for key, tensor in model.named_parameters()}
    torch.manual_seed(SEED)
    numbers = (0.02 * torch.randn(_BLOCK)).bfloat16()
    with ShardWriter(base, plan, _SHARD_BYTES.get(name, MAX_SHARD_BYTES)) as out:
        for key, stored in plan.items():
            values = numbers.repeat(-(-stored.bytes // numbers.nbytes))[: stored.bytes // 2]
            out.write(key, values.reshape(stored.shape))
    return base, _write_adapter(folder / "adapter", model, base)


def _write_adapter(folder: Path, model: Any, base: Path) -> Path:
    """As a run saves one: PEFT's files, and the lineage with the hash of its base."""
    from safetensors.torch import save_file

    from lorafocal.lineage import BaseIdentity, Lineage
    from lorafocal.model.adapters import linear_names
    from lorafocal.model.load import base_fingerprint

    config, tensors = lora_config(), {}
    config.target_modules = sorted({name.rpartition(".")[2] for name in linear_names(model)})
    for name in linear_names(model):
        layer = model.get_submodule(name)
        tensors[f"base_model.model.{name}.lora_A.weight"] = 0.02 * torch.randn(config.r, layer.in_features)
        tensors[f"base_model.model.{name}.lora_B.weight"] = 0.002 * torch.randn(layer.out_features, config.r)
    folder.mkdir()
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors")
    Lineage.untrained(BaseIdentity(**base_fingerprint(str(base)))).write(folder)  # type: ignore[arg-type]
    return folder


def main(words: Sequence[str] | None = None) -> None:
    parser = options(argparse.ArgumentParser(description="a merge's time and memory"))
    parser.add_argument("--model", default="tiny", help="a name of shapes.py")
    parser.add_argument(
        "--folder", type=Path, help="where the model is written; the system's temporary folder if absent"
    )
    parser.add_argument("--peers", action="store_true", help="PEFT's merge too, which needs memory for the whole model")
    given = parser.parse_args(words)
    name = "tiny" if given.dry_run else given.model
    at = session(given)
    folder = Path(tempfile.mkdtemp(prefix="lorafocal-merge-", dir=given.folder))
    try:
        base, adapter = write_model(folder, name)
        common = {"base": str(base), "adapter": str(adapter), "dtype": "bfloat16"}
        cases = [Case(OURS, "tensor by tensor, base checked", {**common, "how": "ours"})]
        if given.peers or given.dry_run:
            cases.append(Case("peft", "merge_and_unload", {**common, "how": "peft"}))
        columns = {"model": name, "dtype": "bfloat16"}
        run(Benchmark("bench_merge", columns, {"s": -1, "peak GiB": -1}, _check_memory), cases, at, name="merge")
    finally:
        shutil.rmtree(folder)


def _check_memory(results: Sequence[Result]) -> None:
    """Ours comes first."""
    if results and results[0]["peak GiB"] > MOST_GIB:
        raise SystemExit(f"bench_merge: {results[0]['peak GiB']:.2f} GiB of host memory, more than {MOST_GIB:g}")


if __name__ == "__main__":
    main()
