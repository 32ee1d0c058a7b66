"""`lorafocal train CONFIG --tiny`: the run that a config describes, on a tiny model of its architecture."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from lorafocal import rehearsal, run
from lorafocal.cli import app
from lorafocal.config import Config, check_config, load_config, resolved_yaml
from lorafocal.errors import InputError, UnhealthyRun
from lorafocal.lineage import BaseIdentity, Lineage
from lorafocal.model.load import load_base, load_tokenizer
from lorafocal.model.quantized import quantization_of
from lorafocal.rehearsal import Rehearsal, changed_keys, rehearse, set_stage
from tests.saved_run import save_base
from tests.test_configs import CONFIGS, FOLDER, name_of

pytestmark = pytest.mark.slow  # many small runs

AT_THE_START = 0.669536  # FocalPO's loss at gamma 0.05 where policy and reference agree
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}


def described(**changes: Any) -> Config:
    """A short config whose model and data are not here; `section__key=value` changes it, a whole section as well."""
    values: dict[str, Any] = {
        "name": "far-away",
        "model": {"name": "nobody/nowhere", "dtype": "float32", "shape": LLAMA},
        "adapter": {"r": 8, "alpha": 16},
        "data": {"train": "not-here.jsonl", "held_out": 0.05},
        "objective": {"name": "focalpo", "beta": 0.1},
        "reference": {"kind": "disabled_adapter"},
        "training": {"pairs_per_step": 64, "learning_rate": 1e-3},
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            values[section][field] = value
        else:
            values[section] = value
    return check_config(values)


@cache
def rehearsed(path: Path) -> Rehearsal:
    return rehearse(load_config(path), quiet=True)


# --- every shipped config -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_shipped_config_rehearses(path: Path) -> None:
    result = rehearsed(path)
    assert result.first_loss == pytest.approx(AT_THE_START, abs=1e-6)
    assert (result.steps, result.scored) == (3, 4)
    assert result.checkpoints >= 1
    assert result.evaluations >= 2
    assert math.isfinite(result.last_loss)


@pytest.mark.gpu
@pytest.mark.parametrize("path", sorted(FOLDER.glob("qlora/*.yaml")), ids=name_of)
def test_on_a_gpu_nothing_stands_in_for_the_paged_optimiser(path: Path) -> None:
    result = rehearsed(path)
    assert result.instead == ()
    assert result.first_loss == pytest.approx(AT_THE_START, abs=1e-6)


# --- what it says, and what it leaves -----------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Path]]:
    """Working, temporary and cache folders of its own; gives every file and folder that is now in them."""
    for name in ("work", "temporary", "cache"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for variable in ("XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    return lambda: [path for name in ("work", "temporary", "cache") for path in (tmp_path / name).rglob("*")]


def test_it_says_what_it_did_and_leaves_nothing_behind(
    alone: Callable[[], list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    result = rehearse(described(), quiet=True)
    assert alone() == []
    assert capsys.readouterr().err.count("step") == 0
    assert result.first_loss == pytest.approx(AT_THE_START, abs=1e-6)
    assert result.last_loss < result.first_loss - 1e-4
    text = str(result)
    assert "a tiny llama: 2 of 8 layers, 128 of 512 wide, 8 of 16 heads, 64 of 32000 tokens; float32" in text
    assert "not rehearsed: the real weights and data" in text
    assert "3 steps: loss 0.669536 at the first" in text
    assert "this config runs" in text


def test_answers_on_the_way_are_rehearsed_and_a_rule_stands_in_for_a_reward_model() -> None:
    result = rehearse(described(evaluation={"every": 100, "reward_model": "nobody/judge"}), quiet=True)
    assert "instead: evaluation.reward_model: the rule exact judged, not nobody/judge" in str(result)
    assert "evaluation.every" in str(result.changed)


def test_a_broken_config_fails_as_its_run_does(alone: Callable[[], list[Path]]) -> None:
    with pytest.raises(InputError, match=r"adapter\.targets: no linear layer is named 'q'(.|\n)*rehearsal of far-away"):
        rehearse(described(adapter__targets=["q"]), quiet=True)
    assert alone() == []


def test_an_adapter_that_scores_otherwise_when_loaded_again_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = run.train

    def careless(*args: Any, **kwargs: Any) -> run.RunSummary:
        summary = honest(*args, **kwargs)
        weights = summary.folder / "adapter" / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(weights)
        safetensors.torch.save_file({name: tensor + 0.5 for name, tensor in tensors.items()}, weights)
        return summary

    monkeypatch.setattr(run, "train", careless)
    with pytest.raises(UnhealthyRun, match="loaded again, has other log-probs"):
        rehearse(described(), quiet=True)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Config] = []

    def stand_in(config: Config, *, quiet: bool) -> Rehearsal:
        asked.append(config)
        return Rehearsal("x", "y", (), (), 0, math.nan, math.nan, 0, 0, "", 0, 0.0, interrupted_by=2 if quiet else None)

    monkeypatch.setattr(rehearsal, "rehearse", stand_in)
    (tmp_path / "run.yaml").write_text(resolved_yaml(described()))
    command = ["train", str(tmp_path / "run.yaml"), "training.seed=7", "--tiny"]
    done = CliRunner().invoke(app, command)
    assert (done.exit_code, asked[0].training.seed) == (0, 7)
    assert "this config runs" in done.output
    stopped = CliRunner().invoke(app, [*command, "--quiet"])
    assert stopped.exit_code == 130
    assert "not rehearsed to its end" in stopped.output
    refused = CliRunner().invoke(app, [*command, "--resume"])
    assert isinstance(refused.exception, InputError)


# --- what is changed and what is kept -----------------------------------------------------------------------


def test_only_what_is_listed_is_changed(tmp_path: Path) -> None:
    config = described(
        training={
            "pairs_per_step": 2,
            "learning_rate": 3e-4,
            "num_train_epochs": 3,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.2,
            "loraplus_lr_ratio": 4.0,
            "weight_decay": 0.1,
            "max_grad_norm": 0.3,
            "activation_checkpointing": "full",
            "logging_strategy": "epoch",
            "eval_strategy": "steps",
            "eval_steps": 500,
            "eval_delay": 100,
            "save_strategy": "epoch",
            "seed": 5,
        },
        data={
            "train": [{"path": "a.parquet", "weight": 0.5, "form": "standard"}, {"path": "someone/some-data"}],
            "eval": "b.parquet",
            "columns": {"prompt": "question"},
            "split": "train",
            "max_length": 900,
            "max_prompt_length": 500,
            "truncation": "recipe",
            "chat_template_kwargs": {"enable_thinking": False, "date_string": "1 May"},
        },
        packing={"tokens": 4096, "layout": "padded"},
        reference={"kind": "frozen_copy"},
        objective={"name": "focalpo", "beta": 0.02, "gamma": 0.3},
    )
    stage = set_stage(config, tmp_path)
    changed = {change.split(" ")[0] for change in changed_keys(config, stage.config)}
    assert changed == {
        "model.name", "model.shape", "data.train", "data.eval", "data.columns", "data.split", "data.cache",
        "training.num_train_epochs", "training.max_steps", "training.logging_strategy", "training.logging_steps",
        "training.eval_steps", "training.eval_delay", "training.report_to", "packing.tokens",
    }  # fmt: skip
    assert [source.weight for source in stage.config.data.train] == [0.5, 1.0]
    assert all(Path(source.path).parent == tmp_path for source in stage.config.data.train)
    tokenizer = load_tokenizer(str(tmp_path / "base"))
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "sort 2 1"}], tokenize=False)
    assert rendered == "<|user|>sort 2 1<|end|>"


def test_it_runs_with_all_of_that(tmp_path: Path) -> None:
    config = described(
        data={
            "train": [{"path": "a.parquet", "weight": 0.5, "form": "standard"}, {"path": "someone/some-data"}],
            "eval": ["b.parquet", "c.parquet"],
            "columns": {"prompt": "question"},
            "max_length": 40,
            "max_prompt_length": 20,
            "truncation": "recipe",
            "chat_template_kwargs": {"enable_thinking": False},
        },
        packing={"tokens": 4096, "layout": "padded"},
        training__activation_checkpointing="full",
        training__save_strategy="no",
    )
    result = rehearse(config, quiet=True)
    assert (result.checkpoints, result.scored) == (0, 8)


@pytest.mark.parametrize(
    ("asked", "nearest"), [("paged_adamw_32bit", "adamw_torch"), ("paged_adamw_8bit", "adamw_8bit")]
)
def test_what_a_machine_cannot_do_is_done_by_the_nearest_and_said(tmp_path: Path, asked: str, nearest: str) -> None:
    config = described(training__optim=asked, training__use_cpu=True, training__tf32=True)
    stage = set_stage(config, tmp_path)
    assert stage.config.training.fields["optim"] == nearest
    assert "tf32" not in stage.config.training.fields
    assert any(asked in note and nearest in note for note in stage.instead)
    assert any("tf32" in note for note in stage.instead)


def test_numbered_layers_keep_their_number(tmp_path: Path) -> None:
    config = described(adapter__rank_pattern={"layers.6.self_attn.q_proj": 2})
    stage = set_stage(config, tmp_path)
    assert stage.config.model.shape is not None
    assert stage.config.model.shape["num_hidden_layers"] == 8
    assert stage.config.adapter.rank_pattern == config.adapter.rank_pattern


def test_starts_that_weights_decide_get_a_rank_that_fits(tmp_path: Path) -> None:
    changes = {"adapter__r": 128, "adapter__alpha": 256, "reference": {"kind": "frozen_copy"}}
    pissa = set_stage(described(adapter__init="pissa", **changes), tmp_path / "pissa").config.adapter
    assert (pissa.r, pissa.alpha) == (32, 64)  # key and value layers have 32 outputs
    plain = set_stage(described(**changes), tmp_path / "plain").config.adapter
    assert (plain.r, plain.alpha) == (128, 256)


# --- where the architecture comes from ----------------------------------------------------------------------


def test_an_architecture_that_is_not_here_is_asked_for() -> None:
    with pytest.raises(InputError, match=r"nobody/nowhere.*state its values as model\.shape"):
        rehearse(described(model={"name": "nobody/nowhere", "dtype": "float32"}))
    with pytest.raises(InputError, match="there is no such folder"):
        rehearse(described(model={"name": "./nowhere", "dtype": "float32"}))
    with pytest.raises(InputError, match=r"model\.shape describes no model"):
        rehearse(described(model__shape={"model_type": "lama"}))


BROKEN = ("{", "[" * 100_000, '{"model_type": "lama"}', '{"model_type": "llama", "hidden_size": "x"}')


@pytest.mark.parametrize("broken", BROKEN, ids=["cut", "deep", "unknown", "mistyped"])
def test_a_config_that_is_here_and_cannot_be_read_is_not_called_missing(tmp_path: Path, monkeypatch, broken) -> None:
    place = tmp_path / "models--owner--model" / "snapshots" / ("a" * 40)
    place.mkdir(parents=True)
    (place / "config.json").write_text(broken)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for model in {"name": "owner/model", "revision": "a" * 40}, {"name": str(place)}:
        with pytest.raises(InputError, match=r"whose config\.json cannot be read \(.*state its values as model\.shape"):
            rehearse(described(model={**model, "dtype": "float32"}))


def test_a_local_config_tells_it_and_is_held_against_the_stated_shape(tmp_path: Path) -> None:
    save_base(tmp_path / "mine", tied=True)
    config = described(model={"name": str(tmp_path / "mine"), "dtype": "float32"})
    stage = set_stage(config, tmp_path / "stage")
    assert stage.config.model.shape is None
    assert load_base(stage.config.model.name, dtype="float32").config.tie_word_embeddings
    wrong = described(model={"name": str(tmp_path / "mine"), "dtype": "float32", "shape": LLAMA})
    with pytest.raises(InputError, match=r"model\.shape does not match"):
        set_stage(wrong, tmp_path / "other")


def test_a_base_that_is_stored_quantised_is_one_here(tmp_path: Path) -> None:
    save_base(tmp_path / "mine")
    file = tmp_path / "mine" / "config.json"
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": stored}))
    stage = set_stage(described(model={"name": str(tmp_path / "mine"), "dtype": "float32"}), tmp_path / "stage")
    assert stage.config.model.quantization == "nf4"
    assert any("stored as nf4" in note for note in stage.instead)
    for changes, told in (
        ({"model__quantization": "fp4"}, r"model\.quantization is fp4, but .* is stored as nf4"),
        (
            {"model__quantization": "nf4", "adapter__init": "loftq", "reference": {"kind": "frozen_copy"}},
            r"adapter\.init: loftq needs the float weights .* stored as nf4",
        ),
    ):
        model = {"name": str(tmp_path / "mine"), "dtype": "float32"}
        with pytest.raises(InputError, match=told):
            set_stage(described(model=model, **changes), tmp_path / "refused")


def test_trained_tokens_are_looked_up_where_the_tokenizer_is_here(tmp_path: Path) -> None:
    save_base(tmp_path / "mine")
    for tokens in (["<|nowhere|>"], [99999]):
        config = described(model={"name": str(tmp_path / "mine"), "dtype": "float32"}, adapter__trainable_tokens=tokens)
        with pytest.raises(InputError, match=r"adapter\.trainable_tokens: .*nowhere|99999 is no id"):
            set_stage(config, tmp_path / "stage")
    stage = set_stage(described(adapter__trainable_tokens=["<|nowhere|>"]), tmp_path / "stage")
    assert any("whether nobody/nowhere has them was not looked up" in note for note in stage.instead)


def test_an_adapter_of_a_base_held_otherwise_is_not_continued_here_either(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    record = {"peft_type": "LORA", "r": 6, "lora_alpha": 9, "target_modules": ["q_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(record))
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "adapter" / "adapter_model.safetensors")
    made = Lineage(BaseIdentity("nowhere", None, "0" * 64), {"name": "dpo"}, 1, 1, quantization="nf4")
    made.write(tmp_path / "adapter")
    adapter, reference = {"start_from": str(tmp_path / "adapter")}, {"kind": "frozen_copy"}
    with pytest.raises(InputError, match=r"base quantised to nf4, but is to go on with a base quantised to int8"):
        set_stage(described(model__quantization="int8", adapter=adapter, reference=reference), tmp_path / "stage")


# --- architectures, bases, references, objectives, adapters -------------------------------------------------

FAMILIES: dict[str, dict[str, Any]] = {  # what differs in a run; tests/model/test_shrunk.py has more of them
    "llama tied": LLAMA | {"tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 4096},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 8},
    "gemma3": {"model_type": "gemma3_text"},
    "phi3": {"model_type": "phi3", "sliding_window": 2047},
    "gpt2": {"model_type": "gpt2"},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 16},
    "gpt_oss": {"model_type": "gpt_oss"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_rehearse_from_their_shape(family: str) -> None:
    result = rehearse(described(model__shape=FAMILIES[family], model__dtype="bfloat16"), quiet=True)
    assert result.first_loss == pytest.approx(AT_THE_START, abs=1e-6)
    assert result.scored == 4


@pytest.mark.parametrize("quantization", ["nf4-double", "fp4", "int8"])
def test_quantised_bases_rehearse(quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[str | None] = []
    honest = run.load_base

    def watched(*args: Any, **kwargs: Any) -> Any:
        model = honest(*args, **kwargs)
        held.append(quantization_of(model))
        return model

    monkeypatch.setattr(run, "load_base", watched)
    result = rehearse(described(model__quantization=quantization, model__dtype="bfloat16"), quiet=True)
    assert held == [quantization]
    assert result.first_loss == pytest.approx(AT_THE_START, abs=1e-6)
    assert f"{quantization} in bfloat16" in str(result)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ({"kind": "frozen_copy"}, AT_THE_START),
        ({"kind": "cached", "store": "not-made"}, AT_THE_START),
        ({"kind": "separate_model", "model": "nobody/other", "identity_probe": True}, AT_THE_START),
        ({"kind": "separate_model", "model": "nobody/other"}, None),
    ],
)
def test_references_rehearse(reference: dict[str, Any], expected: float | None) -> None:
    result = rehearse(described(reference=reference), quiet=True)
    if expected is None:
        assert result.first_loss != pytest.approx(AT_THE_START, abs=1e-4)
    else:
        assert result.first_loss == pytest.approx(expected, abs=1e-6)
    assert ("reference.model" in " ".join(result.instead)) == ("model" in reference)
    assert not Path("not-made").exists()


@pytest.mark.parametrize(
    ("objective", "reference", "expected"),
    [({"name": "dpo", "beta": 0.1}, {"kind": "disabled_adapter"}, math.log(2)), ({"name": "sft"}, None, None)],
)
def test_objectives_rehearse(objective: dict[str, Any], reference: dict[str, Any] | None, expected: float) -> None:
    result = rehearse(described(objective=objective, reference=reference), quiet=True)
    assert result.last_loss < result.first_loss
    assert expected is None or result.first_loss == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "adapter",
    [
        {
            "use_rslora": True,
            "use_dora": True,
            "modules_to_save": ["lm_head"],
            "trainable_tokens": ["<|tool|>", 128_011],
        },
        {"init": "pissa_niter_2", "r": 64},
        {"init": "olora"},
        {"init": "eva"},
        {"init": "orthogonal", "r": 64},
        {"init": "gaussian", "rank_pattern": {"layers.6.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}},
    ],
    ids=str,
)
def test_adapters_rehearse(adapter: dict[str, Any]) -> None:
    config = described(adapter={"r": 8, "alpha": 16} | adapter, reference={"kind": "frozen_copy"})
    result = rehearse(config, quiet=True)
    assert result.first_loss == pytest.approx(AT_THE_START, abs=1e-5)
    assert result.last_loss < result.first_loss


def test_loftq_rehearses() -> None:
    config = described(adapter__init="loftq", model__quantization="nf4", reference={"kind": "frozen_copy"})
    assert rehearse(config, quiet=True).first_loss == pytest.approx(AT_THE_START, abs=1e-5)


def test_a_continued_adapter_rehearses_on_one_of_its_kind(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    record = {"peft_type": "LORA", "r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(record))
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "adapter" / "adapter_model.safetensors")
    for folder, rank in ((tmp_path / "adapter", 6), (tmp_path / "nowhere", 8)):
        config = described(adapter={"start_from": str(folder)}, reference={"kind": "frozen_copy"})
        result = rehearse(config, quiet=True)
        assert result.first_loss == pytest.approx(AT_THE_START, abs=1e-6)
        assert f"rank {rank}" in " ".join(result.instead)
