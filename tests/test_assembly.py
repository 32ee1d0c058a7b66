"""What a trainer is given: pairs that a model cannot score are refused before the first step, whoever brings them."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from lorafocal import assembly, engines, memory
from lorafocal.arguments import FocalPOConfig
from lorafocal.data.toy import toy_preferences, toy_tokenizer
from lorafocal.engines import loading_device
from lorafocal.errors import InputError
from lorafocal.memory import Setup, Shape
from lorafocal.model import load
from lorafocal.model.head import causal_lm
from lorafocal.model.load import load_base
from lorafocal.ops.attention import SHARED_PREFIX_ATTENTION
from lorafocal.ops.attention_kernels import KernelChoice
from lorafocal.ops.elementwise import TORCH
from lorafocal.trainer import FocalPOTrainer
from tests.model.families import text_policy
from tests.saved_run import other_tokenizer, save_base
from tests.tiny import SIZES, lora, pairs, tiny_base, tiny_policy, trainer

pytestmark = pytest.mark.slow

PAIR = pairs(1)[0]


@pytest.mark.row("28")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt_ids": []}, "part without tokens"),
        ({"chosen_ids": []}, "part without tokens"),
        ({"rejected_ids": []}, "part without tokens"),
        ({"rejected_ids": [5, 97]}, "token id 97, but the model's embeddings end at 96"),
    ],
)
def test_tokenised_pairs_are_looked_at_too(tmp_path, change, named):
    """A prompt without tokens would be predicted by the pair before it; an answer without tokens would score 0."""
    bad = replace(PAIR, id="odd", **change)
    with pytest.raises(InputError, match=rf"train_dataset: pair 'odd' .*{named}"):
        trainer(tmp_path, [*pairs(3), bad])
    with pytest.raises(InputError, match=rf"eval_dataset: pair 'odd' .*{named}"):
        trainer(tmp_path, pairs(3), [bad])
    with pytest.raises(InputError, match=rf"eval_dataset: pair 'odd' .*{named}"):
        trainer(tmp_path, pairs(3), pairs(3)).evaluate([bad])


def phi3(limit: int) -> Phi3ForCausalLM:
    """Phi-3 as it is stored: the length at which its rotations change is a value of its own."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [9.0] * 4, "rope_theta": 10000.0}
    lengths = {"original_max_position_embeddings": limit, "max_position_embeddings": 64}
    torch.manual_seed(0)
    return Phi3ForCausalLM(Phi3Config(**SIZES, **lengths, rope_parameters=rope)).requires_grad_(False)


def test_of_layers_that_differ_in_their_heads_every_kernel_is_named(monkeypatch):
    """Each layer's own is found when it is called; a store's log-probs are told apart by all of them."""

    def choose(*_: object, head_dim: int, **__: object) -> KernelChoice:
        return KernelChoice("a call a segment" if head_dim > 256 else "flash", None, f"for {head_dim}")

    monkeypatch.setattr(assembly, "choose", choose)
    policy = text_policy("gemma4_text")  # 8, and 512 where attention is full
    policy.get_base_model().set_attn_implementation(SHARED_PREFIX_ATTENTION)
    assert str(assembly.attention_of(policy, torch.device("cpu"))) == "flash and a call a segment (for 8; for 512)"
    monkeypatch.setattr(assembly, "choose", lambda *_, **__: KernelChoice("flash", None, "first"))
    assert str(assembly.attention_of(policy, torch.device("cpu"))) == "flash (first)"


@pytest.mark.slow
@pytest.mark.row("20")
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_pairs_that_would_move_their_neighbours_are_refused_wherever_they_come_from(tmp_path, layout):
    """Phi-3's long rotations begin for a whole batch with its longest sequence."""
    short, long = pairs(3), [*pairs(3), replace(PAIR, prompt_ids=[7] * 24)]

    def tried(train, held_out=None, **more):
        given = {"layout": layout, "model": phi3(24), "peft_config": lora()}
        return trainer(tmp_path, train, held_out, **given | more)

    refused = pytest.raises(InputError, match=r"longest pair has 25 tokens.*beyond 24 the model's longrope")
    with refused:
        tried(long)
    with refused:
        tried(short, long)
    with refused:
        tried(short, short).evaluate(long)
    with refused:
        tried(long, model=phi3(64), ref_model=phi3(24), reference="separate_model")
    run = tried(short, short, max_steps=2)
    run.train()
    assert run.state.log_history[-2]["rewards/margins"] != 0
    assert run.data_collator.layout == layout


@pytest.mark.row("7", "22")
def test_a_reference_that_reads_token_ids_otherwise_is_refused(tmp_path):
    """Its embeddings are as many as the policy's, so nothing else would notice."""
    save_base(tmp_path / "base", dtype=torch.float32)
    other = other_tokenizer(save_base(tmp_path / "other", dtype=torch.float32))

    def tried(ref_model):
        return FocalPOTrainer(
            load_base(str(tmp_path / "base"), dtype="float32"),
            str(ref_model),
            args=FocalPOConfig(output_dir=str(tmp_path / "run"), reference="separate_model", use_cpu=True),
            train_dataset=toy_preferences(4),
            processing_class=toy_tokenizer(),
            peft_config=lora(),
        )

    with pytest.raises(InputError, match=r"other does not share the tokenizer: 2 tokens have another id.*'0'"):
        tried(other)
    tried(tmp_path / "base")


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_chosen_elementwise_functions_fold_the_logits_of_policy_and_reference(tmp_path, monkeypatch, layout):
    folded: list[int] = []

    def fold(logits, *rest):
        folded.append(len(logits))
        return TORCH.head_fold_(logits, *rest)

    monkeypatch.setattr(assembly, "load", lambda name: replace(TORCH, name=name, head_fold_=fold))
    data = pairs(6)
    separate = {"reference": "separate_model", "ref_model": tiny_base()}
    run = trainer(tmp_path, data, layout=layout, max_steps=1, pairs_per_step=6, **separate)
    folded.clear()
    run.train()
    assert sum(folded) == 2 * sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in data)


def test_attention_sinks_are_seen_when_the_kernel_is_told(monkeypatch):
    asked = []
    monkeypatch.setattr(assembly, "choose", lambda *_, **needs: asked.append(needs["sinks"]))
    for policy in (text_policy("gpt_oss"), tiny_policy()):
        policy.get_base_model().set_attn_implementation(SHARED_PREFIX_ATTENTION)
        assembly.attention_of(policy, torch.device("cpu"))
    assert asked == [True, False]


@pytest.mark.slow
@pytest.mark.row("F12")
def test_a_trainer_whose_model_was_prepared_for_another_layout_since_is_refused(tmp_path):
    """transformers' own attention takes a pack for one long text, or cuts it where its positions restart."""
    packed = trainer(tmp_path / "a", pairs(6))
    padded = trainer(tmp_path / "b", pairs(6), model=packed.model, layout="padded")
    with pytest.raises(InputError, match=r"whose attention is sdpa.*one after the other"):
        packed.train()
    padded.train()
    again = trainer(tmp_path / "c", pairs(6), model=packed.model, identity_probe=False)
    with pytest.raises(InputError, match="without `segments`"):
        padded.train()
    again.train()


def test_a_run_on_the_cpu_puts_no_named_model_on_an_accelerator(tmp_path, monkeypatch):
    """int8 weights that were on a GPU once cannot compute anywhere else, and the GPU may be too small or in use."""
    names = [str(save_base(tmp_path / name, dtype=torch.bfloat16)) for name in ("base", "reference")]
    monkeypatch.setattr(load, "local_device", lambda: torch.device("cuda", 0))
    settings = {"reference": "separate_model", "use_cpu": True, "max_steps": 1, "report_to": "none"}
    trainer = FocalPOTrainer(
        names[0],
        names[1],
        args=FocalPOConfig(output_dir=str(tmp_path / "run"), pairs_per_step=4, **settings),
        train_dataset=toy_preferences(8, seed=1),
        peft_config=lora(),
    )
    assert {p.device.type for m in (trainer.model, trainer.ref_model) for p in m.parameters()} == {"cpu"}


@pytest.mark.row("37")
@pytest.mark.parametrize("reference", ["cached", "separate_model"])
@pytest.mark.parametrize(
    ("engine", "offload"),
    [("zero2", "optimizer"), ("zero3", "none"), ("zero3", "optimizer"), ("zero3", "all"), ("fsdp2", "all")],
)
def test_the_plan_knows_where_models_are_loaded(engine: str, offload: str, reference: str) -> None:
    """A process holds its models in one place before the first step, on its GPU or in the machine's memory."""
    args: Any = SimpleNamespace(engine=engine, offload=offload, reference=reference, use_cpu=False)
    setup = Setup(full=True, engine=engine, offload=offload, reference=reference)
    start = memory.starting_bytes(Shape.of(causal_lm(tiny_policy()).config.to_dict()), setup)
    waits = loading_device(args) == torch.device("cpu")
    assert waits == ((engine, offload, reference) == ("zero3", "all", "separate_model"))
    assert (start.on_gpu == 0, start.in_machine > 0) == (waits, waits)
    args.use_cpu = True
    assert loading_device(args) == torch.device("cpu")


@pytest.mark.parametrize(
    ("offload", "bound", "threads"), [("none", 6, []), ("optimizer", 6, [3]), ("all", 3, [3]), ("all", 2, [2])]
)
def test_what_a_processor_steps_has_the_threads_of_its_cores(
    monkeypatch: pytest.MonkeyPatch, offload: str, bound: int, threads: list[int]
) -> None:
    """torchrun leaves each process of several one thread. A machine's other cores are another job's, and of the
    launcher's those to which it binds another process."""
    found: list[int] = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {*range(6 if process else bound)})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(engines, "set_num_threads", found.append)
    monkeypatch.setattr(engines, "get_num_threads", lambda: 1)
    args: Any = SimpleNamespace(engine="zero2", offload=offload, device=torch.device("cuda"), world_size=2)
    engines.build_engine(args)
    assert found == threads
