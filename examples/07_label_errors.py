"""Find pairs that are labelled the wrong way round, leave them out, and train again.

The quickstart's task with a tenth of its pairs swapped: which ones is known here, so that the list can be judged.
Prints how good the list is, and the right answers and the reward accuracy of runs with all pairs, without those of the
list, without as many drawn at random, and without exactly the swapped ones. The numbers in docs/suspects.md are of

    python examples/07_label_errors.py --out label-errors --seeds 0 1 2 --held-out 1000 \
        --set training.learning_rate=1.0e-3 evaluation.temperature=0
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorafocal.config import load_config
from lorafocal.data.toy import toy_preferences
from lorafocal.evaluate.during import callbacks
from lorafocal.evaluate.suspects import find_suspects
from lorafocal.model.toy_base import toy_base
from lorafocal.report.numbers import last, right_answers
from lorafocal.report.read import read_run
from lorafocal.run import train

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("label-errors"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--pairs", type=int, default=3840)
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--swapped", type=float, default=0.1, help="share of the pairs that are swapped")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="KEY=VALUE")
    args = parser.parse_args(arguments)
    for seed in args.seeds:
        print(json.dumps(once(args, seed)), flush=True)


def once(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train on swapped pairs, look for them, and train again without those that were found."""
    folder = args.out / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    rows = toy_preferences(args.pairs, seed=10 + seed)
    rng = random.Random(seed)
    names = [f"pair-{number}" for number in range(args.pairs)]
    swapped = set(rng.sample(names, round(args.swapped * args.pairs)))
    write_rows(
        folder / "train.jsonl", [labelled(row, name, name in swapped) for row, name in zip(rows, names, strict=True)]
    )
    write_rows(folder / "held_out.jsonl", toy_preferences(args.held_out, seed=20 + seed, held_out=True))

    def right(run: str, leave_out: Sequence[str] = ()) -> dict[str, float | None]:
        return trained(args, folder, seed, run, leave_out)

    answers = {"all pairs": right("all")}
    found = find_suspects(folder / "all", out=folder / "suspects.html", write=folder / "suspects.txt")
    listed = {suspect.id for suspect in found.to_leave_out}
    always = {suspect.id for suspect in found.found}
    answers["without the confident suspects"] = right("without-confident", sorted(listed))
    answers["without all suspects"] = right("without-suspects", sorted(always))
    answers["without as many at random"] = right("without-random", rng.sample(names, len(listed)))
    answers["without the swapped pairs"] = right("without-swapped", sorted(swapped))
    judged = {"confident": judge(listed, swapped), "all": judge(always, swapped)}
    return {"seed": seed, "lists": judged, "held out": answers}


def trained(
    args: argparse.Namespace, folder: Path, seed: int, run: str, leave_out: Sequence[str]
) -> dict[str, float | None]:
    """Of the held-out prompts and pairs after training without some pairs: answers, sampled, and reward accuracy."""
    overrides = [
        f"name={run}",
        f"model.name={toy_base()}",
        f"data.train={folder / 'train.jsonl'}",
        f"data.eval={folder / 'held_out.jsonl'}",
        f"training.seed={seed}",
        f"training.data_seed={seed}",
        "training.save_steps=12",
        f"evaluation={{every: 100000, rule: exact, count: {args.held_out}, max_new_tokens: 8, temperature: 1.0}}",
        *args.overrides,
    ]
    if leave_out:
        names = folder / f"{run}.txt"
        names.write_text("".join(f"{name}\n" for name in leave_out))
        overrides.append(f"data.leave_out={names}")
    train(load_config(CONFIG, overrides), quiet=True, runs_dir=folder, callbacks=callbacks)
    record = read_run(folder / run, run)
    return {"right": last(right_answers(record)), "reward accuracy": last(record.series("eval_rewards/accuracies"))}


def labelled(row: dict[str, Any], name: str, swap: bool) -> dict[str, Any]:
    """The row under a name of its own, perhaps with its answers exchanged."""
    swapped = {"chosen": row["rejected"], "rejected": row["chosen"]} if swap else {}
    return row | swapped | {"id": name}


def judge(listed: set[str], swapped: set[str]) -> dict[str, float]:
    """How many of the listed pairs are swapped, and how many of the swapped are listed."""
    hits = len(listed & swapped)
    return {"pairs": len(listed), "precision": hits / max(1, len(listed)), "recall": hits / max(1, len(swapped))}


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
