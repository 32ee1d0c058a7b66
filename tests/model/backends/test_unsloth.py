"""unsloth as a backend, on a stand-in that does to transformers what unsloth does: one model gets it, and no other."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig

from lorafocal import run
from lorafocal.assembly import attention_of
from lorafocal.cli.training import _begin
from lorafocal.data.packing import pad_sequences
from lorafocal.data.toy import toy_tokenizer
from lorafocal.errors import InputError
from lorafocal.model import load as load_module
from lorafocal.model.adapters import attach_lora
from lorafocal.model.backends import named, unsloth
from lorafocal.model.load import load_base
from lorafocal.policy import evaluating, token_logps
from lorafocal.probes import choose_layout
from lorafocal.schema import Model
from tests.model.backends import stand_in
from tests.tiny import disturb, lora, pairs, tiny_base, trainer

pytestmark = pytest.mark.slow

ROUNDING = 0.06  # nats a token between two attentions in bf16
LONGEST = 24


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "tiny-base"
    tiny_base(max_position_embeddings=64).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def imported(monkeypatch):
    """The stand-in as unsloth, imported as `start` would have."""
    module = stand_in.module()
    monkeypatch.setitem(sys.modules, "unsloth", module)
    monkeypatch.setenv(unsloth.CODE_FOLDER, unsloth._private_folder())
    return module


@pytest.fixture
def loaded(saved, imported):
    return unsloth.load(saved, max_length=LONGEST)[0]


def vars_of_the_exchanged():
    return [vars(owner).get(name) for owner, name in stand_in.EXCHANGED]


def test_the_base_is_frozen_in_train_mode_and_as_it_is_stored(saved, loaded):
    theirs = load_base(saved)
    assert loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    held, stored = loaded.state_dict(), theirs.state_dict()
    assert held.keys() == stored.keys()
    assert all(torch.equal(held[name], stored[name]) for name in stored)  # the pad token's embedding, too


def test_what_is_asked_of_it_and_the_tokenizer_that_comes_with_it(saved, imported, capsys):
    model, tokenizer = unsloth.load(saved, max_length=LONGEST)
    call = imported.calls[0]
    assert (call["model_name"], call["max_seq_length"], call["dtype"]) == (saved, 64, torch.bfloat16)
    assert call["use_exact_model_name"] is True
    assert call["use_safetensors"] is True
    assert not any(call[name] for name in ("load_in_4bit", "fix_tokenizer", "offload_embedding"))
    assert "quantization_config" not in call
    assert tokenizer.padding_side == load_module.load_tokenizer(saved).padding_side
    printed = capsys.readouterr()
    assert "banner" in printed.err
    assert not printed.out  # which belongs to results
    assert model.config._name_or_path == saved


def test_four_bits_are_asked_for_as_for_any_base(saved, imported):
    model, _ = unsloth.load(saved, max_length=LONGEST, quantization="nf4")
    config = imported.calls[0]["quantization_config"]
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", False)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    theirs = load_base(saved, quantization="nf4").state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


@pytest.mark.row("61")
def test_every_class_is_afterwards_what_it_was(saved, imported):
    before = vars_of_the_exchanged()
    unsloth.load(saved, max_length=LONGEST)
    assert vars_of_the_exchanged() == before
    assert not hasattr(stand_in.Trainer, "_original_training_loop")


@pytest.mark.row("61")
def test_classes_are_what_they_were_after_a_load_that_failed_too(saved, imported, monkeypatch):
    before = vars_of_the_exchanged()

    def failing(*args, **kwargs):
        raise RuntimeError("Unsloth: no\nand more")

    monkeypatch.setattr(stand_in.AutoModelForCausalLM, "from_pretrained", failing)
    with pytest.raises(InputError, match=r"unsloth does not load .*Unsloth: no\)"):
        unsloth.load(saved, max_length=LONGEST)
    assert vars_of_the_exchanged() == before


def test_its_backbone_is_this_models_alone(saved, loaded):
    assert loaded.model.forward.__func__ is stand_in.backbone
    assert {layer.self_attn.forward.__func__ for layer in loaded.model.layers} == {stand_in.attention}
    assert "forward" not in vars(loaded)
    assert not any("forward" in vars(module) for module in load_base(saved).modules())


def scores(base, layout):
    torch.manual_seed(1)
    policy = disturb(attach_lora(base, lora()))
    choice = choose_layout(policy, layout)
    pack = pad_sequences(pairs(5))
    with evaluating(policy):
        evaluated = token_logps(policy, pack)
    return choice, token_logps(policy, pack), evaluated


@pytest.mark.row("61")
def test_packs_are_passed_over_and_padded_rows_give_the_same_log_probs_in_fp32(saved, loaded):
    choice, ours, evaluated = scores(loaded, "auto")
    _, theirs, _ = scores(load_base(saved), "padded")
    assert choice.layout == "padded"
    assert "0 call the attention interface" in choice.reason
    assert ours.dtype == torch.float32
    assert not torch.equal(ours, ours.bfloat16().float())  # nothing on the way rounded them
    assert (ours - theirs).abs().max() < ROUNDING
    assert (evaluated - theirs).abs().max() < ROUNDING


def test_packed_rows_that_are_asked_for_are_refused(loaded):
    with pytest.raises(InputError, match=r"packing\.layout: padded"):
        choose_layout(attach_lora(loaded, lora()), "packed")


@pytest.mark.slow
def test_the_same_trainer_gives_the_same_losses(saved, loaded, tmp_path):
    settings = {"peft_config": lora(), "max_steps": 3, "layout": "auto", "reference": "disabled_adapter"}
    losses = []
    for base in (loaded, load_base(saved)):
        made = trainer(tmp_path, pairs(8), model=base, **settings)
        made.train()
        losses.append([entry["loss"] for entry in made.state.log_history if "loss" in entry])
    assert losses[0][0] == pytest.approx(0.669536, abs=1e-5)  # the switched-off adapter is the reference
    assert losses[0] == pytest.approx(losses[1], abs=5e-3)


def test_a_row_that_would_be_cut_is_refused(loaded):
    policy = attach_lora(loaded, lora())
    choose_layout(policy, "padded")
    with pytest.raises(InputError, match="loaded for 64 and would cut it"):
        token_logps(policy, pad_sequences(pairs(3, longest=8) + pairs(9, longest=40, seed=5)))


def test_it_does_not_generate(loaded):
    with pytest.raises(InputError, match="lorafocal chat"):
        attach_lora(loaded, lora()).generate(input_ids=torch.ones(1, 2, dtype=torch.long))


def test_embeddings_of_another_shape_are_refused(saved, imported, monkeypatch):
    made = stand_in.AutoModelForCausalLM.from_pretrained

    def with_a_token_more(*args, **kwargs):
        model = made(*args, **kwargs)
        model.resize_token_embeddings(model.config.vocab_size + 1)
        return model

    monkeypatch.setattr(stand_in.AutoModelForCausalLM, "from_pretrained", with_a_token_more)
    with pytest.raises(InputError, match="adds a pad token"):
        unsloth.load(saved, max_length=LONGEST)


@pytest.mark.row("61")
def test_rotations_that_were_left_uninitialised_are_refused(saved, imported, monkeypatch):
    made = stand_in.AutoModelForCausalLM.from_pretrained

    def left_alone(*args, **kwargs):
        model = made(*args, **kwargs)
        model.model.rotary_emb.inv_freq.fill_(1e-3)
        return model

    monkeypatch.setattr(stand_in.AutoModelForCausalLM, "from_pretrained", left_alone)
    with pytest.raises(InputError, match="rotations of LlamaForCausalLM have other frequencies"):
        unsloth.load(saved, max_length=LONGEST)


HELD = {"dtype": "bfloat16", "quantization": None, "max_length": 512}
CONFIG = LlamaConfig(max_position_embeddings=1024)


@pytest.mark.parametrize(
    ("config", "held", "said"),
    [
        (CONFIG, {"dtype": "float32"}, "bfloat16"),
        (CONFIG, {"quantization": "int8"}, "int8"),
        (CONFIG, {"max_length": 1025}, "1024 positions"),
        (Gemma2Config(), {}, "'gemma2'"),
        (LlamaConfig(attention_dropout=0.1), {}, "dropout"),
        (LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), {}, "'linear'"),
    ],
)
def test_what_it_would_compute_otherwise_is_refused_with_the_way_out(config, held, said):
    unsloth.check_supported(CONFIG, "owner/base", **HELD)
    with pytest.raises(InputError, match=said) as refused:
        unsloth.check_supported(config, "owner/base", **(HELD | held))
    assert "Lower `data.max_length`" in str(refused.value) or "model.backend: transformers" in str(refused.value)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="several processes"):
        unsloth.check_supported(CONFIG, "owner/base", **HELD)


def test_absence_is_answered_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", None)
    with pytest.raises(InputError, match=r"requirements/unsloth\.txt"):
        unsloth.load("owner/base", max_length=8)


def test_one_that_somebody_else_imported_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", stand_in.module())
    monkeypatch.setenv(unsloth.CODE_FOLDER, "unsloth_compiled_cache")
    with pytest.raises(InputError, match="working directory"):
        unsloth.start()


def test_the_folder_of_its_code_is_private_and_new_each_time():
    folders = [unsloth._private_folder() for _ in range(2)]
    assert folders[0] != folders[1]
    for folder in folders:
        assert stat.S_IMODE(Path(folder).stat().st_mode) == 0o700
        assert not list(Path(folder).iterdir())


# What unsloth does when it is imported: its folder goes to the front of the path, and code is taken from there.
PACKAGE = """
import importlib.util, os, sys
folder = os.environ.get("UNSLOTH_COMPILE_LOCATION", "unsloth_compiled_cache")
if folder not in sys.path:
    sys.path.insert(0, folder)
print("early:", [name for name in ("transformers", "peft", "trl") if name in sys.modules])
print("settings:", all(os.environ.get(key) for key in {settings!r}))
print("folder:", os.path.abspath(folder), oct(os.stat(folder).st_mode & 0o777) if os.path.isdir(folder) else None)
if importlib.util.find_spec("planted"):
    import planted
"""


def start_in(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run `script` in `folder`, where code is planted in unsloth's usual place, with the stand-in as unsloth."""
    package, place = folder / "site" / "unsloth", folder / "work"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE.replace("{settings!r}", repr([*unsloth.SETTINGS, *unsloth.NO_CPU])))
    (place / "unsloth_compiled_cache").mkdir(parents=True)
    (place / "unsloth_compiled_cache" / "planted.py").write_text("print('PLANTED CODE RAN')\n")
    path = os.pathsep.join([str(folder / "site"), str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(folder)}
    environment.pop(unsloth.CODE_FOLDER, None)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=place, env=environment)


@pytest.mark.row("S11")
def test_code_planted_in_the_working_directory_is_not_imported(tmp_path):
    done = start_in(tmp_path, "from lorafocal.model.backends import named; named('unsloth').start()")
    assert done.returncode == 0, done.stderr
    assert "PLANTED" not in done.stdout + done.stderr
    folder, mode = next(line for line in done.stderr.splitlines() if line.startswith("folder")).split()[1:]
    assert (Path(folder).parent, mode) == (tmp_path, "0o700")
    assert not Path(folder).exists()  # gone with its process
    assert "early: []" in done.stderr
    assert "settings: True" in done.stderr


def test_the_stand_in_takes_planted_code_where_nobody_says_otherwise(tmp_path):
    done = start_in(tmp_path, "import unsloth")
    assert "PLANTED CODE RAN" in done.stdout


def test_it_comes_before_the_libraries_that_it_changes(tmp_path):
    late = (
        "import sys, types; sys.modules['peft'] = types.ModuleType('peft')\n"
        "from lorafocal.model.backends import unsloth; unsloth.start()"
    )
    done = start_in(tmp_path, late)
    assert "InputError: model.backend: unsloth must be imported first" in done.stderr
    assert "peft came before it" in done.stderr
    assert "folder:" not in done.stderr


def test_where_it_does_not_start_the_reason_is_one_line(monkeypatch):
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    monkeypatch.setattr(unsloth, "_CHANGED", ())
    monkeypatch.setattr(unsloth.importlib.util, "find_spec", lambda name: object())

    def no_gpu(name):
        raise NotImplementedError("Unsloth cannot find any torch accelerator\n? You need a GPU.")

    monkeypatch.setattr(unsloth.importlib, "import_module", no_gpu)
    for key in (*unsloth.SETTINGS, *unsloth.NO_CPU, unsloth.CODE_FOLDER):
        monkeypatch.setenv(key, "before")
    with pytest.raises(InputError, match=r"cannot find any torch accelerator\)\. It needs a CUDA device"):
        unsloth.start()


def test_backends_are_found_by_their_word():
    assert named("unsloth") is unsloth


def test_nothing_else_names_it():
    package = Path(unsloth.__file__).parents[2]
    naming = {str(file.relative_to(package)) for file in package.rglob("*.py") if "unsloth" in file.read_text()}
    assert naming == {"model/backends/unsloth.py", "schema/__init__.py", "schema/sections.py"}


def test_a_config_leads_to_it_before_and_while_loading(saved, imported):
    model = Model(name=saved, dtype="bfloat16", backend="unsloth")
    _begin(model.backend)
    config = SimpleNamespace(model=model, data=SimpleNamespace(max_length=LONGEST))
    base = run._load(saved, None, config, SimpleNamespace(use_cpu=True))
    assert base.backend == "unsloth"
    assert attention_of(attach_lora(base, lora()), torch.device("cpu")).name == "unsloth's own"
