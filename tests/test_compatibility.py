"""The compatibility table answers every cell; what it says is so; configs, trainer, launcher and page say the same."""

from __future__ import annotations

import ast
import importlib.util
from collections import Counter
from itertools import chain, combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lorafocal import cli, launch
from lorafocal.compatibility import (
    ADAPTERS,
    BASES,
    ENGINES,
    LAYOUTS,
    QUANTIZED,
    REFERENCES,
    RULES,
    STARTS,
    Cell,
    adapter_words,
    check,
    engine_refusal,
    verdict,
)
from lorafocal.config import check_config, resolved_yaml
from lorafocal.errors import InputError
from lorafocal.model.adapters import attach_lora
from lorafocal.model.load import load_base
from lorafocal.policy import evaluating
from tests import compatibility_table
from tests.test_config import VALUES, mistakes
from tests.tiny import lora, pairs, tiny_base, trainer

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]
PLAIN = frozenset({"lora"})
IDS = torch.tensor([[5, 6, 7, 8]])


# --- every cell has an answer -------------------------------------------------------------------------------


def adapters() -> list[frozenset[str]]:
    """Every adapter of up to three words, and one of all words at once."""
    few = chain.from_iterable(combinations([*ADAPTERS, "other:target_parameters"], size) for size in (1, 2, 3))
    return [*map(frozenset, few), frozenset(ADAPTERS)]


def test_every_cell_trains_or_is_refused_with_reason_and_way_out() -> None:
    counted: Counter[bool] = Counter()
    for base, words, reference in product((*BASES, "hqq"), adapters(), REFERENCES):
        found = verdict(Cell(base, words, reference))
        counted[found.trains] += 1
        assert found.trains == (not found.reason) == (not found.remedy)
        assert all(refusal.reason and refusal.remedy for refusal in found.refusals)
        assert "{" not in str(found)
    assert min(counted.values()) > 1000


def test_layouts_and_engines_refuse_on_their_own() -> None:
    """A cell trains in a layout and an engine if it trains at all, but for what is split and cannot be."""
    for base, word, reference in product(BASES, ADAPTERS, REFERENCES):
        alone = verdict(Cell(base, frozenset({word}), reference)).trains
        for layout, engine in product(LAYOUTS, ENGINES):
            split = engine == "zero3" and (base == "int8" or word == "trainable_tokens")
            split |= engine in ("zero3", "fsdp2") and reference in ("moving", "moving-soft")
            assert verdict(Cell(base, frozenset({word}), reference, layout, engine)).trains == (alone and not split)


def test_all_reasons_are_told_each_with_its_way_out() -> None:
    cell = Cell("int8", frozenset({"lora", "pissa", "bias"}), "disabled_adapter", engine="zero3")
    with pytest.raises(InputError) as error:
        check(cell)
    refusals = verdict(cell).refusals
    assert [refusal.rule.axis for refusal in refusals] == ["adapter", "adapter", "reference", "engine"]
    for refusal in refusals:
        assert f"{refusal.reason}: {refusal.remedy}" in str(error.value)


@pytest.mark.parametrize("place", ["base", "reference", "layout", "engine"])
def test_words_that_the_table_does_not_have_are_refused_by_name(place: str) -> None:
    cell = {"base": "float32", "adapter": PLAIN, "reference": "none", "layout": "packed", "engine": "ddp"}
    check(Cell(**cell))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="newest"):
        check(Cell(**cell | {place: "newest"}))  # type: ignore[arg-type]


def test_the_words_of_a_config_are_those_of_a_lora_config() -> None:
    ours = {"use_dora": True, "init": "pissa_niter_4", "alpha_pattern": {"q_proj": 4.0}, "trainable_tokens": [3]}
    theirs = {"use_dora": True, "init_lora_weights": "pissa_niter_4", "alpha_pattern": {"q_proj": 4.0}}
    assert adapter_words(ours) == adapter_words(theirs | {"trainable_token_indices": [3], "bias": "none"})
    assert adapter_words(ours) == {"dora", "pissa", "patterns", "trainable_tokens"}
    assert (
        adapter_words({}) == adapter_words({"init": "default"}) == adapter_words({"init_lora_weights": True}) == PLAIN
    )
    assert adapter_words({"init_lora_weights": False, "bias": "all"}) == {"lora", "random", "bias"}


# --- the doors say what the table says ----------------------------------------------------------------------


SECTIONS: dict[str, dict[str, Any]] = {
    "separate_model": {"kind": "separate_model", "model": "m"},
    "adapter": {"kind": "adapter", "adapter": "a"},
    "moving-soft": {"kind": "moving", "mixing": 0.5},
    "several": {"kind": "several", "members": ["base", "a"]},
}


def config_of(quantization: str | None, adapter: dict[str, Any], reference: str) -> dict[str, Any]:
    if reference == "none":
        objective: dict[str, Any] = {"objective": {"name": "sft"}}
    else:
        objective = {"objective": VALUES["objective"], "reference": SECTIONS.get(reference, {"kind": reference})}
    values = {key: value for key, value in VALUES.items() if key not in ("objective", "reference")}
    base = {"name": "m", "dtype": "bfloat16", "quantization": quantization}
    return {**values, **objective, "model": base, "adapter": {"r": 8, "alpha": 8, **adapter}}


IN_CONFIGS = [
    {**variant, **start, **extra}
    for variant in ({}, {"use_rslora": True}, {"use_dora": True})
    for start in ({}, *({"init": word} for word in STARTS if word != "random"))
    for extra in ({}, {"modules_to_save": ["norm"]}, {"trainable_tokens": [3]})
]


@pytest.mark.row("6", "48")
@pytest.mark.parametrize("quantization", [None, *QUANTIZED])
@pytest.mark.parametrize("reference", REFERENCES)
def test_configs_are_refused_in_the_tables_words(quantization: str | None, reference: str) -> None:
    """Of a config alone: nothing is read or downloaded, and no model exists."""
    for adapter in IN_CONFIGS:
        found = verdict(Cell(quantization or "bfloat16", adapter_words(adapter), reference))
        if found.trains:
            check_config(config_of(quantization, adapter, reference))
        else:
            told = mistakes(config_of(quantization, adapter, reference))
            assert all(str(refusal) in told for refusal in found.refusals)


@pytest.mark.row("48")
@pytest.mark.parametrize("quantization", [None, *QUANTIZED])
@pytest.mark.parametrize("reference", REFERENCES)
def test_configs_without_an_adapter_are_refused_so(quantization: str | None, reference: str) -> None:
    """A word forgotten must not train a whole model: its reference cannot be the adapter switched off."""
    values = {key: value for key, value in config_of(quantization, {}, reference).items() if key != "adapter"}
    found = verdict(Cell(quantization or "bfloat16", adapter_words(None), reference))
    if found.trains:
        assert check_config(values).adapter is None
    else:
        assert all(str(refusal) in mistakes(values) for refusal in found.refusals)


@pytest.mark.row("48")
def test_a_refused_config_stops_before_any_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hub ids in it do not exist, and nobody asks for them."""
    config = check_config(config_of("nf4", {}, "disabled_adapter"))
    file = tmp_path / "run.yaml"
    file.write_text(resolved_yaml(config).replace("init: default", "init: pissa"))
    monkeypatch.setattr("sys.argv", ["lorafocal", "train", str(file)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "adapter: with PiSSA" in told
    assert "reference.kind: with PiSSA" in told


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("float16", {}, "disabled_adapter"),
    ("float8_e4m3fn", {}, "frozen_copy"),
    ("float32", {"bias": "all"}, "frozen_copy"),
    ("float32", {"init_lora_weights": "pissa"}, "disabled_adapter"),
    ("bfloat16", {"init_lora_weights": "olora"}, "disabled_adapter"),
    ("float32", {"init_lora_weights": "orthogonal"}, "disabled_adapter"),
    ("float32", {"init_lora_weights": False}, "disabled_adapter"),
    ("float64", {"init_lora_weights": "pissa"}, "frozen_copy"),
    ("nf4", {"init_lora_weights": "pissa"}, "frozen_copy"),
    ("int8", {"init_lora_weights": "olora"}, "frozen_copy"),
    ("int8", {"init_lora_weights": "loftq"}, "frozen_copy"),
    ("nf4", {"init_lora_weights": "orthogonal"}, "frozen_copy"),
    ("float32", {"init_lora_weights": "loftq"}, "frozen_copy"),
    ("float32", {"init_lora_weights": "pissa", "use_dora": True}, "frozen_copy"),
    ("float32", {"init_lora_weights": "eva", "trainable_token_indices": [3]}, "frozen_copy"),
    ("float32", {"init_lora_weights": "corda"}, "frozen_copy"),
    ("float32", {"init_lora_weights": "lora_ga"}, "frozen_copy"),
    ("float32", {"target_parameters": ["some.weight"]}, "frozen_copy"),
    ("nf4", {"bias": "all", "init_lora_weights": "pissa"}, "disabled_adapter"),
    ("float32", {"init_lora_weights": "pissa"}, "adapter"),
    ("float32", {"init_lora_weights": "olora"}, "several"),
    ("float32", {"use_dora": True}, "moving-soft"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("base")
    tiny_base().save_pretrained(path)
    return str(path)


def base_in(word: str, folder: str) -> Any:
    if word in QUANTIZED:
        return load_base(folder, dtype="float32", quantization=word)
    return tiny_base(dtype=getattr(torch, word))


def config_with(settings: dict[str, Any]) -> LoraConfig:
    """As PEFT would have it, but without its own checks: for some starts it asks for packages first."""
    config = lora()
    for name, value in settings.items():
        setattr(config, name, value)
    return config


@pytest.mark.row("6")
@pytest.mark.parametrize(("base", "settings", "reference"), REFUSED)
def test_the_trainer_refuses_in_the_tables_words(
    tmp_path: Path, folder: str, base: str, settings: dict[str, Any], reference: str
) -> None:
    words = adapter_words(settings) | {"other:target_parameters" for name in settings if name == "target_parameters"}
    expected = str(verdict(Cell(base, words, reference)))
    assert expected
    model = base_in(base, folder)
    named = SECTIONS.get(reference, {"kind": reference})
    section = {"reference" if key == "kind" else f"reference_{key}": value for key, value in named.items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        trainer(tmp_path, pairs(4), model=model, peft_config=config_with(settings), **section)
    assert str(error.value) == expected
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(now[name].dtype == t.dtype and bytes_of(now[name]) == bytes_of(t) for name, t in before.items())


def test_the_average_of_two_dora_weights_is_no_dora_weight() -> None:
    """Nor is its difference to the base of low rank."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 20, generator=draw, dtype=torch.float64)

    def dora() -> torch.Tensor:
        a, b = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((2, 20), (24, 2)))
        changed = weight + b @ a
        return torch.rand(24, 1, generator=draw, dtype=torch.float64) * changed / changed.norm(dim=1, keepdim=True)

    average = (dora() + dora()) / 2
    assert torch.linalg.matrix_rank(average - weight) == 20


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.row("6")
def test_a_model_that_brings_its_adapter_goes_through_the_same_check(tmp_path: Path) -> None:
    brought = get_peft_model(tiny_base(), lora(init_lora_weights="orthogonal"))
    with pytest.raises(InputError) as error:
        trainer(tmp_path, pairs(4), model=brought)
    assert str(error.value) == str(verdict(Cell("float32", PLAIN | {"orthogonal"}, "disabled_adapter")))
    run = trainer(tmp_path, pairs(4), model=brought, reference="frozen_copy", max_steps=1)
    run.train()
    for init in ("pissa", "olora"):
        rewritten = get_peft_model(tiny_base(), lora(init_lora_weights=init))
        with pytest.raises(InputError, match=f"'{init}'.*changed the base.*give the base and `peft_config`"):
            trainer(tmp_path, pairs(4), model=rewritten, reference="frozen_copy")


@pytest.mark.row("40", "48", "49")
@pytest.mark.parametrize(
    ("environment", "engine", "named"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "zero2", ""),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3", ""),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "zero0", "zero0"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "one-process", ""),  # what a trainer under DeepSpeed leaves behind
        ({"ACCELERATE_USE_FSDP": "true"}, "accelerate's own FSDP", "FSDP"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM", "Megatron-LM"),
        ({"WORLD_SIZE": "2"}, "ddp", ""),
        ({"ACCELERATE_USE_FSDP": "false"}, "one-process", ""),
    ],
)
def test_engines_are_refused_at_launch(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], engine: str, named: str
) -> None:
    """By name, for every base, before a config is read."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch.engine() == engine
    if not named:
        launch.check_launch()
        return
    with pytest.raises(InputError, match=f"{named}.*engine.kind: zero3") as error:
        launch.check_launch()
    assert engine_refusal(engine) in str(error.value)


@pytest.mark.row("48")
@pytest.mark.parametrize("field", ["fsdp", "deepspeed"])
def test_engines_are_refused_as_training_arguments(tmp_path: Path, field: str) -> None:
    with pytest.raises(InputError, match=r"engine\.kind"):
        trainer(tmp_path, pairs(4), **{field: "full_shard" if field == "fsdp" else {"zero_optimization": {"stage": 3}}})


# --- what the rules say is so -------------------------------------------------------------------------------


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    with evaluating(model):
        return model(input_ids=IDS, use_cache=False).logits


def test_float16_overflows_where_bfloat16_does_not() -> None:
    """Hidden states beyond 65504, as large models have them."""
    finite = {}
    for dtype in (torch.float16, torch.bfloat16):
        model = tiny_base()
        for layer in model.model.layers:
            layer.mlp.up_proj.weight *= 1e3
            layer.mlp.down_proj.weight *= 1e3
        finite[dtype] = bool(logits(model.to(dtype)).isfinite().all())
    assert finite == {torch.float16: False, torch.bfloat16: True}


@pytest.mark.row("6")
def test_a_trained_bias_stays_when_the_adapter_is_off() -> None:
    base = tiny_base(attention_bias=True)
    before = logits(base)
    model = get_peft_model(base, lora(bias="all"))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith("bias"):
            parameter.data += 0.1
    with model.disable_adapter():
        assert (logits(model) - before).abs().max() > 0.01


@pytest.mark.row("6")
@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", False, True, "gaussian"])
def test_the_switched_off_adapter_is_not_the_start(init: str | bool) -> None:
    """It is for the starts that the table trains with `disabled_adapter`, to the last bit."""
    torch.manual_seed(0)
    model = attach_lora(tiny_base(), lora(init_lora_weights=init))
    start = logits(model)
    with model.disable_adapter():
        moved = float((logits(model) - start).abs().max())
    trains = verdict(Cell("float32", adapter_words({"init_lora_weights": init}), "disabled_adapter")).trains
    assert (moved == 0) == trains
    assert trains or (moved < 1e-4) == (init == "orthogonal")


@pytest.mark.row("6")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_weights_lose_what_a_start_takes_out(folder: str, quantization: str) -> None:
    """PEFT refuses PiSSA there; OLoRA it rounds again, so that training would not start at the base's policy."""
    with pytest.raises(TypeError, match="PiSSA"):
        get_peft_model(base_in(quantization, folder), lora(init_lora_weights="pissa"))
    base = base_in(quantization, folder)
    before = logits(base)
    moved = {"olora": (logits(get_peft_model(base, lora(init_lora_weights="olora"))) - before).abs().max()}
    base = base_in(quantization, folder)
    moved["default"] = (logits(get_peft_model(base, lora())) - before).abs().max()
    assert moved["olora"] > 1e-3 > moved["default"]


def test_peft_takes_no_float64_weights_apart() -> None:
    with pytest.raises(TypeError, match="PiSSA"):
        get_peft_model(tiny_base(dtype=torch.float64), lora(init_lora_weights="pissa"))


# --- the page -----------------------------------------------------------------------------------------------


def test_the_page_is_made_from_the_rules() -> None:
    assert compatibility_table.PAGE.read_text(encoding="utf-8") == compatibility_table.page()


def test_every_rule_is_shown_by_a_test() -> None:
    shown = compatibility_table.PROOFS
    assert [rule.name for rule in RULES if not rule.name.startswith("another-")] == list(shown)
    for node in shown.values():
        file, _, name = node.partition("::")
        functions = ast.parse((REPOSITORY / file).read_text(encoding="utf-8")).body
        assert name in {f.name for f in functions if isinstance(f, ast.FunctionDef)}, node


def test_the_table_is_light() -> None:
    """`lorafocal --help` reads it: no package but the interpreter's own."""
    source = Path(importlib.util.find_spec("lorafocal.compatibility").origin or "").read_text(encoding="utf-8")  # type: ignore[union-attr]
    named = [n.module for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)]
    assert set(named) == {"__future__", "collections.abc", "dataclasses", "typing", "lorafocal.errors"}
