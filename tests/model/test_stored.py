"""A base that its name would not bring back is refused before anything is trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorafocal.compatibility import QUANTIZED
from lorafocal.errors import InputError
from lorafocal.model.adapters import attach_lora
from lorafocal.model.load import load_base
from lorafocal.model.stored import check_as_stored
from tests.model.families import random_model
from tests.tiny import disturb, lora, pairs, tiny_base, trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny_base(tie_word_embeddings=request.param).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", [None, *QUANTIZED])
def test_what_was_loaded_is_what_is_stored_with_and_without_an_adapter(
    base: str, dtype: str, quantization: str | None
) -> None:
    model = load_base(base, dtype=dtype, quantization=quantization)
    check_as_stored(model)
    check_as_stored(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))  # widens what is float
    more: dict[str, Any] = {"modules_to_save": ["norm"], "trainable_token_indices": [3]}
    policy = disturb(attach_lora(model, lora(**more)))
    check_as_stored(policy)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3", "phi3"])
def test_families_load_as_they_are_stored(tmp_path: Path, family: str) -> None:
    random_model(family).save_pretrained(tmp_path)
    check_as_stored(load_base(str(tmp_path)))


def test_a_model_from_nowhere_is_nobody_elses() -> None:
    check_as_stored(tiny_base())


@pytest.mark.row("5", "S13")
def test_a_base_with_an_adapter_merged_into_it_is_not_taken_for_the_one_it_was(tmp_path: Path, base: str) -> None:
    """The usual second stage in one process: its adapter would be saved as one for the first base."""
    policy = disturb(attach_lora(load_base(base), lora()), scale=1e-3)
    merged = policy.merge_and_unload()
    with pytest.raises(InputError, match=r"is not what is stored there.*save_pretrained"):
        trainer(tmp_path / "run", pairs(4), model=merged, peft_config=lora())
    merged.save_pretrained(tmp_path / "merged")
    check_as_stored(load_base(str(tmp_path / "merged")))


@pytest.mark.row("6")
def test_what_pissa_leaves_of_a_base_is_not_taken_for_it(base: str) -> None:
    policy = attach_lora(load_base(base, dtype="float32"), lora(init_lora_weights="pissa"))
    with pytest.raises(InputError, match="is not what is stored there"):
        check_as_stored(policy.unload())


def test_a_vocabulary_that_grew_in_memory_is_refused(base: str) -> None:
    model = load_base(base)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    with pytest.raises(InputError, match=r"\.weight is not what is stored there"):
        check_as_stored(model)


@pytest.mark.row("9")
@pytest.mark.parametrize("with_adapter", [False, True])
def test_layers_left_in_float_on_loading_are_refused_and_in_a_checkpoint_they_are_not(
    tmp_path: Path, base: str, with_adapter: bool
) -> None:
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["down_proj", "lm_head"]
    )
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=how)
    model.save_pretrained(tmp_path / "partly")
    with pytest.raises(InputError, match=r"quantised to nf4 on loading.*down_proj.*left in float"):
        check_as_stored(get_peft_model(model, lora()) if with_adapter else model)
    stored: Any = load_base(str(tmp_path / "partly"))
    check_as_stored(PeftModel(stored, lora()) if with_adapter else stored)
