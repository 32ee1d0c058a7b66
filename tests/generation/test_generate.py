"""Files of answers: whose they are, that a kill loses a batch at most, and that nothing else goes on with them."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from lorafocal.errors import InputError
from lorafocal.generation import GenerationReport, generate
from lorafocal.generation.asks import Ask, Completion
from lorafocal.generation.formats import provenance_file, read_answers
from lorafocal.generation.journal import journal_file
from lorafocal.generation.local import TransformersEngine
from lorafocal.generation.subject import find_subject
from lorafocal.model.load import load_tokenizer
from lorafocal.model.saved import open_adapter, read_adapter
from lorafocal.release.merge import merge_adapter
from tests.killing import moments
from tests.saved_run import SavedRun

pytestmark = pytest.mark.slow

HOW: dict[str, Any] = {"max_new_tokens": 7, "batch_tokens": 90}


def made(target: Path | str, prompts: Path, out: Path, **options: Any) -> GenerationReport:
    return generate(target, prompts, out=out, say=lambda line: None, **(HOW | options))


def outputs(path: Path) -> list[str]:
    return [row.output for row in read_answers(path).rows]


def test_greedy_answers_of_a_run_are_transformers_own_and_those_of_the_merged_model(
    run: SavedRun, asked: Path, instructions: list[str], tmp_path: Path
) -> None:
    """The adapter attached, the adapter merged, and `generate` one prompt at a time; the base says something else."""
    made(run.folder, asked, tmp_path / "run.json")
    made(run.adapter, asked, tmp_path / "adapter.json")
    merge_adapter(run.adapter, tmp_path / "merged", dtype="float32")
    made(tmp_path / "merged", asked, tmp_path / "merged.json")
    made(run.base, asked, tmp_path / "base.json")
    policy = open_adapter(read_adapter(run.adapter), dtype="float32")
    tokenizer = load_tokenizer(str(run.base))
    expected = []
    for text in instructions:
        chat = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        output = policy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=7,
                                 pad_token_id=0)  # fmt: skip
        expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    assert outputs(tmp_path / "run.json") == expected
    assert outputs(tmp_path / "adapter.json") == expected
    assert outputs(tmp_path / "merged.json") == expected
    assert outputs(tmp_path / "base.json") != expected


def test_alpaca_evals_form_is_the_packages_and_its_provenance_names_no_place(
    run: SavedRun, asked: Path, instructions: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "mine.json"
    report = made(run.folder, asked, out, temperature=0.9, seed=3)
    rows = json.loads(out.read_text())
    assert [row["instruction"] for row in rows] == instructions
    assert all(set(row) == {"instruction", "output", "generator", "dataset"} for row in rows)
    assert list(pd.read_json(out).columns) == ["instruction", "output", "generator", "dataset"]  # as the package reads
    assert {row["generator"] for row in rows} == {"run"}
    record = json.loads(provenance_file(out).read_text())
    assert record["sampling"]["temperature"] == 0.9
    assert record["sampling"]["stop"] == [load_tokenizer(str(run.base)).eos_token_id]
    assert record["target"]["kind"] == "adapter"
    assert record["target"]["base"]["name"] == "base"
    assert record["target"]["objective"]["name"] == "focalpo"
    assert record["prompts"]["count"] == record["counts"]["answers"] == len(rows) == report.answers
    assert torch.__version__.startswith(record["versions"]["torch"])  # a build for GPUs may say more
    assert 0 < report.length_limit < len(rows)
    assert f"{report.length_limit} cut at the limit" in str(report)
    assert str(tmp_path) not in out.read_text() + provenance_file(out).read_text()
    again = tmp_path / "again.json"
    made(run.folder, asked, again, temperature=0.9, seed=3)
    assert again.read_bytes() == out.read_bytes()
    made(run.folder, asked, tmp_path / "named.json", temperature=0.9, seed=4, name="other")
    assert read_answers(tmp_path / "named.json").generator == "other"
    assert outputs(tmp_path / "named.json") != outputs(out)


def test_arena_hards_questions_are_answered_turn_by_turn(run: SavedRun, questions: Path, tmp_path: Path) -> None:
    """The oracle asks for each second turn by itself, after what was answered to the first."""
    out = tmp_path / "mine.jsonl"
    made(run.folder, questions, out, preset="arena-hard")
    answers = read_answers(out)
    asked = [json.loads(line) for line in questions.read_text().splitlines()]
    assert [row.question_id for row in answers.rows] == [question["question_id"] for question in asked]
    chats = []
    for question, row in zip(asked, answers.rows, strict=True):
        assert len(row.turns) == len(row.tokens) == len(question["turns"])
        first, *later = question["turns"]
        chat = [{"role": "user", "content": first["content"]}]
        for turn in later:
            chat += [{"role": "assistant", "content": row.turns[0]}, {"role": "user", "content": turn["content"]}]
        chats.append({"prompt": chat})
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    made(run.folder, tmp_path / "chats.jsonl", tmp_path / "chats.json")
    assert [row.output for row in answers.rows] == outputs(tmp_path / "chats.json")
    line = json.loads(out.read_text().split("\n")[0])
    assert set(line) == {"question_id", "answer_id", "model_id", "choices"}
    assert line["choices"][0]["index"] == 0
    assert line["choices"][0]["turns"][0]["token_len"] > 0


class Counting:
    """An engine of five batches of three that says what it is asked for."""

    name = "transformers"
    target: Mapping[str, Any] = {"name": "counting"}
    settings: Mapping[str, Any] = {"stop": [1]}
    notes = ("a note",)

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def plan(self, asks: Sequence[Ask]) -> list[list[Ask]]:
        return [list(asks[start::5]) for start in range(5)]

    def answer(self, batch: Sequence[Ask]) -> list[Completion]:
        self.asked.append([ask.key for ask in batch])
        return [Completion(f"{ask.key} \u00e4 {ask.messages[0]['content']}", 3, ended=ask.key[0] > 2) for ask in batch]


@pytest.mark.slow
@pytest.mark.row("54")
def test_a_kill_at_any_moment_loses_a_batch_at_most_and_the_same_call_goes_on(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    engine = Counting()
    monkeypatch.setattr("lorafocal.generation.on_this_machine", lambda *target, **how: (engine, "to count"))

    def left() -> dict[str, bytes]:
        """What is there now; then nothing is."""
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        for file in folder.iterdir():
            file.unlink()
        return files

    made("counting", asked, folder / "a.json")
    expected = left()
    assert set(expected) == {"a.json", "a.provenance.json"}
    kills = []
    for killed in moments(lambda: made("counting", asked, folder / "a.json"), folder):
        journal = journal_file(folder / "a.json")
        kept = max(journal.read_bytes().count(b"\n") - 1, 0) if journal.is_file() else 0
        complete = not journal.exists() and provenance_file(folder / "a.json").is_file()
        engine.asked.clear()
        made("counting", asked, folder / "a.json")
        assert len(engine.asked) == (0 if complete else 5 - kept)
        assert left() == expected
        kills.append((killed, kept))
    assert {kept for killed, kept in kills if killed} == {0, 1, 2, 3, 4, 5}


@pytest.mark.row("54")
@pytest.mark.parametrize("batches", [0, 1, 2])
def test_answers_are_those_of_a_call_that_was_not_interrupted(
    run: SavedRun, asked: Path, tmp_path: Path, batches: int
) -> None:
    how = {"temperature": 0.8, "seed": 2}
    made(run.folder, asked, tmp_path / "whole.json", **how)
    _stop_after(batches, run, asked, tmp_path / "a.json", **how)
    assert journal_file(tmp_path / "a.json").read_bytes().count(b"\n") == 1 + batches
    made(run.folder, asked, tmp_path / "a.json", **how)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_a_torn_batch_is_asked_for_again(run: SavedRun, asked: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "a.json", tmp_path / "whole.json"
    made(run.folder, asked, whole)
    _stop_after(1, run, asked, out)
    journal = journal_file(out)
    for lost in (1, 5, len(journal.read_bytes().split(b"\n")[1])):
        text = journal.read_bytes()
        journal.write_bytes(text[:-lost])
        _stop_after(1, run, asked, out)
        assert journal.read_bytes() == text
    made(run.folder, asked, out)
    assert out.read_bytes() == whole.read_bytes()
    assert not journal.exists()


def test_one_process_at_a_time_and_a_damaged_journal_is_named(run: SavedRun, asked: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    _stop_after(1, run, asked, out)
    journal = journal_file(out)
    with journal.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"a\.partial\.jsonl is being written by another process"):
            made(run.folder, asked, out)
    text = journal.read_bytes()
    for damaged in (b"{}\n", b"no JSON\n", text + b'{"answers": [[0]]}\n'):
        journal.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.partial\.jsonl is damaged .* remove it to begin again"):
            made(run.folder, asked, out)
    journal.write_bytes(b'{"generati')  # a kill in the first line
    made(run.folder, asked, out)
    assert not journal.exists()


def _stop_after(batches: int, run: SavedRun, asked: Path, out: Path, **options: Any) -> None:
    """As Ctrl-C after some batches."""
    answer, left = TransformersEngine.answer, [batches]

    def interrupted(engine: TransformersEngine, batch: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return answer(engine, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersEngine, "answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made(run.folder, asked, out, **options)


@pytest.mark.row("58")
def test_other_settings_are_refused_by_name_and_leave_what_there_is(
    run: SavedRun, asked: Path, instructions: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "a.json"
    _stop_after(1, run, asked, out)
    others = asked.with_name("others.json")
    others.write_text(json.dumps([{"instruction": text} for text in instructions[1:]]))
    shutil.copytree(run.folder, tmp_path / "other" / "run")
    weights = tmp_path / "other" / "run" / "adapter" / "adapter_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-2] ^= 1
    weights.write_bytes(changed)
    changes: list[tuple[str, dict[str, Any]]] = [
        (r"sampling\.max_new_tokens: 7 -> 9", {"max_new_tokens": 9}),
        (r"sampling\.temperature: 0\.0 -> 0\.5", {"temperature": 0.5}),
        (r"sampling\.batch_tokens: 90 -> 91", {"batch_tokens": 91}),
        (r"sampling\.system: \(absent\) -> ''", {"system": ""}),
        (r"target\.generator: 'run' -> 'b'", {"name": "b"}),
        (r"prompts\.count: 14 -> 13", {"prompts": others}),
        (r"target\.kind: 'adapter' -> 'model'", {"target": run.base}),
        (r"target\.adapter_sha256: ", {"target": tmp_path / "other" / "run"}),
    ]

    def refused() -> None:
        kept = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
        for says, options in changes:
            given = {"target": run.folder, "prompts": asked, "out": out} | options
            with pytest.raises(InputError, match=rf"(?s)is of another generation:.*{says}.*another --out"):
                made(**given)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == kept

    refused()
    made(run.folder, asked, out)
    refused()
    stands = out.stat().st_mtime_ns
    report = made(run.folder, asked, out)
    assert out.stat().st_mtime_ns == stands
    assert report.answers == 14
    assert report.counts["answers"] == 14
    provenance_file(out).unlink()
    with pytest.raises(InputError, match="nothing beside it says how it was made"):
        made(run.folder, asked, out)


def test_what_cannot_be_is_refused_before_weights_are_loaded(
    run: SavedRun, asked: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafocal.generation.local.TransformersEngine.answer", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"folder .*none does not exist", {"out": tmp_path / "none" / "a.json"}),
        (r"answers end in \.json .* or \.jsonl", {"out": tmp_path / "a.txt"}),
        (r"\.jsonl is Arena-Hard's form", {"out": tmp_path / "a.jsonl"}),
        (r"question\.jsonl, row 1: a question of several turns", {"prompts": questions}),
        (r"there is no preset 'best'; known: llama3-alpaca", {"preset": "best"}),
        (r"top_p and top_k choose among tokens", {"top_k": 3}),
        (r"max_new_tokens is 1 or more", {"max_new_tokens": 0}),
        (r"batch_tokens is 1 or more", {"batch_tokens": 0}),
        (r"engine is auto or transformers or vllm", {"engine": "hf"}),
        (r"vLLM cannot answer here: vLLM is not installed", {"engine": "vllm"}),
        (r"runs/mine: there is no such folder", {"target": "runs/mine"}),
        (r"holds no adapter and no model", {"target": tmp_path / "runs"}),
        (r"leave --base out", {"target": run.base, "base": "other"}),
    ]
    for says, options in cases:
        given = {"target": run.folder, "prompts": asked, "out": tmp_path / "a.json"} | options
        with pytest.raises(InputError, match=says):
            made(**given)
    assert not [file.name for file in tmp_path.iterdir() if "a." in file.name]


def test_a_second_system_message_is_refused(run: SavedRun, asked: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chat = [{"role": "system", "content": "sort"}, {"role": "user", "content": "3 1"}]
    chats.write_text(json.dumps({"prompt": chat}))
    with pytest.raises(InputError, match=r"chats\.jsonl, row 1: the prompt has a system message of its own"):
        made(run.folder, chats, tmp_path / "a.json", preset="mistral-base-alpaca")
    made(run.folder, chats, tmp_path / "b.json")
    assert read_answers(tmp_path / "b.json").rows[0].instruction == "[system]\nsort\n\n[user]\n3 1"


def test_special_tokens_in_prompts_are_read_and_said(run: SavedRun, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("sort 2 1\nsort <|end|> 3\n")
    report = made(run.folder, tmp_path / "p.txt", tmp_path / "a.json")
    assert any(
        "1 of the prompts spell special tokens of the model (the first: p.txt, row 2)" in n for n in report.notes
    )
    assert json.loads(provenance_file(tmp_path / "a.json").read_text())["notes"] == list(report.notes)


def test_answers_that_may_pass_the_models_positions_are_noted(run: SavedRun, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("sort 2 1\nsort 3 1 2 9 8 7\n")
    room = 64 - len(find_subject(run.folder).speech.prompt_ids("sort 2 1"))
    [note] = made(run.folder, tmp_path / "p.txt", tmp_path / "a.json", max_new_tokens=room).notes
    assert note.startswith(f"1 of the prompts (the first: p.txt, row 2) with {room} new tokens pass the model's 64")
    assert made(run.folder, tmp_path / "p.txt", tmp_path / "b.json").notes == ()
