"""Runs on a stored reference: no reference forward, the live run's numbers to fp32's rounding, nothing on trust."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.model.head import causal_lm
from lorafocal.model.load import load_base
from lorafocal.objectives.focal import identity_loss
from lorafocal.store import ReferenceStore, Score, answers_of
from lorafocal.trainer import FocalPOTrainer
from tests.tiny import disturb, lora, pairs, relative_difference, tiny_base, tiny_policy, trainer, weights

pytestmark = pytest.mark.slow

STEPS = 4
TRAIN, HELD_OUT = pairs(12), pairs(4, seed=2)
ROUNDED = 2.0**-24  # relative: fp32


def cached(folder: Path, *, compute: bool = True, **settings) -> FocalPOTrainer:
    """A trainer on a stored reference; the store is in `folder`, the run in `folder`/run."""
    defaults = {"reference": "cached", "reference_store": str(folder / "references")}
    made = live(folder / "run", **(defaults | settings))
    if compute:
        made.cache_reference()
    return made


def live(folder: Path, **settings) -> FocalPOTrainer:
    train, held_out = settings.pop("train", TRAIN), settings.pop("held_out", HELD_OUT)
    return trainer(folder, train, held_out, **({"max_steps": STEPS} | settings))


def logged(run: FocalPOTrainer) -> list[dict[str, float]]:
    return [
        {key: value for key, value in line.items() if not key.endswith(("_per_s", "_runtime", "_per_second", "_gib"))}
        for line in run.state.log_history
        if "loss" in line or "eval_loss" in line
    ]


@pytest.mark.row("34")
def test_a_separate_model_is_let_go_once_it_is_looked_up(tmp_path):
    tiny_base(rope_theta=500.0).save_pretrained(tmp_path / "reference")
    run = cached(tmp_path, ref_model=load_base(str(tmp_path / "reference"), dtype="float32"), identity_probe=False)
    weights = [weakref.ref(parameter) for parameter in run.ref_model.parameters()]
    run.look_up_reference()
    gc.collect()
    assert not any(weight() is not None for weight in weights)
    run.train()
    run.evaluate()
    assert run.evaluate(HELD_OUT[:3])["eval_loss"] > 0
    with pytest.raises(InputError, match="was let go"):
        run.cache_reference()


class Forwards:
    """Packs that a trainer trained, and forwards of its models since the last `reset`."""

    def __init__(self, run: FocalPOTrainer) -> None:
        self.packs = self.forwards = 0
        part_loss = run._part_loss

        def counted(*arguments):
            self.packs += 1
            return part_loss(*arguments)

        run._part_loss = counted
        for model in filter(None, (run.model, run.ref_model)):
            causal_lm(model).base_model.register_forward_pre_hook(self._count)  # PEFT 0.18 calls its base past hooks

    def _count(self, *_) -> None:
        self.forwards += 1

    def reset(self) -> None:
        self.packs = self.forwards = 0


@pytest.mark.row("34")
@pytest.mark.parametrize("model", ["policy", "separate"])
def test_training_and_evaluation_run_no_reference_forward(tmp_path, model):
    ref_model = {"ref_model": tiny_base(rope_theta=500.0), "identity_probe": False} if model == "separate" else {}
    run = cached(tmp_path, **ref_model)
    count = Forwards(run)
    run.look_up_reference()
    assert count.forwards > 0  # the spot check's
    count.reset()
    run.train()
    assert count.packs >= STEPS
    assert count.forwards == count.packs
    evaluated = len(run.data_collator(HELD_OUT).packs)
    count.reset()
    run.evaluate()
    assert count.forwards == evaluated


STARTS = {
    "fresh": ("disabled_adapter", dict),
    "dora, padded": ("disabled_adapter", lambda: {"peft_config": lora(use_dora=True), "layout": "padded"}),
    "continued, sliding window": ("frozen_copy", lambda: {"model": tiny_policy("mistral")}),
    "separate": (
        "separate_model",
        lambda: {"ref_model": disturb(tiny_policy(), scale=0.02), "identity_probe": False},
    ),
}


@pytest.mark.slow
@pytest.mark.row("34", "35")
@pytest.mark.parametrize("start", STARTS)
def test_a_stored_reference_trains_what_a_live_one_does(tmp_path, start):
    kind, settings = STARTS[start]
    ours = cached(tmp_path, eval_strategy="steps", eval_steps=2, **settings())
    theirs = live(tmp_path / "live", reference=kind, eval_strategy="steps", eval_steps=2, **settings())
    ours.train()
    theirs.train()
    of_noise = {  # at the start margins are 0 or noise
        "rewards/ties", "rewards/accuracies", "rewards/accuracies_where_right", "rewards/accuracies_where_wrong",
        "rewards/length_correlation", "focal/chosen_fell_share",
    }  # fmt: skip
    for number, (line, expected) in enumerate(zip(logged(ours), logged(theirs), strict=True)):
        left_out = of_noise if number == 0 else set()
        assert line.keys() - left_out == expected.keys() - left_out
        for key in expected.keys() - left_out:
            assert line[key] == pytest.approx(expected[key], rel=1e-5, abs=2e-6), key
    assert relative_difference(weights(ours), weights(theirs)) < 1e-5
    if start != "separate":
        assert logged(ours)[0]["loss"] == pytest.approx(identity_loss(0.05), abs=1e-6)


@pytest.mark.slow
@pytest.mark.row("35")
def test_gradients_are_the_live_ones_to_the_noise_floor(tmp_path):
    found = {}

    class Gradients(TrainerCallback):
        def __init__(self, name: str, run: FocalPOTrainer) -> None:
            self.name, self.run = name, run

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found.setdefault((self.name, state.global_step), {n: p.grad.clone() for n, p in self.run.trained.items()})

    still = {"learning_rate": 1e-3, "max_grad_norm": 0.0}
    for name, run in {
        "stored": cached(tmp_path, model=tiny_policy(), **still),
        "live": live(tmp_path / "live", model=tiny_policy(), reference="frozen_copy", **still),
    }.items():
        run.add_callback(Gradients(name, run))
        run.train()
    for step in range(STEPS):
        assert relative_difference(found["stored", step], found["live", step]) < 1e-5


def test_a_float64_run_starts_at_the_identity_up_to_the_stored_rounding(tmp_path):
    """What is stored is fp32: a margin is off by at most beta times four rounded log-probs, whatever the model."""
    model = tiny_base(dtype=torch.float64)
    run = cached(tmp_path, model=model, peft_config=lora(), beta=0.1)
    run.train()
    largest = max(abs(line["logps/chosen"]) + abs(line["logps/rejected"]) for line in logged(run)[:1]) * 4
    first = logged(run)[0]["loss"]
    assert abs(first - identity_loss(0.05)) < 0.1 * 4 * ROUNDED * largest
    assert logged(run)[0]["rewards/margins"] != 0.0


@pytest.mark.slow
@pytest.mark.row("35")
@pytest.mark.parametrize("word", ["nf4", "int8"])
def test_quantised_bases_have_entries_of_their_own(tmp_path, word):
    tiny_base().save_pretrained(tmp_path / "base")

    def on(quantization: str | None, **settings) -> FocalPOTrainer:
        base = load_base(str(tmp_path / "base"), dtype="float32", quantization=quantization)
        return cached(tmp_path, model=base, peft_config=lora(), **settings)

    run = on(word)
    run.train()
    assert logged(run)[0]["loss"] == pytest.approx(identity_loss(0.05), abs=2e-6)
    with pytest.raises(InputError, match=f"weights_sha256 is .*quantization is {word} there and None here"):
        on(None, compute=False).train()
    again = on(word, compute=False, seed=7)  # another process, to the store
    assert again.cache_reference().computed == 0
    again.look_up_reference()


@pytest.mark.slow
def test_runs_of_a_sweep_share_the_store(tmp_path):
    cached(tmp_path)
    for settings in ({"seed": 5}, {"learning_rate": 1e-3}, {"peft_config": lora(r=2)}, {"gamma": 0.1}):
        run = cached(tmp_path, compute=False, max_steps=1, **settings)
        assert run.cache_reference().computed == 0
        run.train()
    assert len(list((tmp_path / "references").iterdir())) == 1


@pytest.mark.row("35")
def test_what_is_missing_is_refused_before_the_first_step(tmp_path):
    cached(tmp_path, train=TRAIN[:-1])
    run = cached(tmp_path, compute=False)
    with pytest.raises(InputError, match=r"2 of 32 .*missing.*pair 'pair-11'.*lorafocal cache-reference"):
        run.train()
    assert run.state.global_step == 0
    with pytest.raises(InputError, match="missing"):
        run.evaluate()
    run.cache_reference()
    run.train()
    with pytest.raises(InputError, match=r"of 14 .*missing"):
        run.evaluate(pairs(7, seed=11))


@pytest.mark.row("35")
def test_repeated_pairs_and_pairs_of_one_prompt(tmp_path):
    one, two, *_ = pairs(6)[3:]
    third = TokenizedPair("third", one.prompt_ids, one.rejected_ids, two.chosen_ids)
    train = [one, two, third, one, two] * 3
    run = cached(tmp_path, train=train, held_out=[third], compute=False)
    assert run.cache_reference().computed == 5
    run.train()
    assert logged(run)[0]["loss"] == pytest.approx(identity_loss(0.05), abs=1e-6)


def rewritten(store: ReferenceStore, of: list[TokenizedPair], by: float) -> None:
    """The store as it was, but for one value: a part whose digest is right."""
    found = [value for pair in store.look_up(of) for value in pair.reference or ()]
    scores = [Score(answer, value) for answer, value in zip(answers_of(of), found, strict=True)]
    shutil.rmtree(store.folder)
    store.write([Score(scores[0].answer, scores[0].logps + by), *scores[1:]])


@pytest.mark.row("35")
def test_one_perturbed_value_stops_the_run(tmp_path):
    """The spot check's pairs are all of them here; the identity probe is off, which would see the first step's."""
    train = pairs(8)
    run = cached(tmp_path, train=train, held_out=None, identity_probe=False)
    rewritten(run.stored.store, train, by=1e-3)
    with pytest.raises(InputError, match=r"stored log-prob of the chosen answer of pair 'pair-0'.*more than noise"):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.row("1", "35")
def test_the_identity_probe_looks_at_the_first_step_within_the_measured_noise(tmp_path):
    """It sees pairs that the spot check did not draw."""
    train = pairs(8)
    run = cached(tmp_path, train=train, held_out=None)
    run.look_up_reference()
    assert 0 < run.stored.noise < 1e-3
    run.train_dataset[3] = changed = run.train_dataset[3]
    chosen, rejected = changed.reference
    object.__setattr__(changed, "reference", (chosen, rejected - 0.01))
    with pytest.raises(InputError, match=rf"differ by 0\.01.* nats on pair '{changed.id}'.*at most.*its noise"):
        run.train()


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_same_bits(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "pairs_per_step": 5}
    whole = cached(tmp_path, **settings)
    whole.train()
    state = json.loads((tmp_path / "run/checkpoint-2/state.json").read_text())
    assert "cached" in json.dumps(state)
    again = cached(tmp_path, compute=False, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert all(torch.equal(weights(whole)[name], tensor) for name, tensor in weights(again).items())


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_reference(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    cached(tmp_path, **settings).train()
    base = tiny_base()
    base.model.norm.weight.data *= 1.01
    other = cached(tmp_path, model=base, **settings, peft_config=lora())
    with pytest.raises(InputError, match="stored log-probs are of another reference than this run began with"):
        other.train(resume_from_checkpoint=True)
    live_run = live(tmp_path / "run", reference="disabled_adapter", **settings)
    with pytest.raises(InputError, match=r"trained with reference cached|was trained otherwise"):
        live_run.train(resume_from_checkpoint=True)


def test_objectives_without_a_reference_refuse_a_store(tmp_path):
    with pytest.raises(InputError, match="reference"):
        cached(tmp_path, objective="sft", compute=False)
    with pytest.raises(InputError, match="nothing is stored"):
        live(tmp_path, objective="sft").cache_reference()
    with pytest.raises(InputError, match="nothing is stored"):
        live(tmp_path).cache_reference()
