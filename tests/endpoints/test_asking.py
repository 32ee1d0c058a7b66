"""Every question is asked until it is answered, and never again: whatever the server does, whenever one is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from lorafocal.endpoints import Endpoint, Question, Reply, ask
from lorafocal.endpoints.asking import DOWN_AFTER, NOT_ASKED, Replies
from lorafocal.endpoints.client import Pace
from lorafocal.endpoints.journal import read_journal
from lorafocal.errors import InputError
from tests.openai_server import Said, Server, a_page, cut, malformed, no_choices, serving, slow, status

pytestmark = pytest.mark.slow

NOWHERE = "http://127.0.0.1:9/v1"  # the discard service, which no machine runs today


def question(text: str, **options: object) -> Question:
    return Question(({"role": "user", "content": text},), options)


QUESTIONS = [question(f"word {n}") for n in range(12)]


def silent(line: str) -> None:
    """Nobody listens."""


def asked(server: Server | str, journal: Path, questions: list[Question] = QUESTIONS, **how: object) -> Replies:
    url = server if isinstance(server, str) else server.url
    return ask(Endpoint("judge", url, **how), questions, journal=journal, say=silent)  # type: ignore[arg-type]


def texts(replies: Replies) -> list[str]:
    return [reply.text for reply in replies.answered.values()]


EXPECTED = [f"WORD {n}" for n in range(12)]


def test_replies_come_in_the_order_of_the_questions(tmp_path: Path) -> None:
    with serving() as server:
        replies = asked(server, tmp_path / "journal.jsonl", concurrency=5)
    assert texts(replies) == EXPECTED
    assert replies.failed == {}
    assert replies.shortfall() is None


def test_what_is_sent_is_the_question_and_its_options(tmp_path: Path) -> None:
    with serving() as server:
        asked(server, tmp_path / "j", [question("a", max_tokens=3, seed=2**40, top_k=4, logprobs=True)])
    assert server.requests == [
        {
            "model": "judge",
            "messages": [{"role": "user", "content": "a"}],
            "max_tokens": 3,
            "seed": 2**40,
            "top_k": 4,
            "logprobs": True,
        }
    ]


@pytest.mark.row("58")
@pytest.mark.parametrize(
    "fault",
    [status(500), status(503), status(429), status(408), slow(3.0), malformed, no_choices, a_page, cut],
    ids="500 503 429 408 slow malformed no_choices page cut".split(),
)
def test_a_fault_that_passes_changes_nothing(tmp_path: Path, fault: object) -> None:
    with serving(faults=[None, fault, None]) as server:  # type: ignore[list-item]
        replies = asked(server, tmp_path / "journal.jsonl", concurrency=2, timeout_s=1.0)
    assert texts(replies) == EXPECTED
    assert replies.failed == {}
    assert len(server.requests) == len(QUESTIONS) + 1


@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        (status(500), "HTTP 500", 2),
        (status(429, "rate_limit_exceeded"), "HTTP 429, rate_limit_exceeded", 2),
        (status(400, "context_length_exceeded"), "HTTP 400, context_length_exceeded", 1),
        (status(422), "HTTP 422", 1),
        (slow(3.0), "no reply within 1 s", 2),
        (cut, "the connection failed or broke", 2),
        (malformed, "malformed reply (the body is no JSON)", 3),
        (no_choices, "malformed reply (the body is JSON but no chat completion with a choice)", 3),
    ],
    ids="500 429 400 422 slow cut malformed no_choices".split(),
)
def test_a_fault_that_stays_is_told_and_the_question_is_asked_the_next_time(
    tmp_path: Path, fault: object, reason: str, requests: int
) -> None:
    journal = tmp_path / "journal.jsonl"
    with serving(faults=[fault] * requests) as server:  # type: ignore[list-item]
        replies = asked(server, journal, concurrency=1, attempts=2, timeout_s=1.0)
        assert list(replies.failed.values()) == [reason]
        assert texts(replies) == EXPECTED[1:]
        assert len(server.requests) == len(QUESTIONS) - 1 + requests
        missing = replies.shortfall()
        assert missing is not None
        assert missing.startswith(f"1 of 12 questions have no reply (1 x {reason}). The others are kept")
        again = asked(server, journal)
    assert texts(again) == EXPECTED
    assert len(server.requests) == len(QUESTIONS) + requests


def test_replies_are_paid_for_once(tmp_path: Path) -> None:
    with serving() as server:
        first = asked(server, tmp_path / "journal.jsonl")
        before = (tmp_path / "journal.jsonl").read_bytes()
        assert asked(server, tmp_path / "journal.jsonl") == first
        assert (tmp_path / "journal.jsonl").read_bytes() == before
        assert asked(NOWHERE, tmp_path / "journal.jsonl") == first, "where a model is asked is not part of the question"
    assert len(server.requests) == len(QUESTIONS)


def test_equal_questions_are_asked_once(tmp_path: Path) -> None:
    with serving() as server:
        replies = asked(server, tmp_path / "journal.jsonl", [question("a"), question("b"), question("a")])
    assert texts(replies) == ["A", "B"]
    assert len(server.requests) == 2


@pytest.mark.row("58")
def test_another_model_or_another_option_is_another_question(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    with serving(lambda body: f"{body['model']} at {body['temperature']}") as server:
        for model in ("one", "two"):
            for temperature in (0, 1):
                endpoint = Endpoint(model, server.url)
                replies = ask(endpoint, [question("a", temperature=temperature)], journal=journal, say=silent)
                assert texts(replies) == [f"{model} at {temperature}"]
    assert len(read_journal(journal)) == 4


def test_log_probs_come_through_to_the_last_bit(tmp_path: Path) -> None:
    logprobs = ({"m": -0.1234567890123456789, "M": -2.25}, {"!": 0.0})
    with serving(lambda body: Said("m", logprobs)) as server:
        plain, with_logprobs = question("a"), question("a", logprobs=True, top_logprobs=5)
        endpoint = Endpoint("judge", server.url)
        ask(endpoint, [plain, with_logprobs], journal=tmp_path / "j", say=silent)
        replies = ask(endpoint, [plain, with_logprobs], journal=tmp_path / "j", say=silent)
    assert replies.answered[endpoint.key(with_logprobs)].top_logprobs == logprobs
    assert replies.answered[endpoint.key(plain)].top_logprobs is None


def test_an_answer_cut_by_the_limit_or_by_a_filter_says_so(tmp_path: Path) -> None:
    said = {"a": Said("half", finish_reason="length"), "b": Said(None, finish_reason="content_filter")}
    with serving(lambda body: said[body["messages"][0]["content"]]) as server:
        replies = asked(server, tmp_path / "journal.jsonl", [question("a"), question("b")])
    found = [(reply.text, reply.finish_reason) for reply in replies.answered.values()]
    assert found == [("half", "length"), ("", "content_filter")]


# --- how hard a server is asked -----------------------------------------------------------------------------


def test_no_more_are_under_way_than_asked_for(tmp_path: Path) -> None:
    turnstile = threading.Barrier(3, timeout=20)

    def answer(body: dict) -> str:
        turnstile.wait()  # passes only when three are here at once
        return "x"

    with serving(answer) as server:
        asked(server, tmp_path / "journal.jsonl", concurrency=3)
    assert server.most_under_way == 3


def test_the_server_says_when_to_come_again(tmp_path: Path) -> None:
    with serving(faults=[status(429, wait_s=1.2)]) as server:
        asked(server, tmp_path / "journal.jsonl", [question("a")])
    assert server.times[1] - server.times[0] >= 1.2


def test_requests_keep_their_distance_over_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = 100.0, []
    monkeypatch.setattr("lorafocal.endpoints.client.time.monotonic", lambda: now)
    monkeypatch.setattr("lorafocal.endpoints.client.time.sleep", slept.append)
    pace = Pace(30)
    for _ in range(4):
        pace.wait()
    now = 107.0
    pace.wait()
    now = 200.0
    pace.wait()
    assert slept == [0.0, 2.0, 4.0, 6.0, 1.0, 0.0]


def test_retries_count_towards_the_rate(tmp_path: Path) -> None:
    with serving(faults=[status(500), status(500)]) as server:
        asked(server, tmp_path / "journal.jsonl", [question("a")], requests_per_minute=150)
    assert len(server.times) == 3
    # 0.4 s apart as they leave; the first has to connect before it arrives
    assert all(later - earlier >= 0.2 for earlier, later in zip(server.times, server.times[1:], strict=False))


# --- when it cannot go on -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (status(401, "invalid_api_key"), "wants a key it knows (HTTP 401, invalid_api_key): none was sent"),
        (status(403), "does not let this key use judge (HTTP 403)"),
        (status(404, "model_not_found"), "has no model judge, or no chat completions at this URL"),
        (status(429, "insufficient_quota"), "has no credit left for judge"),
        (status(402), "has no credit left for judge (HTTP 402)"),
    ],
    ids="401 403 404 quota 402".split(),
)
def test_what_every_question_would_meet_ends_it_at_once_and_keeps_what_there_is(
    tmp_path: Path, fault: object, words: str
) -> None:
    with serving(faults=[None, None, fault, fault]) as server:  # type: ignore[list-item]
        with pytest.raises(InputError) as error:
            asked(server, tmp_path / "journal.jsonl", concurrency=1, attempts=2)
        assert words in str(error.value)
        assert error.value.__cause__ is None
        assert len(server.requests) <= 2 + 2 + 1  # one more may have been under way
        assert len(read_journal(tmp_path / "journal.jsonl")) >= 2
        assert texts(asked(server, tmp_path / "journal.jsonl")) == EXPECTED


def test_a_server_that_is_down_is_left_alone(tmp_path: Path) -> None:
    many = [question(f"word {n}") for n in range(DOWN_AFTER + 30)]
    replies = asked(NOWHERE, tmp_path / "journal.jsonl", many, attempts=1, concurrency=2)
    assert list(replies.failed) == [Endpoint("judge").key(each) for each in many]
    reasons = Counter(replies.failed.values())
    assert set(reasons) == {"the connection failed or broke", NOT_ASKED}
    assert reasons[NOT_ASKED] >= 20
    assert "46 of 46 questions have no reply" in (replies.shortfall() or "")


def test_after_a_server_counts_as_down_no_question_is_begun(tmp_path: Path) -> None:
    def talk(line: str) -> None:
        time.sleep(0.05)  # whoever gathers lags behind those who ask

    many = [question(f"word {n}") for n in range(100)]
    with serving(faults=[status(500)] * 100) as server:
        judge = Endpoint("judge", server.url, attempts=1, concurrency=4)
        replies = ask(judge, many, journal=tmp_path / "j", say=talk)
    assert DOWN_AFTER <= len(server.requests) < DOWN_AFTER + 4  # three more may have been under way
    assert Counter(replies.failed.values())[NOT_ASKED] == 100 - len(server.requests)


def test_questions_that_are_refused_one_by_one_do_not_end_the_rest(tmp_path: Path) -> None:
    refused = DOWN_AFTER + 4
    many = [question(f"word {n}") for n in range(refused + 1)]
    with serving(faults=[status(400)] * refused) as server:
        replies = asked(server, tmp_path / "journal.jsonl", many, concurrency=1)
    assert texts(replies) == [f"WORD {refused}"]


def test_a_reply_that_comes_while_all_ends_is_kept(tmp_path: Path) -> None:
    refused = threading.Event()

    def fail(body: dict, key: object, respond: object) -> None:
        status(401)(body, key, respond)  # type: ignore[arg-type]
        refused.set()

    def answer(body: dict) -> str:
        refused.wait(20)
        return "late and paid for"

    with serving(answer, faults=[None, fail]) as server, pytest.raises(InputError):  # type: ignore[list-item]
        asked(server, tmp_path / "journal.jsonl", QUESTIONS[:2], concurrency=2)
    assert [reply.text for reply in read_journal(tmp_path / "journal.jsonl").values()] == ["late and paid for"]


def test_who_interrupts_keeps_what_was_under_way(tmp_path: Path) -> None:
    said: list[str] = []

    def interrupt(line: str) -> None:
        said.append(line)
        if line.startswith("3 of"):
            raise KeyboardInterrupt

    with serving() as server:
        with pytest.raises(KeyboardInterrupt):
            ask(Endpoint("judge", server.url, concurrency=2), QUESTIONS, journal=tmp_path / "j", say=interrupt)
        assert said[-1].startswith("stopping")
        before = len(server.requests)
        assert len(read_journal(tmp_path / "j")) == before
        assert texts(asked(server, tmp_path / "j")) == EXPECTED
    assert len(server.requests) == len(QUESTIONS)


@pytest.mark.slow
def test_killed_among_its_replies_the_next_call_asks_for_the_rest_alone(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.endpoints.test_asking import asked;"
        " asked(sys.argv[1], Path(sys.argv[2]), concurrency=2)"
    )
    journal = tmp_path / "journal.jsonl"

    def answer(body: dict) -> str:
        if len(server.requests) == 6:
            running.kill()
        return body["messages"][0]["content"].upper()

    with serving(answer) as server:
        running = subprocess.Popen([sys.executable, "-c", code, server.url, str(journal)])
        assert running.wait(60) == -signal.SIGKILL
        kept, requests = read_journal(journal), len(server.requests)
        assert texts(asked(server, journal)) == EXPECTED
    assert len(kept) >= requests - 2, "a kill loses those under way alone"
    assert len(server.requests) == requests + len(QUESTIONS) - len(kept)


# --- the journal --------------------------------------------------------------------------------------------


def test_a_torn_line_is_asked_again_wherever_it_is_torn(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    with serving() as server:
        asked(server, journal, QUESTIONS[:3], concurrency=1)
        whole = journal.read_bytes()
        last = whole.rindex(b"\n", 0, -1) + 1
        for end in range(last, len(whole), 45):
            journal.write_bytes(whole[:end])
            assert len(read_journal(journal)) == 2
            assert texts(asked(server, journal, QUESTIONS[:3])) == EXPECTED[:3]
            assert journal.read_bytes() == whole


@pytest.mark.parametrize(
    "line", ["", "null", "{", '{"key": "x"}', '{"key": "x", "text": 3}'], ids="empty null torn nothing number".split()
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    journal = tmp_path / "journal.jsonl"
    with serving() as server:
        asked(server, journal, QUESTIONS[:1])
    journal.write_text(journal.read_text() + line + "\n" + journal.read_text())
    before = journal.read_bytes()
    with pytest.raises(InputError, match=r"journal\.jsonl:2 is no reply of a journal"):
        asked(NOWHERE, journal)
    assert journal.read_bytes() == before


def test_two_processes_do_not_pay_for_the_same(tmp_path: Path) -> None:
    with serving(lambda body: inner()) as server:

        def inner() -> str:
            with pytest.raises(InputError, match="is being written by another process"):
                asked(NOWHERE, tmp_path / "journal.jsonl")
            return "x"

        assert texts(asked(server, tmp_path / "journal.jsonl", QUESTIONS[:1])) == ["x"]


def test_a_journal_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="symbolic link"):
        asked(NOWHERE, tmp_path / "link")


def test_the_journal_holds_replies_under_hashes(tmp_path: Path) -> None:
    with serving(lambda body: "an answer") as server:
        asked(server, tmp_path / "journal.jsonl", [question("the prompt")])
    [record] = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    key = Endpoint("judge").key(question("the prompt"))
    assert record == {"key": key, **Reply("an answer", "stop", 10, 2, "judge").as_dict()}
