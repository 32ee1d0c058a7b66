"""Loading bases: what is accepted, what is refused by name, and what identifies one."""

from __future__ import annotations

import ast
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.auto import tokenization_auto

from lorafocal.data.packing import share_prefixes
from lorafocal.errors import InputError
from lorafocal.lineage import LINEAGE_FILE, lineage_of
from lorafocal.model import load as load_module
from lorafocal.model.continued import place_of
from lorafocal.model.load import (
    base_fingerprint,
    check_length,
    check_tokenizer,
    check_vocabulary,
    load_base,
    load_tokenizer,
)
from lorafocal.model.saved import read_config, read_lora_config
from lorafocal.policy import prepare_policy, sequence_logps
from lorafocal.probes import LayoutChoice, choose_layout
from tests.model.families import random_model
from tests.no_memory import lacking, whoever_says_it
from tests.tiny import SIZES, enlarged, pairs, tiny_base

pytestmark = pytest.mark.slow


@pytest.fixture
def saved(tmp_path):
    tiny_base().save_pretrained(tmp_path / "tiny-base")
    return tmp_path / "tiny-base"


def test_a_base_is_frozen_and_in_the_dtype_that_was_asked_for(saved):
    for dtype, found in (("float32", torch.float32), ("bfloat16", torch.bfloat16), (torch.float32, torch.float32)):
        model = load_base(str(saved), dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {found}
        assert not any(p.requires_grad for p in model.parameters())
        assert model.training


@pytest.mark.row("12")
def test_half_precision_is_refused_with_the_reason(saved):
    for half in ("float16", torch.float16):
        with pytest.raises(InputError, match=r"'float16' is not supported.*overflows"):
            load_base(str(saved), dtype=half)


def test_a_shape_that_does_not_match_is_refused_by_key(saved):
    load_base(str(saved), dtype="float32", shape={"model_type": "llama", "hidden_size": SIZES["hidden_size"]})
    with pytest.raises(InputError, match="hidden_size"):
        load_base(str(saved), dtype="float32", shape={"model_type": "llama", "hidden_size": 4096})


def test_a_missing_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="no-such-model"):
        load_base(str(tmp_path / "no-such-model"))


@pytest.mark.newest  # transformers 5.5 makes up a Llama tokenizer of eight special tokens
def test_a_folder_without_tokenizer_is_refused(saved):
    with pytest.raises(InputError, match="tokenizer"):
        load_tokenizer(str(saved))


@pytest.mark.parametrize(
    ("load", "door", "what"),
    [(load_tokenizer, AutoTokenizer, "tokenizer"), (load_base, AutoModelForCausalLM, "model")],
)
def test_a_package_that_is_not_installed_is_one_message(saved, monkeypatch, load, door, what):
    def lacks(*_: object, **__: object) -> None:
        raise ImportError("\nThis requires the Pieces library but it was not found in your environment.\nMore.\n")

    monkeypatch.setattr(door, "from_pretrained", lacks)
    with pytest.raises(InputError, match=rf"no {what} .*the Pieces library but .*\. Install the package that it needs"):
        load(str(saved))


@whoever_says_it
def test_a_device_without_memory_is_no_fault_of_the_weights(saved, monkeypatch, error):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lacking(error))
    with pytest.raises(type(error)) as raised:
        load_base(str(saved))
    assert raised.value is error


@pytest.mark.row("F15")
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "gemma3", "llava"])
def test_bases_without_sdpa_and_image_text_bases_load(family, tmp_path):
    random_model(family, torch.float32).save_pretrained(tmp_path / "base")
    model = load_base(str(tmp_path / "base"), dtype="float32")
    assert choose_layout(model, "auto") == LayoutChoice("packed", "")


def test_a_model_that_does_not_continue_text_is_refused_by_type(tmp_path):
    config = T5Config(vocab_size=97, d_model=32, d_ff=64, num_layers=1, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(InputError, match=r"'t5'.*causal language model"):
        load_base(str(tmp_path / "t5"))


@pytest.mark.parametrize(
    ("file", "answer"),
    [
        ("adapter_config.json", "holds an adapter, and no model: .* adapter.start_from"),
        ("trainer_state.json", "is a checkpoint, for --resume alone"),
        ("manifest.json", "is a run folder; its adapter is"),
    ],
)
def test_other_folders_of_a_run_are_no_model_and_say_so(tmp_path, file, answer):
    (tmp_path / file).write_text("{}")
    with pytest.raises(InputError, match=answer):
        load_tokenizer(str(tmp_path))


def test_a_missing_tokenizer_is_told_of_by_the_key_that_names_it(tmp_path):
    with pytest.raises(InputError, match=r"^reference\.model: no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path), key="reference.model")


@pytest.mark.row("S2")
def test_pickled_weights_are_refused_with_the_way_to_convert_them(saved, monkeypatch):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("opened"))
    for read in (load_base, base_fingerprint):
        with pytest.raises(InputError, match=r"no safetensors weights.* convert it in a sandbox .*save_pretrained"):
            read(str(saved))


@pytest.mark.row("S2")
def test_only_safetensors_are_asked_for_even_where_pickles_lie_beside_them(saved, monkeypatch):
    (saved / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    asked = {}
    loader = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: asked.update(k) or loader(*a, **k))
    load_base(str(saved))
    assert asked["use_safetensors"] is True
    assert "trust_remote_code" not in asked


NO_WEIGHTS = ("AutoConfig", "AutoTokenizer", "GenerationConfig")


@pytest.mark.row("S2")
def test_wherever_a_model_is_loaded_it_is_from_safetensors():
    """Every function of the library that calls `from_pretrained` of a model says so."""
    callers = {}
    for file in Path(load_module.__file__).parents[1].rglob("*.py"):
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                called = [ast.unparse(n.func) for n in ast.walk(function) if isinstance(n, ast.Call)]
                loads = [name for name in called if name.endswith("from_pretrained")]
                if any(name.split(".")[-2] not in NO_WEIGHTS for name in loads):
                    callers[f"{file.name}:{function.name}"] = ast.unparse(function)
    assert "load.py:load_base" in callers
    for name, source in callers.items():
        assert "use_safetensors=True" in source or "'use_safetensors': True" in source, name


@pytest.mark.row("S2")
def test_a_pickled_adapter_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(
        InputError, match=r"no adapter_model\.safetensors.*only safetensors are read.* [Ss]ave it again"
    ):
        read_lora_config(tmp_path)


def test_a_whole_model_is_no_adapter_and_is_named(tmp_path):
    """Given to `merge`, or to go on from: by its own folder, or by that of the run that made it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "model"):
        with pytest.raises(InputError, match=r"not an adapter folder.*model is a whole model: nothing is to be merged"):
            read_lora_config(folder)


def test_what_a_later_peft_can_do_is_refused_by_name_only_where_an_adapter_uses_it(tmp_path):
    """PEFT writes each setting that it knows into each file, so an older one meets names that mean nothing here."""
    record = {"peft_type": "LORA", "r": 4, "later_config": None, "use_later": False, "later_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(record))
    (tmp_path / "adapter_model.safetensors").touch()
    assert read_lora_config(tmp_path).r == 4
    (tmp_path / "adapter_config.json").write_text(json.dumps(record | {"use_later": True}))
    with pytest.raises(InputError, match=r"does not know use_later\. It was written by another PEFT"):
        read_lora_config(tmp_path)


@pytest.mark.row("S9")
@pytest.mark.parametrize("broken", ["{", "\x00", "[" * 100_000], ids=["cut", "bytes", "deep"])
def test_a_strangers_file_that_cannot_be_read_is_named(tmp_path, broken):
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "adapter_config.json").write_text(broken)
    with pytest.raises(InputError, match=r"adapter_config\.json is not JSON"):
        read_lora_config(tmp_path)
    (tmp_path / "config.json").write_text(broken)
    for read in (load_base, load_tokenizer, read_config):
        with pytest.raises(InputError, match=r"no (model|tokenizer) c(an|ould) be"):
            read(str(tmp_path))
    (tmp_path / LINEAGE_FILE).write_text(broken)
    with pytest.raises(InputError, match=r"lorafocal\.json is not a lineage file"):
        lineage_of(tmp_path)


@pytest.mark.row("52")
def test_a_base_with_an_adapter_in_its_folder_is_refused(saved):
    """transformers loads both without a word, and the adapter is then taken for the base."""
    (saved / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    for read in (load_base, base_fingerprint):
        with pytest.raises(InputError, match=r"adapter_config\.json.*folder of their own"):
            read(str(saved))


def test_the_fingerprint_is_a_name_without_a_path_and_changes_with_one_byte(saved):
    before = base_fingerprint(str(saved))
    assert before["name"] == "tiny-base"
    assert before["revision"] is None
    assert base_fingerprint(f"{saved}/")["sha256"] == before["sha256"]
    weights = bytearray((saved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (saved / "model.safetensors").write_bytes(weights)
    assert base_fingerprint(str(saved))["sha256"] != before["sha256"]


def test_shards_are_part_of_the_fingerprint(saved, tmp_path):
    tiny_base().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 1
    load_base(str(tmp_path / "sharded"))
    assert base_fingerprint(str(tmp_path / "sharded")) != base_fingerprint(str(saved))
    shards[1].unlink()
    with pytest.raises(InputError, match=shards[1].name):
        base_fingerprint(str(tmp_path / "sharded"))


EVIL_SHARDS = [
    *("../evil.safetensors", "../../evil.safetensors", "sub/evil.safetensors", "./evil.safetensors", ".safetensors"),
    *("/evil.safetensors", "..\\evil.safetensors", "C:\\evil.safetensors", "~/evil.safetensors", ".evil.safetensors"),
    *("", ".", "..", "evil.bin", "evil.pt", "evil.safetensors.bin", "evil.safetensors\n", "evil\0.safetensors"),
    *("e vil.safetensors", "évil.safetensors", "$HOME.safetensors", "%2e%2e%2fevil.safetensors", None, 7, ["a"], {}),
]


@pytest.mark.row("S2", "S9", "S13")
@pytest.mark.parametrize("other", ["other.safetensors", "adapter_model.bin", "../elsewhere.safetensors.index.json"])
def test_a_config_that_names_its_weights_is_refused_before_anything_is_read(saved, monkeypatch, other):
    """transformers would load that file, and what is checked and hashed is model.safetensors."""
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"transformers_weights": other}))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("read"))
    for read in (load_base, base_fingerprint):
        with pytest.raises(InputError, match="take `transformers_weights` out of it"):
            read(str(saved))


@pytest.mark.row("51")
def test_of_a_hub_s_model_the_commit_is_known(saved, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "hub" / "models--owner--name"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    shutil.copytree(saved, place / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for revision in (None, commit):
        assert base_fingerprint("owner/name", revision=revision)["revision"] == commit
        assert place_of(load_base("owner/name", revision=revision, dtype="float32")) == ("owner/name", commit)
    assert "_commit_hash" not in load_base("owner/name", dtype="float32").config.to_dict()


@pytest.mark.row("S9", "S2")
def test_an_index_that_leads_elsewhere_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    tiny_base().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    save_file({"evil": torch.ones(2)}, tmp_path / "evil.safetensors")
    index = tmp_path / "base" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("read"))
    first = next(iter(content["weight_map"]))
    for evil in EVIL_SHARDS:
        content["weight_map"][first] = evil
        index.write_text(json.dumps(content))
        for read in (load_base, base_fingerprint):
            with pytest.raises(InputError, match=r"outside its folder|is no index"):
                read(str(tmp_path / "base"))
    for broken in ("{", "[]", "{}", '{"weight_map": 3}', "[" * 100_000):
        index.write_text(broken)
        with pytest.raises(InputError, match="is no index"):
            load_base(str(tmp_path / "base"))


@pytest.mark.row("46")
def test_a_tokenizer_larger_than_the_vocabulary_is_refused():
    class Long(list):
        pass

    check_vocabulary(tiny_base(), Long(range(97)))
    with pytest.raises(InputError, match=r"98 tokens.* Resize and train the base's embeddings before"):
        check_vocabulary(tiny_base(), Long(range(98)))


def longrope(limit):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [9.0] * 4, "rope_theta": 10000.0}
    lengths = {"original_max_position_embeddings": limit, "max_position_embeddings": 64}
    torch.manual_seed(0)
    return enlarged(Phi3ForCausalLM(Phi3Config(**SIZES, **lengths, rope_parameters=rope | lengths))).eval()


@pytest.mark.row("20")
def test_lengths_at_which_a_pair_would_move_its_neighbours_are_refused():
    """Phi-3's long rotations begin for a whole batch with its longest sequence."""
    model = longrope(16)
    choose_layout(longrope(64), "packed")
    prepare_policy(model)
    short, long = pairs(3, longest=5)[1], replace(pairs(3)[2], prompt_ids=[7] * 20)
    alone, beside = (sequence_logps(model, share_prefixes(batch)).rejected[0] for batch in ([short], [short, long]))
    assert (alone - beside).abs() > 1e-3
    check_length(model, 16)
    with pytest.raises(InputError, match=r"17 tokens.*beyond 16 the model's longrope"):
        check_length(model, 17)


def test_lengths_without_positions_are_refused():
    model = random_model("gpt2", torch.float32)
    check_length(model, 64)
    with pytest.raises(InputError, match=r"65 tokens.*positions for 64.*data\.max_length"):
        check_length(model, 65)
    check_length(tiny_base(max_position_embeddings=16), 17)  # plain rotations reach on


@pytest.mark.parametrize("name", ["./no/such", "/nowhere/base", "runs/wrong/adapter", "~/base"])
def test_a_place_that_is_none_is_said_without_asking_a_hub(name, monkeypatch):
    monkeypatch.setattr(load_module.AutoConfig, "from_pretrained", lambda *a, **k: pytest.fail("asked"))
    monkeypatch.setattr(load_module.AutoTokenizer, "from_pretrained", lambda *a, **k: pytest.fail("asked"))
    for load in (load_base, load_tokenizer):
        with pytest.raises(InputError, match="no such folder"):
            load(name)


@pytest.mark.row("46")
def test_no_tokenizer_is_taken_from_mistral_common(monkeypatch):
    """transformers takes it where that package is installed and a folder has a tekken.json; it has no template."""

    class MistralCommonBackend:
        pass

    asked: dict[str, object] = {}
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **options: asked.update(options))
    load_tokenizer("owner/model")
    assert asked.get("mistral_format") is (False if hasattr(tokenization_auto, "_use_mistral_format") else None)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **options: MistralCommonBackend())
    with pytest.raises(InputError, match=r"model\.name: .*mistral-common.*mistral_format=False"):
        load_tokenizer("owner/model")
    with pytest.raises(InputError, match=r"processing_class: .*mistral-common"):
        check_tokenizer(MistralCommonBackend(), "processing_class")
