"""Real chat templates, each with what becomes of it; and one made-up template for each way to go wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lorafocal.data.sources import Preference
from lorafocal.data.template_options import variables
from lorafocal.data.templates import Renderer
from lorafocal.data.tokens import TokenizedData, tokenize_preferences
from lorafocal.errors import InputError
from tests.data import template_table
from tests.data.template_table import CHOSEN, NAMES, PAGE, QUESTION, REASONING, conversations, page, seen
from tests.data.test_tokens import MISTRAL_LIKE, QWEN_LIKE, byte_tokenizer, chat, only

THINKING = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n<think>\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
)
R1_LIKE = (
    "{{ bos_token }}{% for m in messages %}{% set content = m['content'] %}"
    "{% if m['role'] == 'user' %}{{ '<|start|>' + content }}"
    "{% else %}{{ '<|stop|>' + content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|stop|><think>\n' }}{% endif %}"
)


def tokenized(preference: Preference, template: str, **options: Any) -> TokenizedData:
    return tokenize_preferences([preference], byte_tokenizer(template, bos=False), max_length=1000, **options)


def texts(preference: Preference, template: str, **kwargs: Any) -> tuple[str, str, str]:
    tokenizer = byte_tokenizer(template, bos=False)
    options = {"chat_template_kwargs": kwargs} if kwargs else {}
    [one] = tokenize_preferences([preference], tokenizer, max_length=1000, **options).pairs
    return tuple(tokenizer.decode(ids) for ids in (one.prompt_ids, one.chosen_ids, one.rejected_ids))  # type: ignore[return-value]


# ---- the templates of TRL


@pytest.mark.slow
@pytest.mark.newest
@pytest.mark.row("26")
def test_the_page_says_what_the_library_does() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tests.data.template_table`"
    accepted = [name for name in NAMES if not seen(name).refusal]
    assert len(NAMES) > 70
    assert len(accepted) >= len(NAMES) - 1


@pytest.mark.newest
@pytest.mark.row("23", "24", "26")
@pytest.mark.parametrize("name", NAMES)
def test_a_real_template_comes_back_as_it_was_written(name: str) -> None:
    """The oracle is the tokenizer's own rendering: prompt as generated from, one end of turn, one BOS at most."""
    one, tokenizer = seen(name), template_table.tokenizer_for(template_table.read(name))
    if one.refusal:
        with pytest.raises(InputError, match="row x: the chat template"):
            only(replace(conversations()["single"], place="row x"), tokenizer)
        return
    bos, eos_or_end = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids(one.turn_end)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    for preference in conversations("" if one.takes_plain else REASONING).values():
        if preference.id == "system" and not one.takes_system:
            continue
        options = {"chat_template_kwargs": one.options}
        [pair] = tokenize_preferences([preference], tokenizer, max_length=10**6, **options).pairs
        messages: Any = preference.prompt
        if name.startswith(("idefics", "smolvlm", "llava")):  # their texts come in parts
            messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **one.options)
        assert pair.prompt_ids == asked
        assert QUESTION in tokenizer.decode(pair.prompt_ids)
        for ids, said in ((pair.chosen_ids, CHOSEN), (pair.rejected_ids, template_table.REJECTED)):
            assert ids[-1] == eos_or_end
            assert ids.count(eos_or_end) == 1
            text = tokenizer.decode(ids)
            assert text.count(said) == 1
            after = ids[len(tokenizer(text[: text.index(said) + len(said)], add_special_tokens=False)["input_ids"]) :]
            assert set(after) <= special  # nothing but the end of the turn
            sequence = pair.prompt_ids + ids
            assert [place for place, token in enumerate(sequence) if token == bos] in ([], [0])


# ---- options


@pytest.mark.row("26", "32")
def test_options_reach_every_rendering() -> None:
    template = QWEN_LIKE.replace("Be kind.", "' + mood + '")
    prompt, chosen, rejected = texts(chat("hi", "yes", "no"), template, mood="Be brief.")
    assert prompt == "<|start|>system\nBe brief.<|eot|>\n<|start|>user\nhi<|eot|>\n<|start|>assistant\n"
    assert (chosen, rejected) == ("yes<|eot|>", "no<|eot|>")


@pytest.mark.row("32")
def test_an_option_that_the_template_does_not_read_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"does not read `enable_thinkng`; it reads enable_thinking"):
        texts(chat("hi", "yes", "no"), THINKING, enable_thinkng=False)
    with pytest.raises(InputError, match="it reads none: leave chat_template_kwargs out"):
        texts(chat("hi", "yes", "no"), QWEN_LIKE, enable_thinking=False)


@pytest.mark.row("32")
@pytest.mark.parametrize(
    "name", ["messages", "add_generation_prompt", "tokenize", "bos_token", "strftime_now", "padding"]
)
def test_what_every_rendering_sets_is_not_an_option(name: str) -> None:
    with pytest.raises(InputError, match=f"`{name}` is set for every rendering"):
        texts(chat("hi", "yes", "no"), "{{ " + name + " }}" + QWEN_LIKE, **{name: "x"})


@pytest.mark.row("32")
def test_options_without_a_conversation_are_refused() -> None:
    rows = [Preference("a", "b", "c", "one")]
    with pytest.raises(InputError, match="all rows are plain strings"):
        tokenize_preferences(rows, byte_tokenizer(), max_length=9, chat_template_kwargs={"x": 1})


def test_what_a_template_reads_is_what_it_does_not_set_itself() -> None:
    assert variables("{{ mood }}{% set tone = 1 %}{{ tone }}{% for m in messages %}{{ m }}{% endfor %}") == {"mood"}
    assert variables("{% if x %}{% set tone = 1 %}{% endif %}{{ tone }}") == {"x"}
    assert variables("{% if day is not defined %}{% set day = 'x' %}{% endif %}{{ day }}") == {"day"}
    assert variables("{% generation %}{{ a | default(b) }}{% endgeneration %}") == {"a", "b"}
    with pytest.raises(InputError, match="not valid Jinja"):
        variables("{% if %}")


def test_a_template_that_writes_the_date_is_known() -> None:
    dated = "{% if day is not defined %}{{ strftime_now('%Y') }}{% else %}{{ day }}{% endif %}" + QWEN_LIKE
    tokenizer = byte_tokenizer(dated, bos=False)
    assert Renderer(tokenizer).writes_date
    assert not Renderer(tokenizer, {"day": "1 May"}).writes_date


# ---- think blocks


@pytest.mark.row("26")
def test_a_prompt_that_is_not_kept_is_refused_with_the_option_that_keeps_it() -> None:
    template = THINKING.replace(
        "m['content'] + '<|eot|>",
        "('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') + m['content'] + '<|eot|>",
    )
    assert texts(chat("hi", "yes", "no"), template)[1] == "\n</think>\n\nyes<|eot|>"
    other = THINKING.replace(
        "'<|start|>assistant\n<think>\n' }}", "'<|start|>assistant\n' + ('' if quiet else '<think>\n') }}"
    )
    with pytest.raises(InputError, match=r"row 7: the chat template does not keep .* to \{quiet: true\}"):
        texts(chat("hi", "yes", "no", "row 7"), other)
    assert texts(chat("hi", "yes", "no"), other, quiet=True)[1] == "yes<|eot|>"


@pytest.mark.row("26")
@pytest.mark.parametrize("opening", ["<think>\n", "<think>", ""])
def test_reasoning_that_a_template_takes_out_of_answers_goes_back_to_its_place(opening: str) -> None:
    row = chat("hi", f"{opening}It is.\n</think>\n\nyes", f"{opening}It is not.</think>no")
    prompt, chosen, rejected = texts(row, R1_LIKE)
    assert prompt.endswith("<|stop|><think>\n")
    assert (chosen, rejected) == ("It is.\n</think>\n\nyes</s>", "It is not.</think>no</s>")


@pytest.mark.row("26")
def test_an_answer_that_does_not_close_the_block_its_prompt_opens_is_refused() -> None:
    with pytest.raises(InputError, match=r"writes '<think>\\n' before .* reasoning, closed by </think>"):
        texts(chat("hi", "It is.</think>yes", "no"), R1_LIKE)


# ---- ends and losses


@pytest.mark.row("24")
def test_what_follows_the_end_of_the_turn_is_not_part_of_it() -> None:
    """Phi-3 ends the whole conversation with an EOS, a line after the turn; Cohere-2 ends a turn with two tokens."""
    closes = (
        "{% for m in messages %}{{ '<|start|>' + m['content'] + '<|eot|>\n' }}{% endfor %}"
        "{{ '<|start|>' if add_generation_prompt else eos_token }}"
    )
    assert texts(chat("hi", "yes", "no"), closes)[1:] == ("yes<|eot|>", "no<|eot|>")
    twice = closes.replace("<|eot|>\n", "<|stop|><|eot|>").replace("eos_token", "''")
    assert texts(chat("hi", "yes", "no"), twice)[1:] == ("yes<|stop|><|eot|>", "no<|stop|><|eot|>")


@pytest.mark.row("29")
def test_a_message_that_a_template_leaves_out_drops_the_pair() -> None:
    forgetful = MISTRAL_LIKE.replace(
        "{% if m['role'] == 'user' %}{{ '[INST] '",
        "{% if m['role'] == 'developer' %}{% elif m['role'] == 'user' %}{{ '[INST] '",
    ).replace("raise_exception('roles must alternate')", "''")
    row = chat("hi", "yes", "no")
    lost = replace(row, prompt=[{"role": "developer", "content": "Be brief."}, *row.prompt])
    data = tokenize_preferences([lost, row], byte_tokenizer(forgetful), max_length=1000)
    assert (data.drops, data.details) == ({"text_left_out": 1}, {"text_left_out": "'Be brief.'"})
    with pytest.raises(InputError, match=r"1 text_left_out \(such as pair: 'yes'\)"):
        tokenized(row, MISTRAL_LIKE.replace("' ' + m['content']", "' '"))


def test_blanks_and_switches_of_thinking_are_not_missed() -> None:
    template = QWEN_LIKE.replace("m['content']", "m['content'].replace('/no_think', '') | trim")
    assert texts(chat("hi /no_think", " yes\n", "no"), template)[1] == "yes<|eot|>"


def test_a_template_that_fails_as_a_program_refuses_the_row() -> None:
    failing = QWEN_LIKE.replace(
        "{% for m in messages %}", "{% for m in messages %}{{ '' if m['content'] != 'hi' else 1 / 0 }}"
    )
    data = tokenize_preferences([chat("hi", "a", "b"), chat("ho", "a", "b")], byte_tokenizer(failing), max_length=999)
    assert (data.drops, data.details) == ({"template_refuses": 1}, {"template_refuses": "division by zero"})
