"""Every parameter of your own model, on all GPUs of this machine: store the reference, train, leave a model.

    torchrun --standalone --nproc-per-node 8 examples/04_full_parameter.py \
        --model HuggingFaceH4/mistral-7b-sft-beta --data pairs.jsonl --out mine

The reference is the model as it is now: its log-probs are computed once, by all processes, before the engine splits the
model, so that no second model is in memory. On the command line these are `lorafocal cache-reference run.yaml
--processes 8` and `lorafocal train run.yaml --engine zero3 --processes 8`; several machines: examples/cluster/. The
paper's own trainings are configs/paper/, with the source of every value.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lorafocal import launch
from lorafocal.config import check_config
from lorafocal.errors import InputError
from lorafocal.run import cache_reference, train


def main(given: argparse.Namespace) -> None:
    config = check_config(
        {
            "name": "run",
            # bfloat16 is the arithmetic; the weights that the optimiser changes are float32, whatever the engine.
            "model": {"name": given.model, "dtype": given.dtype},
            # No `adapter`: every parameter is trained.
            "data": {"train": given.data, "held_out": 0.05, "max_length": 1024},
            "objective": {"name": "focalpo", "beta": 0.01, "gamma": 0.05},
            "reference": {"kind": "cached", "store": str(given.out / "references")},
            "training": {
                "pairs_per_step": given.pairs_per_step,  # over all processes, however they share it
                "num_train_epochs": 1,
                "learning_rate": given.learning_rate,
                "lr_scheduler_type": "cosine",
                "warmup_ratio": 0.1,
                "eval_strategy": "epoch",
                "save_total_limit": 1,  # a checkpoint holds three float32 numbers a parameter
                **({"use_cpu": True} if given.cpu else {}),
            },
            "engine": {"kind": given.engine},
        }
    )
    stored = cache_reference(config)
    summary = train(config, runs_dir=given.out)
    if launch.is_main():
        print(stored)
        print(summary)  # plain transformers loads OUT/run/model
    if summary.interrupted_by is not None:
        raise SystemExit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub id or folder of the model to train")
    parser.add_argument("--data", required=True, help="file of preference rows")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that comes out")
    parser.add_argument("--engine", default="zero3", help="zero1, zero2, zero3, fsdp2, or ddp: how processes share it")
    parser.add_argument("--dtype", default="bfloat16", help="of the arithmetic: bfloat16 or float32")
    parser.add_argument("--pairs-per-step", type=int, default=128, help="the paper's batch")
    parser.add_argument("--learning-rate", type=float, default=5e-7, help="peak; the paper tried 3e-7 to 1e-6")
    parser.add_argument("--cpu", action="store_true", help="train on this machine's CPUs")
    try:
        main(parser.parse_args())
    except InputError as error:
        raise SystemExit(f"04_full_parameter: {error}") from None
    finally:
        launch.shutdown()
