"""Training state comes back bit for bit or not at all, with no pickle."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorafocal.checkpoint import OPTIMIZER_FILE, PARAMETERS_FILE, STATE_FILE, latest_complete
from lorafocal.errors import InputError
from lorafocal.tensor_files import check_saved
from tests.small_run import EXTRA, Run, checkpoint


@pytest.fixture
def no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pickle was about to be written or read")

    for module, name in [
        (torch, "load"),
        (torch, "save"),
        *((pickle, name) for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler")),
        *((pickle, name) for name in ("_load", "_loads", "_dump", "_dumps", "_Unpickler", "_Pickler")),
    ]:
        monkeypatch.setattr(module, name, refuse)


@pytest.mark.row("54", "56", "S1", "F9")
@pytest.mark.usefixtures("no_pickle")
@pytest.mark.parametrize("kind", ["adamw", "amsgrad", "sgd", "plain sgd", "8 bits", "32 bits", "paged"])
@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_interrupted_equals_uninterrupted_bit_for_bit(tmp_path: Path, kind: str, cut: int) -> None:
    whole = Run(kind)
    whole.train(0, 6)
    first = Run(kind)
    first.train(0, cut)
    first.save(tmp_path / "checkpoint")
    second = Run(kind, seed=1)
    second.base = first.base
    assert second.load(tmp_path / "checkpoint") == EXTRA
    assert second.everything() == first.everything()
    second.train(cut, 6)
    assert second.everything() == whole.everything()


def test_a_used_optimizer_is_overwritten_not_mixed(tmp_path: Path) -> None:
    fresh, used = Run(), Run(seed=2)
    fresh.save(tmp_path / "checkpoint")
    used.train(0, 4)
    used.load(tmp_path / "checkpoint")
    assert used.everything() == fresh.everything()


def test_exact_file_set_and_dtypes(tmp_path: Path) -> None:
    run = Run()
    run.train(0, 3)
    run.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {PARAMETERS_FILE, OPTIMIZER_FILE, STATE_FILE}
    saved = load_file(tmp_path / OPTIMIZER_FILE)
    assert saved["model.q.lora_B.weight/step"].dtype == torch.float32
    assert saved["model.q.lora_B.weight/step"].shape == ()
    assert json.loads((tmp_path / STATE_FILE).read_text())["optimizer"]["groups"][0]["parameters"] == [
        "model.q.lora_A.weight"
    ]


def test_bfloat16_parameters_come_back_exactly(tmp_path: Path) -> None:
    run = Run()
    run.train(0, 3)
    for parameter in run.parameters.values():
        parameter.data = parameter.data.bfloat16()
        run.optimizer.state[parameter] = {
            key: value if key == "step" else value.bfloat16() for key, value in run.optimizer.state[parameter].items()
        }
    before = copy.deepcopy([p.data for p in run.parameters.values()])
    run.save(tmp_path)
    for parameter in run.parameters.values():
        parameter.data.zero_()
    run.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, run.parameters.values(), strict=True))


@pytest.mark.parametrize("empty", [1, 2])
def test_empty_groups_that_earlier_versions_saved_are_left_out(tmp_path: Path, empty: int) -> None:
    run = Run()
    run.train(0, 3)
    run.save(tmp_path)

    def as_then(state: dict[str, Any]) -> None:
        groups, schedule = state["optimizer"]["groups"], state["scheduler"]["state"]
        groups += [groups[0] | {"parameters": []}] * empty
        for key in ("base_lrs", "_last_lr", "lr_lambdas"):
            schedule[key] += schedule[key][:1] * empty

    rewrite_state(tmp_path, as_then)
    fresh = Run()
    assert fresh.load(tmp_path) == EXTRA
    assert fresh.everything() == run.everything()
    fresh.train(3, 5)
    run.train(3, 5)
    assert fresh.everything() == run.everything()


# --- strict both ways ---------------------------------------------------------------------------------------


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def rewrite_state(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = json.loads((folder / STATE_FILE).read_text())
    change(state)
    (folder / STATE_FILE).write_text(json.dumps(state))


B = "model.q.lora_B.weight"
TENSOR_DAMAGE: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "dropped parameter": (PARAMETERS_FILE, lambda t: t.pop(B), f"missing '{B}'"),
    "renamed parameter": (PARAMETERS_FILE, lambda t: t.update({"other": t.pop(B)}), "unexpected 'other'"),
    "extra parameter": (PARAMETERS_FILE, lambda t: t.update(other=torch.ones(1)), "unexpected 'other'"),
    "other shape": (PARAMETERS_FILE, lambda t: t.update({B: torch.ones(8)}), r"\(8,\), expected \(8, 4\)"),
    "other dtype": (PARAMETERS_FILE, lambda t: t.update({B: t[B].double()}), "float64, expected"),
    "dropped moment": (OPTIMIZER_FILE, lambda t: t.pop(f"{B}/exp_avg_sq"), f"missing '{B}/exp_avg_sq'"),
    "renamed moment": (OPTIMIZER_FILE, lambda t: t.update({"x": t.pop(f"{B}/exp_avg")}), "unexpected 'x'"),
    "moment's shape": (OPTIMIZER_FILE, lambda t: t.update({f"{B}/exp_avg": torch.ones(3)}), r"shape \(3,\)"),
    "no optimizer at all": (OPTIMIZER_FILE, lambda t: t.clear(), "missing"),
    "zero moments": (
        OPTIMIZER_FILE,
        lambda t: [value.zero_() for name, value in t.items() if name.endswith("/exp_avg")],
        "every first moment is zero",
    ),
}  # fmt: skip


@pytest.mark.row("53", "54")
@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
def test_tensors_are_strict_both_ways_and_nothing_is_half_loaded(tmp_path: Path, damage: str) -> None:
    run = Run()
    run.train(0, 3)
    run.save(tmp_path)
    file, change, message = TENSOR_DAMAGE[damage]
    rewrite(tmp_path / file, change)
    fresh = Run(seed=3)
    before = fresh.everything()
    with pytest.raises(InputError, match=f"{file}.*{message}"):
        fresh.load(tmp_path)
    assert fresh.everything() == before


STATE_DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "other optimizer": (
        lambda s: s["optimizer"].update({"class": "SGD"}),
        "saved by SGD, the run uses AdamW",
    ),
    "other scheduler": (lambda s: s["scheduler"].update({"class": "StepLR"}), "saved by StepLR"),
    "one group": (lambda s: s["optimizer"]["groups"].pop(), "1 optimizer groups, the run has 2"),
    "swapped groups": (lambda s: s["optimizer"]["groups"].reverse(), "optimizer group 0: missing"),
    "dropped setting": (lambda s: s["optimizer"]["groups"][1]["settings"].pop("lr"), "group 1: missing 'lr'"),
    "unknown setting": (
        lambda s: s["optimizer"]["groups"][1]["settings"].update(x=1),
        "group 1: unexpected 'x'",
    ),
    "dropped schedule key": (
        lambda s: s["scheduler"]["state"].pop("last_epoch"),
        "scheduler: missing 'last_epoch'",
    ),
    "other format": (lambda s: s.update(format=2), "not a training state of format 1"),
}


@pytest.mark.row("53", "54")
@pytest.mark.parametrize("damage", STATE_DAMAGE)
def test_settings_are_strict_both_ways(tmp_path: Path, damage: str) -> None:
    run = Run()
    run.train(0, 3)
    run.save(tmp_path)
    change, message = STATE_DAMAGE[damage]
    rewrite_state(tmp_path, change)
    before = run.everything()
    with pytest.raises(InputError, match=message):
        run.load(tmp_path)
    assert run.everything() == before


OTHER_SETTINGS = {
    "initial_lr": (0.5, "learning_rate of optimizer group 1: 0.01 -> 0.5"),
    "weight_decay": (0.3, "weight_decay of optimizer group 1: 0.0 -> 0.3"),
    "betas": ((0.8, 0.95), r"adam_beta1, adam_beta2 of optimizer group 1: .* -> \[0.8, 0.95\]"),
    "eps": (1e-6, "adam_epsilon of optimizer group 1: 1e-08 -> 1e-06"),
}


@pytest.mark.parametrize("kind", ["adamw", "8 bits"])
@pytest.mark.parametrize("key", OTHER_SETTINGS)
def test_an_optimizer_that_is_set_otherwise_is_not_set_back_without_a_word(tmp_path: Path, kind: str, key: str) -> None:
    run = Run(kind)
    run.train(0, 3)
    run.save(tmp_path)
    fresh = Run(kind, seed=3)
    value, message = OTHER_SETTINGS[key]
    fresh.optimizer.param_groups[1][key] = value
    before = fresh.everything()
    with pytest.raises(InputError, match=f"{message}\nset these back"):
        fresh.load(tmp_path)
    assert fresh.everything() == before


def test_betas_that_a_schedule_cycles_are_its_own(tmp_path: Path) -> None:
    def cycling() -> Run:
        run = Run()
        run.scheduler = torch.optim.lr_scheduler.OneCycleLR(run.optimizer, max_lr=1e-2, total_steps=10)
        return run

    run, fresh = cycling(), cycling()
    run.train(0, 3)
    run.save(tmp_path)
    assert fresh.load(tmp_path) == EXTRA
    assert fresh.everything() == run.everything()


@pytest.mark.parametrize("file", [PARAMETERS_FILE, OPTIMIZER_FILE, STATE_FILE])
def test_missing_and_torn_files_are_named(tmp_path: Path, file: str) -> None:
    run = Run()
    run.train(0, 3)
    run.save(tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-7])
    with pytest.raises(InputError, match=file):
        run.load(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(InputError, match=file):
        run.load(tmp_path)


def test_the_trainable_set_must_be_the_optimizers(tmp_path: Path) -> None:
    run = Run()
    run.parameters["frozen"] = nn.Parameter(torch.ones(2))
    with pytest.raises(InputError, match="missing 'frozen'"):
        run.save(tmp_path)
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(5))]})
    with pytest.raises(InputError, match=r"group 2 .*\(5,\)"):
        run.save(tmp_path)


@pytest.mark.parametrize("extra", [{"x": (1, 2)}, {"x": {1: 2}}, {"x": object()}, {"x": {1, 2}}])
def test_what_json_would_change_is_refused(tmp_path: Path, extra: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="the trainer's state cannot be saved as JSON"):
        Run().save(tmp_path, extra)


# --- what bitsandbytes keeps --------------------------------------------------------------------------------


def test_tables_stay_shared_and_codes_stay_codes(tmp_path: Path) -> None:
    run, fresh = Run("8 bits"), Run("8 bits", seed=1)
    run.train(0, 3)
    run.save(tmp_path)
    saved = load_file(tmp_path / OPTIMIZER_FILE)
    assert {str(saved[f"{B}/{key}"].dtype) for key in ("state1", "state2")} == {"torch.uint8"}
    fresh.load(tmp_path)
    first, second = (fresh.optimizer.state[parameter] for parameter in fresh.parameters.values())
    assert first["qmap1"].data_ptr() == second["qmap1"].data_ptr()
    assert first["step"] == 3


EIGHT_BIT_DAMAGE: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "dropped scale": ("8 bits", lambda t: t.pop(f"{B}/absmax2"), f"missing '{B}/absmax2'"),
    "codes as numbers": ("8 bits", lambda t: t.update({f"{B}/state1": t[f"{B}/state1"].float()}), "float32, expected"),
    "codes of another shape": ("8 bits", lambda t: t.update({f"{B}/state1": t[f"{B}/state1"][:4]}), r"shape \(4, 4\)"),
    "scales of other blocks": ("8 bits", lambda t: t.update({f"{B}/absmax1": torch.ones(2)}), r"shape \(2,\)"),
    "codes that mean other values": ("8 bits", lambda t: t[f"{B}/qmap1"].mul_(2), "other values than"),
    "lost codes": ("8 bits", lambda t: [v.zero_() for k, v in t.items() if "state1" in k], "first moment is zero"),
    "lost scales": ("8 bits", lambda t: [v.zero_() for k, v in t.items() if "absmax1" in k], "first moment is zero"),
    "lost moments": ("32 bits", lambda t: [v.zero_() for k, v in t.items() if "state1" in k], "first moment is zero"),
}


@pytest.mark.row("54")
@pytest.mark.parametrize("damage", EIGHT_BIT_DAMAGE)
def test_states_of_bitsandbytes_are_strict_too(tmp_path: Path, damage: str) -> None:
    kind, change, message = EIGHT_BIT_DAMAGE[damage]
    run, fresh = Run(kind), Run(kind, seed=3)
    run.train(0, 3)
    run.save(tmp_path)
    rewrite(tmp_path / OPTIMIZER_FILE, change)
    fresh.train(0, 1)
    before = fresh.everything()
    with pytest.raises(InputError, match=f"{OPTIMIZER_FILE}.*{message}"):
        fresh.load(tmp_path)
    assert fresh.everything() == before


@pytest.mark.row("54")
def test_a_step_count_that_is_missing_is_not_taken_for_zero(tmp_path: Path) -> None:
    """The bias correction would start over, with moments of many steps."""
    run = Run("8 bits")
    run.train(0, 3)
    run.save(tmp_path)
    rewrite_state(tmp_path, lambda state: state["optimizer"]["values"].pop(f"{B}/step"))
    with pytest.raises(InputError, match="missing 'step'"):
        Run("8 bits").load(tmp_path)


@pytest.mark.row("54")
@pytest.mark.parametrize(
    ("saved", "used", "named"),
    [
        ("adamw", "32 bits", "saved by AdamW, the run uses AdamW of bitsandbytes in 32 bits"),
        ("8 bits", "32 bits", "AdamW of bitsandbytes in 8 bits, the run uses AdamW of bitsandbytes in 32 bits"),
        ("8 bits", "adamw", "AdamW of bitsandbytes in 8 bits, the run uses AdamW"),
        ("paged", "8 bits", "in 8 bits, paged, the run uses"),
        ("8 bits", "8 bits of large tensors", "unexpected 'absmax1'"),
    ],
)
def test_an_optimizer_of_other_bits_is_another_optimizer(tmp_path: Path, saved: str, used: str, named: str) -> None:
    run = Run(saved)
    run.train(0, 3)
    run.save(tmp_path)
    with pytest.raises(InputError, match=named):
        Run(used).load(tmp_path)


# --- row 47: what is written is what was meant --------------------------------------------------------------


def adapter(**changes: Tensor) -> dict[str, Tensor]:
    return {"q.lora_A.weight": torch.ones(2, 4), "q.lora_B.weight": torch.full((4, 2), 0.5)} | changes


@pytest.mark.row("47")
def test_a_good_adapter_passes(tmp_path: Path) -> None:
    save_file(adapter(), tmp_path / "adapter_model.safetensors")
    check_saved(tmp_path / "adapter_model.safetensors", adapter(), trained=True)


EMPTY_GATHER = {name: torch.empty(0) for name in adapter()}
NOT_TRAINED = adapter(**{"q.lora_B.weight": torch.zeros(4, 2)})


@pytest.mark.row("47")
@pytest.mark.parametrize(
    ("saved", "expected", "message"),
    [
        pytest.param(EMPTY_GATHER, adapter(), r"lora_A.*shape \(0,\), expected \(2, 4\)", id="empty in the file"),
        pytest.param(EMPTY_GATHER, EMPTY_GATHER, "lora_A.*is empty: gather", id="empty on both sides"),
        pytest.param({}, {}, "nothing to save", id="nothing"),
        pytest.param({}, adapter(), "missing 'q.lora_A.weight'", id="empty file"),
        pytest.param(adapter(x=torch.ones(1)), adapter(), "unexpected 'x'", id="more than meant"),
        pytest.param(adapter(), NOT_TRAINED, "lora_B.*differs from what was written", id="other values"),
        pytest.param({k: v.half() for k, v in adapter().items()}, adapter(), "torch.float16", id="other dtype"),
        pytest.param(NOT_TRAINED, NOT_TRAINED, "every lora_B is zero", id="never trained"),
        *(
            pytest.param(bad := adapter(**{"q.lora_A.weight": torch.full((2, 4), value)}), bad, "NaN", id=str(value))
            for value in (float("nan"), float("inf"))
        ),
    ],
)
def test_a_bad_adapter_is_refused(
    tmp_path: Path, saved: dict[str, Tensor], expected: dict[str, Tensor], message: str
) -> None:
    save_file(saved, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=message):
        check_saved(tmp_path / "adapter_model.safetensors", expected, trained=True)


@pytest.mark.row("47")
def test_before_the_first_real_step_lora_b_may_be_zero(tmp_path: Path) -> None:
    save_file(NOT_TRAINED, tmp_path / "x.safetensors")
    check_saved(tmp_path / "x.safetensors", NOT_TRAINED, trained=False)


@pytest.mark.row("47")
@pytest.mark.parametrize("loss_of", ["parameters", "moments", "finiteness"])
def test_a_failed_save_keeps_the_checkpoint_before(tmp_path: Path, loss_of: str) -> None:
    run = Run()
    run.train(0, 3)
    checkpoint(run, tmp_path, 3)
    lora_b = run.parameters[B]
    if loss_of == "parameters":  # what ZeRO-3 leaves where nothing was gathered
        lora_b.data = torch.empty(0)
    elif loss_of == "moments":
        for state in run.optimizer.state.values():
            state["exp_avg"].zero_()
    else:
        lora_b.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=f"{B}.*(empty|NaN)|every first moment is zero"):
        checkpoint(run, tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert latest_complete(tmp_path) == (tmp_path / "checkpoint-3", [])
