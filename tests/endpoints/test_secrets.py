"""A key goes where its owner sends it, and nowhere else: no file, no log, no message; prompts stay out of logs too."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from openai import OpenAI

from lorafocal.endpoints import Endpoint, Question, ask
from lorafocal.endpoints.endpoint import OPENAI_URL
from lorafocal.endpoints.refusals import quotable
from lorafocal.errors import InputError
from tests.openai_server import Server, a_page, cut, malformed, serving, slow, status

KEY = "sk-made-up-0123456789abcdef"
PROMPT = "the quick brown fox jumps over the lazy dog, and says it in confidence"
QUESTIONS = [Question(({"role": "user", "content": f"{n}: {PROMPT}"},)) for n in range(4)]
FAULTS = {
    "400": status(400, "bad_request"),
    "401": status(401),
    "403": status(403),
    "404": status(404),
    "429": status(429),
    "500": status(500, KEY),
    "malformed": malformed,
    "page": a_page,
    "cut": cut,
    "slow": slow(3.0),
}


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, f"{name}-{KEY}")


def endpoint(server: Server, timeout_s: float = 60.0) -> Endpoint:
    return Endpoint("judge", server.url, "THE_KEY", attempts=2, timeout_s=timeout_s)


@pytest.mark.row("S8")
def test_a_key_goes_to_the_server_it_was_named_for(tmp_path: Path) -> None:
    with serving(key=KEY) as server:
        ask(endpoint(server), QUESTIONS, journal=tmp_path / "j", say=lambda line: None)
    assert server.keys == [KEY] * 4


@pytest.mark.row("S8")
def test_the_key_for_openai_goes_to_no_other_server(tmp_path: Path) -> None:
    with serving() as server:
        ask(Endpoint("judge", server.url), QUESTIONS, journal=tmp_path / "j", say=lambda line: None)
    assert server.keys == ["none"] * 4
    assert KEY not in str(server.headers)


@pytest.mark.row("S8")
@pytest.mark.parametrize(
    "fault",
    [None, *FAULTS.values()],
    ids=["none", *FAULTS],
)
def test_neither_key_nor_prompt_is_in_any_file_log_or_message(
    tmp_path: Path, fault: object, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Though the server's errors repeat both, and everybody logs all they can."""
    said: list[str] = []
    with serving(lambda body: "yes", faults=[fault] * 6) as server, caplog.at_level(logging.DEBUG):  # type: ignore[list-item]
        try:
            replies = ask(endpoint(server, 1.0), QUESTIONS, journal=tmp_path / "j", say=said.append)
            said += [*replies.failed.values(), str(replies.shortfall())]
        except InputError as error:
            said += [str(error), repr(error.__cause__)]
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    everything = "\n".join([*said, *files, caplog.text, *capfd.readouterr()])
    assert len(files) == 1
    assert KEY not in everything
    assert KEY[:10] not in everything
    assert PROMPT not in everything
    assert PROMPT[:20] not in everything


@pytest.mark.row("S8")
def test_a_client_that_logs_its_requests_is_not_heard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As openai does up to 1.x, at level DEBUG."""

    def answer(body: dict) -> str:
        logging.getLogger("openai._base_client").debug("Request options: %s", body)
        logging.getLogger("httpx").info("HTTP Request: POST http://the.host/v1")
        return "yes"

    with serving(answer) as server, caplog.at_level(logging.DEBUG):
        ask(endpoint(server), QUESTIONS, journal=tmp_path / "j", say=lambda line: None)
    assert caplog.text == ""


def test_the_levels_of_others_loggers_are_as_before(tmp_path: Path) -> None:
    logging.getLogger("openai").setLevel(logging.INFO)
    with serving() as server:
        ask(endpoint(server), QUESTIONS, journal=tmp_path / "j", say=lambda line: None)
    assert logging.getLogger("openai").level == logging.INFO
    logging.getLogger("openai").setLevel(logging.NOTSET)


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 2048 tokens, and 4096 were asked for.",
        "Unknown parameter: top_k.",
    ],
)
def test_a_server_that_explains_itself_is_quoted(message: str) -> None:
    assert quotable(message, QUESTIONS[0], KEY) == message
    assert quotable(f"\n {message}  ", QUESTIONS[0], KEY) == message


@pytest.mark.parametrize(
    "message",
    [
        "",
        f"Incorrect API key provided: {KEY}.",
        f"Incorrect API key provided: {KEY[:8]}****{KEY[-4:]}.",
        f"Flagged: {PROMPT}",
        "Flagged: ...x jumps over the lazy...",
        "Flagged: the  quick\nbrown fox jumps",
        "Flagged: \\u0074\\u0068\\u0065",
        "Flagged: ｔｈｅ ｑｕｉｃｋ",
        "x" * 201,
    ],
)
def test_a_server_that_repeats_the_question_or_the_key_is_not_quoted(message: str) -> None:
    assert quotable(message, QUESTIONS[0], KEY) is None


def test_a_short_prompt_is_not_quoted_either() -> None:
    assert quotable("you said: rosebud", Question(({"role": "user", "content": "rosebud"},)), None) is None


def test_a_refused_question_is_told_in_the_servers_words(tmp_path: Path) -> None:
    def explain(body: object, key: object, respond: object) -> None:
        message = '{"object": "error", "message": "max_tokens is too large", "type": "BadRequestError", "code": 400}'
        respond(400, message.encode(), {})  # type: ignore[operator]

    with serving(faults=[explain]) as server:  # type: ignore[list-item]
        replies = ask(endpoint(server), QUESTIONS[:1], journal=tmp_path / "j", say=lambda line: None)
    assert list(replies.failed.values()) == ["HTTP 400, BadRequestError: max_tokens is too large"]


@pytest.mark.parametrize(
    ("value", "words"),
    [("", "holds no key"), ("  ", "holds no key"), ("sk a", "no key has"), ("sk\u00e9", "no key has")],
)
def test_a_key_that_cannot_be_one_is_refused_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, words: str
) -> None:
    monkeypatch.setenv("THE_KEY", value)
    with serving() as server, pytest.raises(InputError, match=words):
        ask(endpoint(server), QUESTIONS, journal=tmp_path / "j", say=lambda line: None)
    assert server.requests == []
    assert list(tmp_path.iterdir()) == []


def test_openais_own_address_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(InputError, match="OPENAI_API_KEY holds no key for judge"):
        Endpoint("judge").credential()


@pytest.mark.row("S8")
def test_an_address_in_the_environment_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package would send it questions and OpenAI's key, which no option of the command said."""
    with serving() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        with pytest.raises(InputError, match=r"OPENAI_BASE_URL is set.*--server URL"):
            Endpoint("judge")
        assert Endpoint("judge", server.url).credential() is None
    assert server.requests == []


@pytest.mark.row("S8")
def test_headers_in_the_environment_go_to_no_other_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"Authorization: Bearer {KEY}")
    with pytest.raises(InputError, match=r"OPENAI_CUSTOM_HEADERS is set.*--key-variable") as error:
        Endpoint("judge", "http://localhost:1/v1", "THE_KEY")
    assert KEY not in str(error.value)
    assert Endpoint("judge").url is None


@pytest.mark.parametrize("nothing", ["", f"{OPENAI_URL}/"])
def test_an_address_in_the_environment_that_says_nothing_is_no_other(
    nothing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", nothing)
    assert Endpoint("judge").url is None


def test_openais_own_address_is_the_packages() -> None:
    assert str(OpenAI(api_key="none").base_url).rstrip("/") == OPENAI_URL
