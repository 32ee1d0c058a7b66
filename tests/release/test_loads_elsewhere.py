"""What we write is what others read: transformers, PEFT, vLLM, llama.cpp; and what they would misread is said."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from lorafocal.data.held_out import write_held_out
from lorafocal.evaluate.score import score_file
from lorafocal.lineage import BaseIdentity, Lineage
from lorafocal.model.adapters import attach_lora
from lorafocal.model.load import load_base, load_tokenizer
from lorafocal.model.save import save_adapter
from lorafocal.model.saved import lora_layers, open_adapter, read_adapter
from lorafocal.model.serving import VLLM_RANKS, serving_notes
from lorafocal.release.combine import combine
from lorafocal.release.merge import merge_adapter
from tests.saved_run import held_out_pairs, save_base
from tests.tiny import disturb, lora, tiny_base, trainer

PAIRS = held_out_pairs(12)
STRANGER = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, pipeline

base, adapter, merged, prompt = sys.argv[1:]
float32 = {"dtype": torch.float32}
writer = pipeline("text-generation", model=merged, **float32)
models = {
    "PeftModel": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **float32), adapter),
    "AutoPeftModelForCausalLM": AutoPeftModelForCausalLM.from_pretrained(adapter, **float32),
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained(merged, **float32),
    "pipeline": writer.model,
}
sequences = json.load(sys.stdin)

@torch.no_grad()
def logps(model, prompt, answer):
    logits = model.eval()(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()

found = {name: [logps(model, *sequence) for sequence in sequences] for name, model in models.items()}
found["text"] = writer(prompt, do_sample=False, max_new_tokens=6, return_full_text=False)[0]["generated_text"]
found["ours"] = [name for name in sys.modules if name.startswith("lorafocal")]
print(json.dumps(found))
"""


@pytest.mark.engine
def test_a_fresh_process_without_lorafocal_computes_the_trained_log_probs(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.float32)
    run = trainer(
        tmp_path / "run", PAIRS, model=load_base(str(base), dtype="float32"), peft_config=lora(), learning_rate=3e-2
    )
    run.train()
    run.save_model()
    pairs, adapter, merged = tmp_path / "run" / "held_out.jsonl", tmp_path / "run" / "adapter", tmp_path / "merged"
    write_held_out(pairs, PAIRS)
    merge_adapter(adapter, merged, base=str(base), dtype="float32")
    rows = score_file(adapter, pairs, base=str(base)).scores
    ours = torch.tensor([logps for row in rows for logps in (row.chosen_logps, row.rejected_logps)])
    reference = [logps for row in rows for logps in (row.reference_chosen_logps, row.reference_rejected_logps)]
    assert (ours - torch.tensor(reference)).abs().mean() > 0.1  # something was learned
    policy, tokenizer = open_adapter(read_adapter(adapter, base=str(base)), dtype="float32"), load_tokenizer(str(base))
    prompt = tokenizer.decode(PAIRS[0].prompt_ids)
    asked = tokenizer(prompt, return_tensors="pt")
    written = policy.generate(**asked, do_sample=False, max_new_tokens=6)[0, asked.input_ids.shape[1] :]

    found = ask_a_stranger(tmp_path, str(base), str(adapter), str(merged), prompt)

    for door in ("PeftModel", "AutoPeftModelForCausalLM", "AutoModelForCausalLM", "pipeline"):
        torch.testing.assert_close(torch.tensor(found[door]), ours, rtol=1e-5, atol=1e-4, msg=door)
    # Versions of the pipeline differ in whether the blank after the prompt is part of the answer.
    assert found["text"].lstrip() == tokenizer.decode(written, skip_special_tokens=True).lstrip() != ""
    assert found["ours"] == []


def ask_a_stranger(root: Path, *arguments: str) -> dict[str, Any]:
    """The adapter names its base by the folder's name alone, so it is found from the folder that it lies in."""
    sequences = [(pair.prompt_ids, answer) for pair in PAIRS for answer in (pair.chosen_ids, pair.rejected_ids)]
    command = [sys.executable, "-W", "ignore", "-c", STRANGER, *arguments]
    answer = subprocess.run(command, input=json.dumps(sequences), capture_output=True, text=True, cwd=root, check=False)
    assert answer.returncode == 0, answer.stderr
    return dict(json.loads(answer.stdout.splitlines()[-1]))


@dataclass(frozen=True)
class Files:
    """An adapter as it was saved, and what PEFT multiplies each layer's B A by."""

    record: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    scalings: Mapping[str, float]

    def rank(self, layer: str) -> int:
        return int(self.tensors[f"base_model.model.{layer}.lora_A.weight"].shape[0])


# The rules of vLLM and llama.cpp, in our words.
#
# vllm-project/vllm: vllm/lora/peft_helper.py at e745bafffc44744aa601169f8c6f325e47ca7cd5 (fields, from_dict,
# validate_legal), vllm/lora/lora_model.py at 0306474e9d1f26d8717aad457b9511f0c9e57d60 and vllm/lora/utils.py at
# 001e63a89b474b88345fd72912fe068c4ae83f41 (names of tensors), vllm/config/lora.py at
# 01230b40128e570a58e54e75f7e55c4d5cd9246d (ranks). Keys that are not its fields are passed over, patterns among them
# (newer versions read those), and one scaling holds for every layer.
#
# ggml-org/llama.cpp: convert_lora_to_gguf.py at 0b03adaa632b76c7651dd1f6fa3b7a0b5eda479c (keys, names of tensors),
# src/llama-adapter.h at 215841fc0178de0797d23f1cae8ab8ee1baa8eb9 (alpha over the tensor's own rank).


def vllm_refuses(files: Files, max_rank: int = 16) -> list[str]:
    record = files.record
    wrong = [f"lacks {key}" for key in ("r", "lora_alpha", "target_modules") if record.get(key) is None]
    wrong += [f"uses {key}" for key in ("use_dora", "modules_to_save", "lora_bias") if record.get(key)]
    wrong += ["bias"] * (record["bias"] != "none") + ["rank"] * (record["r"] > max_rank)
    wrong += ["start"] * (str(record["init_lora_weights"]).partition("_")[0] in ("pissa", "olora", "loftq", "corda"))
    endings = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
    wrong += [name for name in files.tensors if not (name.startswith("base_model.model.") and name.endswith(endings))]
    return wrong


def vllm_scaling(files: Files, layer: str) -> float:
    rank = files.record["r"]
    return float(files.record["lora_alpha"] / (math.sqrt(rank) if files.record.get("use_rslora") else rank))


def llama_cpp_refuses(files: Files) -> list[str]:
    wrong = [f"lacks {key}" for key in ("base_model_name_or_path", "lora_alpha") if files.record.get(key) is None]
    known = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B", ".base_layer.weight")
    for name in files.tensors:
        if not any(part in name for part in known) and "_layernorm" not in name and ".norm" not in name:
            wrong.append(name)
    return wrong


def llama_cpp_scaling(files: Files, layer: str) -> float:
    return float(files.record["lora_alpha"] / files.rank(layer))


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "narrow": {"target_modules": ["q_proj", "down_proj"]},
    "pissa": {"init_lora_weights": "pissa"},
    "rank 17": {"r": 17},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ranks": {"rank_pattern": {"q_proj": 2}},
    "alphas": {"alpha_pattern": {"q_proj": 2}},
    "modules": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5]},
}
REFUSED = {"vLLM": {"dora", "modules", "tokens", "rank 17"}, "llama.cpp": {"dora", "modules", "tokens"}}
MISREAD = {"vLLM": {"ranks", "alphas"}, "llama.cpp": {"rslora", "alphas"}}


def saved_files(folder: Path, **settings: Any) -> Files:
    """An adapter of a hub's base as a run saves it."""
    base = tiny_base()
    base.name_or_path = "owner/model"
    policy = disturb(attach_lora(base, LoraConfig(**({"r": 4, "lora_alpha": 8} | settings))))
    folder.mkdir()
    lineage = Lineage(BaseIdentity("owner/model", "c" * 40, "0" * 64), {"name": "focalpo"}, 1, 8)
    save_adapter(policy, folder, lineage, trained=True)
    return read_files(folder, {name: layer.scaling["default"] for name, layer in lora_layers(policy).items()})


def read_files(folder: Path, scalings: Mapping[str, float]) -> Files:
    record = json.loads((folder / "adapter_config.json").read_text())
    return Files(record, load_file(folder / "adapter_model.safetensors"), scalings)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    root = tmp_path_factory.mktemp("variants")
    return {name: saved_files(root / name.replace(" ", "-"), **settings) for name, settings in VARIANTS.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_servers_take_an_adapter_or_the_card_says_that_they_do_not(saved: dict[str, Files], variant: str) -> None:
    """A note for each server that refuses it or scales it wrongly, and none for one that reads it right."""
    files = saved[variant]
    refusals = {"vLLM": vllm_refuses(files), "llama.cpp": llama_cpp_refuses(files)}
    scalings = {"vLLM": vllm_scaling, "llama.cpp": llama_cpp_scaling}
    notes = serving_notes(LoraConfig(**files.record))
    for server, reasons in refusals.items():
        assert bool(reasons) == (variant in REFUSED[server]), reasons
        wrong = [n for n, right in files.scalings.items() if not math.isclose(scalings[server](files, n), right)]
        if variant != "pissa":  # its saved form has twice the rank and half the scaling of what was trained
            assert bool(wrong) == (variant in MISREAD[server]), wrong
        assert any(server in note for note in notes) == (variant in REFUSED[server] | MISREAD[server]), notes


def test_the_notes_are_in_the_card(tmp_path: Path) -> None:
    saved_files(tmp_path / "dora", use_dora=True)
    saved_files(tmp_path / "plain")
    assert "## Serving\n\n- vLLM and llama.cpp's converter refuse DoRA" in (tmp_path / "dora" / "README.md").read_text()
    assert "vLLM" not in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.parametrize(("rank", "said"), [(16, None), (17, "--max-lora-rank 32`"), (512, "512`"), (513, "up to 512")])
def test_the_rank_that_vllm_must_be_started_with_is_named(rank: int, said: str | None) -> None:
    notes = serving_notes(LoraConfig(r=rank))
    assert (notes == ()) if said is None else (said in notes[0])
    assert (
        not vllm_refuses(Files({**vars(LoraConfig(r=rank, target_modules=["q"]))}, {}, {}), max(VLLM_RANKS))
        or rank > 512
    )


def test_what_servers_would_misread_is_read_right_once_it_is_folded(tmp_path: Path) -> None:
    """`combine` of a single adapter by 1 is the same adapter in a form that has one scaling."""
    base = save_base(tmp_path / "base")
    policy = attach_lora(load_base(str(base)), LoraConfig(r=4, use_rslora=True, rank_pattern={"q_proj": 2}))
    (tmp_path / "stable").mkdir()
    save_adapter(disturb(policy), tmp_path / "stable", None)
    (tmp_path / "folded").mkdir()
    combine([read_adapter(tmp_path / "stable", base=str(base))], [1.0], tmp_path / "folded")
    folded = open_adapter(read_adapter(tmp_path / "folded", base=str(base)), dtype="float32")
    files = read_files(tmp_path / "folded", {n: one.scaling["default"] for n, one in lora_layers(folded).items()})
    assert (vllm_refuses(files), llama_cpp_refuses(files), serving_notes(LoraConfig(**files.record))) == ([], [], ())
    assert {vllm_scaling(files, n) for n in files.scalings} == {llama_cpp_scaling(files, n) for n in files.scalings}
    assert set(files.scalings.values()) == {1.0}


@pytest.mark.row("51")
def test_a_hubs_base_is_named_with_its_commit(saved: dict[str, Files]) -> None:
    """AutoPeftModelForCausalLM loads that commit, and the newest one where none is named."""
    record = saved["lora"].record
    assert (record["base_model_name_or_path"], record["revision"]) == ("owner/model", "c" * 40)
    assert record["task_type"] == "CAUSAL_LM"
