"""Plans of configs: what fits on which card, how long it takes, what to change, and what was assumed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorafocal import memory
from lorafocal.config import Config, check_config, load_config
from lorafocal.errors import InputError
from lorafocal.memory import Lengths
from lorafocal.plan import plan

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
LORA, QLORA = ROOT / "configs/lora/llama3-8b.yaml", ROOT / "configs/qlora/llama3-8b.yaml"
GIB = 2**30


def config(*overrides: str, file: Path = LORA) -> Config:
    return load_config(file, list(overrides))


@pytest.mark.row("37")
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_shipped_config_is_answered_at_once_without_torch(file):
    code = (
        "import sys; from lorafocal.config import load_config; from lorafocal.plan import plan;"
        f" found = plan(load_config({str(file)!r}), None); print(found.table());"
        " assert not {'torch', 'transformers', 'datasets', 'bitsandbytes'} & {*sys.modules}"
    )
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=10).stdout
    assert said.count("yes") >= 6
    assert "assumed:" in said


@pytest.mark.row("37")
@pytest.mark.parametrize("gpus", ["1xRTX4090", "8xA100-40", "1xH200", "1x12GiB"])
@pytest.mark.parametrize("file", [LORA, QLORA], ids=["lora", "qlora"])
def test_parts_add_up_and_a_run_that_fits_stays_below_the_card(file, gpus):
    (found,) = plan(config(file=file), gpus).machines
    assert found.used == sum(part.bytes for part in found.parts)
    assert found.fits == (found.used <= found.machine.gpu.memory_bytes)
    assert found.fits == (found.choice.tokens >= 2 * 2048 and found.budgets[found.choice.tier] >= found.choice.tokens)


@pytest.mark.row("37")
def test_small_cards_hold_8b_in_4_bits_and_no_others():
    for gib in (24, 12):
        (found,) = plan(config(file=QLORA), f"1x{gib}GiB").machines
        assert found.fits
    (found,) = plan(config(), "1x12GiB").machines
    assert not found.fits


@pytest.mark.row("37")
@pytest.mark.parametrize(
    ("gpus", "given"),
    [
        ("1x16GiB", {}),
        ("1x12GiB", {}),
        ("1xRTX4090", {"training.activation_checkpointing": "none"}),
        ("1xRTX4090", {"data.max_length": "8192", "packing.tokens": "20000"}),
    ],
)
def test_every_piece_of_advice_for_a_run_that_does_not_fit_is_enough(gpus, given):
    """Each line by itself, tried as the overrides or the card that it names."""
    found = plan(config(*(f"{key}={value}" for key, value in given.items())), gpus)
    assert not found.machines[0].fits
    assert found.advice
    for line in found.advice:
        words = line.removeprefix("together: ").partition(": ")[0]
        card = words.removeprefix("--gpus ") if words.startswith("--gpus") else gpus
        changed = {} if card != gpus else dict(override.split("=") for override in words.split())
        overrides = (f"{key}={value}" for key, value in (given | changed).items())
        assert plan(config(*overrides), card).machines[0].fits, line


@pytest.mark.row("37")
def test_a_stated_budget_and_tier_are_taken():
    asked = config("packing.tokens=4608", "training.activation_checkpointing=full", "kernels.adapters=peft")
    (found,) = plan(asked, "1xH100").machines
    assert (found.choice.tokens, found.choice.tier) == (4608, "full")
    with pytest.raises(InputError, match="PEFT's own adapter functions cannot"):
        plan(config("training.activation_checkpointing=mlp", "kernels.adapters=peft"), "1xH100")


def test_time_follows_operations_and_what_is_stated():
    at = Lengths(256, 384, 384)
    values = load_config(LORA, ["reference.kind=cached"]).model_dump()
    values["data"]["eval"] = None
    del values["training"]["eval_strategy"], values["training"]["eval_steps"]
    found = plan(check_config(values), "2xH100", tflops=500, pairs=12_800, lengths=at, price_per_hour=3.0)
    (here,) = found.machines
    least = memory.minimum_flops_per_pair(found.work.shape, found.work.setup, at)
    assert here.choice.tier == "none"
    assert here.speed is not None
    assert here.speed.step_s == pytest.approx(128 * least / (2 * 500e12))
    assert found.work.steps == 100
    assert here.speed.hours == pytest.approx(here.speed.reference_h + 100 * here.speed.step_s / 3600)
    assert here.speed.cost == pytest.approx(here.speed.hours * 2 * 3.0)
    assert [line.partition(":")[0] for line in found.assumed] == ["memory"]  # nothing else was left open


def test_a_stored_reference_is_one_pass_and_leaves_the_step():
    live, stored = (
        plan(config(f"reference.kind={kind}"), "1xH100").machines[0].speed for kind in ("disabled_adapter", "cached")
    )
    assert live is not None
    assert stored is not None
    assert live.reference_h == 0 < stored.reference_h
    assert stored.step_s < 0.7 * live.step_s


def test_a_second_model_is_counted():
    second = config("reference.kind=separate_model", "reference.model=some/model", "reference.identity_probe=null")
    (found,) = plan(second, "1xH100").machines
    (part,) = (part for part in found.parts if part.name == "reference")
    assert part.bytes / GIB == pytest.approx(14.96, abs=0.01)


def test_quantised_matrices_cost_time_in_every_pack():
    float_step, quantized_step = (
        plan(config("training.optim=adamw_torch", file=file), "1xH100", tflops=450).machines[0].speed.step_s
        for file in (LORA, QLORA)
    )
    assert 1.005 < quantized_step / float_step < 1.2


@pytest.mark.row("37")
def test_rows_of_local_files_are_counted(tmp_path):
    rows = "".join(json.dumps({"prompt": "a", "chosen": "b", "rejected": str(i)}) + "\n" for i in range(640))
    (tmp_path / "train.jsonl").write_text(rows, encoding="utf-8")
    found = plan(config(f"data.train={tmp_path / 'train.jsonl'}", "data.eval=null", "data.held_out=0.1"), "1xH100")
    assert (found.work.pairs, found.work.held_out, found.work.steps) == (576, 64, 5)
    assert not [line for line in found.assumed if line.startswith("data:")]


@pytest.mark.row("37")
def test_the_shape_comes_from_a_local_folder_or_is_asked_for(tmp_path):
    shape = config().model.shape
    (tmp_path / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    local = plan(config(f"model.name={tmp_path}", "model.shape=null"), "1xH100")
    assert local.machines == plan(config(), "1xH100").machines
    with pytest.raises(InputError, match=r"model.shape is missing.*copy these values from its config.json"):
        plan(config("model.shape=null"), "1xH100")


def test_a_continued_adapter_has_its_own_size(tmp_path):
    stored: dict[str, Any] = {"r": 8, "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored), encoding="utf-8")
    values = config().model_dump() | {"reference": {"kind": "frozen_copy"}}
    found = plan(check_config(values | {"adapter": {"start_from": str(tmp_path)}}), "1xH100")
    assert memory.adapter_parameters(found.work.shape, found.work.setup) == 32 * 8 * (2 * 4096 + 4096 + 1024)
    with pytest.raises(InputError, match=r"adapter.start_from.*adapter_config.json"):
        plan(check_config(values | {"adapter": {"start_from": "owner/adapter"}}), "1xH100")


def test_names_that_are_no_modules_count_as_nothing_and_that_is_said():
    named = plan(config("adapter.targets=[q_proj,zz_proj]", "adapter.modules_to_save=[lm_hed]"), "1xH100")
    (targets, saved) = (line for line in named.assumed if line.startswith("adapter."))
    assert "adapter.targets: zz_proj counts as nothing" in targets
    assert "self_attn.q_proj" in targets
    assert "adapter.modules_to_save: lm_hed counts as nothing" in saved
    known = config("adapter.targets=[layers.3.mlp.up_proj,q_proj]", "adapter.modules_to_save=[lm_head]")
    assert not [line for line in plan(known, "1xH100").assumed if line.startswith("adapter.")]


@pytest.mark.parametrize(
    ("given", "passes"),
    [
        ({}, 1),  # a run evaluates each epoch where nothing is said
        ({"num_train_epochs": 3}, 3),
        ({"eval_strategy": "no"}, 1),  # the finished adapter is measured whatever is said
        ({"eval_strategy": "steps", "eval_steps": 3}, 4),  # 3, 6, 9 and 10
        ({"eval_strategy": "steps", "eval_steps": 5, "eval_on_start": True}, 3),
    ],
    ids=str,
)
def test_evaluations_are_those_of_the_run(given, passes):
    values = config().model_dump()
    values["data"] |= {"eval": None, "held_out": 100}
    values["training"] = {"pairs_per_step": 64, **given}
    found = plan(check_config(values), "1xH100", pairs=640)
    assert found.work.evaluations == passes
    values["data"]["held_out"] = None
    values["training"] = {"pairs_per_step": 64}
    assert plan(check_config(values), "1xH100", pairs=640).work.evaluations == 0


def test_a_pair_is_never_split():
    found = plan(config("packing.tokens=100"), "1xH100")
    assert found.machines[0].packs == 128
    assert "about 1 pair; 128 packs a step" in found.table()


def test_no_gpu_is_faster_than_its_whole_pairs():
    """128 pairs on 256 GPUs take as long as on 128, and on 3 as 43 on one."""
    steps = {n: plan(config(), f"{n}xH100", tflops=400).machines[0].speed.step_s for n in (1, 3, 128, 256)}
    assert steps[256] == steps[128] == pytest.approx(steps[1] / 128)
    assert steps[3] == pytest.approx(steps[1] * 43 / 128)


def test_a_stated_budget_that_does_not_fit_is_named():
    found = plan(config("packing.tokens=16000"), "1xRTX4090")
    assert not found.machines[0].fits
    assert "packing.tokens is 16000" in found.table()


def test_common_cards_say_why_they_know_no_time():
    found = plan(config("model.dtype=float32"), None)
    assert any(line.startswith("time: not known") and "--tflops" in line for line in found.assumed)


def test_a_stored_adapter_that_is_no_lora_is_refused(tmp_path):
    values = config().model_dump() | {"reference": {"kind": "frozen_copy"}, "adapter": {"start_from": str(tmp_path)}}
    for content, said in (("[]", "holds no JSON object"), ('{"peft_type": "IA3"}', "no LoRA adapter")):
        (tmp_path / "adapter_config.json").write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=said):
            plan(check_config(values), "1xH100")


@pytest.mark.parametrize(
    ("gpus", "numbers", "said"),
    [
        ("1xRTX4091", {}, "did you mean RTX4090"),
        ("1xH100", {"tflops": -1.0}, "--tflops is -1; it must be above 0"),
        (None, {"tflops": 400.0}, "--tflops is that of one kind of GPU"),
        (None, {"price_per_hour": 2.0}, "--price is that of one kind of GPU"),
        ("1x24GiB", {"price_per_hour": 2.0}, "state it with --tflops"),
    ],
)
def test_what_makes_no_sense_is_refused(gpus, numbers, said):
    with pytest.raises(InputError, match=said):
        plan(config(), gpus, **numbers)


def test_the_table_says_what_a_person_asks_and_json_holds_the_same():
    found = plan(config(file=QLORA), "1xRTX4090", price_per_hour=0.5)
    said = found.table()
    for words in ("fits", "base, nf4", "optimiser", "all of it", "a pack", "a step", "the run", "costs", "assumed:"):
        assert words in said
    assert max(map(len, said.splitlines())) <= 120
    values = json.loads(json.dumps(found.as_dict()))
    (machine,) = values["machines"]
    assert machine["fits"] is True
    assert machine["used"] == found.machines[0].used
    assert str(ROOT) not in json.dumps(values)


def test_pairs_longer_than_the_largest_useful_pack_fit_where_there_is_room():
    (found,) = plan(config("data.max_length=32768", file=QLORA), "1xH100").machines
    assert found.fits
    assert found.choice.tokens == 65_536
    (stated,) = plan(config("packing.tokens=32768", file=QLORA), "1xH200").machines
    assert (stated.fits, stated.choice.tokens) == (True, 32_768)
    long = plan(config("data.max_length=200000", file=QLORA), "1xH100")
    assert "data.max_length=76352: longer pairs are dropped" in long.advice
