"""Files of prompts in each form, and what is refused by row and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafocal.errors import InputError
from lorafocal.generation.presets import PRESETS, Sampling, sampling_of
from lorafocal.generation.prompts import Prompts, read_prompts
from lorafocal.publish import sha256

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
ANSWERS = {"chosen": [{"role": "assistant", "content": "y"}], "rejected": [{"role": "assistant", "content": "n"}]}


def read(folder: Path, rows: Any, name: str = "p.json") -> Prompts:
    text = rows if isinstance(rows, str) else json.dumps(rows)
    (folder / name).write_text(text)
    return read_prompts(folder / name)


def test_each_form_gives_its_prompts(tmp_path: Path) -> None:
    plain = [({"role": "user", "content": "a"},), ({"role": "user", "content": "c"},)]
    for rows, form in (
        ([{"instruction": "a", "dataset": "d", "output": "o"}, {"instruction": "c"}], "instructions"),
        ([{"prompt": "a"}, {"prompt": "c"}], "prompts"),
        ([{"prompt": p, "chosen": "y", "rejected": "n"} for p in ("a", "c")], "preferences"),
        ([{"question_id": p, "turns": [{"content": p}]} for p in ("a", "c")], "arena-hard"),
    ):
        prompts = read(tmp_path, rows)
        assert prompts.form == form
        assert [prompt.messages for prompt in prompts.rows] == plain
        assert prompts.as_dict() == {
            "file": "p.json", "sha256": sha256(tmp_path / "p.json"), "count": 2, "form": form
        }  # fmt: skip
    lines = read(tmp_path, "a\r\n\n  \nc\n", "p.txt")
    assert [prompt.messages for prompt in lines.rows] == plain
    assert lines.rows[1].place == "p.txt, row 4"
    assert read(tmp_path, [{"instruction": "a", "dataset": "d"}]).rows[0].dataset == "d"


def test_conversations_and_several_turns(tmp_path: Path) -> None:
    [prompt] = read(tmp_path, [{"prompt": CHAT}]).rows
    assert list(prompt.messages) == CHAT
    assert prompt.instruction == "[user]\na\n\n[assistant]\nb\n\n[user]\nc"
    [prompt] = read(tmp_path, [{"question_id": "q", "turns": [{"content": "a"}, {"content": "c"}]}]).rows
    assert (prompt.instruction, prompt.later, prompt.question_id) == ("a", ("c",), "q")
    twice = read(tmp_path, [{"prompt": CHAT, **ANSWERS}, {"prompt": CHAT[:1], **ANSWERS}, {"prompt": CHAT, **ANSWERS}])
    assert [list(prompt.messages) for prompt in twice.rows] == [CHAT, CHAT[:1]]
    assert twice.repeated == 1


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "it holds no prompts"),
        ("", "it holds no prompts"),
        (["a"], "row 1: a row is an object"),
        ([{"text": "a"}], r"no prompts are recognised \(the first row has text\)"),
        ([{"prompt_ids": [1]}], "holds token ids"),
        ([{"instruction": "a"}, {"instruction": ""}], "row 2, key `instruction`: an empty string"),
        ([{"instruction": "a"}, {"prompt": "b"}], "row 2, key `instruction`: expected a string, found null"),
        ([{"instruction": "a", "input": "b"}], "key `input`: half of what was asked"),
        ([{"prompt": CHAT[:2]}], "key `prompt`: the last message is the assistant's"),
        ([{"prompt": json.dumps(CHAT)}], "key `prompt`: a list of messages that was written as text"),
        ([{"instruction": json.dumps(CHAT)}], "key `instruction`: a list of messages that was written as text"),
        ([{"question_id": "q", "turns": ["a", json.dumps(CHAT)]}], r"key `turns\[1\]\.content`: a list of messages"),
        ([{"prompt": "a", "tools": ["x"]}], "rows with tools are not supported"),
        ([{"question_id": "q", "turns": []}], "key `turns`: expected a list of turns"),
        ([{"question_id": "q", "turns": [{"text": "a"}]}], r"key `turns\[0\]\.content`: expected a string"),
        ([{"turns": [{"content": "a"}]}], "key `question_id`: expected a string"),
        ([{"question_id": "q", "turns": ["a"]}] * 2, "the question q stands there twice"),
    ],
)
def test_what_is_no_prompt_is_named(tmp_path: Path, rows: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read(tmp_path, rows)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("none.json", "none.txt"):
        with pytest.raises(InputError, match=f"{name}.*(no such file|No such file)"):
            read_prompts(tmp_path / name)


@pytest.mark.row("58")
def test_presets_are_those_of_the_published_numbers() -> None:
    """SimPO's eval folder at 1b3e8f3, which the paper follows; top_p is 1 there, and no top_k is set."""
    drawn = {name: (p.sampling.temperature, p.sampling.max_new_tokens) for name, p in PRESETS.items()}
    assert drawn["llama3-alpaca"] == (0.9, 4096)
    assert drawn["mistral-base-alpaca"] == (0.7, 2048)
    assert drawn["arena-hard"] == (0.0, 4096)
    assert all((p.sampling.top_p, p.sampling.top_k) == (1.0, 0) for p in PRESETS.values())
    assert {name for name, p in PRESETS.items() if p.sampling.system is not None} == {"mistral-base-alpaca"}
    assert sampling_of("llama3-alpaca", seed=4, top_p=None) == Sampling(max_new_tokens=4096, temperature=0.9, seed=4)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": float("nan")}, {"max_new_tokens": 0}, {"top_p": 0}, {"top_p": 1.5},
     {"top_k": -1}, {"seed": -1}, {"seed": 2**63}],
)  # fmt: skip
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**({"max_new_tokens": 4, "temperature": 1.0} | wrong))  # type: ignore[arg-type]
