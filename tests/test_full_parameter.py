"""Training without an adapter: every weight, exactly; bf16 arithmetic on fp32 masters; what only adapters have."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lorafocal.arguments import FocalPOConfig
from lorafocal.data.packing import pad_sequences, scores_of, share_prefixes
from lorafocal.engines.whole import Whole
from lorafocal.errors import InputError, UnhealthyRun
from lorafocal.model.master import arithmetic_of, check_one_width, hold_masters, train_in_full
from lorafocal.objectives import build_objective
from lorafocal.objectives.focal import identity_loss
from lorafocal.objectives.inputs import PairLogps
from lorafocal.policy import prepare_policy, token_logps
from lorafocal.probes import choose_layout
from lorafocal.trainer import FocalPOTrainer
from tests.model.architecture_table import one_at_a_time
from tests.model.families import known_families, random_model
from tests.tiny import (
    adapter_gradients,
    lora,
    pairs,
    relative_difference,
    tiny_base,
    trainer,
    weights,
    with_a_wide_norm,
)

pytestmark = pytest.mark.slow

DATA = pairs(10)
# Tied and untied, capped scores, sinks, experts, transposed linear layers, learned positions, an image encoder.
FAMILIES = {"llama", "llama tied", "gemma2", "gpt2", "gpt_oss", "mixtral", "ernie4_5_moe", "gemma3"}


def sums(of_tokens: Tensor, data: list) -> PairLogps:
    """Of token log-probs in the order of a pack: all chosen answers, then all rejected ones."""
    lengths = [len(pair.chosen_ids) for pair in data] + [len(pair.rejected_ids) for pair in data]
    both = torch.stack([part.sum() for part in of_tokens.split(lengths)])
    return PairLogps(*both.chunk(2))


def full_trainer(folder, data=DATA, held_out=None, *, dtype=torch.float32, tied=False, **settings):
    """A separate model as the reference, the same as the policy unless it is given."""
    model = tiny_base(dtype=dtype, tie_word_embeddings=tied)
    if settings.get("reference", "separate_model") == "separate_model":
        settings = {"reference": "separate_model", "ref_model": copy.deepcopy(model), "identity_probe": True} | settings
    return trainer(folder, data, held_out, model=model, **settings)


# ---- what is computed ------------------------------------------------------------------------------------------


@pytest.mark.row("19")
@pytest.mark.parametrize(
    ("family", "layout"),
    [(family, "packed") for family in sorted(FAMILIES & {*known_families()})] + [("llama tied", "padded")],
)
def test_gradients_of_every_weight_are_those_of_plain_autograd(family, layout):
    """In float64, one sequence at a time, on transformers' own attention; norms and routers round to fp32 within."""
    plain = random_model(family)
    ours = copy.deepcopy(plain)
    trained = train_in_full(ours)
    assert train_in_full(plain).keys() == trained.keys()
    choose_layout(ours, layout)
    prepare_policy(plain)
    batch = pairs(5)
    scores = token_logps(ours, (share_prefixes if layout == "packed" else pad_sequences)(batch))
    weights = torch.randn(len(scores), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (scores * weights).sum().backward()
    wanted = one_at_a_time(plain, batch)
    (wanted * weights).sum().backward()
    assert (scores - wanted).abs().max() < 1e-11
    assert adapter_gradients(ours).keys() == trained.keys()
    assert relative_difference(adapter_gradients(ours), adapter_gradients(plain)) < 1e-6


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_step_is_the_mean_loss_of_its_pairs_by_autograd(tmp_path, tied, layout):
    """FocalPO's Eq. 4, written out, of log-probs of one sequence at a time; the reference is another model."""
    other = tiny_base(dtype=torch.float64, tie_word_embeddings=tied)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.02)
    settings = {"layout": layout, "identity_probe": False, "ref_model": other, "beta": 0.1, "gamma": 0.05}
    run = full_trainer(tmp_path, dtype=torch.float64, tied=tied, tokens_per_pack=40, **settings)
    plain = tiny_base(dtype=torch.float64, tie_word_embeddings=tied)
    train_in_full(plain)
    policy, reference = (sums(one_at_a_time(model, DATA), DATA) for model in (plain, copy.deepcopy(other)))
    ratios = [ours - theirs.detach() for ours, theirs in zip(policy, reference, strict=True)]
    p = torch.sigmoid(0.1 * (ratios[0] - ratios[1]))
    wanted = -(p**0.05 * p.log()).mean()
    wanted.backward()

    run.create_optimizer_and_scheduler(1)
    batch = run.data_collator(run.train_dataset)
    assert len(batch.packs) > 2
    loss = run.training_step(run.model, batch)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-9)
    ours = {name: parameter.grad for name, parameter in run.trained.items()}
    theirs = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert relative_difference(ours, theirs) < 1e-6


@pytest.mark.row("15")
@pytest.mark.parametrize("objective", ["kto", "odpo"])
def test_sums_over_the_step_and_scores_reach_the_loss_however_it_is_split(tmp_path, objective):
    """KTO's reference points are of the whole step; ODPO's offsets are of each pair."""
    scored = [replace(pair, score_chosen=float(n), score_rejected=-1.0) for n, pair in enumerate(DATA)]
    other = tiny_base(dtype=torch.float64)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.1)
    steps = {}
    for tokens in (40, 10_000):
        settings = {"objective": objective, "ref_model": other, "identity_probe": False, "tokens_per_pack": tokens}
        run = full_trainer(tmp_path, scored, dtype=torch.float64, **settings)
        run.create_optimizer_and_scheduler(1)
        loss = run.training_step(run.model, run.data_collator(run.train_dataset))
        steps[tokens] = float(loss), {name: p.grad.clone() for name, p in run.trained.items()}
    assert steps[40][0] == pytest.approx(steps[10_000][0], rel=1e-9)
    assert relative_difference(steps[40][1], steps[10_000][1]) < 1e-6
    by_hand = build_objective(objective, beta=run.args.beta)
    policy, reference = (sums(one_at_a_time(m, scored), scored) for m in (tiny_base(dtype=torch.float64), other))
    lengths = share_prefixes(scored).index.lengths
    wanted = by_hand(policy, reference, lengths, scores=scores_of(scored)).losses.mean()
    assert steps[40][0] == pytest.approx(float(wanted), rel=1e-9)


# ---- bf16 arithmetic, fp32 masters -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_bfloat16(tmp_path_factory):
    """One step of a rate far below what a bf16 weight can move by; what was before it and after."""
    run = full_trainer(tmp_path_factory.mktemp("bf16"), dtype=torch.bfloat16, learning_rate=1e-7, max_steps=1)
    before = weights(run)
    run.train()
    return run, before


@pytest.mark.row("13", "49")
def test_a_step_of_1e_7_moves_the_masters_of_a_bf16_model(in_bfloat16):
    run, before = in_bfloat16
    assert {parameter.dtype for parameter in before.values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in run.trained.values()} == {torch.float32}
    state = run.engine.optimizer.state
    assert {moments["exp_avg"].dtype for moments in state.values()} == {torch.float32}
    assert arithmetic_of(run.model) == torch.bfloat16
    had = torch.cat([(p.grad if p.grad is not None else state[p]["exp_avg"]).flatten() for p in run.trained.values()])
    moved = torch.cat([(run.trained[name] != old).flatten() for name, old in before.items()])
    assert moved[had != 0].double().mean() > 0.95  # fp32 itself is 1.2e-7 coarse at 1
    rounded = torch.cat([(run.trained[name].bfloat16() != old).flatten() for name, old in before.items()])
    assert rounded.double().mean() < 0.01  # what bf16 weights would have kept of it


@pytest.mark.row("1", "55")
def test_policy_and_separate_reference_start_exactly_alike_in_bf16(in_bfloat16):
    run, _ = in_bfloat16
    [entry] = [entry for entry in run.state.log_history if "loss" in entry]
    assert entry["rewards/ties"] == 1.0
    assert entry["loss"] == pytest.approx(identity_loss(0.05), abs=1e-6)


@pytest.mark.row("13", "49")
def test_weights_that_a_bf16_model_keeps_in_fp32_are_not_rounded_without_a_word(tmp_path):
    """ZeRO and FSDP2 compute with one precision; the ordinary engine with what each weight has."""
    wide = with_a_wide_norm(tmp_path).requires_grad_()
    with pytest.raises(InputError, match=r"fsdp2 .* keeps 1 of its own in float32 \(model.norm.weight is one\)"):
        check_one_width(wide, "fsdp2")
    check_one_width(wide.requires_grad_(False), "fsdp2")
    check_one_width(tiny_base(dtype=torch.bfloat16).requires_grad_(), "fsdp2")
    check_one_width(tiny_base().requires_grad_(), "fsdp2")


def test_masters_are_no_base_of_an_adapter(tmp_path, in_bfloat16):
    with pytest.raises(InputError, match=r"fp32 masters of a run that trained all of them.*save_model"):
        trainer(tmp_path, DATA, model=in_bfloat16[0].model, peft_config=lora())


@pytest.mark.parametrize("family", sorted({"llama", "gemma2", "gemma3_text", "gpt2"} & {*known_families()}))
def test_a_model_with_masters_computes_what_it_did_in_bf16_to_the_last_bit(family):
    model = random_model(family, torch.bfloat16)
    choose_layout(model, "packed")
    pack = share_prefixes(pairs(5))
    with torch.no_grad():
        before = token_logps(model, pack)
    hold_masters(model, train_in_full(model))
    after = token_logps(model, pack)
    assert torch.equal(before, after)
    after.sum().backward()
    assert {gradient.dtype for gradient in adapter_gradients(model).values()} == {torch.float32}
    hold_masters(model, train_in_full(model))  # again: nothing
    assert torch.equal(before, token_logps(model, pack))


def test_an_fp32_model_is_left_as_it_is():
    model = tiny_base()
    hold_masters(model, train_in_full(model))
    assert arithmetic_of(model) == torch.float32
    assert not model.model.embed_tokens._forward_hooks


# ---- what is trained -------------------------------------------------------------------------------------------


def test_of_an_image_text_model_the_text_part_is_trained_and_nothing_that_no_gradient_reaches():
    model = random_model("gemma3")
    trained = train_in_full(model)
    assert trained
    assert not any("vision" in name or "projector" in name for name in trained)
    if "ernie4_5_moe" in known_families():
        model = random_model("ernie4_5_moe")
        left = {name for name, _ in model.named_parameters()} - train_in_full(model).keys()
        assert left
        assert all(name.endswith("e_score_correction_bias") for name in left)


def test_every_weight_moves_and_tied_ones_stay_tied(tmp_path):
    run = full_trainer(tmp_path, tied=True, held_out=pairs(3, seed=2), max_steps=2, recompute="full")
    before = weights(run)
    run.evaluate()
    run.train()
    run.evaluate()
    assert run.health.moved
    assert not [name for name, old in before.items() if torch.equal(run.trained[name], old)]
    assert run.model.lm_head.weight is run.model.model.embed_tokens.weight
    first, second = (entry["loss"] for entry in run.state.log_history if "loss" in entry)
    assert first == pytest.approx(identity_loss(0.05), abs=1e-6)
    assert second != first


def test_the_engine_says_and_sets_whole_weights_and_states_by_name(tmp_path):
    """What checkpoints are made of: a second trainer, set to what the first says, goes on with the same bits."""
    run = full_trainer(tmp_path, max_steps=2, identity_probe=False)
    run.train()
    engine: Whole = run.engine
    values = {name: engine.full(parameter) for name, parameter in run.trained.items()}
    states = {name: engine.states(parameter) for name, parameter in run.trained.items()}
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in states.values())
    again = full_trainer(tmp_path, max_steps=2, identity_probe=False)
    again.engine.begin(again)
    again.create_optimizer_and_scheduler(2)
    again.engine.ready(again)
    again.engine.restore(again.trained, values.__getitem__, states.__getitem__)
    batch = run.data_collator(DATA)
    for one in (run, again):
        for _, settings in one.engine.groups(one.trained):
            settings["lr"] = 1e-3
        one.training_step(one.model, batch)
        one.optimizer.step()
    assert all(torch.equal(p, again.trained[name]) for name, p in run.trained.items())
    ours, theirs = ([names for names, _ in one.engine.groups(one.trained)] for one in (run, again))
    assert ours == theirs


# ---- the stored reference --------------------------------------------------------------------------------------


@pytest.mark.row("34")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_reference_is_the_policy_as_it_starts_and_is_shared_with_adapters(tmp_path, dtype):
    """Whatever trains on a base, the base's own log-probs are one store's."""
    where = {"reference": "cached", "reference_store": str(tmp_path / "store")}
    trainer(tmp_path, DATA, model=tiny_base(dtype=dtype), peft_config=lora(), **where).cache_reference()
    run = full_trainer(tmp_path, dtype=dtype, max_steps=2, **where)
    report = run.cache_reference()
    assert report.computed == (0 if report.found else -1)
    run.train()
    first, second = (entry["loss"] for entry in run.state.log_history if "loss" in entry)
    assert first == pytest.approx(identity_loss(0.05), abs=1e-3 if dtype == torch.float32 else 0.02)
    assert second != first


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference": "disabled_adapter"}, "reference disabled_adapter is one of adapters.*reference.kind: cached"),
        ({"reference": "frozen_copy"}, "the reference frozen_copy is one of adapters"),
        ({"loraplus_lr_ratio": 16.0}, "^loraplus_lr_ratio: there is no adapter"),
        ({"adapter_kernels": "peft"}, "^adapter_kernels: there is no adapter"),
        ({"recompute": "mlp"}, "recompute=mlp is a matter of the fused adapter functions: without an adapter"),
    ],
)
def test_what_only_adapters_have_is_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        full_trainer(tmp_path, **settings)


def test_the_policy_cannot_be_its_own_reference(tmp_path):
    model = tiny_base()
    with pytest.raises(InputError, match=r"the very model that is trained"):
        trainer(tmp_path, DATA, model=model, ref_model=model, reference="separate_model")


def test_a_weight_without_gradient_stops_the_first_step(tmp_path):
    run = full_trainer(tmp_path)
    run.model.model.norm.weight.requires_grad_(False)
    with pytest.raises(UnhealthyRun, match=r"received no gradient \(first: model\.norm\.weight\)"):
        run.train()


def test_a_gradient_that_is_not_finite_stops_the_step_before_a_weight_changes(tmp_path):
    run = full_trainer(tmp_path)
    before = weights(run)
    run.model.model.norm.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(UnhealthyRun, match="gradient is not finite"):
        run.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in run.trained.items())


def test_without_a_reference_nothing_is_asked_for(tmp_path):
    """SFT of every weight, from a plain model and nothing else."""
    args = FocalPOConfig(output_dir=str(tmp_path), objective="sft", use_cpu=True, max_steps=1, save_strategy="no")
    run = FocalPOTrainer(tiny_base(), args=args, train_dataset=DATA)
    run.train()
    assert isinstance(run.model, nn.Module)
    assert run.health.moved
