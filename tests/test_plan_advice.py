"""What `lorafocal plan` advises: each line enough by itself, tried as what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorafocal.config import check_config, load_config
from lorafocal.memory import Lengths
from lorafocal.plan import plan
from tests.test_plan import FULL, LORA, config

pytestmark = pytest.mark.slow


@pytest.mark.row("37")
@pytest.mark.parametrize(
    ("gpus", "given"),
    [
        ("1x16GiB", {}),
        ("1x12GiB", {}),
        ("1xRTX4090", {"training.activation_checkpointing": "none"}),
        ("1xRTX4090", {"data.max_length": "8192", "packing.tokens": "20000"}),
    ],
)
def test_every_piece_of_advice_for_a_run_that_does_not_fit_is_enough(gpus, given):
    """Each line by itself, tried as the overrides or the card that it names."""
    check_advice(LORA, gpus, given)


@pytest.mark.parametrize(
    ("given", "never"),
    [
        ({"adapter.init": "pissa", "reference.kind": "frozen_copy"}, "quantization"),
        ({"adapter": "{start_from: STORED}", "reference.kind": "frozen_copy"}, "adapter.r"),
        ({"stages": "2"}, "zero3"),
        ({"reference": "{kind: moving, every: 64, mixing: 0.6}"}, "zero3"),
        ({"adapter.trainable_tokens": "['<x>']"}, "zero3"),
    ],
    ids=["rewritten base", "continued adapter", "stages", "moving", "tokens"],
)
def test_nothing_is_advised_that_would_be_refused(given, never, tmp_path):
    """Each change may train by itself, and not beside what this config says."""
    stored = {"r": 64, "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored), encoding="utf-8")
    given = {key: value.replace("STORED", str(tmp_path)) for key, value in given.items()}
    advice = [*check_advice(LORA, "1x16GiB", given), *check_advice(LORA, "2x16GiB", given)]
    assert not any(never in line for line in advice), advice


def test_no_length_is_advised_that_most_pairs_exceed():
    """The same means would be refused with it."""
    asked = config("data.max_length=8192", file=LORA)
    for mean, advised in ((1000, True), (8000, False)):
        found = plan(asked, "1xRTX4090", lengths=Lengths(100, mean - 100, 100))
        assert any("data.max_length" in line for line in found.advice) is advised


def check_advice(file: Path, gpus: str, given: dict[str, str]) -> list[str]:
    """What was advised, a line each, all of it tried."""
    found = plan(config(*(f"{key}={value}" for key, value in given.items()), file=file), gpus)
    assert not found.machines[0].fits
    assert found.advice
    for line in found.advice:
        words = line.removeprefix("together: ").partition(": ")[0].split()
        card = words[1] if words[0] == "--gpus" else gpus
        changed = dict(word.split("=") for word in words if "=" in word)
        overrides = (f"{key}={value}" for key, value in (given | changed).items())
        assert plan(config(*overrides, file=file), card).machines[0].fits, line
    return list(found.advice)


@pytest.mark.parametrize("gpus", ["1xH200", "1x20GiB"])
@pytest.mark.parametrize(("name", "advised"), [("dpo", True), ("tdpo1", False)])
def test_a_stored_reference_is_advised_where_its_log_probs_are_enough(name, advised, gpus):
    """Whole distributions cannot be stored: on a card that holds the run, and one that does not."""
    values = load_config(LORA.parents[1] / f"objectives/{name}.yaml").model_dump()
    values["model"] = config().model_dump()["model"]
    values["reference"] = {"kind": "separate_model", "model": "some/model", "identity_probe": None}
    found = plan(check_config(values), gpus)
    assert found.machines[0].fits is (gpus == "1xH200")
    assert any("reference.kind=cached" in line for line in found.advice) is advised


LIVE = {"reference.kind": "separate_model", "reference.model": "owner/base"}


@pytest.mark.row("37")
@pytest.mark.parametrize(
    ("gpus", "given", "said"),
    [
        ("8xA100-40", {"engine.kind": "zero1"}, ["engine.kind=zero3", "--gpus 8xH100"]),
        ("8xA100-40", {"engine.kind": "ddp"}, ["engine.kind=zero3"]),
        ("1xH100", {"engine": "null"}, ["--gpus 4xH100 engine.kind=zero3", "--gpus 1xB200"]),
        ("8xRTX4090", {}, ["engine.offload=optimizer", "engine.offload=all"]),
        ("4xL40S", {}, ["data.max_length=1216 data.max_prompt_length=", "--gpus 8xL40S: each"]),
        ("1xRTX3080", {"engine.offload": "all", **LIVE}, ["data.max_length=", "--gpus 1xRTX5080: the smallest card"]),
        ("1xRTX3080", {"engine.offload": "all"}, ["--gpus 1xRTX4080"]),  # a stored reference needs the model whole
    ],
)
def test_advice_for_full_parameters_is_enough(gpus, given, said):
    advice = check_advice(FULL, gpus, given)
    assert all(any(line.startswith(words) for line in advice) for words in said), advice
    assert not any("quantization" in line or "adapter" in line for line in advice)


def test_a_stored_reference_is_not_advised_to_stages() -> None:
    assert not any("cached" in line for line in plan(config("stages=3"), "1xRTX4090").advice)
    assert any("cached" in line for line in plan(config(), "1xRTX4090").advice)


def test_changes_that_are_not_enough_together_end():
    """Two ways to offload are each other's alternative; both were proposed for ever."""
    found = plan(config(file=FULL), "1xRTX3080")
    assert not found.machines[0].fits
