"""Arena-Hard's judging: two games a question, the answers in both orders, and one more word with a silent judge."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorafocal.endpoints import Endpoint, Question, Reply, approved, ask
from lorafocal.endpoints.spending import Approve, Price
from lorafocal.errors import InputError
from lorafocal.evaluate.arena_prompt import JudgePrompt
from lorafocal.evaluate.arena_verdicts import label_in
from lorafocal.publish import write_atomically

GO_ON = "Please go on from there, and close with the label of your verdict."


@dataclass(frozen=True, slots=True)
class Duel:
    """A question's turns, and both answers to them, turn by turn."""

    question_id: str
    question: tuple[str, ...]
    model: tuple[str, ...]
    baseline: tuple[str, ...]


@dataclass(slots=True)
class Game:
    """One order of the two answers: the chat so far, all that the judge wrote, and the label in it."""

    chat: tuple[Mapping[str, str], ...]
    judgment: str = ""
    label: str | None = None
    open: bool = True

    def hear(self, reply: Reply, pattern: re.Pattern[str]) -> None:
        """Take in a reply; without any label in it the game stays open."""
        self.judgment += "\n" + reply.text
        self.label, self.open = label_in(self.judgment, pattern)
        self.chat += ({"role": "assistant", "content": reply.text}, {"role": "user", "content": GO_ON})

    def as_dict(self) -> dict[str, str | None]:
        """Under the names of Arena-Hard's `model_judgment` files."""
        first = next(message for message in self.chat if message["role"] == "user")
        return {"user_prompt": first["content"], "judgment": self.judgment, "score": self.label}


@dataclass(slots=True)
class Judging:
    """Two games for each duel, in the duels' order, and what happened on the way.

    `counts`: games asked again, judge's replies cut at their limit, and games that a reply is missing of.
    `answered_as`: the names that the server gave the judge.
    """

    games: list[tuple[Game, Game]]
    counts: dict[str, int] = field(default_factory=lambda: {"asked_again": 0, "cut_replies": 0, "without_reply": 0})
    answered_as: set[str] = field(default_factory=set)

    def hear(self, games: Sequence[Game], replies: Sequence[Reply | None], pattern: re.Pattern[str]) -> list[Game]:
        """Take in a round's replies, one a game; the games that are still without any label."""
        for game, reply in zip(games, replies, strict=True):
            if reply is None:
                self.counts["without_reply"] += 1
                game.open = False
                continue
            game.hear(reply, pattern)
            self.counts["cut_replies"] += reply.finish_reason == "length"
            self.answered_as.update({reply.model} - {""})
        return [game for game in games if game.open]


def judge_duels(
    judge: Endpoint,
    duels: Sequence[Duel],
    *,
    prompt: JudgePrompt,
    journal: Path,
    approve: Approve,
    price: Price | None = None,
    allowed_missing: int = 0,
    say: Callable[[str], None] = print,
) -> Judging:
    """Every duel judged in both orders: first with the baseline as assistant A, then with the model as A.

    A judge that gives no label at all is asked to go on, `prompt.attempts` times in all; the agreement to the
    spending covers that. Raises InputError before anything is sent (not agreed, no key), and where more than
    `allowed_missing` games have no reply; what came is in `journal`, and the same call goes on.
    """
    judging = Judging(
        [
            (
                Game(prompt.messages(duel.question, duel.baseline, duel.model)),
                Game(prompt.messages(duel.question, duel.model, duel.baseline)),
            )
            for duel in duels
        ]
    )
    waiting = [game for pair in judging.games for game in pair]
    first = [Question(game.chat, prompt.options) for game in waiting]
    approved(judge, first, journal=journal, price=price, approve=approve)
    for attempt in range(prompt.attempts):
        if attempt and waiting:
            judging.counts["asked_again"] += len(waiting)
            say(f"{len(waiting)} judgments end without a label: the judge is asked to go on")
        questions = [Question(game.chat, prompt.options) for game in waiting]
        replies = ask(judge, questions, journal=journal, say=say)
        heard = [replies.answered.get(judge.key(question)) for question in questions]
        waiting = judging.hear(waiting, heard, re.compile(prompt.pattern))
        if judging.counts["without_reply"] > allowed_missing:
            raise InputError(f"{replies.shortfall()}; or allow as many games without one (--allow-missing)")
    return judging


def write_judgments(path: Path, duels: Sequence[Duel], judging: Judging, *, model: str, judge: str) -> None:
    """Arena-Hard's `model_judgment` file, which that project's own tools read; the same bytes for the same games."""
    rows = (
        {"question_id": duel.question_id, "model": model, "judge": judge, "games": [game.as_dict() for game in pair]}
        for duel, pair in zip(duels, judging.games, strict=True)
    )
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
