"""The optimiser of a run: nothing else than what was named, on every base; LoRA+'s rates; moments that come back."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import numpy as np
import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager
from peft.optimizers import create_loraplus_optimizer
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

from lorafocal.arguments import FocalPOConfig
from lorafocal.checkpoint import load_state, save_state
from lorafocal.engines.whole import Whole
from lorafocal.errors import InputError
from lorafocal.model.load import load_base
from lorafocal.optimizers import kind_of, of_bitsandbytes, schedule_of, separate_rates
from lorafocal.trainer import FocalPOTrainer
from tests.tiny import SIZES, enlarged, lora, pairs, tiny_base, tiny_policy, trainer, weights

pytestmark = pytest.mark.slow  # many small runs

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # with rank 64, adapter tensors of 4096 entries and more
SMALLEST_IN_8_BITS = 4096


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    enlarged(AutoModelForCausalLM.from_config(LlamaConfig(**(SIZES | WIDE)))).save_pretrained(folder)
    return folder


class FirstStep(TrainerCallback):
    """What the first step did to each tensor of the adapter."""

    def __init__(self, run) -> None:
        self.run = run
        self.gradients: dict[str, torch.Tensor] = {}
        self.updates: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before = weights(self.run)
        self.gradients = {name: parameter.grad.clone() for name, parameter in self.run.trained.items()}

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.updates = {name: parameter.detach() - self.before[name] for name, parameter in self.run.trained.items()}


def first_step(folder, **settings) -> FirstStep:
    """Of an adapter whose A has a gradient too, at a constant rate."""
    start = {"model": tiny_policy(trained=True), "identity_probe": False, "lr_scheduler_type": "constant"}
    run = trainer(folder, pairs(8), max_steps=1, max_grad_norm=0.0, **(start | settings))
    seen = FirstStep(run)
    run.add_callback(seen)
    run.train()
    return seen


def plain(run) -> torch.optim.Optimizer:
    return run.optimizer.optimizer


def rates(optimizer, parameters) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in parameters.items()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


# --- LoRA+ --------------------------------------------------------------------------------------------------


def test_b_takes_sixteen_times_the_step_in_closed_form(tmp_path):
    step = first_step(tmp_path, optim="sgd", learning_rate=0.01, loraplus_lr_ratio=16.0)
    for name, update in step.updates.items():
        rate = 0.16 if "lora_B" in name else 0.01
        torch.testing.assert_close(update, -rate * step.gradients[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_every_adamw_moves_b_by_the_ratio(tmp_path, optim):
    """The first step of Adam is as long as its rate, whatever the gradient."""
    settings = {"optim": optim, "learning_rate": 1e-4, "adam_epsilon": 1e-12}
    plus = first_step(tmp_path / "plus", loraplus_lr_ratio=16.0, **settings).updates
    for name, update in plus.items():
        rate = 16e-4 if "lora_B" in name else 1e-4
        moved = update[update != 0].abs()
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=2e-3, atol=0)
        assert len(moved) == update.numel()


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_a_ratio_of_one_changes_no_bit(tmp_path, base, optim):
    ends = []
    for ratio in (None, 1.0):
        settings = {"optim": optim, "weight_decay": 0.1, "loraplus_lr_ratio": ratio, "peft_config": lora(r=64)}
        run = trainer(tmp_path / str(ratio), pairs(10), model=load_base(str(base), dtype="float32"), **settings)
        run.train()
        ends.append(run.trained)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_on_plain_lora_the_rates_are_pefts():
    policy = tiny_policy()
    parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    theirs = create_loraplus_optimizer(policy, AdamW, lr=1e-3, loraplus_lr_ratio=8.0)
    ours = AdamW(parameters.values(), lr=1e-3)
    separate_rates(ours, parameters, 8.0)
    assert rates(ours, parameters) == rates(theirs, parameters)


def test_groups_of_nothing_are_left_out_as_deepspeed_leaves_them(tmp_path):
    """transformers makes one for biases and norms: a checkpoint would have it in one engine and not in another."""
    for ratio, groups in ((None, 1), (16.0, 2)):
        run = trainer(tmp_path / str(ratio), pairs(8), loraplus_lr_ratio=ratio)
        assert len(run.create_optimizer().param_groups) == groups


@pytest.mark.row("32")
def test_what_is_neither_a_nor_b_keeps_the_plain_rate_and_groups_their_settings():
    names = [
        "q.lora_A.default.weight",
        "q.lora_B.default.weight",
        "q.lora_magnitude_vector.default.weight",
        "embed.token_adapter.trainable_tokens_delta.default",
        "norm.modules_to_save.default.weight",
    ]
    parameters = {name: torch.nn.Parameter(torch.zeros(2)) for name in names}
    decayed, others = list(parameters.values())[:2], list(parameters.values())[2:]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=1e-3, betas=(0.8, 0.9), eps=1e-6)
    separate_rates(optimizer, parameters, 4.0)
    assert rates(optimizer, parameters) == {name: 4e-3 if "lora_B" in name else 1e-3 for name in names}
    kept = [(group["weight_decay"], group["betas"], group["eps"]) for group in optimizer.param_groups]
    assert kept == [(decay, (0.8, 0.9), 1e-6) for decay in (0.1, 0.1, 0.0, 0.0)]


def test_the_schedule_moves_both_rates_and_a_is_logged(tmp_path):
    run = trainer(tmp_path, pairs(8), max_steps=4, learning_rate=8e-3, loraplus_lr_ratio=4.0)
    seen = []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            by_name = rates(plain(run), run.trained)
            seen.append({"lora_B" in name: rate for name, rate in by_name.items()})

    run.add_callback(Rates())
    run.train()
    for number, of_step in enumerate(seen):
        assert of_step == {False: pytest.approx(8e-3 * (1 - number / 4)), True: pytest.approx(32e-3 * (1 - number / 4))}
    logged = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    assert max(logged) <= 8e-3


@pytest.mark.row("32")
def test_an_optimizer_of_the_callers_own_would_ignore_the_ratio(tmp_path):
    own = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    args = FocalPOConfig(output_dir=str(tmp_path), use_cpu=True, loraplus_lr_ratio=4.0)
    with pytest.raises(InputError, match=r"loraplus_lr_ratio is 4.*leave one of the two out"):
        FocalPOTrainer(tiny_base(), args=args, train_dataset=pairs(4), peft_config=lora(), optimizers=(own, None))


# --- bitsandbytes -------------------------------------------------------------------------------------------


@pytest.mark.row("32", "62")
@pytest.mark.parametrize(
    ("optim", "instead"), [("paged_adamw_8bit", "adamw_8bit"), ("paged_adamw_32bit", "adamw_torch")]
)
def test_paging_without_a_gpu_is_refused_before_a_model_is_loaded(tmp_path, optim, instead):
    with pytest.raises(InputError, match=f"^optim: {optim} .*no CUDA device.*use {instead}"):
        FocalPOConfig(output_dir=str(tmp_path), use_cpu=True, optim=optim)


def moments(run) -> dict[str, torch.dtype]:
    return {name: plain(run).state[parameter]["state1"].dtype for name, parameter in run.trained.items()}


def of_the_bits(run) -> dict[str, torch.dtype]:
    large = {name: parameter.numel() >= SMALLEST_IN_8_BITS for name, parameter in run.trained.items()}
    return {name: torch.uint8 if is_large else torch.float32 for name, is_large in large.items()}


def test_eight_bits_reach_every_tensor_that_is_large_enough_whatever_ran_before(tmp_path, base, monkeypatch):
    """bitsandbytes keeps exceptions for the whole process: by a tensor's place in the groups, and by its id."""
    manager = GlobalOptimManager.get_instance()
    monkeypatch.setitem(manager.index2config, (0, 0), {"optim_bits": 32})
    model = load_base(str(base), dtype="float32")
    run = trainer(tmp_path, pairs(8), model=model, peft_config=lora(r=64), optim="adamw_8bit", max_steps=1)
    for parameter in list(run.trained.values())[:5]:
        monkeypatch.setitem(manager.pid2config, id(parameter), {"optim_bits": 32})
    run.train()
    assert of_bitsandbytes(plain(run))
    assert kind_of(plain(run)) == "AdamW of bitsandbytes in 8 bits"
    assert moments(run) == of_the_bits(run)
    assert {torch.uint8, torch.float32} == set(moments(run).values())


@pytest.mark.parametrize(
    ("adapter", "dtype"),
    [
        ({"modules_to_save": ["lm_head"]}, torch.uint8),
        ({"modules_to_save": ["embed_tokens"]}, torch.float32),
        ({"trainable_token_indices": list(range(2, 70))}, torch.float32),
    ],
)
def test_rows_of_tokens_keep_32_bits(tmp_path, base, adapter, dtype):
    """A rare token's moments would be rounded by those of the frequent one beside it."""
    model = load_base(str(base), dtype="float32")
    run = trainer(tmp_path, pairs(8), model=model, peft_config=lora(**adapter), optim="adamw_8bit", max_steps=1)
    run.train()
    [found] = [dtype for name, dtype in moments(run).items() if "lora_" not in name]
    assert found == dtype


@pytest.mark.row("13")
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_small_rates_move_every_entry_of_an_fp32_adapter_with_8_bit_moments(tmp_path, base, quantization):
    model = load_base(str(base), dtype="bfloat16", quantization=quantization)
    settings = {"optim": "adamw_8bit", "learning_rate": 5e-6, "max_steps": 8, "peft_config": lora(r=64)}
    run = trainer(tmp_path, pairs(8), model=model, **settings)
    before = {name: p.detach().clone() for name, p in run.trained.items() if "lora_A" in name}
    run.train()
    assert {parameter.dtype for parameter in run.trained.values()} == {torch.float32}
    moved = torch.cat([(run.trained[name] != old).flatten() for name, old in before.items()])
    assert moved.double().mean() > 0.99


def end_of(folder, base, quantization, settings, checkpoint=None):
    model = load_base(str(base), dtype="float32", quantization=quantization)
    adapter = lora(**({"r": 64} | settings.get("adapter", {})))
    others = {key: value for key, value in settings.items() if key != "adapter"}
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "pairs_per_step": 5}
    run = trainer(folder, pairs(12), model=model, peft_config=adapter, optim="adamw_8bit", **(steps | others))
    run.train(resume_from_checkpoint=checkpoint)
    tensors = weights(run)
    for name, parameter in run.trained.items():
        tensors |= {f"{name}/{key}": torch.as_tensor(v) for key, v in plain(run).state[parameter].items()}
    return tensors


@pytest.mark.row("54", "56")
@pytest.mark.parametrize(
    ("quantization", "settings"),
    [
        pytest.param(None, {}, id="lora"),
        pytest.param(
            "nf4", {"loraplus_lr_ratio": 8.0, "weight_decay": 0.1, "adapter": {"use_dora": True}}, id="dora+ on nf4"
        ),
        pytest.param("int8", {"adapter": {"use_dora": True}}, id="dora on int8"),
    ],
)
def test_two_steps_and_two_more_are_four_bit_for_bit_in_8_bits(tmp_path, base, quantization, settings):
    whole = end_of(tmp_path, base, quantization, settings)
    resumed = end_of(tmp_path, base, quantization, settings, str(tmp_path / "checkpoint-2"))
    assert any(tensor.dtype == torch.uint8 for tensor in whole.values())
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


@pytest.mark.gpu
@pytest.mark.row("54")
@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_paged_moments_come_back_paged_and_bit_for_bit(tmp_path, optim):
    """Paging begins at 100,000 entries."""

    def made():
        parameter = torch.nn.Parameter(torch.randn(400, 300, generator=torch.Generator().manual_seed(0)).cuda())
        bits = 8 if "8bit" in optim else 32
        return parameter, bitsandbytes.optim.AdamW([parameter], lr=1e-2, optim_bits=bits, is_paged=True)

    def step(parameter, optimizer, number):
        parameter.grad = torch.randn(400, 300, generator=torch.Generator().manual_seed(number)).cuda()
        optimizer.step()

    def parts(parameter, optimizer):
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        engine = Whole(SimpleNamespace(engine="one-process", world_size=1))
        engine.optimizer = optimizer
        return {"parameters": {"x": parameter}, "engine": engine, "scheduler": schedule}

    parameter, optimizer = made()
    for number in range(3):
        step(parameter, optimizer, number)
    save_state(tmp_path, **parts(parameter, optimizer), extra={})
    again, restored = made()
    load_state(tmp_path, **parts(again, restored))
    assert restored.state[again]["state1"].is_paged
    for number in range(3, 6):
        step(parameter, optimizer, number)
        step(again, restored, number)
    torch.cuda.synchronize()
    assert torch.equal(parameter, again)
    for key, value in optimizer.state[parameter].items():
        assert value == restored.state[again][key] if key == "step" else torch.equal(value, restored.state[again][key])


def test_a_schedule_is_told_as_json_reads_it_back(tmp_path: Path) -> None:
    """A checkpoint holds it: what JSON lacks would end a run at its first one."""
    settings = {"num_cycles": np.int64(2), "cycle": (1, 2)}
    args = FocalPOConfig(output_dir=str(tmp_path), max_steps=4, warmup_steps=0.5, report_to="none", use_cpu=True)
    args.lr_scheduler_type, args.lr_scheduler_kwargs = "cosine", settings
    told = schedule_of(args, 10)
    assert told == json.loads(json.dumps(told))
    assert (told["steps"], told["warmup_steps"], told["lr_scheduler_type"]) == (4, 2, "cosine")
    assert told["lr_scheduler_kwargs"] == {"num_cycles": "2", "cycle": [1, 2]}
    args.max_steps, args.num_train_epochs, args.pairs_per_step = -1, 1.5, 4
    assert schedule_of(args, 10)["steps"] == 5  # 3 an epoch
