"""Merging: arithmetic against PEFT and float64, what survives, what is refused, files that others load."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafocal.errors import InputError
from lorafocal.lineage import lineage_of
from lorafocal.model.load import base_fingerprint, load_base
from lorafocal.model.saved import read_adapter
from lorafocal.policy import plain_attention
from lorafocal.publish import sha256
from lorafocal.release import files, measure, merge
from lorafocal.release.gate import GateFailure, compare
from lorafocal.release.merge import MergeReport, merge_adapter
from lorafocal.release.shards import ShardWriter
from lorafocal.release.survival import LayerSurvival, survival_notes
from lorafocal.release.weights import write_merged
from tests.saved_run import SavedRun, edit_json, save_run
from tests.tiny import lora, trainer

pytestmark = pytest.mark.slow  # whole models are written and loaded again

FILES = {
    "README.md", "lorafocal.json", "merge.json", "config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> SavedRun:
    return save_run(tmp_path)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}}])
def test_float32_merge_is_peft_s_own(tmp_path: Path, settings: dict[str, object]) -> None:
    run = save_run(tmp_path, **settings)
    merge_adapter(run.adapter, tmp_path / "out", dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.bfloat16).float()
    oracle = PeftModel.from_pretrained(base, run.adapter).merge_and_unload().state_dict()
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == oracle.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, oracle[name], rtol=1e-6, atol=1e-7)


@pytest.mark.row("43")
@pytest.mark.parametrize("std", [1e-1, 3e-3, 3e-4, 1e-5])
def test_survival_is_what_float64_says(tmp_path: Path, std: float) -> None:
    run = save_run(tmp_path, std=std)
    survival = survival_of(run, "bfloat16")
    base, adapter = (
        load_file(run.base / "model.safetensors"),
        load_file(run.adapter / "adapter_model.safetensors"),
    )
    assert len(survival) == 6
    for layer in survival:
        a, b = (adapter[f"base_model.model.{layer.layer}.lora_{x}.weight"].double() for x in "AB")
        weight = base[f"{layer.layer}.weight"].double()
        delta = (8 / 4) * b @ a
        stored = (weight + delta).bfloat16().double()  # differs from a float32 sum at ties only
        kept = ((stored - weight) * delta).sum() / delta.square().sum()
        error = (stored - weight - delta).norm() / delta.norm()
        assert layer.kept == pytest.approx(kept.item(), rel=1e-2, abs=1e-3)
        assert layer.error == pytest.approx(error.item(), rel=1e-2)
        assert layer.delta_norm == pytest.approx(delta.norm().item(), rel=1e-5)


@pytest.mark.row("43")
def test_a_delta_that_rounds_away_warns_in_bfloat16_and_not_in_float32(tmp_path: Path) -> None:
    run = save_run(tmp_path, std=3e-4)
    [note] = survival_notes(survival_of(run, "bfloat16"), "bfloat16")
    assert "--dtype float32" in note
    assert "without merging" in note
    assert survival_notes(survival_of(run, "float32"), "float32") == ()


def survival_of(run: SavedRun, dtype: str) -> tuple[LayerSurvival, ...]:
    folder = run.folder / dtype
    folder.mkdir()
    return write_merged(read_adapter(run.adapter), folder, dtype=dtype).survival


def test_an_untrained_adapter_merges_to_the_base_bit_for_bit(tmp_path: Path) -> None:
    run = save_run(tmp_path, std=0.0)
    merge_adapter(run.adapter, tmp_path / "out")
    merged, base = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(run.base / "model.safetensors"),
    )
    assert all(torch.equal(merged[name], base[name]) for name in base)


@pytest.mark.row("S13")
def test_a_base_that_computes_otherwise_by_its_config_is_refused(run: SavedRun, tmp_path: Path) -> None:
    edit_json(run.base / "config.json", rms_norm_eps=0.1)
    with pytest.raises(InputError, match=r"base: the base's config\.json is not the one of training"):
        merge_adapter(run.adapter, tmp_path / "out")
    edit_json(run.adapter / "lorafocal.json", base_config_sha256=None)  # as earlier versions wrote it
    merge_adapter(run.adapter, tmp_path / "out")


@pytest.mark.row("52", "51")
def test_files_are_the_allowed_ones_and_name_no_folder(run: SavedRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge_adapter(run.adapter, out)
    assert {path.name for path in out.iterdir()} == FILES
    for path in out.iterdir():
        for private in (str(tmp_path), str(Path.cwd()), str(Path.home()) + "/"):
            assert private.encode() not in path.read_bytes(), path.name


@pytest.mark.row("52")
def test_a_stranger_among_the_files_stops_the_merge(
    run: SavedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_NAMES", files._NAMES - {"tokenizer.json"})
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        merge_adapter(run.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_config_generation_config_and_template_are_the_base_s(run: SavedRun, tmp_path: Path) -> None:
    merge_adapter(run.adapter, tmp_path / "out", dtype="float32")
    config, base = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", run.base))
    assert config == base | {"dtype": "float32"}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_new_tokens"] == 7
    merged, original = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", run.base))
    chat = [{"role": "user", "content": "sort 3 1"}]
    assert merged.apply_chat_template(chat, tokenize=False) == original.apply_chat_template(chat, tokenize=False)


@pytest.mark.row("45")
def test_tied_embeddings_survive_and_plain_transformers_computes_the_same(tmp_path: Path) -> None:
    run = save_run(tmp_path, tied=True)
    merge_adapter(run.adapter, tmp_path / "out", dtype="float32")
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert "lm_head.weight" not in names
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    base = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.bfloat16).float()
    live = PeftModel.from_pretrained(base, run.adapter)
    ids = run.pairs[0].prompt_ids + run.pairs[0].chosen_ids
    with torch.no_grad():
        expected = live(torch.tensor([ids])).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(merged(torch.tensor([ids])).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.engine
@pytest.mark.row("4")
def test_a_fresh_adapter_on_a_merged_model_is_the_same_in_a_fresh_process(run: SavedRun, tmp_path: Path) -> None:
    """The way out of stacking: merge, train on the result, and find that very base by its digest again."""
    merge_adapter(run.adapter, tmp_path / "merged", dtype="float32")
    second = trainer(
        tmp_path / "second", run.pairs, model=load_base(str(tmp_path / "merged"), dtype="float32"), peft_config=lora()
    )
    second.train()
    second.save_model()
    lineage = lineage_of(tmp_path / "second" / "adapter")
    assert lineage is not None
    assert lineage.base.sha256 == base_fingerprint(str(tmp_path / "merged"))["sha256"]
    ids = run.pairs[0].prompt_ids + run.pairs[0].chosen_ids
    with torch.no_grad(), plain_attention(second.model.eval()):
        expected = second.model(torch.tensor([ids])).logits
    script = (
        "import sys, json, torch\nfrom pathlib import Path\n"
        "from lorafocal.model.saved import open_adapter, read_adapter\ntorch.set_num_threads(1)\n"
        "policy = open_adapter(read_adapter(Path(sys.argv[1]), base=sys.argv[2]), dtype='float32')\n"
        "with torch.no_grad(): logits = policy(torch.tensor([json.loads(sys.argv[3])])).logits\n"
        "print(json.dumps(logits.tolist()))"
    )
    paths = [str(tmp_path / "second" / "adapter"), str(tmp_path / "merged")]
    command = [sys.executable, "-c", script, *paths, json.dumps(ids)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    # In training fused functions computed it, in the other process PEFT's own.
    torch.testing.assert_close(torch.tensor(json.loads(answer.stdout)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.row("45")
def test_a_merge_that_unties_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path, tied=True)
    monkeypatch.setattr(measure, "is_tied", lambda model: False)
    with pytest.raises(InputError, match="tied"):
        merge_adapter(run.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.row("45")
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head, which is not an inner linear layer"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens, which is not an inner linear layer"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"bias": "lora_only"}, "uses bias"),
    ],
)
def test_what_would_change_more_than_it_trained_is_refused_by_name(
    tmp_path: Path, settings: dict[str, object], named: str
) -> None:
    run = save_run(tmp_path, tied=True, **settings)
    with pytest.raises(InputError, match=named) as refusal:
        merge_adapter(run.adapter, tmp_path / "out")
    assert "adapter" in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.row("41")
def test_a_base_that_was_quantised_after_training_is_refused(run: SavedRun, tmp_path: Path) -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit_json(run.base / "config.json", quantization_config=stored)
    with pytest.raises(InputError, match=r"trained on a float base, but .* is stored as nf4.*--base"):
        read_adapter(run.adapter)
    with pytest.raises(InputError, match=r"stored as nf4.*--base"):
        merge_adapter(run.adapter, tmp_path / "out")
    edit_json(run.base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match="quantised with gptq"):
        merge_adapter(run.adapter, tmp_path / "out")


@pytest.mark.row("53")
@pytest.mark.parametrize("damage", ["missing", "stranger", "shape", "nan"])
def test_an_adapter_that_does_not_fit_is_refused_by_tensor(run: SavedRun, tmp_path: Path, damage: str) -> None:
    path = run.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "layers.1.self_attn.q_proj.lora_B" in name)
    tensor = tensors.pop(name)
    if damage == "stranger":
        tensors |= {name: tensor, name.replace("layers.1", "layers.7"): tensor.clone()}
    elif damage != "missing":
        tensors[name] = tensor[:-1].contiguous() if damage == "shape" else tensor * float("nan")
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"layers\.[17]\.self_attn\.q_proj\.lora_B"):
        merge_adapter(run.adapter, tmp_path / "out")


@pytest.mark.row("S13")
def test_one_flipped_byte_in_the_base_is_refused(run: SavedRun, tmp_path: Path) -> None:
    expected = lineage_of(run.adapter)
    weights = run.base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="sha256") as refusal:
        merge_adapter(run.adapter, tmp_path / "out")
    assert expected is not None
    assert expected.base.sha256 in str(refusal.value)


@pytest.mark.row("S13")
def test_one_flipped_byte_in_a_hub_s_cache_is_refused(run: SavedRun, tmp_path: Path) -> None:
    """There a file's name is its digest, which is not computed again at each look."""
    weights = run.base / "model.safetensors"
    blob = tmp_path / sha256(weights)
    weights.rename(blob)
    weights.symlink_to(blob)
    merge_adapter(run.adapter, tmp_path / "right")
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors is not what was downloaded .*download it again"):
        merge_adapter(run.adapter, tmp_path / "out")


def test_a_plain_peft_adapter_merges_with_a_note(run: SavedRun, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(run.adapter, alone)
    (alone / "lorafocal.json").unlink()
    held_out = run.folder / "held_out.jsonl"
    with pytest.raises(InputError, match="--base"):
        merge_adapter(alone, tmp_path / "out", pairs=held_out)  # it names "base", which is no folder here
    report = merge_adapter(str(alone), str(tmp_path / "out"), base=str(run.base), pairs=str(held_out))
    assert report.out == tmp_path / "out"
    assert "lorafocal.json" in report.notes[0]
    lineage = lineage_of(tmp_path / "out")
    assert lineage is not None
    assert lineage.objective is None
    assert lineage.base.name == "base"


def test_lineage_and_report_lie_beside_the_weights(run: SavedRun, tmp_path: Path) -> None:
    report = merge_adapter(run.adapter, tmp_path / "out")
    before, after = lineage_of(run.adapter), lineage_of(tmp_path / "out")
    assert before is not None
    assert after is not None
    assert after.base == before.base
    assert after.parents[0].adapter == "adapter"
    assert json.loads((tmp_path / "out" / "merge.json").read_text()) == json.loads(json.dumps(report.as_dict()))
    assert report.gate.table() in (tmp_path / "out" / "README.md").read_text()
    assert "least" in report.table()


def test_requests_that_make_no_sense_are_refused_first(run: SavedRun, tmp_path: Path) -> None:
    for wrong in ({"dtype": "float8"}, {"gate_dtype": "fp8"}, {"max_drift": 1.0}):
        with pytest.raises(InputError, match="--"):
            merge_adapter(run.adapter, tmp_path / "out", **wrong)
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        merge_adapter(run.folder, tmp_path / "out")
    (run.folder / "held_out.jsonl").unlink()
    with pytest.raises(InputError, match="--pairs FILE"):
        merge_adapter(run.adapter, tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already"):
        merge_adapter(run.adapter, tmp_path / "out")


@pytest.mark.row("43")
def test_the_gate_stops_a_merge_that_lost_the_change(tmp_path: Path) -> None:
    run = save_run(tmp_path, std=1e-5)
    with pytest.raises(GateFailure, match="--dtype float32"):
        merge_adapter(run.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "run"}
    assert merge_adapter(run.adapter, tmp_path / "out", dtype="float32").gate.passed


STEPS = [
    (ShardWriter, "write"),
    *((merge, name) for name in ("combine", "write_merged", "_keep_only", "_write_papers")),
]


def test_killed_after_any_of_its_steps_a_merge_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both bases are tried and two adapters combined, so that every folder it makes is there in turn."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a forked process that loads in threads fails now and then
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # and one cannot use a GPU that its parent has used
    run = save_run(tmp_path, std=0.1, quantization="nf4")

    def merged() -> MergeReport:
        return merge_adapter([run.adapter, run.adapter], tmp_path / "out", weights=[0.5, 0.5], dtype="float32")

    def merge_until_killed(owner: object, name: str) -> None:
        step = getattr(owner, name)
        setattr(owner, name, lambda *a, **k: (step(*a, **k), os.kill(os.getpid(), signal.SIGKILL)))
        merged()

    for step in STEPS:
        process = multiprocessing.get_context("fork").Process(target=merge_until_killed, args=step)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, step
        assert not (tmp_path / "out").exists(), step
    assert merged().gate.passed
    assert {path.name for path in tmp_path.iterdir()} == {"base", "run", "out"}  # the torn copies are cleared away
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_float16_is_written_and_measured_in_its_own_arithmetic_too(run: SavedRun, tmp_path: Path) -> None:
    report = merge_adapter(run.adapter, tmp_path / "out", dtype="float16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}
    assert report.gate.lost < 0.01
    assert report.gate.noise_rms is not None
    assert 0 < report.gate.noise_rms < report.gate.learned_rms
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float16


@pytest.mark.row("6", "45")
@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True, "use_rslora": True},
        {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 5]},
    ],
)
def test_what_is_trained_beside_b_a_is_merged_too(tmp_path: Path, settings: dict[str, object]) -> None:
    run = save_run(tmp_path, **settings)
    adapter = load_file(run.adapter / "adapter_model.safetensors")
    save_file(
        {name: tensor if "lora_A" in name or "lora_B" in name else tensor * 1.3 for name, tensor in adapter.items()},
        run.adapter / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    report = merge_adapter(run.adapter, tmp_path / "out", dtype="float32")
    assert report.gate.learned_rms > 0.1
    assert report.gate.lost < 1e-4


def test_several_adapters_are_summed_with_their_weights(run: SavedRun, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run.adapter, other)
    tensors = load_file(other / "adapter_model.safetensors")
    save_file(
        {name: tensor.flip(0) for name, tensor in tensors.items()},
        other / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    merge_adapter([run.adapter, other], tmp_path / "out", weights=[1, -0.5], base=str(run.base), dtype="float32")
    name = "model.layers.0.self_attn.q_proj"
    (one, two), base, merged = (
        [load_file(folder / "adapter_model.safetensors") for folder in (run.adapter, other)],
        load_file(run.base / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    deltas = [
        2 * part[f"base_model.model.{name}.lora_B.weight"] @ part[f"base_model.model.{name}.lora_A.weight"]
        for part in (one, two)
    ]
    expected = base[f"{name}.weight"].float() + deltas[0] - 0.5 * deltas[1]
    torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=1e-5, atol=1e-6)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    lineage = lineage_of(tmp_path / "out")
    assert lineage is not None
    assert [(stage.adapter, stage.weight) for stage in lineage.parents][:2] == [("adapter", 1.0), ("other", -0.5)]
    assert lineage.parents[-1].how == "merged"


def test_a_stranger_can_run_the_gate_again_from_its_evidence(run: SavedRun, tmp_path: Path) -> None:
    report = merge_adapter(run.adapter, tmp_path / "out", dtype="float32")
    seen = report.evidence
    again = compare(
        seen.pairs,
        live=seen.live,
        reference=seen.reference,
        merged=seen.merged,
        served=None,
        dtype="float32",
        gate_dtype=seen.dtype,
    )
    assert again == report.gate
    assert "evidence" not in report.as_dict()


@pytest.mark.row("42")
def test_the_gate_holds_a_merge_against_the_weights_that_training_multiplied_by(tmp_path: Path) -> None:
    """In bfloat16 bitsandbytes rounds what it de-quantises: a gate in float32 must not take that for drift."""
    run = save_run(tmp_path, std=3e-3, quantization="nf4")
    report = merge_adapter(run.adapter, tmp_path / "out", dtype="float32", onto="trained")
    assert report.gate.lost < 1e-3
