"""What a run leaves behind is taken up again by a run that is set as it was, and by no other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lorafocal.errors import InputError
from lorafocal.model.load import load_base
from lorafocal.trainer import FocalPOTrainer
from tests.tiny import lora, pairs, tiny_base, trainer

pytestmark = pytest.mark.slow  # many small runs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny_base().save_pretrained(folder)
    return str(folder)


def run_on(
    folder: Path, base: str, adapter: Mapping[str, Any], held: Mapping[str, Any], **settings: Any
) -> FocalPOTrainer:
    model = load_base(base, **({"dtype": "float32"} | dict(held)))
    return trainer(folder, pairs(8), model=model, peft_config=lora(**adapter), save_strategy="steps", **settings)


@pytest.mark.row("55")
@pytest.mark.parametrize(
    ("adapter", "held", "settings", "named"),
    [
        ({"lora_alpha": 16}, {}, {}, "lora_alpha: 8 -> 16"),
        ({"use_rslora": True}, {}, {}, "use_rslora: False -> True"),
        ({"alpha_pattern": {"q_proj": 2}}, {}, {}, r"alpha_pattern.q_proj: \(absent\) -> 2"),
        ({"init_lora_weights": "pissa"}, {}, {"objective": "sft"}, "r: 4 -> 8"),
        ({}, {"quantization": "nf4"}, {}, r"base.quantization: \(absent\) -> 'nf4'"),
        ({}, {"dtype": "bfloat16"}, {}, "base.dtype: 'float32' -> 'bfloat16'"),
        ({}, {}, {"beta": 0.5}, r"objective.beta: 0.1 -> 0.5"),
        ({}, {}, {"objective": "dpo"}, "objective.name: 'focalpo' -> 'dpo'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_checkpoint_whose_tensors_would_mean_something_else_is_refused(
    tmp_path: Path, base: str, adapter: dict[str, Any], held: dict[str, Any], settings: dict[str, Any], named: str
) -> None:
    """Tensors have the same names and shapes in all of these, so nothing but the settings tells."""
    first = {"objective": "sft"} if settings == {"objective": "sft"} else {}
    run_on(tmp_path, base, {}, {}, max_steps=1, save_steps=1, **first).train()
    with pytest.raises(InputError, match=named):
        run_on(tmp_path, base, adapter, held, max_steps=2, **settings).train(resume_from_checkpoint=True)


@pytest.mark.row("55", "5")
def test_a_checkpoint_on_other_weights_is_refused(tmp_path: Path, base: str) -> None:
    run_on(tmp_path / "run", base, {}, {}, max_steps=1, save_steps=1).train()
    tiny_base().save_pretrained(tmp_path / "moved")
    other = tiny_base()
    other.get_input_embeddings().weight[0] += 1
    other.save_pretrained(tmp_path / "other")
    run_on(tmp_path / "run", str(tmp_path / "moved"), {}, {}, max_steps=1).train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match=r"base\.sha256"):
        run_on(tmp_path / "run", str(tmp_path / "other"), {}, {}, max_steps=2).train(resume_from_checkpoint=True)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_an_earlier_save_of_the_same_kind_is_replaced(tmp_path: Path) -> None:
    """TRL's `save_model(args.output_dir)` would take the checkpoints and metrics with it."""
    run = trainer(tmp_path / "run", pairs(8), max_steps=1, save_strategy="steps", save_steps=1)
    run.train()
    tiny_base().save_pretrained(tmp_path / "base")
    foreign = {"notes": "thesis.tex", "card": "README.md", "source": "config.json"}
    for folder, name in foreign.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("mine")
    run.save_model(str(tmp_path / "older"))
    (tmp_path / "older" / "thesis.tex").write_text("mine")
    foreign |= {"older": "thesis.tex", "base": "config.json", "run": "checkpoint-1", "run/checkpoint-1": "adapter"}
    before = files_in(tmp_path)
    for folder, name in foreign.items():
        with pytest.raises(
            InputError, match=rf"/{folder} holds '{name}', .* \(save_model\(\) without one takes 'adapter'"
        ):
            run.save_model(str(tmp_path / folder))
    with pytest.raises(InputError, match="part of a checkpoint"):
        run.save_model(str(tmp_path / "run" / "checkpoint-1" / "adapter"))
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["additional_chat_templates", "qwen.tiktoken", "source.spm", "spiece.model", "vocab.txt"]
)
def test_whatever_a_tokenizer_leaves_is_part_of_a_save(tmp_path: Path, name: str) -> None:
    run = trainer(tmp_path / "run", pairs(8), max_steps=1)
    run.save_model()
    (tmp_path / "run" / "adapter" / name).mkdir()
    run.save_model()
    assert not (tmp_path / "run" / "adapter" / name).exists()


def test_a_save_is_repeated_over_itself_and_over_those_of_others(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", pairs(8), max_steps=1)
    for _ in range(2):
        run.save_model()
        run.save_model(str(tmp_path / "other"))
    run.model.save_pretrained(tmp_path / "peft")  # with a card
    (tmp_path / "peft" / "tokenizer.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for folder in ("peft", "empty"):
        run.save_model(str(tmp_path / folder))
        assert files_in(tmp_path / folder).keys() == files_in(tmp_path / "other").keys()


def test_a_whole_model_is_saved_over_itself_and_not_over_an_adapter(tmp_path: Path) -> None:
    trainer(tmp_path / "lora", pairs(8)).save_model()
    run = trainer(tmp_path / "run", pairs(8), model=tiny_base(), objective="sft")
    for _ in range(2):
        run.save_model()
    with pytest.raises(InputError, match="no part of a saved model"):
        run.save_model(str(tmp_path / "lora" / "adapter"))
