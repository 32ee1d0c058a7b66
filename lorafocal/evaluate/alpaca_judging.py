"""A judge's verdicts on pairs of answers: alpaca-eval's annotator asks, our endpoint answers.

The prompt, the order in which two answers are shown (drawn by the prompt's text and a seed), and the reading of
verdicts are the package's. Sending, retries, the journal and the bill are `lorafocal.endpoints`'.
"""

from __future__ import annotations

import difflib
import io
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lorafocal.endpoints import Endpoint, Question, Reply, Spending, approved, ask
from lorafocal.errors import InputError
from lorafocal.evaluate.alpaca_package import alpaca_eval
from lorafocal.evaluate.intervals import Share, share

ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"  # AlpacaEval 2's
ORDER_SEED = 0  # the package's default, with which the leaderboard was judged
MARKS = ("<|im_start|>", "<|im_end|>", "{instruction}", "{output_1}", "{output_2}")
_SENT = {"max_tokens", "temperature", "top_p", "seed", "logprobs", "top_logprobs"}
_OF_THE_PACKAGES_CLIENT = {"model_name", "price_per_token", "client_kwargs", "requires_chatml"}


@dataclass(frozen=True, slots=True)
class Judgments:
    """Preferences by position (1 to 2; None without a verdict) and the judge's replies as the package keeps them.

    `unanswered` questions got no reply; of those answered, `malformed` hold no verdict and `unweighted` the
    log-prob of one token alone where the annotator weighs two. `answered_as`: what the server called its model.
    """

    preferences: Mapping[int, float | None]
    raw: Mapping[int, Any]
    unanswered: int
    malformed: int
    unweighted: int
    answered_as: frozenset[str]


@dataclass(frozen=True, slots=True)
class Terms:
    """Whom to ask, where to keep the replies, and what may be spent and missed."""

    judge: Endpoint
    journal: Path
    approve: Callable[[Spending], bool]
    price: tuple[float, float] | None = None
    allowed_missing: int = 0
    say: Callable[[str], None] = print


def known_config(name: str) -> dict[str, Any] | None:
    """The settings of one of the package's annotators; None for a name it does not have, or that means several."""
    with alpaca_eval() as package:
        folder = Path(package.constants.EVALUATORS_CONFIG_DIR)
        if name not in _names(folder):
            return None
        config = package.utils.load_configs(folder / name)
    return dict(config[name]) if [*config] == [name] else None


def _names(folder: Path) -> list[str]:
    return sorted(file.parent.name for file in folder.glob("*/configs.yaml"))


def annotator_config(name: str) -> dict[str, Any]:
    """The settings of an annotator that can be asked here. Raises InputError for any other."""
    config = known_config(name)
    if config is None:
        with alpaca_eval() as package:
            names = _names(Path(package.constants.EVALUATORS_CONFIG_DIR))
        near = ", ".join(difflib.get_close_matches(name, names, 3, 0.3)) or ANNOTATOR
        raise InputError(f"alpaca-eval has no single annotator {name!r} (nearest: {near})")
    if config.get("fn_completions") != "openai_completions" or config.get("batch_size") != 1:
        raise InputError(f"the annotator {name} does not ask a chat model about one pair at a time: take {ANNOTATOR}")
    if unsent := sorted(set(config["completions_kwargs"]) - _SENT - _OF_THE_PACKAGES_CLIENT):
        raise InputError(f"the annotator {name} needs {', '.join(unsent)}, which is not sent here: take {ANNOTATOR}")
    return config


def signature(annotator: str, judge: str) -> str:
    """What annotations call their annotator: the package's name, and the judge where it is not the annotator's own."""
    own = annotator_config(annotator)["completions_kwargs"]["model_name"]
    return annotator if judge == own else f"{annotator}@{judge}"


def signed(name: str) -> tuple[str, str | None]:
    """The annotator and the judge that such a name means; None for a judge that nobody knows."""
    annotator, _, judge = name.partition("@")
    own = (known_config(annotator) or {}).get("completions_kwargs", {}).get("model_name")
    return annotator, judge or own


def first_preferred(replies: Iterable[Any], annotator: str) -> Share | None:
    """How often the judge preferred the answer that it read first, among the replies that decide.

    None where nothing was decided, and where the replies do not tell: the annotator is not known, or does not draw
    the order, so that the first answer is always the reference's.
    """
    config = known_config(annotator)
    if config is None or not config.get("is_randomize_output_order", True) or config.get("batch_size") != 1:
        return None
    with alpaca_eval() as package:
        parser = getattr(package.completion_parsers, config.get("fn_completion_parser", "regex_parser"))
        kwargs = config.get("completion_parser_kwargs") or {}
        read = [verdict for reply in replies if (verdict := _read(parser, reply, kwargs)) is not None]
    return share([verdict < 1.5 for verdict in read if verdict != 1.5]) if any(v != 1.5 for v in read) else None


def _read(parser: Callable[..., Any], reply: Any, kwargs: Mapping[str, Any]) -> float | None:
    """One reply's verdict on the answers as they were shown, 1 to 2; None for one that holds none."""
    try:
        (verdict,) = parser(reply, **kwargs)
        verdict = _known(verdict)
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError):  # whatever the parsers trip over
        return None
    return verdict if verdict is not None and 1 <= verdict <= 2 else None


def judge_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into a request beside the messages; the whole distribution where the annotator does not say.

    The package's client says so too, and some servers would else take top_p from the judge's generation config.
    """
    return {"top_p": 1.0} | {key: value for key, value in config["completions_kwargs"].items() if key in _SENT}


def judge_pairs(pairs: Mapping[int, Mapping[str, Any]], annotator: str, terms: Terms) -> Judgments:
    """The verdicts of `terms.judge` on `pairs`, by position; equal answers are a draw and nobody is asked.

    Raises InputError, before anything is sent, for a text that the package's prompt cannot hold and where the bill
    is not agreed to; after the first reply for a judge that gives no log-probs; and where more than
    `terms.allowed_missing` questions stay without a reply (the others are kept: the same call goes on).
    """
    import pandas

    _check_marks(pairs)
    config = annotator_config(annotator)
    columns = ("instruction", "output_1", "output_2")
    frame = pandas.DataFrame([{key: row[key] for key in columns} for row in pairs.values()], index=list(pairs))
    with alpaca_eval() as package:
        court = _Court(package, config, terms)
        bench = package.annotators.PairwiseAnnotator(annotators_config=annotator, seed=ORDER_SEED, caching_path=None)
        bench.annotators[annotator].fn_completions = court
        with redirect_stderr(io.StringIO()):  # the package draws a bar of its own
            rows = bench.annotate_pairs(frame, chunksize=None)
    found = [_known(row.get("preference")) for row in rows]
    raw = getattr(bench, "completion_key", "raw_completion")  # as 0.6.2 always calls them
    replies = [row.get(raw) for row in rows]
    return Judgments(
        dict(zip(pairs, found, strict=True)),
        {position: reply for position, reply in zip(pairs, replies, strict=True) if isinstance(reply, str | dict)},
        court.unanswered,
        found.count(None) - court.unanswered,
        court.unweighted,
        court.answered_as,
    )


class _Court:
    """What the package calls with all its prompts at a time, instead of its own client."""

    def __init__(self, package: ModuleType, config: Mapping[str, Any], terms: Terms) -> None:
        self._to_messages, self._config, self._terms = package.utils.prompt_to_chatml, config, terms
        self._stderr = sys.stderr
        self.unanswered = self.unweighted = 0
        self.answered_as: frozenset[str] = frozenset()

    def __call__(self, prompts: Sequence[str], **_: Any) -> dict[str, list[Any]]:
        options, terms = judge_options(self._config), self._terms
        questions = [Question(tuple(self._to_messages(prompt.strip())), options) for prompt in prompts]
        with redirect_stderr(self._stderr):
            approved(terms.judge, questions, journal=terms.journal, price=terms.price, approve=terms.approve)
            if options.get("logprobs"):
                self._check_logprobs(questions[0])
            replies = ask(terms.judge, questions, journal=terms.journal, say=terms.say)
        found = [replies.answered.get(terms.judge.key(question)) for question in questions]
        self.unanswered = found.count(None)
        self.answered_as = frozenset(reply.model for reply in found if reply is not None)
        if self.unanswered > terms.allowed_missing:
            raise InputError(f"{replies.shortfall()}; or accept them missing with --allow-missing {self.unanswered}")
        if options.get("top_logprobs", 0) > 1:
            weights = [reply.top_logprobs[-1] for reply in found if reply is not None and reply.top_logprobs]
            self.unweighted = sum(len(weighed) < 2 for weighed in weights)
        key = self._config.get("completion_key", "completions")
        return {key: [_completion(reply, whole=key != "completions") for reply in found]}

    def _check_logprobs(self, question: Question) -> None:
        """One question alone, before the rest is paid for."""
        self._terms.say(f"one question first: does {self._terms.judge.model} give log-probs?")
        reply = ask(self._terms.judge, [question], journal=self._terms.journal, say=lambda _: None).answered
        if any(not each.top_logprobs for each in reply.values()):
            raise InputError(
                f"{self._terms.judge.model} gives no log-probs, by which this annotator weighs a verdict: take another"
                " judge or server, or an annotator that reads words (--annotator alpaca_eval_gpt4). One question was"
                " asked"
            )


def _completion(reply: Reply | None, *, whole: bool) -> Any:
    """A reply as the package's own client would hand it to the parsers; none is empty, which none of them reads."""
    if reply is None or not whole:
        return "" if reply is None else reply.text
    tokens = [
        {"top_logprobs": [{"token": token, "logprob": logprob} for token, logprob in alternatives.items()]}
        for alternatives in reply.top_logprobs or ()
    ]
    return {"finish_reason": reply.finish_reason, "text": reply.text, "logprobs": {"content": tokens}}


def _check_marks(pairs: Mapping[int, Mapping[str, Any]]) -> None:
    """The package fills its template by search and replace, then splits it at ChatML's marks."""
    for position, row in pairs.items():
        owners = {"instruction": "the instruction", "output_1": row["generator_1"], "output_2": row["generator_2"]}
        for key, owner in owners.items():
            if mark := next((mark for mark in MARKS if mark in row[key]), None):
                raise InputError(
                    f"prompt {position + 1} of the reference: the text of {owner} holds {mark}, at which alpaca-eval"
                    " cuts or misfills the judge's prompt: make it a stop token of the generation, or take it out"
                )


def _known(preference: Any) -> float | None:
    return None if preference is None or math.isnan(preference) else float(preference)
