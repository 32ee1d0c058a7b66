"""Starts from weights and data in a run: the reference is the start, resuming is exact, what is saved loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from lorafocal import run
from lorafocal.data.packing import PairCollator
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.model.load import load_base
from lorafocal.objectives.focal import identity_loss
from lorafocal.policy import prepare_policy, sequence_logps
from lorafocal.trainer import FocalPOTrainer
from tests.model.test_starts import config_of, started
from tests.test_references_in_training import StopAfter
from tests.tiny import adapter_gradients, lora, pairs, relative_difference, tiny_base, trainer
from tests.toy_run import run_config, write_inputs

pytestmark = pytest.mark.slow  # many small runs

DATA = pairs(24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("base")
    tiny_base().save_pretrained(place)
    return place


def run_of(place: Path, folder: Path, init: str, dtype: str = "float32", **settings) -> FocalPOTrainer:
    """A run on a base that was loaded from a folder, in 4 bits for LoftQ."""
    base = load_base(str(folder), dtype=dtype, quantization="nf4" if init == "loftq" else None)
    defaults = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "reference": "frozen_copy"}
    more = {"use_rslora": True} if init == "pissa" else {}
    return trainer(place, DATA, model=base, peft_config=config_of(init, **more), **(defaults | settings))


def logps(model: torch.nn.Module) -> Tensor:
    prepare_policy(model)
    pack = PairCollator("packed", 4096)(DATA[:8]).packs[0]
    with torch.no_grad():
        return torch.cat(sequence_logps(model, pack))


@pytest.mark.row("6")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "loftq"])
def test_the_switched_off_adapter_is_refused_where_it_is_not_the_start(tmp_path, folder, init):
    with pytest.raises(InputError, match=r"(?i)(pissa|olora|loftq).*frozen_copy"):
        run_of(tmp_path, folder, init, reference="disabled_adapter")


@pytest.mark.row("1", "6")
@pytest.mark.parametrize(
    ("init", "dtype"),
    [
        ("pissa", "bfloat16"),
        ("olora", "float32"),
        ("loftq", "bfloat16"),
        ("eva", "float32"),
        ("eva switched off", "float32"),
        ("eva switched off", "bfloat16"),
    ],
)
def test_the_reference_is_exactly_the_start(tmp_path, folder, init, dtype):
    init, _, off = init.partition(" ")
    reference = "disabled_adapter" if off else "frozen_copy"
    trained = run_of(tmp_path, folder, init, dtype, reference=reference, max_steps=2)
    trained.train()
    first, second, *_ = trained.state.log_history
    assert first["loss"] == pytest.approx(identity_loss(0.05), abs=1e-7)
    assert first["logps/reference_chosen"] == first["logps/chosen"]
    assert second["rewards/ties"] < 1.0


@pytest.mark.row("55")
@pytest.mark.parametrize("init", ["olora", "loftq"])  # PiSSA and EVA: see the killed runs below
def test_stopped_and_resumed_it_ends_with_the_same_bits(tmp_path, folder, init):
    whole = run_of(tmp_path / "whole", folder, init)
    whole.train()
    first = run_of(tmp_path / "cut", folder, init)
    first.add_callback(StopAfter(2))
    first.train()
    resumed = run_of(tmp_path / "cut", folder, init)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert resumed.trained.keys() == whole.trained.keys()
    ours, theirs = (trained.model.state_dict() for trained in (whole, resumed))  # what is left of the base too
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.row("6", "8")
@pytest.mark.parametrize(
    ("init", "settings"),
    [
        ("pissa", {}),
        ("olora", {"objective": "sft", "reference": None}),
        ("pissa_niter_2", {"reference": "separate_model"}),
        ("eva", {"reference": "disabled_adapter"}),
    ],
)
def test_a_trained_adapter_loads_with_plain_peft_on_the_original_base(tmp_path, folder, init, settings):
    if settings.get("reference") == "separate_model":
        settings = settings | {"ref_model": tiny_base()}
    trained = run_of(tmp_path, folder, init, **settings)
    trained.train()
    trained.save_model()
    for saved in (tmp_path / "adapter", tmp_path / "checkpoint-4" / "adapter"):
        again = PeftModel.from_pretrained(load_base(str(folder), dtype="float32"), saved)
        torch.testing.assert_close(logps(again), logps(trained.model), atol=1e-5, rtol=1e-6)
        assert not [key for key in load_file(saved / "adapter_model.safetensors") if "reference" in key]
    assert set(load_file(tmp_path / "checkpoint-4" / "parameters.safetensors")) == set(trained.trained)
    lineage = trained.lineage()
    assert lineage is not None
    assert lineage.parents == ()  # a start that is not zero is no earlier training


def token_sums(model: PreTrainedModel, pair: TokenizedPair) -> list[Tensor]:
    """Plain log-probs of a pair's two answers, one sequence at a time."""
    sums = []
    for answer in (pair.chosen_ids, pair.rejected_ids):
        ids = torch.tensor([[*pair.prompt_ids, *answer]])
        rows = model(input_ids=ids).logits[0, len(pair.prompt_ids) - 1 : -1].double().log_softmax(-1)
        sums.append(rows.gather(1, torch.tensor(answer)[:, None]).sum())
    return sums


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_gradients_are_those_of_pefts_own_model(init):
    config: LoraConfig = lora(init_lora_weights=init)
    twin = get_peft_model(tiny_base(), config)
    sum(chosen - 2 * rejected for chosen, rejected in (token_sums(twin, pair) for pair in DATA[:8])).backward()
    policy = started(tiny_base(), init)
    prepare_policy(policy)
    ours = sequence_logps(policy, PairCollator("packed", 4096)(DATA[:8]).packs[0])
    (ours.chosen - 2 * ours.rejected).sum().backward()
    assert relative_difference(adapter_gradients(policy), adapter_gradients(twin)) < 1e-5


def test_a_base_that_is_prepared_already_can_start_by_eva(tmp_path):
    """A second run in one session, on the base that the first has unloaded."""
    base = tiny_base()
    trained = trainer(tmp_path / "one", DATA, model=base, peft_config=lora(), max_steps=1)
    trained.train()
    again = trainer(tmp_path / "two", DATA, model=trained.model.unload(), peft_config=config_of("eva"), max_steps=1)
    fresh = trainer(tmp_path / "three", DATA, peft_config=config_of("eva"), max_steps=1)
    assert all(torch.equal(p, again.trained[name]) for name, p in fresh.trained.items())


@pytest.mark.filterwarnings("error:.*(EVA config|post-training conversion|low_cpu_mem)")
@pytest.mark.parametrize(
    ("init", "quantization", "kind"),
    [
        ("loftq", "nf4-double", "frozen_copy"),
        ("eva", "int8", "disabled_adapter"),
        ("pissa_niter_4", None, "frozen_copy"),
    ],
)
def test_a_config_names_the_start_and_a_killed_run_takes_it_up_again(tmp_path, monkeypatch, init, quantization, kind):
    root = write_inputs(tmp_path)
    config = run_config(
        root,
        model__quantization=quantization,
        adapter__init=init,
        adapter__use_rslora=True,
        adapter__rank_pattern={"q_proj": 2},
        reference__kind=kind,
        training__num_train_epochs=1,
    )
    whole = run.train(config, quiet=True, runs_dir=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(FocalPOTrainer, "training_step", stop_at(FocalPOTrainer.training_step, step=3))
        with pytest.raises(KeyboardInterrupt):
            run.train(config, quiet=True, runs_dir=tmp_path / "cut")
    again = run.train(config, quiet=True, runs_dir=tmp_path / "cut", resume=True)
    files = [load_file(summary.folder / "adapter" / "adapter_model.safetensors") for summary in (whole, again)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def stop_at(training_step, step: int):
    def stopping(trainer, *args, **kwargs):
        if trainer.state.global_step + 1 == step:
            raise KeyboardInterrupt
        return training_step(trainer, *args, **kwargs)

    return stopping
