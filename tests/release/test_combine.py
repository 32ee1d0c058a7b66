"""Adapters added with signed weights: against PEFT's deltas in float64, what is refused, where the sum comes from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lorafocal.errors import InputError
from lorafocal.lineage import COMBINED, CONTINUED, MERGED, BaseIdentity, Lineage, Stage, lineage_of
from lorafocal.model.continued import continue_adapter, stages_of
from lorafocal.model.load import base_fingerprint, load_base
from lorafocal.model.saved import SavedAdapter, lora_layers, open_adapter, read_adapter
from lorafocal.release.combine import combine
from tests.saved_run import save_base

FOCALPO = {"name": "focalpo", "beta": 0.1, "gamma": 0.05}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "stable": {"r": 3, "lora_alpha": 5, "target_modules": ["v_proj", "o_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["k_proj", "v_proj"], "r": 2, "lora_alpha": 3, "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.v_proj": 5}, "alpha_pattern": {"k_proj": 7, "0.self_attn.v_proj": 1},
    },
}  # fmt: skip


def plant(
    folder: Path, base: Path, *, dtype: str = "bfloat16", quantization: str | None = None, **settings: Any
) -> Path:
    """An adapter of random A and B, other ones for every name, as training leaves it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    policy = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(sum(folder.name.encode()))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    policy.peft_config["default"].base_model_name_or_path = base.name
    policy.save_pretrained(folder)
    identity = BaseIdentity(**base_fingerprint(str(base)))  # type: ignore[arg-type]
    Lineage(identity, FOCALPO, 3, 24, dtype=dtype, quantization=quantization).write(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("combine") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, SavedAdapter]:
    return {
        name: read_adapter(plant(base.parent / name, base, **settings), base=str(base))
        for name, settings in SETTINGS.items()
    }


def added(folder: Path, ones: list[SavedAdapter], weights: list[float]) -> SavedAdapter:
    folder.mkdir()
    return read_adapter(combine(ones, weights, folder), base=ones[0].base)


def deltas(saved: SavedAdapter, *, absolute: bool = False) -> dict[str, Tensor]:
    """PEFT's change of every layer, in float64; `absolute`: with |A| and |B|, what rounding is measured by."""
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved.base), saved.folder).double()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if absolute and "lora_" in name:
                parameter.abs_()
        return {name: layer.get_delta_weight("default") for name, layer in lora_layers(policy).items()}


def total(parts: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    names = {name for part in parts for name in part}
    return {
        n: torch.stack([w * part[n] for part, w in zip(parts, weights, strict=True) if n in part]).sum(0) for n in names
    }


def test_the_change_is_the_weighted_sum_of_pefts_own(adapters: dict[str, SavedAdapter], tmp_path: Path) -> None:
    """Other ranks, alphas, scalings and layers; exact but for one rounding of each entry of B to float32."""
    ones, weights = list(adapters.values()), [1.0, -0.7, 0.3]
    made = added(tmp_path / "sum", ones, weights)
    found, wanted = deltas(made), total([deltas(one) for one in ones], weights)
    scale = total([deltas(one, absolute=True) for one in ones], [abs(weight) for weight in weights])
    assert found.keys() == wanted.keys()
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}
    for name, delta in found.items():
        assert bool(((delta - wanted[name]).abs() <= 2.0**-24 * scale[name] + 1e-15).all()), name


@pytest.mark.parametrize("weight", [1e25, 1e45])
def test_weights_beyond_what_float32_computes_with_are_refused(
    adapters: dict[str, SavedAdapter], tmp_path: Path, weight: float
) -> None:
    with pytest.raises(InputError, match=r"--weights 1e\+\d+,1: their sum passes what float32 computes with"):
        combine([adapters["plain"], adapters["patterns"]], [weight, 1.0], tmp_path)


def test_a_full_disk_is_the_systems_error_and_named(
    adapters: dict[str, SavedAdapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("lorafocal.release.combine.save_file", full)
    with pytest.raises(OSError, match=r"No space left on device: .*adapter_model\.safetensors"):
        combine([adapters["plain"]], [1.0], tmp_path)


@pytest.mark.row("5")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_negative_weight_subtracts(adapters: dict[str, SavedAdapter], tmp_path: Path, name: str) -> None:
    one = adapters[name]
    before = deltas(one)
    nothing = deltas(added(tmp_path / "nothing", [one, one], [1.0, -1.0]))
    turned = deltas(added(tmp_path / "turned", [one], [-1.0]))
    doubled = deltas(added(tmp_path / "doubled", [one, one], [0.5, 1.5]))
    for layer, delta in before.items():
        size = float(delta.abs().max())
        torch.testing.assert_close(nothing[layer], torch.zeros_like(delta), rtol=0, atol=1e-15)
        torch.testing.assert_close(turned[layer], -delta, rtol=0, atol=1e-6 * size)
        torch.testing.assert_close(doubled[layer], 2 * delta, rtol=0, atol=1e-6 * size)


def test_the_sum_opens_here_and_computes_the_base_plus_the_changes(
    adapters: dict[str, SavedAdapter], tmp_path: Path
) -> None:
    ones, weights = [adapters["plain"], adapters["patterns"]], [0.8, -0.4]
    policy = open_adapter(added(tmp_path / "sum", ones, weights), dtype="float32")
    model = load_base(ones[0].base).float().eval()
    with torch.no_grad():
        for name, delta in total([deltas(one) for one in ones], weights).items():
            model.get_submodule(name).weight += delta.float()
        ids = torch.arange(2, 12)[None]
        torch.testing.assert_close(policy(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_one_scaling_holds_for_every_layer(adapters: dict[str, SavedAdapter], tmp_path: Path) -> None:
    """Servers know one rank and one alpha; of patterns they know nothing, and scale wrongly without a word."""
    config = added(tmp_path / "sum", list(adapters.values()), [1.0, 1.0, 1.0]).config
    assert config.lora_alpha == config.r == 4 + 3 + 5
    assert (config.use_rslora, config.rank_pattern, config.alpha_pattern) == (False, {}, {})


def test_transposed_layers_stay_transposed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    settings: dict[str, Any] = {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    ones = [
        read_adapter(
            plant(tmp_path / name, tmp_path / "base", dtype="float32", **settings), base=str(tmp_path / "base")
        )
        for name in ("one", "other")
    ]
    made = added(tmp_path / "sum", ones, [1.0, -2.0])
    assert made.config.fan_in_fan_out is True
    for name, delta in total([deltas(one) for one in ones], [1.0, -2.0]).items():
        torch.testing.assert_close(deltas(made)[name], delta, rtol=0, atol=1e-7)


def test_the_files_are_those_of_any_adapter_and_name_no_folder(
    adapters: dict[str, SavedAdapter], tmp_path: Path
) -> None:
    made = added(tmp_path / "sum", list(adapters.values()), [1.0, 2.0, -1.0]).folder
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "lorafocal.json"}
    assert {path.name for path in made.iterdir()} == files
    for path in made.iterdir():
        for private in (str(tmp_path), adapters["plain"].base, str(Path.cwd()), str(Path.home()) + "/"):
            assert private.encode() not in path.read_bytes(), path.name
    targets = json.loads((made / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)


@pytest.mark.row("5")
def test_the_lineage_names_every_parent_with_its_weight(adapters: dict[str, SavedAdapter], tmp_path: Path) -> None:
    first = Stage("sft", "1" * 64, CONTINUED, {"name": "sft"}, None, 2, 9)
    plain, stable = adapters["plain"], adapters["stable"]
    assert plain.lineage is not None
    before = replace(plain.lineage, parents=(first,))
    plain = replace(plain, lineage=before)
    lineage = lineage_of(added(tmp_path / "sum", [plain, replace(stable, lineage=None)], [1, -0.5]).folder)
    assert lineage is not None
    assert [(stage.adapter, stage.how, stage.weight) for stage in lineage.parents] == [
        ("sft", CONTINUED, None), ("plain", COMBINED, 1.0), ("stable", COMBINED, -0.5),
    ]  # fmt: skip
    assert [stage.objective for stage in lineage.combined] == [FOCALPO, None]
    merged = replace(lineage, parents=(*lineage.parents, lineage.stage("sum", "2" * 64, MERGED)))
    assert merged.combined == lineage.combined
    assert replace(merged, parents=(*merged.parents, lineage.stage("x", "3" * 64, MERGED))).combined == ()
    assert before.combined == ()
    assert lineage.base == before.base
    assert (lineage.start, lineage.dtype, lineage.objective) == (None, "bfloat16", None)
    record = json.loads((tmp_path / "sum" / "lorafocal.json").read_text())
    assert ["weight" in stage for stage in record["parents"]] == [False, True, True]  # older readers know no weight
    policy = continue_adapter(load_base(plain.base), tmp_path / "sum")
    assert [stage.how for stage in stages_of(policy)] == [CONTINUED, COMBINED, COMBINED, CONTINUED]


@pytest.mark.row("S13", "9")
def test_adapters_of_another_base_dtype_or_quantisation_are_refused_by_name(
    adapters: dict[str, SavedAdapter], base: Path, tmp_path: Path
) -> None:
    plain = adapters["plain"]
    other = save_base(tmp_path / "other-base", tied=True)
    strangers = {
        "weights of sha256": read_adapter(plant(tmp_path / "a", other, **SETTINGS["plain"]), base=str(other)),
        "a base computing in float32": replace(plain, dtype="float32"),
        "a base quantised to nf4": replace(plain, quantization="nf4"),
    }
    for number, (named, stranger) in enumerate(strangers.items()):
        for pair in ([plain, stranger], [stranger, plain]):
            with pytest.raises(InputError, match=named) as refusal:
                added(tmp_path / f"{number}{pair[0] is plain}", pair, [1, 1])
            assert str(stranger.folder) in str(refusal.value)


def test_adapters_of_one_base_under_other_configs_are_refused(
    adapters: dict[str, SavedAdapter], tmp_path: Path
) -> None:
    def under(name: str, digest: str | None) -> SavedAdapter:
        saved = adapters[name]
        assert saved.lineage is not None
        return replace(saved, lineage=replace(saved.lineage, base_config_sha256=digest))

    with pytest.raises(InputError, match=r"patterns was trained under another config\.json of its base than .*plain"):
        added(tmp_path / "refused", [under("plain", "a" * 64), under("patterns", "b" * 64)], [1, 1])
    combine([under("plain", "a" * 64), under("patterns", None)], [1, 1], tmp_path)
    combined = lineage_of(tmp_path)
    assert combined is not None
    assert combined.base_config_sha256 == "a" * 64


@pytest.mark.row("6")
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "uses dora"),
        ({"modules_to_save": ["norm"]}, "uses modules_to_save"),
        ({"trainable_token_indices": [1]}, "uses trainable_tokens"),
    ],
)
def test_what_is_no_sum_of_b_times_a_is_refused_by_name(
    adapters: dict[str, SavedAdapter], base: Path, tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    stranger = read_adapter(plant(tmp_path / "stranger", base, **SETTINGS["plain"], **settings), base=str(base))
    with pytest.raises(InputError, match=rf"stranger: the adapter {named}.*lorafocal merge"):
        added(tmp_path / "sum", [adapters["plain"], stranger], [1, 1])


@pytest.mark.parametrize(
    "weights", [[], [1.0], [1.0, 0.0], [1.0, float("nan")], [1.0, float("inf")], [1.0, 1.0, 1.0], [1e300, 1.0]]
)
def test_weights_that_would_be_ignored_are_refused(
    adapters: dict[str, SavedAdapter], tmp_path: Path, weights: list[float]
) -> None:
    with pytest.raises(InputError, match=r"--weights"):
        added(tmp_path / "sum", [adapters["plain"], adapters["stable"]], weights)
