#!/usr/bin/env python3
"""Check a release bundle: `python verify.py [FOLDER] [--digest SHA256] [--dtype float32|bfloat16|float16]`.

Needs torch and transformers, nothing else, and no network. FOLDER is the bundle, by default the folder of this file.

1. Every file is compared with manifest.json: none missing, altered or extra. The sha256 of manifest.json, which stands
   for the whole bundle, is printed, and compared with --digest where that is given.
2. merged/ is loaded with AutoModelForCausalLM, and the log-prob of both answers of each held-out pair (pairs.jsonl,
   token ids) is computed again, one sequence at a time.
3. The gate: these may differ from the log-probs that the live adapter gave (gate.json) by a share of what it learned.

What this shows: the weights in merged/ do what gate.json says that the adapter did. What it cannot show: that gate.json
and pairs.jsonl are honest, or that the model is good. Whoever can change the weights can change manifest.json,
gate.json and this file too: compare the digest with the one that the publisher announced elsewhere, and run a verify.py
that you trust (a copy comes with lorafocal: `python -m lorafocal.release.verify FOLDER`).

Exit code 0: all of it holds. 1: something does not. 3: the files are whole, but pairs.jsonl was not published, so the
gate was not run again.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NOISE = 1e-6  # two float32 ways to one log-prob differ by this share of it: below, nothing can be told apart
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PAIRS = "pairs.jsonl"  # the publisher's data: the one file that may be held back
OF_A_COPY = (".gitattributes", ".git/", ".cache/huggingface/")  # what a hub or git adds, and nothing here reads
EXECUTABLE = (".py", ".bin", ".pt", ".pth", ".pkl", ".ckpt")  # code, or weights that run code when they are loaded
UNREADABLE = (LookupError, TypeError, AttributeError, ValueError, OSError, RuntimeError)  # papers of another make


class Refused(Exception):
    """What does not hold, for a person."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--digest", help="the announced sha256 of manifest.json")
    parser.add_argument("--dtype", choices=tuple(BYTES), help="to compute in; default: the gate's")
    asked = parser.parse_args(arguments)
    try:
        files = check_files(asked.folder, asked.digest)
        if PAIRS not in files:
            print(f"gate                  NOT RUN: {PAIRS} was not published, so only the files were checked")
            return 3
        return run_gate(asked.folder, asked.dtype)
    except Refused as reason:
        print(f"FAILED                {reason}")
    except UNREADABLE as error:
        print(f"FAILED                this cannot be checked ({type(error).__name__}: {error})")
    return 1


def check_files(folder: Path, digest: str | None) -> set[str]:
    """Refuse a bundle with a file that is missing, altered or extra; the files that are there."""
    listed = {name: entry["sha256"] for name, entry in read_json(folder / "manifest.json")["files"].items()}
    found = {at.relative_to(folder).as_posix() for at in folder.rglob("*") if at.is_symlink() or not at.is_dir()}
    found = {name for name in found if not name.startswith(OF_A_COPY)} - {"manifest.json"}
    for name in sorted(listed.keys() - found - {PAIRS}):
        raise Refused(f"{name} is missing")
    for name in sorted(found - listed.keys()):
        raise Refused(f"{name} is not in manifest.json")
    for name in sorted(found):
        if sha256(folder / name) != listed[name]:
            raise Refused(f"{name} was altered: its sha256 is not that of manifest.json")
        if name.startswith("merged/") and (name.endswith(EXECUTABLE) or name == "merged/adapter_config.json"):
            raise Refused(f"{name} may not be part of a merged model")
    index = folder / "merged" / "model.safetensors.index.json"
    for shard in set(read_json(index)["weight_map"].values()) if index.exists() else ():
        if f"merged/{shard}" not in found:
            raise Refused(f"{index.name} leads to {shard}, which is not a file of merged/")
    own = sha256(folder / "manifest.json")
    print(f"files                 {len(found)} as manifest.json says; none missing, altered or extra")
    print(f"digest of the bundle  {own}")
    if digest is not None and own != digest.strip().lower():
        raise Refused("the digest is not the one that was announced: this is another bundle")
    print("  announced           " + ("the same" if digest else "not given: compare it yourself, or say --digest"))
    return found


def run_gate(folder: Path, dtype: str | None) -> int:
    """Compute every log-prob again, and hold them against gate.json by its own rule; the exit code."""
    gate = read_json(folder / "gate.json")
    rows = [json.loads(line) for line in (folder / PAIRS).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows or len(rows) != len(gate["logps"]):
        raise Refused(f"{PAIRS} has {len(rows)} pairs, gate.json {len(gate['logps'])}")
    live, reference, recorded = (
        [value for pair in gate["logps"] for value in pair[who]] for who in ("live", "reference", "merged")
    )
    if not 0 < gate["max_drift"] < 1:
        raise Refused(f"gate.json allows a drift of {gate['max_drift']} of the learned effect, which is no gate")
    model = load(folder / "merged", *place(folder, gate, dtype))
    sides = [(row, side) for row in rows for side in ("chosen", "rejected")]
    found = [logp(model, row["prompt_ids"], row[f"{side}_ids"], row.get(f"{side}_turns")) for row, side in sides]

    learned, drift = rms(differences(live, reference)), rms(differences(found, live))
    limit = gate["max_drift"] * learned + NOISE * rms(live)
    before, after = margins(live, reference), margins(found, reference)
    flips = sum((a > 0) - (a < 0) != (b > 0) - (b < 0) for a, b in zip(before, after, strict=True))
    share = f"{drift / learned:.2%} of the learned effect" if learned else "no learned effect to compare with"
    apart = max(map(abs, differences(found, recorded)))
    print(f"pairs                 {len(rows)}")
    print(f"learned effect        {learned:.4g} nats a sequence (rms of adapter - base)")
    print(f"drift of the merge    {drift:.3g} nats a sequence = {share}")
    print(f"  allowed             {limit:.3g} nats ({gate['max_drift']:.0%} of the learned effect)")
    print(f"right rankings        {sum(m > 0 for m in before)} of {len(rows)} live, {sum(m > 0 for m in after)} merged")
    print(f"rank flips            {flips}")
    print(f"from what was stated  {apart:.3g} nats at most (gate.json, computed by the publisher)")
    if not drift <= limit < math.inf:
        raise Refused("the gate: these weights do not do what gate.json says that the adapter did")
    print("gate                  passed")
    return 0


def place(folder: Path, gate: dict[str, Any], dtype: str | None) -> tuple[str, str]:
    """Where to compute, and in what: in the gate's dtype on the GPU, or on the CPU, or in that of the files."""
    import torch

    stored = sum(path.stat().st_size for path in (folder / "merged").glob("*.safetensors"))
    wanted = dtype or gate["gate_dtype"]
    needed = stored * BYTES[wanted] / BYTES[gate["dtype"]]
    if torch.cuda.is_available() and needed < torch.cuda.mem_get_info()[0]:
        return "cuda", wanted
    if dtype is None and needed > memory():
        print(f"note                  too little memory for {wanted}: the noise of {gate['dtype']} counts as drift")
        return "cpu", gate["dtype"]
    return "cpu", wanted


def memory() -> float:
    """Bytes of this machine; no limit where that is not known."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return math.inf


def load(folder: Path, device: str, dtype: str) -> Any:
    """The model of `folder`, every tensor of which must come from its files."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers
    from safetensors import SafetensorError

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {"dtype": getattr(torch, dtype), "use_safetensors": True, "output_loading_info": True}
    try:
        model, report = door(folder).from_pretrained(folder, **options)
    except SafetensorError as error:
        raise Refused(f"the weights in merged/ cannot be read: {error}") from error
    if missing := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise Refused(f"merged/ lacks tensors of its model, or has them in another shape: {missing[0]}")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"model                 {type(model).__name__} in {dtype} on {device}, {versions}")
    return model.eval().to(device)


def door(folder: Path) -> Any:
    """The class that loads this kind of model: for text, or for images and text."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    text = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return transformers.AutoModelForCausalLM if text else transformers.AutoModelForImageTextToText


def logp(model: Any, prompt: list[int], completion: list[int], turns: list[int] | None = None) -> float:
    """The summed log-prob of the completion's tokens after the prompt, in nats; not of those whose turn is -1."""
    import torch

    ids = torch.tensor([prompt + completion], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    wanted = ids[0, len(prompt) :]
    wanted = wanted.masked_fill(torch.tensor(turns or [0] * len(wanted), device=model.device) < 0, -100)
    return -float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))


def rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def margins(logps: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Of each pair, by how much more than the reference the model prefers the chosen answer, in nats."""
    ratios = differences(logps, reference)
    return differences(ratios[::2], ratios[1::2])


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"{path.name} cannot be read: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
