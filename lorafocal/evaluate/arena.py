"""Arena-Hard v0.1: the win rate against a baseline, as that project computes it from verdicts in both orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafocal.endpoints import Endpoint
from lorafocal.endpoints.spending import Approve, Price
from lorafocal.errors import InputError
from lorafocal.evaluate import bradley_terry
from lorafocal.evaluate.arena_judge import Duel, judge_duels, write_judgments
from lorafocal.evaluate.arena_prompt import JudgePrompt, read_judge_prompt
from lorafocal.evaluate.arena_verdicts import STRONG, Judged, Verdicts, read_judgments
from lorafocal.evaluate.arena_win_rate import battles_resampled, count, first_preferred, questions_resampled
from lorafocal.evaluate.result import Result, file_hashes, package_versions, prompt_sha256
from lorafocal.generation.formats import AnswerRow, Answers, read_answers
from lorafocal.generation.prompts import read_prompts
from lorafocal.publish import check_folder_of

# What stands behind the published numbers of arena-hard-auto v0.1.
QUESTIONS, JUDGE, BASELINE, MAX_NEW_TOKENS = 500, "gpt-4-1106-preview", "gpt-4-0314", 4096
ROUNDS, SEED = 100, 42  # of its bootstrap
OWN_PROMPT = "lorafocal's own"
API_ERROR = "$ERROR$"  # what that project writes as the answer where a server gave none


def evaluate_arena(
    answers: Path,
    *,
    questions: Path,
    baseline: Path,
    judge: Endpoint,
    journal: Path,
    judgments: Path,
    approve: Approve,
    judge_config: Path | None = None,
    price: Price | None = None,
    allowed_missing: int = 0,
    rounds: int = ROUNDS,
    seed: int = SEED,
    say: Callable[[str], None] = print,
) -> Result:
    """Have `judge` compare `answers` with those of `baseline` on `questions`, all in Arena-Hard's JSONL forms.

    Each question is judged twice, in both orders. The judgments go into `judgments` in that project's form, the
    replies into `journal` as they come, so that the same call goes on where a killed one stopped. `judge_config` is
    that project's YAML with its judge prompt; without it the judge gets this project's own words, which the result
    notes. `price` is USD for a million tokens (in, out), `rounds` and `seed` are the bootstrap's.

    Raises InputError before anything is sent where that can be known, and where more than `allowed_missing` games
    have no reply.
    """
    if judgments.exists() and not journal.exists():
        raise InputError(f"{judgments} exists already, and not by this journal: evaluate it alone, or name another")
    check_folder_of(judgments)
    _check(rounds)
    prompt = JudgePrompt() if judge_config is None else read_judge_prompt(judge_config)
    ours, theirs = read_answers(answers), read_answers(baseline)
    model, opponent = ours.generator, theirs.generator
    if model == opponent:
        raise InputError(f"{answers.name} and {baseline.name} are both answers of {model}: name another baseline")
    duels = _duels(_questions(questions), ours, theirs)
    judging = judge_duels(
        judge,
        duels,
        prompt=prompt,
        journal=journal,
        approve=approve,
        price=price,
        allowed_missing=allowed_missing,
        say=say,
    )
    write_judgments(judgments, duels, judging, model=model, judge=judge.model)
    told = {
        "judge_prompt": prompt.file or OWN_PROMPT,
        "judge_prompt_sha256": prompt.sha256,
        "judge_options": dict(prompt.options),
        "judge_answered_as": sorted(judging.answered_as),
    }
    files = [path for path in (answers, questions, baseline, judge_config) if path is not None]
    known = _Known(
        ours,
        opponent,
        {duel.question_id: duel.question for duel in duels},
        {**_failed(duels), **judging.counts},
        told,
        file_hashes(*files),
    )
    return _result(read_judgments(judgments), known, rounds=rounds, seed=seed)


def evaluate_judgments(
    judgments: Path,
    *,
    answers: Path | None = None,
    questions: Path | None = None,
    baseline: Path | None = None,
    rounds: int = ROUNDS,
    seed: int = SEED,
) -> Result:
    """The win rate of judgments that exist: a `model_judgment` file of Arena-Hard.

    `answers` tell how the model was sampled, `questions` name the prompts (needed to compare results prompt by
    prompt), `baseline` the model that was compared with, which the judgments do not.
    """
    _check(rounds)
    judged = read_judgments(judgments)
    ours = None if answers is None else read_answers(answers)
    if ours is not None and ours.generator != judged.model:
        raise InputError(f"{judgments.name} judges {judged.model}, and {ours.file} is of {ours.generator}")
    files = [path for path in (judgments, answers, questions, baseline) if path is not None]
    known = _Known(
        ours,
        None if baseline is None else read_answers(baseline).generator,
        {} if questions is None else _questions(questions),
        inputs=file_hashes(*files),
    )
    return _result(judged, known, rounds=rounds, seed=seed)


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known beside the verdicts; `questions` are turns by question id, empty where none were given."""

    answers: Answers | None
    baseline: str | None
    questions: Mapping[str, tuple[str, ...]]
    counts: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)


def _questions(path: Path) -> dict[str, tuple[str, ...]]:
    prompts = read_prompts(path)
    if prompts.form != "arena-hard":
        raise InputError(f"{path.name} holds no Arena-Hard questions: its rows have question_id and turns")
    return {str(row.question_id): (row.instruction, *row.later) for row in prompts.rows}


def _duels(questions: Mapping[str, tuple[str, ...]], model: Answers, baseline: Answers) -> list[Duel]:
    ours, theirs = _by_question(model, questions), _by_question(baseline, questions)
    return [Duel(key, turns, ours[key].turns, theirs[key].turns) for key, turns in questions.items()]


def _by_question(answers: Answers, questions: Mapping[str, tuple[str, ...]]) -> dict[str, AnswerRow]:
    """Raises InputError where a question or a turn of it has no answer."""
    found = {row.question_id: row for row in answers.rows if row.question_id is not None}
    if not found:
        raise InputError(f"{answers.file} is not in Arena-Hard's form: generate it with --out in .jsonl")
    missing = [key for key, turns in questions.items() if key not in found or len(found[key].turns) != len(turns)]
    if missing:
        raise InputError(
            f"{answers.file} does not answer {len(missing)} of {len(questions)} questions (first {missing[0]}):"
            " generate those, or give the questions that it answers"
        )
    return {key: found[key] for key in questions}


def _failed(duels: Sequence[Duel]) -> dict[str, int]:
    return {
        "failed_answers": sum(API_ERROR in duel.model for duel in duels),
        "failed_baseline_answers": sum(API_ERROR in duel.baseline for duel in duels),
    }


def _check(rounds: int) -> None:
    """What can be known to be missing before anything is paid for."""
    if rounds < 2:
        raise InputError(f"rounds of the bootstrap are 2 or more, not {rounds}")
    bradley_terry.library()


def _result(judged: Judged, known: _Known, *, rounds: int, seed: int) -> Result:
    verdicts, answers = judged.verdicts, known.answers
    if not any(each.battles for each in verdicts):
        raise InputError(f"the judgments of {judged.model} hold no verdict at all, so there is no win rate")
    if known.questions and (strange := [v.question_id for v in verdicts if v.question_id not in known.questions]):
        raise InputError(f"{len(strange)} judged questions are not among the questions given (first {strange[0]})")
    counts = {**count(verdicts), **known.counts, **({} if answers is None else answers.counts)}
    scores = {
        "win_rate": battles_resampled(verdicts, rounds=rounds, seed=seed),
        "win_rate_questions_resampled": questions_resampled(verdicts, rounds=rounds, seed=seed),
    }
    first = first_preferred(verdicts)
    if first is not None:
        scores["first_answer_preferred"] = first.percent
    return Result(
        benchmark="arena_hard_v0.1",
        model=judged.model,
        scores=scores,
        judge=judged.judge,
        sampling=None if answers is None else answers.sampling,
        target=None if answers is None else answers.target,
        counts=counts,
        settings={
            "baseline": known.baseline,
            "strong_weight": STRONG,
            "rounds": rounds,
            "seed": seed,
            **known.settings,
        },
        inputs=known.inputs,
        versions=package_versions("scikit-learn", "numpy"),
        notes=tuple(_notes(judged, known, counts)),
        items=tuple(_item(each, known.questions.get(each.question_id)) for each in verdicts),
    )


def _item(verdicts: Verdicts, question: Sequence[str] | None) -> dict[str, Any]:
    """The model's share of the question's battles, from 0 to 1; None without a verdict."""
    battles = verdicts.battles
    named = {} if question is None else {"prompt_sha256": prompt_sha256("\n\n".join(question))}
    preference = sum(battles) / len(battles) if battles else None
    return {"question_id": verdicts.question_id, **named, "preference": preference}


def _notes(judged: Judged, known: _Known, counts: Mapping[str, int]) -> Iterator[str]:
    """What sets the number apart from the published ones, and what weakens it."""
    if judged.judge != JUDGE:
        yield f"judged by {judged.judge or 'a judge that is not named'}; published numbers are judged by {JUDGE}"
    prompt = known.settings.get("judge_prompt")
    if prompt is None:
        yield "what the judge was told is not known"
    elif prompt == OWN_PROMPT:
        yield "the judge's prompt is lorafocal's own, not Arena-Hard's, which --judge-config gives"
    if known.baseline != BASELINE:
        named = "a baseline that the judgments do not name" if known.baseline is None else known.baseline
        yield f"compared with {named}; published numbers are against {BASELINE}"
    if counts["questions"] != QUESTIONS:
        yield f"{counts['questions']} questions were judged; Arena-Hard v0.1 has {QUESTIONS}"
    yield from _weaknesses(counts)
    if len({win for each in judged.verdicts for win in each.battles}) == 1:
        yield "every battle ended alike, so drawing them again gives no interval"
    sampling = None if known.answers is None else known.answers.sampling
    if sampling is None:
        yield "how the answers were sampled is not known"
    elif sampling.get("temperature") != 0 or sampling.get("max_new_tokens") != MAX_NEW_TOKENS:
        yield (
            f"answers of temperature {sampling.get('temperature')} and at most {sampling.get('max_new_tokens')} tokens;"
            f" Arena-Hard's are greedy, of at most {MAX_NEW_TOKENS}"
        )
    first = first_preferred(judged.verdicts)
    if first is not None:
        yield f"the judge preferred the answer that it read first in {first} of the {first.total} games that it decided"


def _weaknesses(counts: Mapping[str, int]) -> Iterator[str]:
    if lost := counts["games_without_label"] + counts["games_with_unknown_label"]:
        yield f"{lost} of {counts['games']} games have no verdict and do not count"
    if again := counts.get("asked_again"):
        yield f"{again} judgments had no label at first and were asked to go on, in words that are not Arena-Hard's"
    if cut := counts.get("length_limit"):
        yield f"{cut} answers were cut at their limit of new tokens"
    if cut := counts.get("cut_replies"):
        yield f"{cut} of the judge's replies were cut at its limit of tokens"
    for key, whose in (("failed_answers", "answers"), ("failed_baseline_answers", "answers of the baseline")):
        if failed := counts.get(key):
            yield f"{failed} {whose} are {API_ERROR}, which stands where a server gave none"
