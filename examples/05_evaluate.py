"""Two models on the same prompts: what they answer, and which is better by a rule, a reward model or a judge.

    python examples/05_evaluate.py --model runs/mine --against owner/base --prompts pairs.jsonl --out compared \\
        --rule number                                                    # the last number is the chosen answer's
        --reward-model owner/reward-model                                # a classifier with one output
        --judge MODEL --server http://localhost:8000/v1                  # any server that speaks OpenAI's protocol

Give any of the three ways to judge, or none to look at the answers alone. A model is a run, an adapter folder (its base
attached, nothing merged), a model's folder or a hub id. `--prompts` are preference rows, AlpacaEval's or Arena-Hard's
questions, or a prompt a line; a rule needs preference rows, whose chosen answers are its targets. Stopped and started
again, the script goes on where it was: answers are kept batch by batch, and a judge's replies as they come.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lorafocal.endpoints import Endpoint
from lorafocal.errors import InputError
from lorafocal.evaluate.alpaca import evaluate_alpaca
from lorafocal.evaluate.by_rule import CHOSEN, evaluate_rule
from lorafocal.evaluate.compare import evaluate_comparison
from lorafocal.evaluate.result import Result
from lorafocal.evaluate.reward import evaluate_reward
from lorafocal.evaluate.rules import RULES
from lorafocal.generation import generate
from lorafocal.report.answers_page import write_answers_page


def main(given: argparse.Namespace) -> None:
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    ours, theirs = out / "model.json", out / "against.json"
    # The same prompts, settings and seed for both, so that their answers differ by the models alone.
    for target, answers in ((given.model, ours), (given.against, theirs)):
        print(generate(target, given.prompts, out=answers, preset=given.preset, max_new_tokens=given.tokens).table())

    verdicts = []
    if given.rule is not None:
        # A share of right answers for each, and the difference over the same prompts with its interval.
        before, after = (
            keep(evaluate_rule(answers, rule=given.rule, targets=given.prompts, field=CHOSEN), out / f"{name}.json")
            for name, answers in (("against-rule", theirs), ("model-rule", ours))
        )
        print(evaluate_comparison(before, after).table())
        verdicts += [after, before]
    if given.reward_model is not None:
        rewarded = evaluate_reward(ours, model=given.reward_model, against=theirs)
        verdicts.append(keep(rewarded, out / "model-reward.json"))
    if given.judge is not None:
        # AlpacaEval's way: the judge sees both answers in an order drawn by the prompt, and says which is better.
        judged = evaluate_alpaca(
            ours,
            reference=theirs,
            judge=Endpoint(given.judge, given.server),
            journal=out / "model-judged.journal.jsonl",
            approve=lambda spending: input(f"{spending.sentence()}. Go on? [y/N] ").strip().lower() == "y",
        )
        verdicts.append(keep(judged, out / "model-judged.json"))
    print(write_answers_page([theirs, ours], out / "answers.html", verdicts=verdicts).table())


def keep(result: Result, file: Path) -> Path:
    """Print a result, and write it for `lorafocal evaluate compare` and `lorafocal report`."""
    print(f"\n{result.table()}\n")
    result.write(file)
    return file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run, an adapter folder, a model's folder or hub id")
    parser.add_argument("--against", required=True, help="what it is compared with: another of these, as its base")
    parser.add_argument("--prompts", type=Path, required=True, help="file of prompts")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that comes out")
    parser.add_argument("--preset", default="greedy", help="how answers are drawn: see docs/generation.md")
    parser.add_argument("--tokens", type=int, help="new tokens of an answer at most, in place of the preset's")
    parser.add_argument("--rule", choices=[rule for rule in RULES if rule != "json"], help="judge by this rule")
    parser.add_argument("--reward-model", help="judge by this reward model")
    parser.add_argument("--judge", help="judge by this model of a server")
    parser.add_argument("--server", help="the judge's server; OpenAI's if absent (the key is in OPENAI_API_KEY)")
    try:
        main(parser.parse_args())
    except InputError as error:
        raise SystemExit(f"05_evaluate: {error}") from None
