"""The weights of a merge, written tensor by tensor: PEFT's own, on what training saw, in little memory."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lorafocal.errors import InputError
from lorafocal.model.adapters import attach_lora
from lorafocal.model.load import base_fingerprint, load_base
from lorafocal.model.saved import SavedAdapter, open_adapter, read_adapter
from lorafocal.release import skeleton, weights
from lorafocal.release.shards import Checkpoint, ShardWriter
from lorafocal.release.weights import Written, write_merged
from tests.counting import Counter
from tests.model.families import random_model
from tests.saved_run import SavedRun, plant_adapter, save_run
from tests.tiny import SIZES, disturb, lora

pytestmark = pytest.mark.slow  # whole models are written and loaded again


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return save_run(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return save_run(tmp_path_factory.mktemp("tied"), tied=True, trainable_token_indices=[3, 1])


def merged(saved: SavedAdapter, folder: Path, dtype: str = "float32", **options: Any) -> dict[str, Tensor]:
    """The tensors of a merge, from however many files."""
    write(saved, folder, dtype, **options)
    stored = Checkpoint.open(str(folder))
    return {name: stored.tensor(name).clone() for name in stored.tensors}


def write(saved: SavedAdapter, folder: Path, dtype: str = "float32", **options: Any) -> Written:
    folder.mkdir(parents=True)
    return write_merged(saved, folder, dtype=dtype, **options)


def peft_s_own(run: SavedRun) -> dict[str, Tensor]:
    base = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.bfloat16).float()
    policy = PeftModel.from_pretrained(base, run.adapter)
    for module in policy.modules():  # PEFT's tied head is a second wrapper around the same rows
        module.requires_grad_(False)
    return policy.merge_and_unload().state_dict()


def sharded(run: SavedRun, folder: Path, most: int = 9000) -> Path:
    """The base of a run in several files."""
    AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size=most)
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return folder


@pytest.mark.row("6", "45")
@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"use_dora": True},
        {"modules_to_save": ["lm_head", "norm"]},
        {"trainable_token_indices": [3, 1]},
    ],
)
def test_every_variant_merges_as_peft_does(tmp_path: Path, settings: dict[str, Any]) -> None:
    run = save_run(tmp_path, **settings)
    for parameter in load_file(run.adapter / "adapter_model.safetensors").values():
        assert parameter.any()
    shift_magnitudes(run.adapter)
    ours, oracle = merged(read_adapter(run.adapter), tmp_path / "out"), peft_s_own(run)
    assert ours.keys() == oracle.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, oracle[name], rtol=1e-6, atol=1e-6)


def shift_magnitudes(adapter: Path) -> None:
    """PEFT starts them at the norms of the base; give them (and whole tensors) values of their own."""
    file = adapter / "adapter_model.safetensors"
    torch.manual_seed(5)
    tensors = load_file(file)
    own = {
        name: tensor * (1 + 0.1 * torch.rand_like(tensor)) for name, tensor in tensors.items() if "lora_" not in name
    }
    own |= {name: tensor * (1 + 0.1 * torch.rand_like(tensor)) for name, tensor in tensors.items() if "magnit" in name}
    save_file(tensors | own, file)


def test_a_sharded_base_merges_to_the_same_bits_and_is_written_in_shards(
    run: SavedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = merged(read_adapter(run.adapter), tmp_path / "one", "bfloat16")
    saved = replace(read_adapter(run.adapter), base=str(sharded(run, tmp_path / "base")))
    monkeypatch.setattr(weights, "ShardWriter", lambda folder, plan: ShardWriter(folder, plan, 9000))
    many = merged(saved, tmp_path / "many", "bfloat16")
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    assert many.keys() == one.keys()
    assert all(torch.equal(many[name], one[name]) for name in one)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    assert all(torch.equal(loaded[name], one[name]) for name in one)


@pytest.mark.row("S13")
def test_one_flipped_byte_in_one_shard_is_refused(run: SavedRun, tmp_path: Path) -> None:
    base = sharded(run, tmp_path / "base")
    adapter = tmp_path / "adapter"
    shutil.copytree(run.adapter, adapter)
    record = json.loads((adapter / "lorafocal.json").read_text())
    record["base"]["sha256"] = base_fingerprint(str(base))["sha256"]
    (adapter / "lorafocal.json").write_text(json.dumps(record))
    write(read_adapter(adapter, base=str(base)), tmp_path / "right")
    shard = sorted(base.glob("model-*.safetensors"))[2]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match="sha256"):
        write(read_adapter(adapter, base=str(base)), tmp_path / "out")


def test_configuration_and_generation_settings_are_the_base_s(run: SavedRun, tmp_path: Path) -> None:
    write(read_adapter(run.adapter), tmp_path / "out", "float16")
    config, base = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", run.base))
    assert config == base | {"dtype": "float16"}
    names = ("out/generation_config.json",)
    assert [(tmp_path / name).read_bytes() for name in names] == [(run.base / "generation_config.json").read_bytes()]


@pytest.mark.parametrize("whole", [False, True])
def test_no_configuration_leads_to_code_that_came_with_the_base(
    run: SavedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Such code is not among the files: with `trust_remote_code` the merged model would not load."""
    base = tmp_path / "base"
    shutil.copytree(run.base, base)
    record = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(record | {"auto_map": {"AutoConfig": "configuration_llama.Config"}}))
    if whole:
        monkeypatch.setattr(skeleton.Skeleton, "_rebuilt", lambda *_: "it is to be merged whole")
    write(replace(read_adapter(run.adapter), base=str(base)), tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("whole", [False, True])
def test_no_configuration_names_a_place_on_the_base_s_machine(
    run: SavedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    base = tmp_path / "base"
    shutil.copytree(run.base, base)
    for name, key in (("config.json", "my_note"), ("generation_config.json", "_from_model")):
        record = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(record | {key: "/home/alice/secret"}))
    if whole:
        monkeypatch.setattr(skeleton.Skeleton, "_rebuilt", lambda *_: "it is to be merged whole")
    written = write(replace(read_adapter(run.adapter), base=str(base)), tmp_path / "out")
    assert not any("alice" in file.read_text() for file in (tmp_path / "out").glob("*.json"))
    assert "Left out of the base's config.json, as places on a machine: my_note." in written.notes


@pytest.mark.row("6")
@pytest.mark.parametrize("whole", [False, True])
def test_buffers_of_a_module_that_was_trained_in_full_are_the_adapter_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    random_model("apertus", torch.float32).save_pretrained(tmp_path / "base")
    model = load_base(str(tmp_path / "base"), dtype="float32")
    policy = disturb(attach_lora(model, lora(target_modules=["q_proj"], modules_to_save=["act_fn"])))
    policy.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    place = "model.layers.1.mlp.act_fn.beta"
    save_file(load_file(file) | {f"base_model.model.{place}": torch.tensor(0.75)}, file, {"format": "pt"})
    if whole:
        monkeypatch.setattr(skeleton.Skeleton, "_rebuilt", lambda *_: "it is to be merged whole")
    saved = replace(read_adapter(tmp_path / "adapter", base=str(tmp_path / "base")), dtype="float32")
    stored = merged(saved, tmp_path / "out", "bfloat16")
    assert stored[place] == 0.75
    assert stored[place].dtype == load_file(tmp_path / "base" / "model.safetensors")[place].dtype


@pytest.mark.row("45", "46")
def test_tied_embeddings_stay_one_tensor_with_their_trained_rows(tied: SavedRun, tmp_path: Path) -> None:
    written = write(read_adapter(tied.adapter), tmp_path / "out")
    assert written.tied
    stored, oracle = load_file(tmp_path / "out" / "model.safetensors"), peft_s_own(tied)
    assert "lm_head.weight" not in stored
    torch.testing.assert_close(stored["model.embed_tokens.weight"], oracle["model.embed_tokens.weight"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.tensor([[1, 3, 5, 7]])
    with torch.no_grad():
        live = open_adapter(read_adapter(tied.adapter), dtype="float32")(ids).logits
        torch.testing.assert_close(model(ids).logits, live, rtol=1e-5, atol=1e-5)


@pytest.mark.row("45")
@pytest.mark.parametrize("place", ["lm_head", "model.embed_tokens"])
def test_a_change_of_one_of_two_tied_tensors_is_refused(tied: SavedRun, tmp_path: Path, place: str) -> None:
    adapter = with_whole_tensor(tied, tmp_path, place)
    with pytest.raises(InputError, match=rf"changes {place}\.weight, which is tied"):
        write(adapter, tmp_path / "out")


def with_whole_tensor(run: SavedRun, root: Path, place: str) -> SavedAdapter:
    """The run's low-rank layers, and a whole tensor of values at `place`."""
    shutil.copytree(run.adapter, root / "adapter")
    file = root / "adapter" / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "lora_" in name}
    embeddings = load_file(run.base / "model.safetensors")["model.embed_tokens.weight"]
    save_file(tensors | {f"base_model.model.{place}.weight": embeddings.float() + 1}, file)
    saved = read_adapter(root / "adapter", base=str(run.base))
    return replace(saved, config=replace(saved.config, modules_to_save=[place], trainable_token_indices=None))


def test_a_base_that_stores_its_tied_tensor_twice(tied: SavedRun, tmp_path: Path) -> None:
    """Equal copies become one; of unequal ones transformers makes two, and so does the merge."""
    usual = merged(read_adapter(tied.adapter), tmp_path / "usual")
    for equal in (True, False):
        base = tmp_path / f"base-{equal}"
        shutil.copytree(tied.base, base)
        tensors = load_file(base / "model.safetensors")
        copy = tensors["model.embed_tokens.weight"].clone()
        save_file(
            tensors | {"lm_head.weight": copy if equal else copy * 2}, base / "model.safetensors", {"format": "pt"}
        )
        saved = replace(read_adapter(tied.adapter), base=str(base))
        if equal:
            ours = merged(saved, tmp_path / "equal")
            assert ours.keys() == usual.keys()
            assert all(torch.equal(ours[name], usual[name]) for name in ours)
        else:
            written = write(saved, tmp_path / "unequal")
            assert not written.tied
            assert "tied in its configuration and differ" in written.notes[0]


def test_tensors_that_the_model_does_not_use_are_left_out_and_named(run: SavedRun, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(run.base, base)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(base / "model.safetensors") | extra, base / "model.safetensors", {"format": "pt"})
    written = write(replace(read_adapter(run.adapter), base=str(base)), tmp_path / "out")
    assert "1 tensors of the base" in written.notes[0]
    assert "inv_freq" in written.notes[0]
    assert not load_file(tmp_path / "out" / "model.safetensors").keys() & extra.keys()


@pytest.mark.row("53")
def test_an_adapter_of_another_base_is_refused_by_tensor(run: SavedRun, tmp_path: Path) -> None:
    file = run.adapter / "adapter_model.safetensors"
    for turn, name in enumerate(("model.layers.1.self_attn.q_proj", "model.layers.9.self_attn.q_proj")):
        adapter = tmp_path / f"adapter{turn}"
        shutil.copytree(run.adapter, adapter)
        wrong = {f"base_model.model.{name}.lora_A.weight": torch.ones(4, 48)}
        wrong |= {f"base_model.model.{name}.lora_B.weight": torch.ones(32, 4)}
        save_file(load_file(file) | wrong, adapter / file.name)
        with pytest.raises(InputError, match=rf"change.* {name}\.weight"):
            write(read_adapter(adapter, base=str(run.base)), tmp_path / f"out{turn}")


@pytest.mark.row("43")
def test_float16_is_exact_where_it_fits_and_refused_by_tensor_where_it_does_not(run: SavedRun, tmp_path: Path) -> None:
    wide, half = (merged(read_adapter(run.adapter), tmp_path / dtype, dtype) for dtype in ("float32", "float16"))
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    assert all(torch.equal(half[name], wide[name].half()) for name in wide)
    base = tmp_path / "base"
    shutil.copytree(run.base, base)
    for number, name in enumerate(("model.norm.weight", "model.layers.0.mlp.down_proj.weight")):
        tensors = load_file(run.base / "model.safetensors")
        tensors[name].view(-1)[5] = 70000.0
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
        saved = replace(read_adapter(run.adapter), base=str(base))
        with pytest.raises(InputError, match=rf"float16: {name} has values up to 7.*bfloat16 or float32"):
            write(saved, tmp_path / f"out{number}", "float16")
        write(saved, tmp_path / f"wide{number}", "bfloat16")


class Peak(Counter):
    """The most bytes that tensors took at once; those without memory (of a skeleton) do not count."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(out, Tensor) and out.is_meta:
            self._storages.pop(out.untyped_storage()._cdata, None)
        self.most = max(self.most, self.live_bytes)
        return out


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, SavedAdapter]:
    """Adapters on all linear layers of bases with 2 and 12 layers, by number of layers."""
    root, made = tmp_path_factory.mktemp("depths"), {}
    for layers in (2, 12):
        config = type(LlamaForCausalLM.config_class())(**(SIZES | {"hidden_size": 128, "num_hidden_layers": layers}))
        base = LlamaForCausalLM(config).bfloat16()
        base.save_pretrained(root / f"base{layers}", max_shard_size=200_000)
        policy = plant_adapter(base.float(), std=0.01, target_modules="all-linear", r=1)
        policy.save_pretrained(root / f"adapter{layers}")
        made[layers] = read_adapter(root / f"adapter{layers}", base=str(root / f"base{layers}"))
    return made


def test_memory_is_that_of_a_few_tensors_however_many_there_are(bases: dict[int, SavedAdapter], tmp_path: Path) -> None:
    peaks = {}
    for layers, saved in bases.items():
        with Peak() as peak:
            written = write(saved, tmp_path / f"out{layers}", "bfloat16")
        assert written.notes == ()
        assert len(written.survival) == 7 * layers
        peaks[layers] = peak.most
    largest = max(tensor.bytes for tensor in Checkpoint.open(bases[12].base).tensors.values())
    whole = sum(tensor.bytes for tensor in Checkpoint.open(bases[12].base).tensors.values())
    assert peaks[12] < 1.1 * peaks[2]
    assert peaks[12] < 20 * largest < whole / 2  # a bf16 tensor and its float32 kin: change, sum, product, comparison


def test_what_transformers_rebuilds_on_loading_is_merged_whole(
    run: SavedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and shapes alone do not tell: a rotated or transposed square keeps both."""
    usual = merged(read_adapter(run.adapter), tmp_path / "usual")
    monkeypatch.setattr(skeleton.Skeleton, "_rebuilt", lambda *_: "transformers rebuilds q_proj on loading")
    written = write(read_adapter(run.adapter), tmp_path / "out")
    assert "merged whole, in memory, not tensor by tensor: transformers rebuilds q_proj" in written.notes[0]
    whole = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(whole[name], usual[name]) for name in usual)
    assert len(whole) == len(usual)


@pytest.mark.row("45")
@pytest.mark.parametrize(
    ("family", "quantization", "why"),
    [
        ("gpt2", None, ""),
        ("gpt2", "int8", ""),
        ("mixtral", None, "it has no tensor model.layers.0.mlp.experts"),
        ("qwen2_vl", "nf4", "it has no tensor model.language_model"),
    ],
)
def test_other_architectures_with_dora_compute_what_the_live_policy_does(
    tmp_path: Path, family: str, quantization: str | None, why: str
) -> None:
    """Transposed and tied weights go tensor by tensor; fused experts and renamed tensors whole, and a note says so."""
    base = tmp_path / "base"
    random_model(family, torch.float32).save_pretrained(base)
    model = load_base(str(base), dtype="float32", quantization=quantization)
    policy = disturb(attach_lora(model, lora(use_dora=True)))
    policy.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    shift_magnitudes(tmp_path / "adapter")
    saved = replace(read_adapter(tmp_path / "adapter", base=str(base)), quantization=quantization, dtype="float32")
    written = write(saved, tmp_path / "out")
    assert [note for note in written.notes if why in note] == list(written.notes)
    assert bool(written.notes) == bool(why)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert {name: t.shape for name, t in after.items()} == {name: t.shape for name, t in before.items()}
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        live = open_adapter(saved, dtype="float32")(ids).logits
        stored = load_base(str(tmp_path / "out"), dtype="float32").eval()(ids).logits
    torch.testing.assert_close(stored, live, rtol=1e-5, atol=1e-5)


def test_what_transformers_never_rounds_is_not_rounded_before_a_merge_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(tmp_path, base_dtype=torch.float32)
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["input_layernorm"])
    saved, base = read_adapter(run.adapter), load_file(run.base / "model.safetensors")
    name = "model.layers.0.input_layernorm.weight"
    base[name] += 1e-4
    save_file(base, run.base / "model.safetensors", {"format": "pt"})
    written = write(saved, tmp_path / "out")
    assert f"transformers keeps {name} in float32" in written.notes[0]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], base[name])


def test_an_original_that_is_quantised_and_other_words_are_refused(run: SavedRun, tmp_path: Path) -> None:
    shutil.copytree(run.base, tmp_path / "four")
    record = json.loads((tmp_path / "four" / "config.json").read_text())
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "four" / "config.json").write_text(json.dumps(record | {"quantization_config": how}))
    with pytest.raises(InputError, match="stored as nf4, which is no float original"):
        write(read_adapter(run.adapter), tmp_path / "a", onto="original", original=str(tmp_path / "four"))
    with pytest.raises(InputError, match="--onto 'auto'"):
        write(read_adapter(run.adapter), tmp_path / "b", onto="auto")


def test_a_base_rounded_for_training_is_rounded_in_the_merge(tmp_path: Path) -> None:
    """Stored in float32 and trained in bfloat16: the trained base is the rounded one, the original the stored one."""
    run = save_run(tmp_path, base_dtype=torch.float32, std=0.0)
    stored = load_file(run.base / "model.safetensors")
    trained = merged(read_adapter(run.adapter), tmp_path / "trained")
    original = merged(read_adapter(run.adapter), tmp_path / "original", onto="original")
    live = load_base(str(run.base), dtype="bfloat16").state_dict()
    for name, tensor in stored.items():
        assert torch.equal(original[name], tensor)
        assert torch.equal(trained[name], live[name].float())
