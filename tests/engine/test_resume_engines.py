"""Any engine goes on from any engine's checkpoint, in any number of processes, and ends where it would have ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lorafocal.saving
from lorafocal.checkpoint import save_state
from lorafocal.lineage import lineage_of
from lorafocal.model.load import base_fingerprint, load_base
from lorafocal.trainer import FocalPOTrainer
from tests.engine.forked import forked_ranks
from tests.tiny import lora, pairs, tiny_base, trainer

pytestmark = pytest.mark.engine

PAIRS, STEPS, SAVED = 17, 6, 2  # every third step has one pair: a rank has none
MOST = 20_000  # bytes of tensors in a file of a checkpoint, so that ranks share the files
ALONE = "one-process"
ACROSS = 1e-5  # relative


class Part(NamedTuple):
    """A run from the start, or from a step of another, by `engine`: of every weight in fp32 ("full"), with fp32 masters
    of bf16 ones ("bf16"), or of an adapter ("lora")."""

    kind: str
    engine: str
    begun: str = ""  # by whom, if not itself
    step: int = 0

    @property
    def folder(self) -> str:
        return f"{self.kind}/{self.engine}" + (f"-after-{self.begun}" if self.begun else "")

    @property
    def checkpoint(self) -> str:
        return f"{self.kind}/{self.begun}/checkpoint-{self.step}"


def own(kind: str, engine: str) -> tuple[Part, Part]:
    return Part(kind, engine), Part(kind, engine, engine, SAVED)


ALONE_FIRST = (*own("full", ALONE), *own("lora", ALONE))
TOGETHER = (
    *own("full", "zero2"), *own("full", "zero3"), *own("full", "fsdp2"), Part("full", "zero3", ALONE, SAVED),
    *own("bf16", "zero1"), *own("bf16", "fsdp2"), Part("bf16", "fsdp2", "zero1", SAVED),
    *own("lora", "zero3"), *own("lora", "fsdp2"), Part("lora", "zero2", ALONE, SAVED),
)  # fmt: skip
IN_BETWEEN = Part("full", ALONE, "zero3", SAVED)
BACK = Part("lora", ALONE, "zero3", SAVED)
LAST = Part("full", "fsdp2", f"{ALONE}-after-zero3", 2 * SAVED)
GONE_ON = [part for part in (*ALONE_FIRST, *TOGETHER, IN_BETWEEN, BACK, LAST) if part.begun]


def make(root: Path, part: Part) -> FocalPOTrainer:
    for state in (AcceleratorState, GradientState, PartialState):  # another engine's
        state._reset_state()
    return trainer(
        root / part.folder,
        pairs(PAIRS),
        model=load_base(str(root / "base"), dtype="bfloat16" if part.kind == "bf16" else "float32"),
        peft_config=lora() if part.kind == "lora" else None,
        objective="sft",
        max_steps=STEPS,
        num_train_epochs=2,
        save_strategy="steps",
        save_steps=SAVED,
        tokens_per_pack=40,
        optim="adamw_torch",
        engine=None if part.engine == ALONE else part.engine,
    )


def run(root: Path, part: Part, rank: int) -> None:
    made, steps = make(root, part), []
    step: Callable[..., Any] = made.training_step
    made.training_step = lambda *args: steps.append(made.state.global_step) or step(*args)  # type: ignore[assignment]
    made.train(resume_from_checkpoint=str(root / part.checkpoint) if part.begun else None)
    made.save_model()
    if rank == 0:
        (root / part.folder / "seen.json").write_text(json.dumps({"steps": steps, "engine": made.engine.word}))


def all_of(root: Path, parts: tuple[Part, ...]) -> Callable[[int], None]:
    def work(rank: int) -> None:
        lorafocal.saving.save_state = partial(save_state, most=MOST)
        for part in parts:
            run(root, part, rank)

    return work


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engines")
    tiny_base(tie_word_embeddings=True).save_pretrained(root / "base")
    for parts, world in ((ALONE_FIRST, 1), (TOGETHER, 2), ((IN_BETWEEN, BACK), 1), ((LAST,), 2)):
        assert forked_ranks(all_of(root, parts), root, world) == [0] * world
    return root


def made_by(root: Path, part: Part) -> dict[str, Tensor]:
    (file,) = (file for name in ("model", "adapter*") for file in (root / part.folder).glob(f"{name}/*.safetensors"))
    return load_file(file)


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Iterator[float]:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        yield float((ours[name].float() - tensor.float()).norm() / tensor.float().norm())


@pytest.mark.row("55", "F10")
@pytest.mark.parametrize("part", [part for part in GONE_ON if part.begun == part.engine], ids=str)
def test_the_same_engine_ends_with_the_same_bits(root: Path, part: Part) -> None:
    assert json.loads((root / part.folder / "seen.json").read_text()) == {"steps": [2, 3, 4, 5], "engine": part.engine}
    whole = Part(part.kind, part.engine)
    assert list(differences(made_by(root, part), made_by(root, whole))) == [0.0] * len(made_by(root, whole))
    last, expected = (root / of.folder / f"checkpoint-{STEPS}" for of in (part, whole))
    for file in expected.glob("*.safetensors"):
        assert (last / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.row("55", "F10")
@pytest.mark.parametrize("part", [part for part in GONE_ON if part.begun != part.engine], ids=str)
def test_another_engine_in_another_number_of_processes_ends_there_too(root: Path, part: Part) -> None:
    """bf16 arithmetic rounds otherwise wherever packs are split otherwise; its masters are compared with its own."""
    seen = json.loads((root / part.folder / "seen.json").read_text())
    assert seen == {"steps": list(range(part.step, STEPS)), "engine": part.engine}
    rounded = part.kind == "bf16"
    whole = Part(part.kind, part.engine if rounded else ALONE)
    assert max(differences(made_by(root, part), made_by(root, whole))) < (1e-2 if rounded else ACROSS)


@pytest.mark.row("F10")
@pytest.mark.parametrize("part", [part for part in TOGETHER if not part.begun and part.kind != "lora"], ids=str)
def test_a_checkpoint_holds_whole_masters_and_moments_in_fp32_without_a_pickle(root: Path, part: Part) -> None:
    folder = root / part.folder / f"checkpoint-{SAVED}"
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json"}
    state = json.loads((folder / "state.json").read_text())
    assert state["files"]["parameters"] > 2
    values, moments = (
        {n: t for file in folder.glob(f"{stem}*.safetensors") for n, t in load_file(file).items()}
        for stem in ("parameters", "optimizer")
    )
    shapes = {name: tuple(p.shape) for name, p in tiny_base(tie_word_embeddings=True).named_parameters()}
    assert {name: tuple(tensor.shape) for name, tensor in values.items()} == shapes
    assert {tensor.dtype for tensor in (*values.values(), *moments.values())} == {torch.float32}
    assert {name: tuple(moments[f"{name}/exp_avg"].shape) for name in shapes} == shapes
    if part.kind == "bf16":  # masters, and not bf16 weights widened
        assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in values.values())


@pytest.mark.row("47")
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_an_adapter_is_whole_though_every_process_holds_a_part(root: Path, engine: str) -> None:
    adapter = made_by(root, Part("lora", engine))
    assert all(tensor.ndim == 2 and tensor.any() for tensor in adapter.values())
    in_checkpoint = root / "lora" / engine / f"checkpoint-{STEPS}" / "adapter" / "adapter_model.safetensors"
    assert list(differences(load_file(in_checkpoint), adapter)) == [0.0] * len(adapter)


@pytest.mark.parametrize("kind", ["full", "bf16"])
def test_plain_transformers_loads_the_model_that_several_processes_trained(root: Path, kind: str) -> None:
    folder = root / kind / "fsdp2" / "model"
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == dtype
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    stored = made_by(root, Part(kind, "fsdp2"))
    assert {name: p.shape for name, p in model.named_parameters()} == {name: t.shape for name, t in stored.items()}
    assert all(torch.equal(parameter, stored[name]) for name, parameter in model.named_parameters())
    (stage,) = lineage_of(folder).parents  # type: ignore[union-attr]
    assert (stage.how, stage.sha256, stage.steps) == ("full", base_fingerprint(str(folder))["sha256"], STEPS)
