"""The cached base: complete or absent, found again, trained anew when its recipe changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafocal.data.toy import toy_tokenizer
from lorafocal.model import toy_base as module
from lorafocal.model.toy_base import ToyRecipe, content_key, toy_base, toy_config

TINY = ToyRecipe(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    steps=60,
    examples_per_step=16,
)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_it_learns_and_loads_by_the_usual_doors(tmp_path: Path) -> None:
    losses: list[float] = []
    folder = toy_base(tmp_path, recipe=TINY, on_step=lambda step, loss: losses.append(loss))
    assert len(losses) == TINY.steps
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert (folder / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.slow
def test_a_second_call_finds_it_and_another_cache_gives_the_same_bits(tmp_path: Path) -> None:
    first = toy_base(tmp_path / "a", recipe=TINY)
    steps: list[int] = []
    assert toy_base(tmp_path / "a", recipe=TINY, on_step=lambda step, loss: steps.append(step)) == first
    assert steps == []
    torch.manual_seed(99)  # the caller's seed has no say
    again = toy_base(tmp_path / "b", recipe=TINY)
    assert again.name == first.name
    assert all(torch.equal(weights(first)[name], tensor) for name, tensor in weights(again).items())


def test_the_callers_random_state_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU's state is the caller's too"))
    toy_base(tmp_path, recipe=replace(TINY, steps=2))
    assert torch.equal(torch.rand(2), expected)


def test_whatever_changes_the_weights_changes_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = {content_key(TINY)}
    keys |= {content_key(replace(TINY, **change)) for change in ({"seed": 1}, {"steps": 61}, {"wrong_share": 0.4})}
    monkeypatch.setattr(torch, "__version__", "0.0")
    keys.add(content_key(TINY))
    changed = tmp_path / "toy.py"
    changed.write_text("another rule")
    monkeypatch.setattr(module.toy, "__file__", str(changed))
    keys.add(content_key(TINY))
    assert len(keys) == 6


def test_an_interrupted_training_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a stop while training nor one while saving leaves anything that a later call would take for a base."""
    recipe = replace(TINY, steps=2)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy_base(tmp_path, recipe=recipe, on_step=stop)
    with monkeypatch.context() as patch:
        patch.setattr(module.LlamaForCausalLM, "save_pretrained", stop)
        with pytest.raises(KeyboardInterrupt):
            toy_base(tmp_path, recipe=recipe)
    assert list(tmp_path.iterdir()) == []


def test_a_leftover_of_a_killed_process_is_not_used(tmp_path: Path) -> None:
    recipe = replace(TINY, steps=2)
    leftover = tmp_path / f".toy-base-{content_key(recipe)}-killed"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert toy_base(tmp_path, recipe=recipe) != leftover


def test_two_processes_at_once_leave_one_whole_base(tmp_path: Path) -> None:
    recipe, others = replace(TINY, steps=2), []

    def meanwhile(*_: object) -> None:
        others.append(toy_base(tmp_path, recipe=recipe))

    folder = toy_base(tmp_path, recipe=recipe, on_step=meanwhile)
    assert set(others) == {folder} == set(tmp_path.iterdir())
    alone = toy_base(tmp_path / "alone", recipe=recipe)
    assert all(torch.equal(weights(folder)[name], tensor) for name, tensor in weights(alone).items())


def test_the_cache_is_that_of_tokenised_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAFOCAL_CACHE", str(tmp_path / "moved"))
    assert toy_base(recipe=replace(TINY, steps=1)).parent == tmp_path / "moved"


def test_the_default_has_about_312_thousand_parameters() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(toy_config(ToyRecipe(), toy_tokenizer()))
    assert model.num_parameters() == pytest.approx(312_000, rel=0.02)
