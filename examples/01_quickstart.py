"""Quickstart: FocalPO makes a model better by a rule that nobody can argue with, and leaves a release to be verified.

A tiny Llama half knows how to sort, reverse and find the maximum of digits (about half of its sampled answers are
right). It is trained on pairs of a right and a wrong answer, with FocalPO and with DPO at the same settings, over
three seeds, and asked held-out questions before and after. Runs in minutes on two CPU cores, offline.

    make quickstart
    python examples/01_quickstart.py [--out DIR] [training.learning_rate=2.0e-3 ...]
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from lorafocal.config import load_config
from lorafocal.data.toy import toy_preferences
from lorafocal.errors import InputError
from lorafocal.evaluate.by_rule import evaluate_rule, read_targets
from lorafocal.evaluate.compare import compare_results
from lorafocal.evaluate.pairs import evaluate_pairs
from lorafocal.evaluate.result import Result, Score
from lorafocal.generation import generate
from lorafocal.generation.formats import read_answers
from lorafocal.model.toy_base import toy_base
from lorafocal.progress import MetricsFile
from lorafocal.release.export import export
from lorafocal.report.write import write_report
from lorafocal.run import RunSummary, train

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
SEEDS = (1, 2, 3)
TRAINING_PAIRS, HELD_OUT = 3840, 600
MARKER = "quickstart.json"
RUNS = [f"{objective}-{seed}" for objective in ("focalpo", "dpo") for seed in SEEDS]
OURS = ("data", "answers", "results", "bundle", "report", *RUNS)


def main(out: Path, overrides: list[str]) -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)  # matrices this small gain nothing from more, and lose much on a busy machine
    disable_progress_bar()  # transformers' own, while it loads
    make_room(out)
    print("1/5  the base: a tiny Llama, trained from scratch (about a minute; kept in your cache directory)")
    base = toy_base(on_step=lambda step, loss: print(f"\r     step {step}  loss {loss:.3f} ", end="", flush=True))
    print(f"\r     {base.name} is ready                    ")

    print("2/5  the pairs: a right and a wrong answer to each question; a rule knows which")
    for folder in ("data", "answers", "results"):
        (out / folder).mkdir()
    for name, rows in (
        ("train", toy_preferences(TRAINING_PAIRS, seed=1)),
        ("held_out", toy_preferences(HELD_OUT, seed=2, held_out=True)),
    ):
        (out / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    print("3/5  training: FocalPO, and DPO at the same settings")
    before = right_answers(base, "base", out)
    table = [f"{'':<12}{'right answers':<24}{'change, paired 95%':<30}reward accuracy"]
    table.append(f"{'base':<12}{percent(before.scores['right']):<24}{'':<30}every margin is 0")
    for objective in ("focalpo", "dpo"):
        for seed in SEEDS:
            name = f"{objective}-{seed}"
            run = train_one(base, out, objective, seed, overrides)
            after = right_answers(run.folder, name, out)
            log_right_answers(run, before, after)
            accuracy = reward_accuracy(run.folder, name, out)
            table.append(
                f"{name:<12}{percent(after.scores['right']):<24}{change(before, after):<30}{percent(accuracy)}"
            )

    print("4/5  a release of the first adapter: merged, checked on held-out pairs, bundled")
    released = export(out / "focalpo-1" / "adapter", out / "bundle", form="bundle", dtype="float32")
    print(released.table())

    print("5/5  the report of the training runs: curves, margins, and what they say in plain words")
    report = write_report([out / name for name in RUNS], out / "report")

    print(f"\n{HELD_OUT} held-out questions, one sampled answer each (95% intervals):\n")
    print("\n".join(table))
    print(
        "\nA row is one training run; -1, -2, -3 are seeds. FocalPO and DPO agree here because margins stay small: this"
        "\nshows that training works, not that one loss is better. Reward accuracy alone can mislead as well:"
        "\ndocs/reading-a-run.md has both stories."
    )
    print(f"\nThe first three questions that are answered otherwise now:\n\n{'':<20}{'right':<14}{'base':<14}FocalPO")
    for question, right, was, became in itertools.islice(changed_answers(out, "base", "focalpo-1"), 3):
        print(f"{question:<20}{right:<14}{was:<14}{became}")
    print(f"\nadapter        {out / 'focalpo-1' / 'adapter'}")
    print(f"merged model   {out / 'bundle' / 'merged'}")
    print(f"check it       .venv/bin/python {out / 'bundle' / 'verify.py'}")
    print(f"report         {report.page}")
    print(f"answers        {out / 'answers'}, and what was found of them in {out / 'results'}")
    print(f"base           {base}")
    print(f"look closer    .venv/bin/lorafocal evaluate pairs {out / 'focalpo-1'} {out / 'data' / 'held_out.jsonl'}")
    print(f"talk to it     .venv/bin/lorafocal chat {out / 'focalpo-1'}")
    print(f"next           .venv/bin/lorafocal train {out / 'focalpo-1' / 'config.yaml'} name=again training.seed=4")
    print(f"all of it took {time.perf_counter() - start:.0f} s")


def train_one(base: Path, out: Path, objective: str, seed: int, more: list[str]) -> RunSummary:
    """One run of configs/quickstart.yaml."""
    overrides = [
        f"name={objective}-{seed}",
        f"model.name={base}",
        f"data.train={out / 'data' / 'train.jsonl'}",
        f"data.eval={out / 'data' / 'held_out.jsonl'}",
        f"objective.name={objective}",
        f"training.seed={seed}",
        f"training.data_seed={seed}",
    ]
    if objective == "dpo":
        overrides.append("objective.gamma=null")
    number = RUNS.index(f"{objective}-{seed}") + 1
    print(f"     run {number} of {len(RUNS)}: {objective}, seed {seed}", flush=True)
    summary = train(load_config(CONFIG, overrides + more), runs_dir=out, quiet=number > 1)
    if summary.interrupted_by is not None:
        raise SystemExit("stopped; the quickstart starts over when it is called again")
    return summary


def right_answers(target: Path, name: str, out: Path) -> Result:
    """One sampled answer to each held-out question, and which of them are right: the pairs' chosen answers are."""
    questions, answers = out / "data" / "held_out.jsonl", out / "answers" / f"{name}.json"
    generate(
        target, questions, out=answers, name=name, temperature=1.0, max_new_tokens=12, seed=0, say=lambda line: None
    )
    result = evaluate_rule(answers, rule="exact", targets=questions, field="chosen")
    result.write(out / "results" / f"{name}-rule.json")
    return result


def reward_accuracy(run: Path, name: str, out: Path) -> Score:
    """The share of held-out pairs whose right answer has the higher implicit reward."""
    result = evaluate_pairs(run, out / "data" / "held_out.jsonl")
    result.write(out / "results" / f"{name}-pairs.json")
    return result.scores["accuracy"]


def log_right_answers(run: RunSummary, before: Result, after: Result) -> None:
    """Right answers by rule before and after training, beside the run's other metrics: the report compares them."""
    log = MetricsFile(run.folder)
    for step, result in ((0, before), (run.steps, after)):
        log.append(step, {"eval_right_answers": result.scores["right"].value / 100})


def change(before: Result, after: Result) -> str:
    difference = compare_results(before, after).scores["difference"]
    return f"{difference.value:+.1f} points [{difference.low:+.1f}, {difference.high:+.1f}]"


def percent(score: Score) -> str:
    return f"{score.value:.1f}% [{score.low:.1f}, {score.high:.1f}]"


def changed_answers(out: Path, one: str, other: str) -> Iterator[tuple[str, str, str, str]]:
    """Question, right answer, and both models' answers, where these differ."""
    right = read_targets(out / "data" / "held_out.jsonl", "chosen")
    rows = (read_answers(out / "answers" / f"{name}.json").rows for name in (one, other))
    for was, became in zip(*rows, strict=True):
        if was.output != became.output:
            yield was.instruction, right[was.instruction], was.output, became.output


def make_room(out: Path) -> None:
    """Replace what an earlier quickstart left, and nothing else."""
    if out.exists() and not (out / MARKER).exists():
        raise SystemExit(
            f"{out} exists and is not a quickstart's folder: move it away, or call"
            " .venv/bin/python examples/01_quickstart.py --out DIR"
        )
    for name in OURS:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("{}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="where everything goes")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the config's")
    given = parser.parse_args()
    try:
        main(given.out, given.overrides)
    except InputError as error:
        raise SystemExit(f"quickstart: {error}") from None
