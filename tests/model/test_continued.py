"""Continuing a saved adapter: the same weights in fp32, trainable, on the right base, or a refusal by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, replace_lora_weights_loftq
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorafocal.errors import InputError
from lorafocal.lineage import CONTINUED, Stage, lineage_of
from lorafocal.model.adapters import check_trainable
from lorafocal.model.continued import continue_adapter, mark_fresh, stages_of
from lorafocal.model.load import load_base
from lorafocal.model.saved import open_adapter, read_adapter
from lorafocal.objectives.focal import identity_loss
from lorafocal.publish import sha256
from lorafocal.tensor_files import tensors_sha256
from tests.saved_run import SavedRun, held_out_pairs, save_base, save_run
from tests.tiny import disturb, lora, tiny_base, tiny_policy, trainer

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path: Path) -> SavedRun:
    return save_run(tmp_path)


@pytest.mark.row("2", "3", "13")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_tensor_is_there_in_fp32_and_trainable_and_nothing_else_is(run: SavedRun, dtype: str) -> None:
    policy = continue_adapter(load_base(str(run.base), dtype=dtype), run.adapter)
    trained = check_trainable(policy)
    stored = load_file(run.adapter / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in trained} == set(stored)
    for name, parameter in trained.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter.detach(), stored[name.replace(".default", "")])
    assert {p.dtype for n, p in policy.named_parameters() if n not in trained} == {getattr(torch, dtype)}


def test_it_computes_what_peft_loads(run: SavedRun) -> None:
    policy = continue_adapter(load_base(str(run.base), dtype="float32"), run.adapter)
    twin = PeftModel.from_pretrained(load_base(str(run.base), dtype="float32"), run.adapter)
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.equal(policy(ids).logits, twin(ids).logits)


@pytest.mark.row("5")
def test_what_came_before_is_remembered_with_its_digest(run: SavedRun) -> None:
    policy = continue_adapter(load_base(str(run.base), dtype="float32"), run.adapter)
    [stage] = stages_of(policy)
    assert (stage.adapter, stage.how, stage.steps) == ("adapter", CONTINUED, 3)
    assert stage.sha256 == sha256(run.adapter / "adapter_model.safetensors")
    by_peft = PeftModel.from_pretrained(load_base(str(run.base), dtype="float32"), run.adapter, is_trainable=True)
    assert stages_of(by_peft) == (Stage("default", stage.sha256, CONTINUED),)
    assert stages_of(tiny_policy(trained=False)) == ()
    other_start = tiny_policy()
    assert stages_of(other_start) != ()
    mark_fresh(other_start)
    assert stages_of(other_start) == ()


@pytest.mark.row("S13", "5")
def test_another_base_is_refused(run: SavedRun, tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(run.base)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"was trained on base .* but .*other has sha256 .*model\.name"):
        continue_adapter(load_base(str(tmp_path / "other"), dtype="float32"), run.adapter)
    with pytest.raises(InputError, match="loaded from nowhere"):
        continue_adapter(tiny_base(), run.adapter)


@pytest.mark.row("6", "45")
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bias": "lora_only"}, "uses bias"),
        ({"layer_replication": [[0, 2]]}, "uses layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"target_modules": ["lm_head"]}, "lm_head, which is not an inner linear layer"),
    ],
)
def test_a_variant_is_refused_by_its_name(tmp_path: Path, settings: dict[str, object], named: str) -> None:
    tiny_base().save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["q_proj"]} | settings
    base = load_base(str(tmp_path / "base"), dtype="float32")
    get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", **settings)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=named):
        continue_adapter(load_base(str(tmp_path / "base"), dtype="float32"), tmp_path / "adapter")


@pytest.mark.row("53")
def test_an_adapter_that_does_not_fit_is_refused_by_tensor(run: SavedRun) -> None:
    path = run.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    save_file({n: t for n, t in tensors.items() if n != name}, path)
    with pytest.raises(InputError, match=f"{name} is missing"):
        continue_adapter(load_base(str(run.base), dtype="float32"), run.adapter)
    with pytest.raises(InputError, match="not an adapter folder"):
        continue_adapter(load_base(str(run.base), dtype="float32"), run.folder)


def test_an_adapter_of_another_tool_is_continued_without_a_lineage(run: SavedRun) -> None:
    (run.adapter / "lorafocal.json").unlink()
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["inference_mode"] is True
    policy = continue_adapter(load_base(str(run.base), dtype="float32"), run.adapter)
    check_trainable(policy)
    [stage] = stages_of(policy)
    assert (stage.objective, stage.adapter) == (None, "adapter")


PAIRS = held_out_pairs(8)
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora and patterns": {
        "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}
    },
    "dora": {"use_dora": True},
    "norm and head": {"modules_to_save": ["norm", "lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5]},
}  # fmt: skip
Trained = Callable[[str, str | None], tuple[Path, PeftModel]]


def logits_of(policy: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return policy.eval()(torch.arange(2, 12)[None]).logits


def trained_on(base: Path, folder: Path, quantization: str | None, **settings: object) -> PeftModel:
    """Two steps on `base`, the adapter saved in `folder`/adapter; the trained policy."""
    model = load_base(str(base), dtype="float32", quantization=quantization)
    run = trainer(folder, PAIRS, model=model, peft_config=lora(**settings), max_steps=2)
    run.train()
    run.save_model()
    return run.model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), dtype=torch.float32)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Folder and policy of a trained variant, made once."""

    @cache
    def made(variant: str, quantization: str | None) -> tuple[Path, PeftModel]:
        folder = tmp_path_factory.mktemp("trained")
        return folder, trained_on(base, folder, quantization, **VARIANTS[variant])

    return made


@pytest.mark.slow
@pytest.mark.row("44", "53")
@pytest.mark.parametrize(
    ("variant", "quantization"),
    [
        ("rslora and patterns", "nf4-double"),
        *((variant, "nf4") for variant in ("dora", "norm and head", "tokens")),
        *((variant, word) for variant in ("dora", "norm and head") for word in (None, "int8")),
    ],
)
def test_every_variant_that_trains_goes_on_where_it_stopped(
    tmp_path: Path, base: Path, trained: Trained, variant: str, quantization: str | None
) -> None:
    folder, first = trained(variant, quantization)
    adapter, path = folder / "adapter", folder / "adapter" / "adapter_model.safetensors"
    fresh = load_base(str(base), dtype="float32", quantization=quantization)
    before = tensors_sha256(dict(fresh.named_parameters()))
    policy = continue_adapter(fresh, adapter)
    assert len(check_trainable(policy)) == len(load_file(path))
    live = {name: p.detach() for name, p in first.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, live[name]) for name, p in policy.named_parameters() if p.requires_grad)
    again = trainer(tmp_path, PAIRS, model=policy, reference="frozen_copy", max_steps=2)
    again.train()
    assert again.state.log_history[0]["loss"] == pytest.approx(identity_loss(0.05), abs=1e-7)
    lineage = again.lineage()
    assert lineage is not None
    assert (lineage.quantization, [stage.quantization for stage in lineage.parents]) == (quantization, [quantization])
    under = again.model.get_base_model()
    own = {re.sub(r"\.(base_layer|original_module|token_adapter)", "", n): p for n, p in under.named_parameters()}
    reloaded = load_base(str(base), dtype="float32", quantization=quantization)
    assert before == tensors_sha256({name: own[name] for name, _ in reloaded.named_parameters()})


@pytest.mark.slow
@pytest.mark.row("53")
@pytest.mark.parametrize(
    ("variant", "part"),
    [
        ("dora", "lora_magnitude_vector"),
        ("norm and head", "model.norm"),
        ("norm and head", "lm_head"),
        ("tokens", "embed_tokens"),
    ],
)
def test_a_variant_s_own_tensors_are_loaded_strictly_too(
    tmp_path: Path, base: Path, trained: Trained, variant: str, part: str
) -> None:
    path = copytree(trained(variant, "nf4")[0] / "adapter", tmp_path / "adapter") / "adapter_model.safetensors"
    whole = load_file(path)
    name = min(name for name in whole if part in name)
    others = {n: t for n, t in whole.items() if n != name}
    damages = {
        f"{name} is missing": others,
        f"{name}x has no layer": {**others, f"{name}x": whole[name]},
        f"{name} is": {**others, name: whole[name][:-1].contiguous()},
        f"{name} has values": {**others, name: whole[name] * float("nan")},
    }
    for told, tensors in damages.items():
        save_file(tensors, path)
        with pytest.raises(InputError, match=told):
            continue_adapter(load_base(str(base), dtype="float32", quantization="nf4"), path.parent)


@pytest.mark.row("46")
def test_a_vocabulary_that_has_grown_is_no_longer_the_base(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "base"))
    settings: dict[str, dict[str, Any]] = {
        "rows, none for 17": {"trainable_token_indices": [17]},
        r"lm_head.weight is \(18, 32\), the base needs \(17, 32\)": {"modules_to_save": ["lm_head"]},
        "embed_tokens.weight has no layer in the base": {"target_modules": ["q_proj"]},
    }
    base.resize_token_embeddings(18)
    base.save_pretrained(tmp_path / "grown")
    for number, (told, more) in enumerate(settings.items()):
        grown = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "grown"), lora(**more))
        grown.save_pretrained(tmp_path / str(number), save_embedding_layers="target_modules" in more)
        with pytest.raises(InputError, match=told):
            continue_adapter(load_base(str(tmp_path / "base")), tmp_path / str(number))


@pytest.mark.row("9", "S13")
@pytest.mark.parametrize(("trained", "given"), [("nf4", None), (None, "nf4"), ("fp4", "nf4"), ("nf4", "nf4-double")])
def test_a_base_in_another_precision_is_refused_in_both_words(
    tmp_path: Path, trained: str | None, given: str | None
) -> None:
    run = save_run(tmp_path, quantization=trained)
    words = [f"quantised to {word}" if word else "a float base" for word in (trained, given)]
    told = rf"trained on .*{words[0]}, but .*{words[1]}: set `model.quantization: {trained or 'null'}`.*lorafocal merge"
    with pytest.raises(InputError, match=told):
        continue_adapter(load_base(str(run.base), quantization=given), run.adapter)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "word"), [("rslora and patterns", "nf4-double"), ("dora", "int8")])
def test_what_a_base_was_quantised_to_is_recorded_from_the_layers(trained: Trained, variant: str, word: str) -> None:
    folder, _ = trained(variant, word)
    lineage = lineage_of(folder / "adapter")
    assert lineage is not None
    assert lineage.quantization == word
    assert word.partition("-")[0].upper() in (folder / "adapter" / "README.md").read_text()


@pytest.mark.row("6")
def test_loftq_that_peft_put_into_a_plain_adapter_is_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's replacement on a 4-bit base changes A and B alone, and its configuration says so."""

    def best_of_rank(_: object, weight: torch.Tensor, *, num_bits: int, reduced_rank: int) -> tuple[torch.Tensor, ...]:
        """What PEFT computes for A and B, but on a CPU, and of the whole weight."""
        u, s, v = torch.linalg.svd(weight)
        return v[:reduced_rank].contiguous(), (u[:, :reduced_rank] * s[:reduced_rank]).contiguous()

    monkeypatch.setattr("peft.utils.loftq_utils._loftq_init_new", best_of_rank)
    base = save_base(tmp_path / "base", dtype=torch.float32)
    policy = get_peft_model(load_base(str(base), dtype="float32", quantization="nf4"), lora(target_modules=["q_proj"]))
    replace_lora_weights_loftq(policy, model_path=str(base / "model.safetensors"))
    assert any(parameter.any() for name, parameter in policy.named_parameters() if "lora_B" in name)
    expected = logits_of(disturb(policy))
    policy.save_pretrained(tmp_path / "adapter")
    again = continue_adapter(load_base(str(base), dtype="float32", quantization="nf4"), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(again), expected)


@pytest.mark.row("9", "22")
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_base_is_opened_in_the_dtype_of_training_whatever_it_is_stored_in(
    tmp_path: Path, quantization: str | None
) -> None:
    """Without a run's config beside it: rounded to bfloat16, it is another model than the stored one."""
    tiny_base().save_pretrained(tmp_path / "base")
    model = load_base(str(tmp_path / "base"), dtype="bfloat16", quantization=quantization)
    run = trainer(tmp_path / "run", held_out_pairs(8), model=model, peft_config=lora(), max_steps=2)
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    saved = read_adapter(tmp_path / "adapter", base=str(tmp_path / "base"))
    assert saved.dtype == "bfloat16"
    opened = open_adapter(saved, dtype=saved.dtype)
    weights = dict(opened.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in run.model.named_parameters())
