"""What a hurried user is told: other tools' keys, keys that are like none, values of the wrong kind."""

from __future__ import annotations

from typing import Any

import pytest

from tests.test_config import changed, mistakes


@pytest.mark.row("32")
@pytest.mark.parametrize(
    ("path", "here"),
    [
        (("training", "load_in_4bit"), "model.quantization: nf4"),
        (("model", "load_in_8bit"), "model.quantization: int8"),
        (("adapter", "use_qlora"), "model.quantization: nf4"),
        (("adapter", "init_lora_weights"), "adapter.init"),
        (("extends",), "the first line of a config file, and no override"),
    ],
)
def test_the_keys_of_other_tools_are_answered_with_ours(path: tuple[str, ...], here: str) -> None:
    assert f"{'.'.join(path)}: unknown key; here that is {here}" in mistakes(changed(*path, True))


@pytest.mark.row("32")
def test_a_key_that_is_like_no_other_is_answered_with_those_of_its_section() -> None:
    assert "adapter.bias: unknown key; known here: adapter.r, adapter.alpha" in mistakes(changed("adapter", "bias", 1))
    assert "qqq: unknown key; known here: name, model, adapter, " in mistakes(changed("qqq", 1))


@pytest.mark.row("32")
@pytest.mark.parametrize(
    ("path", "value", "answer"),
    [
        (("model", "quantization"), "none", "allowed: nf4, nf4-double, fp4, fp4-double, int8, or null"),
        (("adapter", "modules_to_save"), "norm", 'it must be a list, such as ["norm"]'),
        (("adapter", "use_dora"), "yes", "it must be true or false"),
        (("engine",), "zero3", "it must be a mapping of keys (for example engine: {kind: zero3})"),
        (("adapter", "trainable_tokens"), [-1], "trainable_tokens.0: found -1; allowed: a token's text"),
        (("adapter", "trainable_tokens"), [""], "trainable_tokens.0: found ''; allowed: a token's text"),
        (("adapter", "trainable_tokens"), [True], "trainable_tokens.0: found True; allowed: a token's text"),
    ],
)
def test_a_wrong_value_is_one_mistake_that_says_what_is_allowed(path: tuple[str, ...], value: Any, answer: str) -> None:
    text = mistakes(changed(*path, value))
    assert "1 mistake\n" in text
    assert answer in text
