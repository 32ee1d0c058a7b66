"""Chat: both streams are transformers' own answers, token by token; prompts as in training; what the terminal shows."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    MambaConfig,
    PreTrainedTokenizerFast,
)

from lorafocal.chat import Session, chat
from lorafocal.chat.partner import Speech, adapter_folder, check_room, meet
from lorafocal.chat.screen import Answer, Columns, text_so_far
from lorafocal.chat.streams import Drawing, TokenStream, in_turn
from lorafocal.data.held_out import write_held_out
from lorafocal.data.tokens import Encoder
from lorafocal.data.toy import toy_prompts, toy_tokenizer
from lorafocal.errors import InputError
from lorafocal.lineage import CONTINUED, Stage, lineage_of
from lorafocal.model.adapters import AdapterSwitch, adapter_layers
from lorafocal.model.saved import open_adapter, read_adapter
from tests.saved_run import SavedRun, save_base, save_run
from tests.tiny import enlarged, tiny_base, tiny_policy

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
QUESTION = "sort 3 1 2"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return save_run(tmp_path_factory.mktemp("chat"), std=0.3, base_dtype=torch.float32, dtype="float32")


@pytest.fixture(scope="module")
def speech() -> Speech:
    return Speech(Encoder.of(toy_tokenizer(), {}), templated=True)


def drawing(temperature: float = 0.0, *, seed: int = 3, tokens: int = 24, ends: set[int] | None = None) -> Drawing:
    return Drawing(tokens, temperature, seed, frozenset({1} if ends is None else ends))


def generated(model: Any, how: Drawing, prompt: list[int] = PROMPT) -> list[int]:
    """The oracle: transformers' own `generate`."""
    sampling = {"do_sample": True, "temperature": how.temperature, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(how.seed)
    output = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=how.max_new_tokens,
        eos_token_id=sorted(how.ends),
        pad_token_id=0,
        use_cache=True,
        **(sampling if how.temperature else {"do_sample": False}),
    )
    return output[0, len(prompt) :].tolist()


def both(policy: Any, how: Drawing, prompt: list[int] = PROMPT) -> tuple[list[int], list[int]]:
    """The answers with the adapter on and off, drawn in turn."""
    on, off = TokenStream(policy, prompt, how), TokenStream(policy, prompt, how)
    for _ in in_turn([(on, nullcontext), (off, AdapterSwitch(policy).off)]):
        pass
    return on.ids, off.ids


def spoken(target: Path, *prompts: str, terminal: bool = False, width: int = 100, **options: Any) -> str:
    """What a call prints."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, height=30, highlight=False, color_system=None)
    chat(target, prompts=prompts, console=console, **({"max_new_tokens": 6} | options))
    return out.getvalue()


def lines_read(*lines: Any) -> Callable[[str], str]:
    """A reader that gives these, raises those that are exceptions, and then has no more."""
    rest = iter(lines)

    def read(_: str) -> str:
        line = next(rest, EOFError())
        if isinstance(line, BaseException):
            raise line
        return str(line)

    return read


# --- the two streams ------------------------------------------------------------------------------------------


@pytest.mark.row("6")
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_both_streams_are_the_answers_of_generate(kind: str) -> None:
    """Mistral's window is shorter than its prompt, so that its cache forgets while the other stream goes on."""
    policy, base = tiny_policy(kind).eval(), tiny_base(kind).eval()
    before = torch.random.get_rng_state()
    for how in (drawing(), drawing(0.7), drawing(1.0, seed=4)):
        assert both(policy, how) == (generated(policy, how), generated(base, how))
    assert len(set(map(tuple, both(policy, drawing())))) == 2
    torch.random.set_rng_state(before)
    both(policy, drawing(0.7))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_between_two_tokens_the_adapter_is_on_and_an_answer_may_be_left_anywhere() -> None:
    policy = tiny_policy().eval()
    layers, how = adapter_layers(policy), drawing(ends=set())
    streams = [TokenStream(policy, PROMPT, how) for _ in range(2)]
    turns = in_turn([(streams[0], nullcontext), (streams[1], AdapterSwitch(policy).off)])
    for _ in range(5):
        next(turns)
        assert not any(layer.disable_adapters for layer in layers)
    assert [len(stream.ids) for stream in streams] == [3, 2]
    turns.close()
    assert both(policy, drawing()) == both(policy, drawing())


def test_a_stream_that_ends_early_leaves_the_other_alone() -> None:
    policy = tiny_policy().eval()
    on, off = both(policy, drawing(tokens=24))
    assert off[-1] == 1
    assert len(off) < len(on) == 24


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_on_quantised_bases_too(tmp_path: Path, quantization: str) -> None:
    saved = save_run(tmp_path, std=0.3, quantization=quantization, base_dtype=torch.float32, dtype="float32")
    partner = meet(saved.folder)
    ids, how = partner.speech.prompt_ids(QUESTION), drawing(0.7, tokens=12)
    fresh = open_adapter(read_adapter(saved.adapter), dtype="float32")
    on = generated(fresh, how, ids)
    off = generated(fresh.unload(), how, ids)
    assert both(partner.model, how, ids) == (on, off)
    assert on != off
    assert quantization in partner.voices[1].title


def test_a_model_without_such_a_cache_reads_the_whole_sequence() -> None:
    config = MambaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=1, pad_token_id=0, bos_token_id=0
    )
    torch.manual_seed(0)
    model = enlarged(AutoModelForCausalLM.from_config(config)).eval()
    streams = [TokenStream(model, prompt, drawing(0.7, tokens=8)) for prompt in (PROMPT, PROMPT[:3])]
    for _ in in_turn([(stream, nullcontext) for stream in streams]):
        pass
    for stream, prompt in zip(streams, (PROMPT, PROMPT[:3]), strict=True):
        assert stream.ids == generated(model, drawing(0.7, tokens=8), prompt)


def test_answers_beyond_the_positions_are_refused_with_both_ways_out() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=97, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    check_room(model, 8, 8)
    with pytest.raises(InputError, match=r"prompt's 9 tokens with 8 new ones .*shorten the prompt.*--max-new-tokens"):
        check_room(model, 9, 8)


# --- how it is spoken to --------------------------------------------------------------------------------------


def test_prompts_have_the_tokens_of_training(run: SavedRun, speech: Speech) -> None:
    questions = [prompt[0]["content"] for prompt in toy_prompts(len(run.pairs), seed=3, held_out=True)]
    assert [speech.prompt_ids(question) for question in questions] == [pair.prompt_ids for pair in run.pairs]
    tokenizer = speech.encoder.tokenizer
    assert tokenizer.decode(speech.prompt_ids("sort 1", "sort 2")).count("<|end|>") == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [("sort <|end|>", "spells the special token '<|end|>'"), ("sort \ud800", "surrogate"), ("", "no tokens")],
)
def test_texts_that_no_training_row_may_have_are_refused(speech: Speech, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says.replace("|", r"\|")):
        replace(speech, templated=False).prompt_ids(text)


@pytest.mark.row("27")
def test_an_answer_ends_with_the_models_ids_the_eos_and_the_templates_end_of_turn() -> None:
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = "<|unknown|>"
    speech = Speech(Encoder.of(tokenizer, {}), templated=True)
    end, eos = tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.eos_token_id
    assert speech.ends(GenerationConfig(eos_token_id=[7, 8])) == {7, 8, end, eos}
    assert speech.ends(GenerationConfig(eos_token_id=7)) == {7, end, eos}
    assert replace(speech, templated=False).ends(None) == {eos}


def test_a_run_of_plain_text_is_continued_as_plain_text(run: SavedRun, tmp_path: Path) -> None:
    plain = shutil.copytree(run.folder, tmp_path / "plain")
    write_held_out(plain / "held_out.jsonl", [replace(pair, prompt_ids=pair.prompt_ids[1:-2]) for pair in run.pairs])
    with pytest.raises(InputError, match="--system needs a chat template"):
        spoken(plain, QUESTION, system="sort")
    assert "continued as plain text" in spoken(plain, QUESTION)
    assert "go through the chat template" in spoken(run.folder, QUESTION, system="sort")


# --- what is found --------------------------------------------------------------------------------------------


def test_an_adapter_outside_a_run_needs_its_base_named(run: SavedRun, tmp_path: Path) -> None:
    lonely = shutil.copytree(run.adapter, tmp_path / "lonely")
    with pytest.raises(InputError, match="--base FOLDER"):
        spoken(lonely, QUESTION)
    answers = spoken(lonely, QUESTION, base=str(run.base), temperature=0)
    assert "[adapter on: lonely]" in answers
    assert answers.split("]")[1:] == spoken(run.adapter, QUESTION, temperature=0).split("]")[1:]


def test_a_whole_model_has_one_column_and_says_why(tmp_path: Path) -> None:
    model = save_base(tmp_path / "merged", dtype=torch.float32)
    answer = spoken(model, QUESTION)
    assert answer.count("[") == 1
    assert "no adapter to switch off" in answer
    with pytest.raises(InputError, match="leave --base out"):
        spoken(model, QUESTION, base="other")


def test_what_speaks_with_the_adapter_off_is_said(run: SavedRun, tmp_path: Path) -> None:
    folder = shutil.copytree(run.folder, tmp_path / "next")
    lineage = lineage_of(folder / "adapter")
    assert lineage is not None
    first, second = Stage("sft", "a" * 64), Stage("first", "b" * 64, CONTINUED)
    notes = {
        "went on from an adapter of unknown making 'first'": {"parents": (first, second), "reference": "frozen_copy"},
        "compared with the adapter's start": {"reference": "frozen_copy"},
        "compared with another model": {"reference": "separate_model"},
    }
    for note, change in notes.items():
        replace(lineage, **change).write(folder / "adapter")  # type: ignore[arg-type]
        partner = meet(folder)
        assert any(note in line for line in partner.notes), note
        assert partner.voices[1].title.endswith("the base base" + ", with 'sft' merged in" * ("parents" in change))
    assert not any("compared" in line for line in meet(run.folder).notes)


def test_a_folder_with_nothing_to_talk_to_is_refused_with_the_nearest_that_has(tmp_path: Path, run: SavedRun) -> None:
    with pytest.raises(InputError, match="there is no such folder"):
        adapter_folder(tmp_path / "missing")
    with pytest.raises(InputError, match="holds no adapter and no model"):
        adapter_folder(tmp_path)
    shutil.copytree(run.adapter, tmp_path / "checkpoint-4" / "adapter")
    with pytest.raises(InputError, match=r"lorafocal chat .*checkpoint-4/adapter --base MODEL"):
        adapter_folder(tmp_path)


def test_what_the_generation_config_asks_for_beyond_a_temperature_is_said(run: SavedRun, tmp_path: Path) -> None:
    model = shutil.copytree(run.base, tmp_path / "model")
    (model / "generation_config.json").write_text('{"do_sample": true, "top_p": 0.8, "repetition_penalty": 1.05}')
    assert "without the top_p 0.8, repetition_penalty 1.05 of the generation config" in spoken(model, QUESTION)


# --- the screen -----------------------------------------------------------------------------------------------


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


# --- a session ------------------------------------------------------------------------------------------------


def test_given_prompts_ask_no_questions_and_a_seed_fixes_their_answers(run: SavedRun) -> None:
    def never(_: str) -> str:
        raise AssertionError("asked")

    first = spoken(run.folder, QUESTION, "maximum 1 2", read=never)
    assert first.count("adapter on: run") == first.count("adapter off: the base base") == 2
    again = spoken(run.folder, "maximum 1 2", QUESTION, read=never)
    assert sorted(first.split("> ")) == sorted(part for part in again.split("> "))  # whatever was answered before
    assert spoken(run.folder, QUESTION, "maximum 1 2", seed=1) != first
    with pytest.raises(InputError, match="special token"):
        spoken(run.folder, "<|end|>")


def test_a_session_asks_until_nothing_is_asked(run: SavedRun) -> None:
    read = lines_read(
        "/help", QUESTION, "/seed 1", QUESTION, "/seed x", "sort \\", "1 2", KeyboardInterrupt(), "sort <|end|>", " /x"
    )
    shown = spoken(run.folder, read=read)
    assert "Ctrl-C stops an answer" in shown
    assert shown.count("adapter on: run") == 4
    first, second = (part.partition("[adapter off")[0] for part in shown.split("[adapter on: run]")[1:3])
    assert first != second
    assert "there is no such command" in shown
    assert "Ctrl-D or an empty line leaves" in shown
    assert "special token '<|end|>'" in shown
    assert "adapter on" not in spoken(run.folder, read=lines_read("  ", QUESTION))


def interrupted(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, *, after: int) -> Callable[[], None]:
    """Send this process a signal within step `after` of the streams; returns what takes that back."""
    steps, step = [0], TokenStream.step

    def send(stream: TokenStream) -> None:
        steps[0] += 1
        if steps[0] == after:
            signal.raise_signal(number)
        step(stream)

    monkeypatch.setattr(TokenStream, "step", send)
    return lambda: monkeypatch.setattr(TokenStream, "step", step)


def test_ctrl_c_stops_an_answer_and_leaves_model_and_handlers_whole(
    run: SavedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, handler = io.StringIO(), signal.getsignal(signal.SIGINT)
    partner = meet(run.folder)
    how = Drawing(6, 0.0, 0, partner.speech.ends(None))
    session = Session(partner, how, None, Console(file=out, highlight=False))
    interrupted(monkeypatch, signal.SIGINT, after=4)  # within the second token with the adapter off
    session.talk(lines_read(QUESTION, QUESTION))
    assert not any(layer.disable_adapters for layer in adapter_layers(partner.model))
    assert signal.getsignal(signal.SIGINT) is handler
    stopped, whole = out.getvalue().split("stopped\n")
    assert stopped.count("(2 tokens, stopped)") == 2
    assert "stopped" not in whole
    expected = both(partner.model, how, partner.speech.prompt_ids(QUESTION))
    assert all(text_so_far(partner.tokenizer, ids, finished=True) in whole for ids in expected)


@pytest.mark.parametrize(("number", "end"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_given_prompts_end_with_the_signal(
    run: SavedRun, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, end: type[BaseException]
) -> None:
    interrupted(monkeypatch, number, after=2)
    with pytest.raises(end) as caught:
        spoken(run.folder, QUESTION, QUESTION)
    assert end is KeyboardInterrupt or caught.value.code == 143  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"seed": -1}]
)
def test_settings_that_cannot_be_are_refused_before_anything_is_loaded(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="--" + next(iter(wrong)).replace("_", "-")):
        chat(tmp_path, **wrong)


# --- a terminal -----------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(run: SavedRun) -> Iterator[SimpleNamespace]:
    """`lorafocal chat` on a pseudo-terminal: `write` types, `until` reads up to a text."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "lorafocal", "chat", str(run.folder), "--temperature", "0", "--max-new-tokens"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}

    def take_terminal() -> None:
        """As a shell does, so that a typed Ctrl-C becomes a signal."""
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [*command, "5000"],
        preexec_fn=take_terminal,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
        start_new_session=True,
        close_fds=True,
    )
    os.close(slave)
    seen: list[str] = []

    def until(text: str, limit_s: float = 120) -> str:
        deadline, start = time.monotonic() + limit_s, len("".join(seen))
        while text not in "".join(seen)[start:]:
            assert time.monotonic() < deadline, "".join(seen)[-2000:]
            if select.select([master], [], [], 1)[0]:
                try:
                    seen.append(os.read(master, 65536).decode(errors="replace"))
                except OSError:  # the other end is closed
                    break
        return "".join(seen)[start:]

    yield SimpleNamespace(process=process, until=until, write=lambda text: os.write(master, text.encode()))
    if process.poll() is None:
        process.kill()
    process.wait()
    os.close(master)


@pytest.mark.engine
def test_a_session_on_a_terminal(terminal: SimpleNamespace) -> None:
    terminal.until("> ")
    terminal.write(f"{QUESTION}\n")
    shown = terminal.until("maximum maximum")
    assert "adapter on: run" in shown
    assert "adapter off: the base base" in shown
    terminal.write("\x03")  # thousands of tokens before its end
    assert " tokens, stopped" in terminal.until("> ")
    terminal.write("\x03")
    assert "Ctrl-D or an empty line leaves" in terminal.until("> ")
    terminal.write("\x04")
    assert terminal.process.wait(60) == 0
