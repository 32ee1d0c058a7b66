"""An adapter's files: the same for the same adapter, whichever process writes them."""

from __future__ import annotations

import json
from pathlib import Path

from lorafocal.model.adapters import attach_lora
from lorafocal.model.save import in_order, save_adapter
from tests.tiny import lora, tiny_base

TARGETS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_names_that_peft_keeps_in_sets_are_written_in_order(tmp_path: Path) -> None:
    policy = attach_lora(tiny_base(), lora())
    kept = policy.peft_config["default"].target_modules
    save_adapter(policy, tmp_path, None)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert isinstance(kept, set)
    assert written == sorted(kept)
    assert {name.rpartition(".")[2] for name in written} == TARGETS
    assert policy.peft_config["default"].target_modules is kept


def test_all_sets_are_ordered_and_the_configuration_itself_stays() -> None:
    config = lora(target_modules=[*TARGETS], exclude_modules=["b", "a", "d", "c"])
    made = in_order(config)
    assert (made.target_modules, made.exclude_modules) == (sorted(TARGETS), ["a", "b", "c", "d"])
    assert (config.target_modules, config.exclude_modules) == (TARGETS, set("abcd"))
