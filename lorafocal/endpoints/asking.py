"""Many questions at a time to one endpoint; each reply is in the journal before the next is counted."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from lorafocal.endpoints.client import Client, quiet_libraries
from lorafocal.endpoints.endpoint import Endpoint, Question
from lorafocal.endpoints.journal import Journal
from lorafocal.endpoints.refusals import Unanswered
from lorafocal.endpoints.reply import Reply

DOWN_AFTER = 16  # questions in a row, each with all its attempts, after which a server counts as down
NOT_ASKED = "not asked, as the server failed again and again"
REPORTS = 20  # lines of progress
REASONS = 3  # that a sentence names


@dataclass(frozen=True, slots=True)
class Replies:
    """By key, in the order of the questions: every question is in one of the two."""

    answered: Mapping[str, Reply]
    failed: Mapping[str, str]

    def shortfall(self) -> str | None:
        """What is missing and why, in one sentence for the user; None where nothing is."""
        if not self.failed:
            return None
        count = len(self.answered) + len(self.failed)
        counted = Counter(self.failed.values()).most_common()
        reasons = "; ".join(f"{number} x {reason}" for reason, number in counted[:REASONS])
        if len(counted) > REASONS:
            reasons += f"; and {len(counted) - REASONS} reasons more"
        return (
            f"{len(self.failed)} of {count} questions have no reply ({reasons}). The others are kept: the same command"
            " asks for these alone"
        )


def ask(
    endpoint: Endpoint,
    questions: Sequence[Question],
    *,
    journal: Path,
    say: Callable[[str], None] = print,
) -> Replies:
    """Every question's reply from `journal` or from the endpoint, `endpoint.concurrency` at a time.

    Equal questions are asked once. A reply is a line of the journal as soon as it is there, so a process that was
    killed loses those under way alone, and the next call asks for what is missing. A question that the server
    refuses or does not answer in all its attempts is `failed` with the reason; once a server has answered none of
    `DOWN_AFTER` in a row, nothing more is begun.

    Raises InputError for a missing key or package before anything is sent, for a refused key, an unknown model and
    an empty account at once, and for a journal that is damaged or in use.
    """
    asked = {endpoint.key(question): question for question in questions}
    endpoint.credential()
    with Journal(journal) as book:
        missing = {key: question for key, question in asked.items() if key not in book.replies}
        if len(asked) > len(missing):
            say(f"{len(asked) - len(missing)} of {len(asked)} replies are there already")
        failed = _ask_missing(endpoint, missing, book, say) if missing else {}
        answered = {key: book.replies[key] for key in asked if key in book.replies}
    return Replies(answered, {key: failed[key] for key in asked if key in failed})


class _Row:
    """Failures in a row, counted where they happen, over all threads: after them none begins another question."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failed = 0

    def check(self) -> None:
        """Raises Unanswered where the server counts as down."""
        if self._failed >= DOWN_AFTER:
            raise Unanswered(NOT_ASKED, down=True)

    def count(self, *, down: bool) -> None:
        """A question has ended; once the server counts as down, that is final."""
        with self._lock:
            if self._failed < DOWN_AFTER:
                self._failed = self._failed + 1 if down else 0


def _ask_missing(
    endpoint: Endpoint, missing: Mapping[str, Question], book: Journal, say: Callable[[str], None]
) -> dict[str, str]:
    """Ask, and write down what comes; the reasons of what does not, by key."""
    failed: dict[str, str] = {}
    row = _Row()
    every = math.ceil(len(missing) / REPORTS)
    client = Client(endpoint)
    pool = ThreadPoolExecutor(endpoint.concurrency, thread_name_prefix="ask")

    def put(key: str, question: Question) -> None:
        row.check()
        try:
            reply = client.reply(question)
        except Unanswered as error:
            row.count(down=error.down)
            raise
        row.count(down=False)
        book.add(key, reply)  # here, not where they are gathered: whatever ends that, this is kept

    with quiet_libraries():
        try:
            waiting = {pool.submit(put, key, question): key for key, question in missing.items()}
            for done, future in enumerate(as_completed(waiting), start=1):
                why = _why_failed(future)
                if why is not None:
                    failed[waiting[future]] = why.reason
                if done % every == 0 or done == len(missing):
                    say(f"{done} of {len(missing)} asked" + (f", {len(failed)} without a reply" if failed else ""))
        except KeyboardInterrupt:
            say("stopping, once the replies under way are there")
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            client.close()
    return failed


def _why_failed(future: Future[None]) -> Unanswered | None:
    """None for a reply that was written down. Raises what concerns all questions."""
    try:
        future.result()
    except Unanswered as error:
        return error
    return None
