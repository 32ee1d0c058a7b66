"""What the unsloth backend asks for and relies on, held against the source of the pinned release, which is never run.

Another version in requirements/unsloth.txt that renames a parameter, an environment variable or a class fails here.
"""

from __future__ import annotations

import ast
import re
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from lorafocal.model.backends import unsloth

pytestmark = pytest.mark.newest  # whatever the libraries are, this is the same: once is enough

ROOT = Path(__file__).resolve().parents[3]
WHEELS = ROOT / ".venv" / "wheels"
PINS = dict(re.findall(r"^(unsloth\w*)==(\S+)$", (ROOT / "requirements" / "unsloth.txt").read_text(), re.MULTILINE))
OURS = ast.parse(Path(unsloth.__file__).read_text(encoding="utf-8"))
HANDED_ON = {"use_safetensors", "quantization_config"}  # `**kwargs` of the loader, and so transformers' own


@cache
def source(path: str) -> str:
    """A file of the pinned wheels, such as `unsloth/models/loader.py`."""
    package = path.partition("/")[0]
    wheel = WHEELS / f"{package}-{PINS[package]}-py3-none-any.whl"
    assert wheel.is_file(), f"{wheel.name} is not there to be read: make .venv/wheels"
    with zipfile.ZipFile(wheel) as packed:
        return packed.read(path).decode("utf-8")


def function(text: str, name: str) -> ast.FunctionDef:
    """A function of a file, or `Class.method`."""
    body: list[ast.stmt] = ast.parse(text).body
    for part in name.split("."):
        [found] = [node for node in body if getattr(node, "name", None) == part]
        body = found.body
    assert isinstance(found, ast.FunctionDef)
    return found


def named_parameters(made: ast.FunctionDef) -> set[str]:
    return {argument.arg for argument in (*made.args.posonlyargs, *made.args.args, *made.args.kwonlyargs)}


def dotted(node: ast.AST) -> str:
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def our_calls() -> Iterator[tuple[str, set[str]]]:
    """What of unsloth our backend calls, and the keywords that it may give."""
    for node in ast.walk(OURS):
        if isinstance(node, ast.Call) and dotted(node.func).startswith("unsloth."):
            given = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
            spread = len(given) < len(node.keywords)
            assert not node.args
            yield dotted(node.func), given | ({"quantization_config"} if spread else set())


def unknown(keywords: set[str], text: str, name: str) -> set[str]:
    """The keywords that a function would take for somebody else's."""
    made = function(text, name)
    assert made.args.kwarg is not None
    return keywords - named_parameters(made) - HANDED_ON


def test_each_call_names_parameters_that_there_are():
    calls = dict(our_calls())
    assert list(calls) == ["unsloth.FastLanguageModel.from_pretrained"]
    loader = source("unsloth/models/loader.py")
    [(_, keywords)] = calls.items()
    assert len(keywords) > 10
    assert not unknown(keywords, loader, "FastLanguageModel.from_pretrained")


@pytest.mark.parametrize("renamed", ["use_exact_model_name", "max_seq_length", "offload_embedding", "fix_tokenizer"])
def test_a_renamed_parameter_is_noticed(renamed):
    loader = source("unsloth/models/loader.py").replace(renamed, f"new_{renamed}")
    [(_, keywords)] = our_calls()
    assert unknown(keywords, loader, "FastLanguageModel.from_pretrained") == {renamed}


def names_spread_in_calls(made: ast.FunctionDef, callee: str) -> list[bool]:
    """For each call of `callee` within: whether it hands `**kwargs` on."""
    return [
        any(keyword.arg is None and dotted(keyword.value) == "kwargs" for keyword in node.keywords)
        for node in ast.walk(made)
        if isinstance(node, ast.Call) and dotted(node.func) == callee
    ]


def test_what_it_does_not_name_reaches_transformers():
    dispatch = function(source("unsloth/models/loader.py"), "FastLanguageModel.from_pretrained")
    assert names_spread_in_calls(dispatch, "dispatch_model.from_pretrained") == [True]
    llama = function(source("unsloth/models/llama.py"), "FastLlamaModel.from_pretrained")
    assert set(names_spread_in_calls(llama, "AutoModelForCausalLM.from_pretrained")) == {True}


def test_a_model_and_a_tokenizer_come_back():
    loads = (("loader", "FastLanguageModel"), ("llama", "FastLlamaModel"))
    for file, kind in loads:
        made = function(source(f"unsloth/models/{file}.py"), f"{kind}.from_pretrained")
        last = made.body[-1]
        assert isinstance(last, ast.Return)
        assert isinstance(last.value, ast.Tuple)
        assert len(last.value.elts) == 2


def test_the_package_has_the_name_at_its_top():
    assert "from .loader import FastLanguageModel" in source("unsloth/models/__init__.py")
    assert "from .models import *" in source("unsloth/_gpu_init.py")
    assert "from ._gpu_init import *" in source("unsloth/__init__.py")


WHERE_READ = {
    unsloth.CODE_FOLDER: "unsloth_zoo/compiler.py",
    "UNSLOTH_DISABLE_STATISTICS": "unsloth/models/_utils.py",
    "UNSLOTH_MEGA_CACHE": "unsloth_zoo/compile_cache.py",
    "UNSLOTH_BNB_NF4_LINEAR": "unsloth/kernels/bnb_override.py",
    "UNSLOTH_FAST_GRAD_PARAMS": "unsloth_zoo/fast_grad_params.py",
    "UNSLOTH_FUSED_FORWARD": "unsloth_zoo/fused_losses/forward_install.py",
}


def read_from_the_environment(text: str) -> set[str]:
    """The variables that a file asks `os.environ` or `os.getenv` for."""
    asked = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and dotted(node.func) in ("os.environ.get", "os.getenv"):
            asked |= {argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)}
        if isinstance(node, ast.Compare) and any(dotted(right) == "os.environ" for right in node.comparators):
            asked |= {node.left.value} if isinstance(node.left, ast.Constant) else set()
    return asked


def test_every_setting_is_read():
    assert WHERE_READ.keys() == {unsloth.CODE_FOLDER, *unsloth.SETTINGS}
    for variable, file in WHERE_READ.items():
        assert variable in read_from_the_environment(source(file)), f"{file} reads no {variable}"


@pytest.mark.row("S11")
def test_code_is_taken_from_that_folder_and_no_other_is_put_on_the_path():
    text = source("unsloth_zoo/compiler.py")
    inserted = re.findall(r"^ *sys\.path\.insert\(0, (\w+)\)", text, re.MULTILINE)
    assert set(inserted) <= {"UNSLOTH_COMPILE_LOCATION", "compile_folder"}
    assert inserted


def test_the_libraries_it_must_come_before_are_those_that_it_names():
    names = re.search(r"^critical_modules = (\[.*\])$", source("unsloth/_gpu_init.py"), re.MULTILINE)
    assert names is not None
    assert set(ast.literal_eval(names[1])) == set(unsloth._CHANGED)


@pytest.mark.parametrize("family", unsloth.FAMILIES)
def test_each_family_has_forwards_of_its_own_that_are_exchanged_on_its_classes(family):
    dispatch = ast.unparse(function(source("unsloth/models/loader.py"), "FastLanguageModel.from_pretrained"))
    assert f"model_type == '{family}'" in dispatch
    prefix = family.title()
    patch = function(source(f"unsloth/models/{family}.py"), f"Fast{prefix}Model.pre_patch")
    exchanged = {dotted(target) for node in ast.walk(patch) if isinstance(node, ast.Assign) for target in node.targets}
    own = {f"{prefix}{part}.forward" for part in ("Attention", "DecoderLayer", "Model", "ForCausalLM")}
    assert own | {"PeftModelForCausalLM.forward"} <= exchanged


def test_the_backbone_takes_what_transformers_own_causal_model_hands_it():
    backbone = function(source("unsloth/models/llama.py"), "LlamaModel_fast_forward")
    assert backbone.args.kwarg is not None
    handed = {"input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache"}
    assert handed <= named_parameters(backbone)


def test_a_backbone_that_is_called_without_its_causal_model_attends_causally():
    """The one branch without a causal mask of its own (xformers) makes one where none was given."""
    text = ast.unparse(function(source("unsloth/utils/attention_dispatch.py"), "_run_attention"))
    assert re.search(
        r"if base_mask is None and context\.is_causal.*:\n\s+base_mask = \S+\.LowerTriangularMask\(\)", text
    )


def test_what_is_worked_around_is_still_there():
    """Each of these is why something is done in the backend; when one goes, so can its remedy."""
    llama = source("unsloth/models/llama.py")
    causal = ast.unparse(function(llama, "CausalLM_fast_forward"))
    assert "logits = logits.to(_get_dtype(dtype_from_config(self.config)))" in causal  # log-probs of 8 bits
    backbone = ast.unparse(function(llama, "LlamaModel_fast_forward"))
    assert "input_ids = input_ids[:, :self.max_seq_length]" in backbone  # rows are cut
    loading = ast.unparse(function(llama, "FastLlamaModel.from_pretrained"))
    for found in ("Trainer._inner_training_loop = ", "zero_pad_embedding_rows(", "model.generate = ", "rope_scaling"):
        assert found in loading
