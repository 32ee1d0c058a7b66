"""Loading quantised bases: checkpoints that are quantised already, the device, and bitsandbytes missing or broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorafocal.compatibility import QUANTIZED
from lorafocal.errors import InputError
from lorafocal.model import load as load_module
from lorafocal.model import quantized
from lorafocal.model.load import load_base
from lorafocal.model.quantized import bitsandbytes_config, describe, quantization_of, word_of
from tests.tiny import tiny_base

pytestmark = pytest.mark.slow

IDS = torch.arange(2, 40)[None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bases") / "llama"
    tiny_base().save_pretrained(folder)
    return str(folder)


def stored(folder: Path, base: str, quantization: str, *, dtype: str = "bfloat16", **config: Any) -> str:
    """A checkpoint that holds quantised weights, its config's statement changed by `config`."""
    load_base(base, dtype=dtype, quantization=quantization).save_pretrained(folder)
    return restated(folder, **config)


def restated(folder: Path, **config: Any) -> str:
    file = folder / "config.json"
    values = json.loads(file.read_text())
    values["quantization_config"] = values.get("quantization_config", {}) | config
    file.write_text(json.dumps(values))
    return str(folder)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if word_of(module) is not None]


# --- checkpoints that are quantised already -----------------------------------------------------------------


@pytest.mark.parametrize("word", QUANTIZED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stored_base_computes_the_bits_of_one_quantised_on_loading(tmp_path, llama, word, dtype):
    fresh = load_base(llama, dtype=dtype, quantization=word)
    folder = stored(tmp_path, llama, word, dtype=dtype)
    for asked in (None, word):
        again = load_base(folder, dtype=dtype, quantization=asked)
        assert torch.equal(logits(again), logits(fresh))
        assert describe(again) == describe(fresh)


def test_a_stored_base_is_refused_under_another_word(tmp_path, llama):
    folder = stored(tmp_path, llama, "nf4")
    for other in ("nf4-double", "int8"):
        with pytest.raises(InputError, match=rf"is {other}, but .* is stored as nf4: leave `model\.quantization` out"):
            load_base(folder, quantization=other)


@pytest.mark.row("60")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_stored_for_half_precision_computes_in_the_dtype_that_was_asked_for(tmp_path, llama, dtype):
    """Most public 4-bit checkpoints say float16, and hold their norms and embeddings in it."""
    stored(tmp_path, llama, "nf4", dtype="float32", bnb_4bit_compute_dtype="float16")
    tensors = load_file(tmp_path / "model.safetensors")
    halved = {
        n: t.half() if n.endswith(("norm.weight", "embed_tokens.weight", "head.weight")) else t
        for n, t in tensors.items()
    }
    save_file(halved, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load_base(str(tmp_path), dtype=dtype)
    wanted = getattr(torch, dtype)
    assert {p.dtype for p in model.parameters()} == {torch.uint8, wanted}
    assert {layer.compute_dtype for layer in layers(model)} == {wanted}
    assert {layer.weight.quant_state.dtype for layer in layers(model)} == {wanted}
    exact = logits(load_base(llama, dtype="float32", quantization="nf4"))
    assert (logits(model) - exact).norm() < (0.02 if dtype == "bfloat16" else 1e-3) * exact.norm()


def test_layers_that_a_stored_base_names_as_left_in_float_are_allowed_and_counted(tmp_path, llama):
    config = bitsandbytes_config("nf4", torch.bfloat16)
    config.llm_int8_skip_modules = ["lm_head", "model.layers.1.mlp"]
    AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16, quantization_config=config).save_pretrained(
        tmp_path
    )
    found = describe(load_base(str(tmp_path)))
    assert (found.quantization, found.quantized_layers, found.float_layers) == ("nf4", 11, 3)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "hqq", "compressed-tensors"])
def test_other_methods_are_refused_by_their_name(tmp_path, llama, method):
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    with pytest.raises(InputError, match=rf"is quantised with {method},.*float original.*model\.quantization: nf4"):
        load_base(restated(tmp_path, quant_method=method, bits=4))


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        ({"bits": 4}, "quantised with a method without a name"),
        ({"quant_method": "bitsandbytes"}, "does not say as what.*one must be true"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "does not say as what.*one must be true"),
    ],
)
def test_a_checkpoint_that_does_not_say_how_it_is_quantised_is_refused(tmp_path, llama, stated, told):
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    with pytest.raises(InputError, match=rf"model\.name: .*{told}.*float original"):
        load_base(restated(tmp_path, **stated))


NEEDED = {
    "nf4": ("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"),
    "nf4-double": ("weight", "weight.absmax", "weight.nested_absmax", "weight.nested_quant_map"),
    "int8": ("weight", "SCB"),
}


@pytest.mark.parametrize(("word", "part"), [(word, part) for word, parts in NEEDED.items() for part in parts])
def test_a_stored_base_without_all_of_its_tensors_is_refused(tmp_path, llama, word, part):
    stored(tmp_path, llama, word)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"model.layers.1.mlp.up_proj.{part}"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"do not fit its config|no scales|no quantised weight|mixture|lacks"):
        load_base(str(tmp_path))


def test_a_float_base_without_all_of_its_tensors_is_refused(tmp_path, llama):
    """transformers would make the weight up and warn."""
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for word in (None, "nf4"):
        with pytest.raises(InputError, match=r"lacks 1 tensors .*up_proj\.weight\), which would be random"):
            load_base(str(tmp_path), quantization=word)


def test_a_stored_base_has_no_outlier_columns_whatever_it_says(tmp_path, llama):
    base = load_base(stored(tmp_path, llama, "int8", llm_int8_threshold=6.0))
    assert {layer.state.threshold for layer in layers(base)} == {0.0}


@pytest.mark.parametrize(
    ("word", "statement", "message"),
    [
        (None, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "no scales: the checkpoint is damaged"),
        (
            None,
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "no quantised weight: the checkpoint is damaged",
        ),
        ("nf4", {"bnb_4bit_quant_type": "fp4"}, "fp4 was asked for, but LlamaForCausalLM was loaded with nf4"),
        ("nf4", {"bnb_4bit_use_double_quant": True}, "nf4-double was asked for"),
        ("nf4", None, "do not fit its config"),
        ("int8", None, r"holds quantised weights \(.*SCB\), but its config does not say so"),
    ],
)
def test_a_config_that_does_not_tell_how_its_weights_are_held_is_refused(tmp_path, llama, word, statement, message):
    load_base(llama, quantization=word).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    if statement is None:
        values = json.loads(file.read_text())
        del values["quantization_config"]
        file.write_text(json.dumps(values))
    else:
        restated(tmp_path, **statement)
    with pytest.raises(InputError, match=message):
        load_base(str(tmp_path))


def test_a_mixture_of_kinds_is_refused(llama):
    one, other = (load_base(llama, quantization=word) for word in ("nf4", "fp4"))
    one.model.layers[1].mlp = other.model.layers[1].mlp
    with pytest.raises(InputError, match="mixture of fp4 and nf4"):
        quantization_of(one)


# --- where it is loaded, and with what ----------------------------------------------------------------------


class Asked(Exception):
    """Ends a loading at `from_pretrained`."""


@pytest.mark.row("50")
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("word", [None, "nf4", "int8"])
def test_each_process_loads_onto_its_own_device(llama, monkeypatch, rank, word):
    """Never `device_map="auto"`, which would spread one model over the devices of all processes."""
    asked = {}

    def from_pretrained(*_: Any, **more: Any) -> None:
        asked.update(more)
        raise Asked

    for key, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(load_module, "library", lambda device=None: None)
    monkeypatch.setattr(load_module.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(Asked):
        load_base(llama, quantization=word)
    assert asked["device_map"] == {"": torch.device("cuda", rank)}
    assert asked["dtype"] == torch.bfloat16
    assert ("quantization_config" in asked) == (word is not None)


def test_without_an_accelerator_it_is_the_cpu(llama, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for word in (None, "nf4"):
        assert {p.device.type for p in load_base(llama, quantization=word).parameters()} == {"cpu"}


@pytest.mark.row("62")
def test_without_bitsandbytes_float_bases_load_and_quantised_ones_say_what_to_install(tmp_path, llama, monkeypatch):
    folder = stored(tmp_path, llama, "nf4")
    monkeypatch.setitem(quantized.sys.modules, "bitsandbytes", None)
    assert quantization_of(load_base(llama)) is None
    for name, word in ((llama, "nf4"), (llama, "int8"), (folder, None)):
        with pytest.raises(InputError, match=r"needs bitsandbytes.*`pip install 'lorafocal\[quant\]'`"):
            load_base(name, quantization=word)


@pytest.mark.row("62")
@pytest.mark.parametrize("error", [RuntimeError("no CUDA library"), OSError("libcudart"), AttributeError("lib")])
def test_a_bitsandbytes_that_does_not_work_is_found_before_anything_is_loaded(llama, monkeypatch, error):
    import bitsandbytes

    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    with pytest.raises(InputError, match=rf"does not work here \({error}\).*lorafocal\[quant\]"):
        load_base(llama, quantization="nf4")
