"""Your own pairs on a base that is held in 4 bits (QLoRA): train, score, merge, all into one folder.

    pip install '.[quant]'
    python examples/03_qlora_4bit.py --model meta-llama/Meta-Llama-3-8B-Instruct --data pairs.jsonl --out mine

`--data` holds one pair a line: {"prompt": "...", "chosen": "...", "rejected": "..."}, strings or message lists; other
common forms are recognised. `lorafocal train configs/qlora/llama3-8b.yaml --tiny` rehearses such a run on any machine.

What must fit on the GPU, `lorafocal plan configs/qlora/llama3-8b.yaml --gpus 1xRTX4090` says beforehand; how much is
computed at once is chosen by the memory there is (memory and speed, never the result). A merge writes the whole model
as floats, 16 GB in bfloat16, and checks it, from disk where it does not fit the memory: `--no-merge` leaves it for
`lorafocal merge mine/run/adapter --out mine/merged` on a larger machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from lorafocal.config import check_config
from lorafocal.data.held_out import HELD_OUT_FILE
from lorafocal.errors import InputError
from lorafocal.evaluate.score import score_file
from lorafocal.release.merge import merge_adapter
from lorafocal.run import train


def main(given: argparse.Namespace) -> None:
    config = check_config(
        {
            "name": "run",
            # Linear layers in 4 bits, the rest and the arithmetic in `dtype`; `nf4-double` saves another 0.4 bits each.
            "model": {"name": given.model, "dtype": given.dtype, "quantization": given.quantization},
            # Zephyr's QLoRA recipe (alignment-handbook, zephyr-7b-beta/dpo/config_qlora.yaml): rank, alpha, layers,
            # learning rate, schedule and length. Its dropout of 0.05 is left out: it would be noise in every margin.
            "adapter": {"r": given.rank, "alpha": given.rank, "targets": "all-linear"},
            # Every twentieth pair is kept apart: a loss that falls on the training pairs alone proves nothing.
            "data": {"train": given.data, "held_out": 0.05, "max_length": 1024},
            # beta and gamma of the FocalPO paper (ACL 2025). gamma 0 would be DPO.
            "objective": {"name": "focalpo", "beta": 0.01, "gamma": 0.05},
            # The same 4-bit base with the adapter switched off: no second model in memory.
            "reference": {"kind": "disabled_adapter"},
            "training": {
                "pairs_per_step": given.pairs_per_step,
                "num_train_epochs": 1,
                "learning_rate": given.learning_rate,
                "lr_scheduler_type": "cosine",
                "warmup_ratio": 0.1,
                # AdamW; the paged one moves its moments off a full GPU, and wants a GPU for it.
                "optim": "paged_adamw_32bit" if torch.cuda.is_available() else "adamw_torch",
                "eval_strategy": "epoch",
            },
        }
    )
    # Ctrl-C finishes the step and saves; `lorafocal train OUT/run/config.yaml --runs OUT --resume` goes on from there.
    summary = train(config, runs_dir=given.out)
    print(summary)
    if summary.interrupted_by is not None:
        raise SystemExit(1)

    # Log-probs, rewards and margins of each held-out pair, on the base in 4 bits as in training.
    adapter, held_out = summary.folder / "adapter", summary.folder / HELD_OUT_FILE
    print(score_file(str(adapter), held_out, out=given.out / "scores.jsonl").table())
    print(f"adapter       {adapter}\nscores        {given.out / 'scores.jsonl'}")

    # Onto the base that training saw, its 4-bit weights turned back to floats, or onto the original weights: whichever
    # ends nearer to the adapter on held-out pairs.
    if given.merge:
        print(merge_adapter(adapter, given.out / "merged", dtype=given.dtype, gate_dtype=given.gate_dtype).table())
        print(f"merged model  {given.out / 'merged'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub id or folder of the base model, in floats")
    parser.add_argument("--data", required=True, help="file of preference rows")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that comes out")
    parser.add_argument("--quantization", default="nf4", help="nf4, nf4-double, fp4, fp4-double or int8")
    parser.add_argument("--dtype", default="bfloat16", help="of all else and of the arithmetic: bfloat16 or float32")
    parser.add_argument("--rank", type=int, default=128, help="of the adapters; their alpha is the same")
    parser.add_argument(
        "--pairs-per-step", type=int, default=128, help="the paper's batch; 32 for a few thousand pairs"
    )
    parser.add_argument("--learning-rate", type=float, default=5e-6, help="peak; try 1e-6 to 5e-5")
    parser.add_argument("--merge", action=argparse.BooleanOptionalAction, default=True, help="also merge")
    parser.add_argument("--gate-dtype", default="float32", help="what checks the merge; bfloat16 halves its memory")
    try:
        main(parser.parse_args())
    except InputError as error:
        raise SystemExit(f"03_qlora_4bit: {error}") from None
