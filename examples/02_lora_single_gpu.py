"""Your own model and your own pairs on one GPU: train, score, merge, all into one folder.

    python examples/02_lora_single_gpu.py --model mistralai/Mistral-7B-Instruct-v0.3 --data pairs.jsonl --out mine

`--data` holds one pair a line: {"prompt": "...", "chosen": "...", "rejected": "..."}, strings or message lists; other
common forms are recognised. How much is computed at once is chosen by the memory there is; `lorafocal plan` says
beforehand what a card holds. The same steps on the command line are `lorafocal train`, `lorafocal score` and
`lorafocal merge`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

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
            "model": {"name": given.model, "dtype": given.dtype},
            # Zephyr's LoRA recipe (alignment-handbook, zephyr-7b-beta/dpo/config_qlora.yaml): rank, alpha, layers,
            # learning rate, schedule and length. Its dropout of 0.05 is left out: it would be noise in every margin.
            "adapter": {"r": 128, "alpha": 128, "targets": "all-linear"},
            # Every twentieth pair is kept apart: a loss that falls on the training pairs alone proves nothing.
            "data": {"train": given.data, "held_out": 0.05, "max_length": 1024},
            # beta and gamma of the FocalPO paper (ACL 2025). gamma 0 would be DPO.
            "objective": {"name": "focalpo", "beta": 0.01, "gamma": 0.05},
            # The base with the adapter switched off: no second model in memory.
            "reference": {"kind": "disabled_adapter"},
            "training": {
                "pairs_per_step": given.pairs_per_step,
                "num_train_epochs": 1,
                "learning_rate": given.learning_rate,
                "lr_scheduler_type": "cosine",
                "warmup_ratio": 0.1,
                "eval_strategy": "epoch",
            },
        }
    )
    # Ctrl-C finishes the step and saves; `lorafocal train OUT/run/config.yaml --runs OUT --resume` goes on from there.
    summary = train(config, runs_dir=given.out)
    print(summary)
    if summary.interrupted_by is not None:
        raise SystemExit(1)

    # Log-probs, rewards and margins of each held-out pair, by the code that trained.
    adapter, held_out = summary.folder / "adapter", summary.folder / HELD_OUT_FILE
    print(score_file(str(adapter), held_out, out=given.out / "scores.jsonl").table())

    # Plain weights that any inference engine loads, published only if they answer as the adapter does.
    print(merge_adapter(adapter, given.out / "merged", dtype=given.dtype).table())
    print(f"adapter       {adapter}\nscores        {given.out / 'scores.jsonl'}\nmerged model  {given.out / 'merged'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub id or folder of the base model")
    parser.add_argument("--data", required=True, help="file of preference rows")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that comes out")
    parser.add_argument("--dtype", default="bfloat16", help="of the base and the arithmetic: bfloat16 or float32")
    parser.add_argument(
        "--pairs-per-step", type=int, default=128, help="the paper's batch; 32 for a few thousand pairs"
    )
    parser.add_argument("--learning-rate", type=float, default=5e-6, help="peak; try 1e-6 to 5e-5")
    try:
        main(parser.parse_args())
    except InputError as error:
        raise SystemExit(f"02_lora_single_gpu: {error}") from None
