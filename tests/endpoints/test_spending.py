"""What asking costs is said before, for what is missing alone, and nothing is sent to who does not agree."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lorafocal.endpoints import Endpoint, Question, Spending, approved, ask, estimate
from lorafocal.errors import InputError
from tests.openai_server import serving


def question(characters: int, **options: object) -> Question:
    return Question(({"role": "user", "content": "x" * characters},), options)


def test_four_characters_a_token_to_read_and_the_limit_to_write() -> None:
    spending = estimate([question(400, max_tokens=10), question(401, max_completion_tokens=5)], (2.0, 8.0))
    assert spending == Spending(2, 201, 15, pytest.approx((201 * 2 + 15 * 8) / 1e6))


def test_without_a_price_there_is_no_sum() -> None:
    assert estimate([question(4, max_tokens=1)]).usd is None
    assert "no price was given" in estimate([question(4, max_tokens=1)]).sentence()


def test_answers_without_a_limit_are_said_to_have_none() -> None:
    spending = estimate([question(4_000_000), question(4, max_tokens=1)], (2.0, 8.0))
    assert spending.completion_tokens is None
    assert spending.sentence() == (
        "2 questions: about 1,000,001 tokens to read, no limit on what is written; at least 2.00 USD"
    )


def test_only_what_the_journal_lacks_is_counted(tmp_path: Path) -> None:
    said: list[Spending] = []

    def agree(spending: Spending) -> bool:
        said.append(spending)
        return True

    with serving() as server:
        endpoint, journal = Endpoint("judge", server.url), tmp_path / "journal.jsonl"
        ask(endpoint, [question(4, max_tokens=1)], journal=journal, say=lambda line: None)
        both = [question(4, max_tokens=1), question(8, max_tokens=1), question(8, max_tokens=1)]
        assert approved(endpoint, both, journal=journal, price=None, approve=agree).questions == 1
        ask(endpoint, both, journal=journal, say=lambda line: None)
        assert approved(endpoint, both, journal=journal, price=None, approve=agree).questions == 0
    assert said == [Spending(1, 2, 1, None)], "nothing is asked where nothing is missing"


def test_who_does_not_agree_sends_nothing(tmp_path: Path) -> None:
    with serving() as server:
        with pytest.raises(InputError, match=r"not agreed to 1 question: .* about 0\.02 USD: nothing was sent"):
            approved(
                Endpoint("judge", server.url), [question(40_000, max_tokens=1)], journal=tmp_path / "j",
                price=(2.0, 8.0), approve=lambda spending: False,
            )  # fmt: skip
    assert server.requests == []
    assert list(tmp_path.iterdir()) == []


def test_a_missing_key_is_told_before_one_is_asked_to_agree(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="NO_SUCH_KEY holds no key"):
        approved(
            Endpoint("judge", key_variable="NO_SUCH_KEY"), [question(4)], journal=tmp_path / "j",
            price=None, approve=lambda spending: pytest.fail("asked"),
        )  # fmt: skip


def test_a_missing_package_is_told_before_one_is_asked_to_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    endpoint, asked = Endpoint("m", "http://localhost:1/v1"), Question(({"role": "user", "content": "a"},))

    def approve(_: Spending) -> bool:
        raise AssertionError("somebody was asked")

    with pytest.raises(InputError, match="needs the openai package"):
        approved(endpoint, [asked], journal=tmp_path / "j.jsonl", price=None, approve=approve)
