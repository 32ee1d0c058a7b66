"""What the terminal shows: whole characters, no escape codes, columns that keep their width."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorafocal.chat.partner import meet
from lorafocal.chat.screen import Answer, Columns, text_so_far
from tests.saved_run import SavedRun
from tests.spoken import QUESTION, both, drawing, spoken


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, as byte-level tokenizers write what their merges do not cover."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: place for place, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def test_characters_of_several_tokens_are_shown_when_they_are_whole() -> None:
    tokenizer, text = bytes_tokenizer(), "Zoë: 日本 👩‍🔬."
    ids = tokenizer(text)["input_ids"]
    shown = [text_so_far(tokenizer, ids[:count], finished=False) for count in range(len(ids) + 1)]
    assert shown[-1] == text
    assert set(shown) == {text[:count] for count in range(len(text) + 1)}
    assert text_so_far(tokenizer, ids[:4], finished=True) == "Zoë"
    assert text_so_far(tokenizer, ids[:3], finished=True) == "Zo\N{REPLACEMENT CHARACTER}"


def test_a_model_cannot_write_escape_codes() -> None:
    tokenizer = bytes_tokenizer()
    ids = tokenizer("a\x1b]0;title\x07\x9b2J\r\nb\tc")["input_ids"]
    shown = text_so_far(tokenizer, ids, finished=True)
    assert shown == "a␛]0;title␇\N{REPLACEMENT CHARACTER}2J\nb   c"


def drawn(answers: list[Answer], *, live: bool, width: int = 43, height: int = 9) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    with console.capture() as capture:
        console.print(Columns(answers, live=live))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_columns_keep_their_width_with_wide_characters_and_lose_nothing() -> None:
    text = "日本語の答え👩‍🔬" * 7 + " [bold]x[/bold] " + "\n\nend"
    lines = drawn([Answer("on", text, "9 tokens"), Answer("off", "b" * 50)], live=False)
    assert all(cell_len(line) <= 43 for line in lines)
    shown = "".join(lines[2:-1])
    assert [shown.count(character) for character in "日本語の答えb"] == [7] * 6 + [50 + 2]
    assert "[bold]x[/bold]" in shown
    assert "end" in shown


def test_while_it_grows_the_end_of_an_answer_is_seen_and_afterwards_all_of_it() -> None:
    answers = [Answer("on", "\n".join(map(str, range(100, 130)))), Answer("off", "short")]
    live, whole = drawn(answers, live=True), drawn(answers, live=False)
    assert len(live) < 9
    assert "129" in live[-2]
    assert "short" in "".join(live)
    assert [line.split()[0] for line in whole[2:-1]] == [str(number) for number in range(100, 130)]


@pytest.mark.parametrize(("terminal", "width"), [(True, 100), (True, 30), (False, 100)])
def test_both_answers_are_shown_in_full_wherever_it_is_written(run: SavedRun, terminal: bool, width: int) -> None:
    shown = spoken(run.folder, QUESTION, terminal=terminal, width=width, temperature=0)
    assert ("\x1b" in shown) == (terminal and width == 100)
    partner = meet(run.folder)
    ids = partner.speech.prompt_ids(QUESTION)
    for answer in both(partner.model, drawing(tokens=6, ends=set(partner.speech.ends(None))), ids):
        text = text_so_far(partner.tokenizer, answer, finished=True)
        assert text in shown
    assert shown.count("6 tokens, cut at --max-new-tokens") >= 1
