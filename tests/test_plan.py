"""Plans of configs: what fits on which card, how long it takes, what to change, and what was assumed."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from lorafocal import memory
from lorafocal.arguments import FocalPOConfig
from lorafocal.config import Config, check_config, load_config
from lorafocal.errors import InputError
from lorafocal.memory import Lengths
from lorafocal.objectives import OBJECTIVES
from lorafocal.plan import plan
from lorafocal.plan.work import work_of
from tests import plan_table
from tests.test_configs import BASE, METHODS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
# Adapters of the paper's configs: one objective stands for all. Methods are planned for a model that is put in.
CONFIGS = [
    file
    for file in sorted({*(ROOT / "configs").rglob("*.yaml")} - {*METHODS, BASE})
    if "\nname: " in file.read_text(encoding="utf-8")
    and (file.parts[-3:-1] not in (("paper", "lora"), ("paper", "qlora")) or "focalpo" in file.name)
]
FULL = ROOT / "configs/paper/llama3-8b-focalpo.yaml"
LORA, QLORA = ROOT / "configs/lora/llama3-8b.yaml", ROOT / "configs/qlora/llama3-8b.yaml"
GIB = 2**30


def config(*overrides: str, file: Path = LORA) -> Config:
    return load_config(file, list(overrides))


@pytest.mark.row("37")
def test_every_shipped_config_is_answered_at_once_without_torch(tmp_path):
    """One that names an engine fits on 8 of some cards, any other on one of most.

    That of a method names no model but a placeholder: it is asked for, and any folder or shape will do.
    """
    shape = config().model.shape
    (tmp_path / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    model = [f"model.name={tmp_path}", "model.dtype=bfloat16"]
    runs = [(str(file), []) for file in CONFIGS] + [(str(file), model) for file in METHODS]
    code = (
        "import sys\nfrom lorafocal.config import load_config\nfrom lorafocal.plan import plan\n"
        f"for file, overrides in {runs!r}:\n"
        "    said = plan(load_config(file, overrides), None).table()\n"
        "    assert said.count(' yes ') >= (4 if '8 GPUs of these' in said else 6), said\n"
        "    assert 'assumed:' in said\n"
        "assert not {'torch', 'transformers', 'datasets', 'bitsandbytes', 'deepspeed'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
    assert len(CONFIGS) >= 20
    assert len(METHODS) >= len(OBJECTIVES)


@pytest.mark.parametrize("file", [METHODS[0], METHODS[-1]], ids=lambda file: file.stem)
def test_a_method_asks_for_the_model_that_its_placeholder_stands_for(file):
    with pytest.raises(InputError, match=r"toy-base is not on this machine.*hf download .*model.shape"):
        plan(load_config(file), None)


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
@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.JSON", "p.json.gz", "p.csv", "p.csv.gz"])
def test_rows_are_those_that_training_reads(tmp_path, name):
    """A quoted cell of a CSV has lines of its own; a packed file's bytes are no rows."""
    rows = [{"prompt": f"q{i}", "chosen": "a\nb\n", "rejected": "c"} for i in range(50)]
    if ".csv" in name:
        text = "prompt,chosen,rejected\n" + "".join(f'q{i},"a\nb\n",c\n' for i in range(50))
    elif ".jsonl" in name:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = json.dumps(rows)
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    values = config().model_dump()
    values["data"] |= {"train": str(tmp_path / name)}
    assert plan(check_config(values), "1xH100").work.pairs == 50


def test_a_parquet_file_that_is_none_is_told(tmp_path):
    (tmp_path / "p.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    values = config().model_dump()
    values["data"] |= {"train": str(tmp_path / "p.parquet")}
    with pytest.raises(InputError, match=r"p\.parquet: not a readable Parquet file"):
        plan(check_config(values), "1xH100")


def test_one_answer_is_one_answer_long():
    sft = plan(config("objective={name: sft}", "reference=null", "data.max_length=8192"), "1xH200").work
    assert sft.longest == 8192
    assert plan(config("data.max_length=8192"), "1xH200").work.longest == 2 * 8192


def test_unsloths_models_train_padded():
    plain, unsloth = (
        plan(config("packing.layout=auto", *words), "1xH100").work for words in ([], ["model.backend=unsloth"])
    )
    assert (plain.shared, unsloth.shared) == (True, False)


def test_a_continued_adapter_has_its_own_size(tmp_path):
    stored: dict[str, Any] = {"r": 8, "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored), encoding="utf-8")
    values = config().model_dump() | {"reference": {"kind": "frozen_copy"}}
    found = plan(check_config(values | {"adapter": {"start_from": str(tmp_path)}}), "1xH100")
    assert memory.adapter_parameters(found.work.shape, found.work.setup) == 32 * 8 * (2 * 4096 + 4096 + 1024)
    stored |= {"lora_dropout": 0.1, "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [3]}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored), encoding="utf-8")
    for allowed in (False, True):
        adapter = {"start_from": str(tmp_path), "allow_dropout": allowed}
        setup = plan(check_config(values | {"adapter": adapter}), "1xH100").work.setup
        assert (setup.trainable_tokens, setup.dropout, setup.fused) == (3, 0.1 * allowed, not allowed)
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
    refused = {"[]": "holds no JSON object", '{"peft_type": "IA3"}': "no LoRA adapter", "[" * 100_000: "is no JSON"}
    for content, said in refused.items():
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
        ("1xH100", {"lengths": Lengths(67, 1982, 218)}, "2,049 tokens on average.*no pair have more than 2,048"),
        (None, {"lengths": Lengths(1e308, 1e308, 1e308)}, "inf tokens on average"),
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
    assert "data.max_length=76736: longer pairs are dropped" in long.advice


# --- every parameter trained ----------------------------------------------------------------------------------------

LIVE = ("reference.kind=separate_model", f"reference.model={'some/model'}", "reference.identity_probe=null")


@pytest.mark.row("37")
@pytest.mark.parametrize("gpus", ["8xA100-40", "8xA100-80"])
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_parts_of_full_parameter_training_add_up(engine, gpus):
    (found,) = plan(config(f"engine.kind={engine}", file=FULL), gpus).machines
    assert (found.engine, found.fits) == (engine, True)
    assert found.used == sum(part.bytes for part in found.parts) <= found.machine.gpu.memory_bytes
    assert {"mlp"} & {*found.budgets} == set()
    held = {part.name: part.bytes for part in found.parts}
    shape = plan(config(file=FULL), gpus).work.shape
    assert held["optimiser"] == shape.parameters  # 8 bytes an entry, by 8
    assert held["gradients"] == shape.parameters / 2


@pytest.mark.row("37")
def test_a_live_reference_costs_its_weights_and_a_forward():
    stored, live = (plan(config(*more, file=FULL), "8xA100-40", tflops=140).machines[0] for more in ((), LIVE))
    parts = {part.name: part.bytes for part in live.parts}
    assert parts["reference"] == pytest.approx(2 * 8_030_261_248 / 8, rel=1e-6)
    assert live.speed.reference_h == 0 < stored.speed.reference_h
    assert 1.2 < live.speed.step_s / stored.speed.step_s < 1.35
    assert live.sent_bytes / stored.sent_bytes == pytest.approx(10 / 8)  # weights gathered once more, 2 of 8 bytes
    (whole,) = plan(config(*LIVE, "engine.kind=zero2", file=FULL), "8xA100-40").machines
    assert not whole.fits


def test_what_gpus_send_is_hidden_by_longer_products_and_waited_for_beyond_them():
    fast, slow = (plan(config(file=FULL), "8xA100-80", tflops=rate).machines[0].speed for rate in (1e6, 140.0))
    assert fast.step_s == pytest.approx(fast.sent_s, rel=0.01)
    assert slow.waits_s == 0 < slow.sent_s < slow.step_s
    after = plan(config("engine.kind=zero2", file=FULL), "8xA100-80", tflops=140.0).machines[0].speed
    assert after.waits_s == after.sent_s > 0  # DeepSpeed's stage 2 sums while nothing is computed
    here, there = (plan(config(file=FULL), gpus, tflops=140.0).machines[0] for gpus in ("8xA100-80", "16xA100-80"))
    assert there.speed.sent_s > 5 * here.speed.sent_s  # over a network
    assert "25 GB/s" in " ".join(plan(config(file=FULL), "16xA100-80").assumed)


def test_offloading_moves_bytes_to_the_machine_and_costs_time():
    same = ("packing.tokens=4096", "training.activation_checkpointing=full")
    none, states, everything = (
        plan(config(f"engine.offload={word}", *same, file=FULL), "8xA100-40", tflops=140.0)
        for word in ("none", "optimizer", "all")
    )
    used = [each.machines[0].used for each in (none, states, everything)]
    assert used == sorted(used, reverse=True)
    parameters = none.work.shape.parameters
    assert none.machines[0].host_bytes == 0
    assert states.machines[0].host_bytes == pytest.approx(16 * parameters)
    assert everything.machines[0].host_bytes == pytest.approx(18 * parameters, rel=1e-6)
    waits = [each.machines[0].speed.waits_s for each in (none, states, everything)]
    assert waits == sorted(waits)
    assert waits[1] > 1
    assert any(line.startswith("offload:") for line in states.assumed)
    assert "in the machine" in states.table()


def test_what_all_processes_hold_in_the_machine_while_models_load_is_told():
    live = ["reference.kind=separate_model", "reference.model=base", "engine.kind=zero3", "engine.offload=all"]
    waits, loads = (plan(config(*live, *more, file=FULL), "8xA100-40") for more in ((), ("engine.offload=none",)))
    assert waits.machines[0].loading_bytes == pytest.approx(8 * 2 * 2 * waits.work.shape.parameters, rel=1e-3)
    assert "while models load" in waits.table()
    assert loads.machines[0].loading_bytes == 0
    assert "while models load" not in loads.table()


def test_a_model_that_no_gpu_holds_whole_before_it_is_split_is_told():
    shape = {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    large = [f"model.shape.{key}={value}" for key, value in shape.items()]
    found = plan(config(*large, file=FULL), "64xA100-80")
    assert not found.machines[0].fits
    assert "before the first step every GPU holds the whole of it, 132" in found.table()
    large.append("engine.offload=all")
    assert not plan(config(*large, file=FULL), "64xA100-80").machines[0].fits  # a stored reference is looked up there
    live = ("reference.kind=separate_model", "reference.model=owner/base")
    assert plan(config(*large, *live, file=FULL), "64xA100-80").machines[0].fits


def test_kto_looks_at_the_whole_step_first():
    """One forward more, of the sums that its loss needs."""
    kto, dpo = (
        plan(config(file=FULL.with_name(f"llama3-8b-{name}.yaml")), "8xA100-40", tflops=140.0).machines[0]
        for name in ("kto", "dpo")
    )
    assert kto.choice.tier == dpo.choice.tier
    assert 1.2 < kto.speed.step_s / dpo.speed.step_s < 1.35


def test_the_page_has_what_is_planned():
    text = plan_table.PAGE.read_text(encoding="utf-8")
    assert plan_table.page(text) == text, "write it again: python -m tests.plan_table"
    assert plan_table.table().count("\n") == 2 + 24


def test_what_a_config_leaves_open_is_planned_as_the_trainer_takes_it():
    """The plan reads no transformers, so the trainer's defaults stand in it once more."""
    bare = {
        "name": "bare", "model": {"name": "m", "dtype": "bfloat16", "shape": config().model.shape},
        "adapter": {"r": 8, "alpha": 8}, "data": {"train": "t.jsonl", "held_out": 100, "max_length": 1024},
        "objective": {"name": "dpo", "beta": 0.1},
        "reference": {"kind": "disabled_adapter"},
        "training": {"pairs_per_step": 64, "learning_rate": 1e-5, "eval_strategy": "steps"},
    }  # fmt: skip
    defaults = {field.name: field.default for field in fields(FocalPOConfig)}
    stated = {name: defaults[name] for name in ("num_train_epochs", "logging_steps", "optim")}
    said = bare | {"training": bare["training"] | stated}
    assert work_of(check_config(bare), pairs=5_000) == work_of(check_config(said), pairs=5_000)
    more = bare | {"training": bare["training"] | {"num_train_epochs": 2, "logging_steps": 5}}
    assert work_of(check_config(bare), pairs=5_000) != work_of(check_config(more), pairs=5_000)
