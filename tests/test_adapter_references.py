"""Runs against references on adapters: a finished one, one that moves, several at once, beside a guide; resumed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from lorafocal.errors import InputError
from lorafocal.model.adapters import FROZEN_COPY, attach_lora
from lorafocal.model.moving import REFERENCE_FILE, reference_state
from lorafocal.objectives.focal import identity_loss
from tests.test_references_in_training import StopAfter
from tests.tiny import disturb, lora, pairs, tiny_base, trainer

PAIRS = pairs(13)
MOVING = {"reference": "moving", "reference_every": 2, "max_steps": 6, "pairs_per_step": 5}
SOFT = MOVING | {"reference_every": 1, "reference_mixing": 0.5}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> str:
    """An adapter of another rank than the policy's, on fewer layers."""
    folder = tmp_path_factory.mktemp("finished") / "adapter"
    disturb(attach_lora(tiny_base(), lora(r=6, target_modules=["q_proj", "up_proj"])), 0.2).save_pretrained(folder)
    return str(folder)


def losses(run) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kernels", ["auto", "peft"])
def test_a_guiding_reference_is_the_model_that_it_names(tmp_path, finished, kernels):
    """The same run against that adapter as a second model."""
    settings = {"max_steps": 3, "adapter_kernels": kernels, "objective": "dpo", "beta": 0.2}
    guided = trainer(tmp_path / "a", PAIRS, reference="adapter", reference_adapter=finished, **settings)
    second = PeftModel.from_pretrained(tiny_base(), finished)
    beside = trainer(
        tmp_path / "b", PAIRS, reference="separate_model", ref_model=second, identity_probe=False, **settings
    )
    guided.train()
    beside.train()
    assert losses(guided) == pytest.approx(losses(beside), rel=1e-4)
    assert abs(losses(guided)[0] - math.log(2)) > 1e-3
    assert not [name for name in guided.trained if FROZEN_COPY in name]


def test_a_moving_reference_starts_over_at_the_identity_loss_after_a_copy(tmp_path):
    run = trainer(tmp_path, PAIRS, **MOVING, beta=0.1)
    run.train()
    at_start = [round(loss, 6) == round(identity_loss(0.05), 6) for loss in losses(run)]
    assert at_start == [True, False, True, False, True, False]


@pytest.mark.slow
@pytest.mark.row("55", "1")
@pytest.mark.parametrize("stop", [2, 3])
@pytest.mark.parametrize("settings", [MOVING, SOFT], ids=["hard", "soft"])
def test_stopped_and_resumed_a_moving_reference_is_where_it_was(tmp_path, settings, stop):
    settings = settings | {"save_strategy": "steps", "save_steps": 10}
    whole = trainer(tmp_path / "whole", PAIRS, **settings)
    whole.train()
    cut = trainer(tmp_path / "cut", PAIRS, **settings)
    cut.add_callback(StopAfter(stop))
    cut.train()
    file = tmp_path / "cut" / f"checkpoint-{stop}" / REFERENCE_FILE
    assert same(load_file(file), reference_state(cut.model))
    resumed = trainer(tmp_path / "cut", PAIRS, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(p, whole.trained[n]) for n, p in resumed.trained.items())
    assert same(reference_state(resumed.model), reference_state(whole.model))
    assert losses(resumed) == losses(whole)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())


@pytest.mark.slow
def test_another_pace_adapter_or_guide_is_not_resumed_under(tmp_path, finished):
    first = trainer(tmp_path / "moving", PAIRS, **MOVING)
    first.add_callback(StopAfter(1))
    first.train()
    with pytest.raises(InputError, match=r"was set to .*'every': 2.*'every': 3"):
        trainer(tmp_path / "moving", PAIRS, **MOVING | {"reference_every": 3}).train(resume_from_checkpoint=True)
    other = str(tmp_path / "other")
    disturb(attach_lora(tiny_base(), lora()), 0.3).save_pretrained(other)
    for name, kind in (("reference_adapter", {"reference": "adapter"}), ("reference_guide", {"objective": "modpo"})):
        settings = kind | {"beta": 0.1, "max_steps": 3}
        begun = trainer(tmp_path / name, PAIRS, **settings, **{name: finished})
        begun.add_callback(StopAfter(1))
        begun.train()
        with pytest.raises(InputError, match=r"sha256 of (its|their) tensors"):
            trainer(tmp_path / name, PAIRS, **settings, **{name: other}).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "more",
    [
        {"reference_combine": "harmonic"},
        {"reference_combine": "geometric", "reference_weights": [0.3, 0.7], "objective": "ipo-sum"},
        {"reference_combine": "geometric", "objective": "sampo", "beta": 0.1},
    ],
)
def test_several_references_train_every_objective_that_they_go_with(tmp_path, finished, more):
    run = trainer(tmp_path, PAIRS, PAIRS[:4], reference="several", reference_members=["base", finished], **more)
    run.train()
    assert all(math.isfinite(loss) for loss in losses(run))
    assert math.isfinite(run.evaluate()["eval_loss"])


def test_a_guide_beside_stored_log_probs_gives_the_run_with_a_live_reference(tmp_path, finished):
    settings = {"objective": "modpo", "beta": 0.1, "reference_guide": finished, "max_steps": 3}
    live = trainer(tmp_path / "live", PAIRS, **settings)
    live.train()
    stored = trainer(
        tmp_path / "stored", PAIRS, reference="cached", reference_store=str(tmp_path / "store"), **settings
    )
    stored.cache_reference()
    stored.train()
    assert losses(stored) == pytest.approx(losses(live), rel=1e-4)
    plain = trainer(tmp_path / "plain", PAIRS, reference="cached", reference_store=str(tmp_path / "store"), beta=0.1)
    assert plain.stored is not None
    assert plain.stored.store.context == stored.stored.store.context  # the guide is no part of the reference


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (SOFT | {"peft_config": lora(use_dora=True)}, "averag"),
        (MOVING | {"model": "whole"}, "the reference moving is one of adapters"),
        ({"reference": "adapter", "peft_config": lora(init_lora_weights="olora")}, "another base"),
    ],
)
def test_what_would_not_be_exact_is_refused_with_the_way_out(tmp_path: Path, finished, settings, said):
    settings = dict(settings)
    if settings["reference"] == "adapter":
        settings["reference_adapter"] = finished
    if settings.get("model") == "whole":
        settings["model"] = tiny_base()
    with pytest.raises(InputError, match=said):
        trainer(tmp_path, PAIRS, **settings)
