"""What vLLM would be given, by a stand-in of its documented interface: the package itself is never run here."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig

from lorafocal.errors import InputError
from lorafocal.generation import generate
from lorafocal.generation.asks import Ask
from lorafocal.generation.formats import provenance_file, read_answers
from lorafocal.generation.presets import Sampling
from lorafocal.generation.subject import find_subject
from lorafocal.generation.vllm import OWN_PROCESS, ROOM, VllmEngine, hindrance, request_seed
from tests.saved_run import SavedRun

ANSWER = [5, 6, 7]  # of which the last but one, below, ends


class FakeLLM:
    made: ClassVar[list[dict[str, Any]]] = []
    calls: ClassVar[list[tuple[list[Any], list[Any], Any]]] = []
    processes: ClassVar[list[str | None]] = []

    def __init__(self, **options: Any) -> None:
        self.made.append(options)
        self.processes.append(os.environ.get(OWN_PROCESS))

    def generate(self, prompts: list[Any], parameters: list[Any], lora_request: Any = None) -> list[Any]:
        self.calls.append((prompts, parameters, lora_request))
        ended = [*ANSWER, parameters[0].stop_token_ids[0]]
        return [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=ended if number % 2 else ANSWER)])
            for number in range(len(prompts))
        ]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    package, lora, request = (ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    package.__spec__ = SimpleNamespace(name="vllm")  # type: ignore[assignment]  # what find_spec asks for
    package.LLM, package.SamplingParams = FakeLLM, SimpleNamespace  # type: ignore[attr-defined]
    request.LoRARequest = lambda *given: given  # type: ignore[attr-defined]
    for module in (package, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(OWN_PROCESS, "")
    monkeypatch.delenv(OWN_PROCESS)  # what it is set to is gone after the test
    FakeLLM.made, FakeLLM.calls, FakeLLM.processes = [], [], []
    return FakeLLM


def test_prompts_parameters_and_the_adapter_go_as_documented(
    run: SavedRun, asked: Path, tmp_path: Path, installed: type[FakeLLM]
) -> None:
    subject = find_subject(run.folder)
    said: list[str] = []
    how = {"temperature": 0.9, "top_p": 0.8, "max_new_tokens": 5, "seed": 3}
    report = generate(run.folder, asked, out=tmp_path / "a.json", say=said.append, **how)
    assert report.engine == "vllm"
    assert "answers by vLLM" in said
    [made] = installed.made
    assert made["model"] == str(run.base)
    assert (made["enable_lora"], made["max_lora_rank"]) == (True, 8)
    assert (made["dtype"], made["trust_remote_code"], made["generation_config"]) == ("float32", False, "vllm")
    [(prompts, parameters, adapter)] = installed.calls
    assert adapter == ("run", 1, str(run.adapter))
    texts = [row["instruction"] for row in json.loads(asked.read_text())]
    assert [prompt["prompt_token_ids"] for prompt in prompts] == [subject.speech.prompt_ids(text) for text in texts]
    assert {(p.temperature, p.top_p, p.top_k, p.max_tokens) for p in parameters} == {(0.9, 0.8, -1, 5)}
    assert parameters[0].stop_token_ids == sorted(subject.ends)
    assert [p.seed for p in parameters] == [request_seed(3, (place, 0)) for place in range(14)]
    text = subject.tokenizer.decode(ANSWER)
    assert [row.output for row in read_answers(tmp_path / "a.json").rows] == [text] * 14
    assert report.length_limit == 7
    assert json.loads(provenance_file(tmp_path / "a.json").read_text())["sampling"]["engine"] == "vllm"
    generate(run.base, asked, out=tmp_path / "b.json", say=said.append, max_new_tokens=5)
    assert "enable_lora" not in installed.made[1]
    assert installed.calls[1][2] is None
    assert installed.calls[1][1][0].seed is None  # greedy


def test_no_process_is_forked_in_which_cuda_would_not_start(
    run: SavedRun, asked: Path, tmp_path: Path, installed: type[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.cuda.is_available() is enough for that, and vLLM looks for an initialised CUDA alone."""
    generate(run.base, asked, out=tmp_path / "a.json", max_new_tokens=5)
    monkeypatch.setenv(OWN_PROCESS, "1")  # what somebody has set stays
    generate(run.base, asked, out=tmp_path / "b.json", max_new_tokens=5)
    monkeypatch.delenv(OWN_PROCESS)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)  # then vLLM spawns one, whose memory ends with it
    generate(run.base, asked, out=tmp_path / "c.json", max_new_tokens=5)
    assert installed.processes == ["0", "1", None]


@pytest.mark.parametrize(
    ("positions", "prompt", "room"),
    [(131_072, 10, ROOM), (131_072, 10_000, 4 * 10_005), (8192, 10_000, 8192), (None, 10, None)],
)
def test_there_is_room_for_the_conversations_not_for_all_positions(
    run: SavedRun, installed: type[FakeLLM], positions: int | None, prompt: int, room: int | None
) -> None:
    engine = VllmEngine(find_subject(run.base), Sampling(max_new_tokens=5))
    engine._positions, engine.ids = positions, {(0, 0): [1] * prompt}
    assert engine._model
    assert installed.made[0]["max_model_len"] == room


def test_a_later_turn_that_outgrows_the_room_is_told_how_to_go_on(run: SavedRun, installed: type[FakeLLM]) -> None:
    engine = VllmEngine(find_subject(run.base), Sampling(max_new_tokens=5))
    engine._positions, engine.ids = 131_072, {(0, 0): [1] * 10}
    asks = [Ask(key, ({"role": "user", "content": "x"},), "row") for key in ((0, 0), (0, 1), (1, 1))]
    assert engine.answer(asks[:1])
    engine.ids |= {(0, 1): [1] * (ROOM - 5), (1, 1): [1] * ROOM}
    assert engine.answer(asks[1:2])
    with pytest.raises(InputError, match=rf"needs {ROOM + 5} tokens, .* for {ROOM} .* give the same command again"):
        engine.answer(asks[1:])
    assert len(installed.calls) == 2


def test_what_vllm_would_get_wrong_is_left_to_transformers(run: SavedRun, installed: type[FakeLLM]) -> None:
    subject = find_subject(run.folder)
    saved = subject.saved
    assert saved is not None
    assert hindrance(subject) is None
    dora = LoraConfig(r=4, use_dora=True, target_modules="all-linear")
    assert "refuse DoRA" in str(hindrance(replace(subject, saved=replace(saved, config=dora))))
    nf4 = replace(subject, saved=replace(saved, quantization="nf4"))
    assert "does not hold a base in nf4 as training did" in str(hindrance(nf4))
    wide = LoraConfig(r=64, target_modules="all-linear")
    assert hindrance(replace(subject, saved=replace(saved, config=wide))) is None


def test_seeds_of_requests_differ_and_fit() -> None:
    seeds = {request_seed(2**63 - 1, (place, turn)) for place in range(1000) for turn in range(3)}
    assert len(seeds) == 3000
    assert 0 <= min(seeds) <= max(seeds) < 2**63


def test_without_a_gpu_or_the_package_it_says_so(run: SavedRun, asked: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vLLM cannot answer here: vLLM is not installed. Leave --engine out"):
        generate(run.base, asked, out=tmp_path / "a.json", engine="vllm")
