"""`lorafocal train` from its config to the finished adapter, in one process."""

from __future__ import annotations

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorafocal import run
from lorafocal.config import check_config, load_config
from lorafocal.data.held_out import read_held_out
from lorafocal.data.packing import share_prefixes
from lorafocal.errors import InputError, UnhealthyRun
from lorafocal.evaluate.score import score_file
from lorafocal.model import load
from lorafocal.model.load import load_base
from lorafocal.objectives import build_objective
from lorafocal.policy import prepare_policy, sequence_logps
from lorafocal.publish import sha256
from lorafocal.reference import DisabledAdapterReference
from lorafocal.report.numbers import parts
from lorafocal.report.read import read_run
from lorafocal.run import RunSummary
from lorafocal.versions import installed
from tests.tiny import pairs, trainer
from tests.toy_run import HELD_OUT, PAIRS, STEPS, all_lines, metric_lines, run_config, write_inputs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def base_sha256(root: Path) -> str:
    return sha256(root / "base" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(root: Path, base_sha256: str) -> RunSummary:
    config = run_config(root, training__logging_steps=1, training__save_steps=4, training__save_total_limit=1)
    return run.train(config, quiet=True, runs_dir=root / "runs")


# --- what a run leaves --------------------------------------------------------------------------------------


@pytest.mark.row("52")
def test_the_run_folder_holds_exactly_these_files(finished: RunSummary) -> None:
    files = {path.relative_to(finished.folder).as_posix() for path in finished.folder.rglob("*") if path.is_file()}
    adapter = {"README.md", "adapter_config.json", "adapter_model.safetensors", "lorafocal.json", "chat_template.jinja"}
    state = {"complete.json", "optimizer.safetensors", "parameters.safetensors", "state.json", "trainer_state.json"}
    assert files == (
        {"config.yaml", "manifest.json", "metrics.jsonl", "held_out.jsonl"}
        | {f"adapter/{name}" for name in adapter}
        | {f"evaluations/step-{step}.jsonl" for step in (3, 6, 9)}
        | {f"checkpoint-{STEPS}/{name}" for name in state}
        | {f"checkpoint-{STEPS}/adapter/{name}" for name in adapter}
    )


def test_the_summary_says_what_was_done_and_how_good_it_is(finished: RunSummary) -> None:
    assert (finished.steps, finished.max_steps, finished.interrupted_by) == (STEPS, STEPS, None)
    last = metric_lines(finished.folder, key="eval_loss")[-1]
    assert finished.held_out["eval_loss"] == last["eval_loss"]
    assert f"{STEPS} steps done" in str(finished)
    assert f"held out: loss {last['eval_loss']:.4f}, rewards/accuracies" in str(finished)


def test_the_manifest_says_what_made_the_run(root: Path, finished: RunSummary, base_sha256: str) -> None:
    manifest = json.loads((finished.folder / "manifest.json").read_text())
    assert set(manifest) == {
        "format", "config", "config_sha256", "recipe", "base", "reference_model", "reference_adapters", "start_from",
        "chat_template_sha256", "vocabulary_sha256", "data", "seeds", "versions", "effective_batch", "threads",
        "processes", "hardware", "machine", "may_change_on_resume", "adapter", "loaded", "layout", "kernels",
        "settled", "engine",
    }  # fmt: skip
    assert manifest["base"]["name"] == "base"
    lineage = json.loads((finished.folder / "adapter" / "lorafocal.json").read_text())
    assert manifest["base"]["config_sha256"] == lineage["base_config_sha256"]
    assert manifest["layout"] == {"layout": "packed", "reason": ""}
    loaded = manifest["loaded"]
    assert (loaded["quantization"], loaded["dtype"], loaded["quantized_layers"]) == (None, "float32", 0)
    assert loaded["float_layers"] == len(manifest["adapter"]["trainable_tensors"]) / 2
    assert loaded["attention"] != "sdpa"  # that of packs
    assert manifest["data"]["train"]["pairs"] == PAIRS
    assert manifest["data"]["eval"]["pairs"] == HELD_OUT
    assert manifest["seeds"] == {"adapter": 42, "order": 42}
    assert manifest["effective_batch"] == {"pairs": 8, "pairs_per_process": 8}
    assert manifest["engine"] == {"kind": "one-process", "offload": "none"}
    assert manifest["recipe"] is None
    assert manifest["reference_adapters"] is None  # compared with the base itself
    assert manifest["versions"]["torch"] == installed("torch")
    policy = PeftModel.from_pretrained(load_base(str(root / "base"), dtype="float32"), finished.folder / "adapter")
    lora = {name: parameter for name, parameter in policy.named_parameters() if "lora_" in name}
    assert (manifest["adapter"]["kind"], manifest["adapter"]["rank"]) == (["lora"], policy.peft_config["default"].r)
    assert manifest["adapter"]["trainable_tensors"] == sorted(lora)
    assert manifest["adapter"]["trainable_parameters"] == sum(p.numel() for p in lora.values())
    resolved = load_config(finished.folder / "config.yaml")
    assert resolved.sha() == manifest["config_sha256"]
    assert manifest["config"] == yaml.safe_load((finished.folder / "config.yaml").read_text())


def test_metrics_are_one_line_a_logged_step_under_trls_names(finished: RunSummary) -> None:
    lines = metric_lines(finished.folder)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["pairs_seen"] for line in lines] == [8, 16, 21, 29, 37, 42, 50, 58, 63]
    keys = {
        "loss", "grad_norm", "learning_rate", "epoch", "step", "pairs_seen", "rewards/chosen", "rewards/rejected",
        "rewards/margins", "rewards/accuracies", "rewards/ties", "logps/chosen", "logps/rejected",
        "logps/reference_chosen", "logps/reference_rejected", "focal/chosen_fell_share", "focal/weight_mean",
        "focal/ratio_to_dpo", "focal/turned_share", "focal/effective_share", "ranking/policy", "ranking/reference",
        "ranking/lost", "ranking/won", "displacement/chosen", "displacement/rejected",
    }  # fmt: skip
    of_some = {  # of pairs that the reference ranks right, or wrong: left out where there are none
        "ranking/kept", "ranking/mended", "rewards/accuracies_where_right", "rewards/accuracies_where_wrong",
    }  # fmt: skip
    assert all(keys <= set(line) <= keys | of_some for line in lines)
    assert of_some <= set().union(*lines)  # and both answers are as long, so that no length goes along with a margin
    assert [line["step"] for line in metric_lines(finished.folder, key="eval_loss")] == [3, 6, 9]
    learned = [line["rewards/margins"] for line in lines]
    assert learned[-1] > learned[1] > 0.0 == learned[0]


def test_log_report_and_score_say_the_same_of_the_held_out_pairs(finished: RunSummary) -> None:
    last = metric_lines(finished.folder, key="eval_loss")[-1]
    logged = {key.removeprefix("eval_"): value for key, value in last.items() if key.startswith("eval_") and "/" in key}
    scored = score_file(finished.folder, finished.folder / "held_out.jsonl").as_dict()
    assert logged.keys() == {key for key in scored if "/" in key}
    assert {key: scored[key] for key in logged} == pytest.approx(logged, rel=1e-5, abs=1e-6)
    assert {"ranking/kept", "ranking/mended", "focal/effective_share", "displacement/chosen"} <= logged.keys()
    right, wrong = parts(read_run(finished.folder, "finished"))
    assert (right.finally_right, wrong.finally_right) == (logged["ranking/kept"], logged["ranking/mended"])
    assert right.accuracy == logged["rewards/accuracies_where_right"]
    assert wrong.accuracy == logged["rewards/accuracies_where_wrong"]


@pytest.mark.row("63")
def test_speed_and_memory_are_logged(finished: RunSummary) -> None:
    training = [line for line in all_lines(finished.folder) if "loss" in line]
    assert all(line["peak_gib"] > 0 for line in training)
    assert all(line["pairs_per_s"] > 0 for line in training[1:])  # the first has nothing to be counted from


@pytest.mark.row("2")
def test_the_first_logged_loss_is_that_of_identity(finished: RunSummary) -> None:
    first, second, *_ = metric_lines(finished.folder)
    assert first["loss"] == pytest.approx(0.669536, abs=1e-6)
    assert first["rewards/ties"] == 1.0
    assert abs(second["loss"] - 0.669536) > 1e-4


@pytest.mark.row("3")
def test_the_base_is_not_touched(root: Path, finished: RunSummary, base_sha256: str) -> None:
    assert sha256(root / "base" / "model.safetensors") == base_sha256
    base = AutoModelForCausalLM.from_pretrained(root / "base").state_dict()
    policy = PeftModel.from_pretrained(load_base(str(root / "base"), dtype="float32"), finished.folder / "adapter")
    for name, tensor in policy.unload().state_dict().items():
        assert torch.equal(tensor.cpu(), base[name]), name


@pytest.mark.row("22")
def test_the_adapter_reloads_to_the_rewards_of_the_last_evaluation(root: Path, finished: RunSummary) -> None:
    policy = PeftModel.from_pretrained(load_base(str(root / "base"), dtype="float32"), finished.folder / "adapter")
    prepare_policy(policy)
    pack = share_prefixes(read_held_out(finished.folder / "held_out.jsonl")).to(policy.device)
    with torch.no_grad():
        logps = sequence_logps(policy, pack)
        losses = build_objective("focalpo", beta=0.1, gamma=0.05)(logps, DisabledAdapterReference(policy).logps(pack))
    logged = metric_lines(finished.folder, key="eval_loss")[-1]
    assert float(losses.losses.mean()) == pytest.approx(logged["eval_loss"], rel=1e-5)
    assert float(losses.margins.mean()) == pytest.approx(logged["eval_rewards/margins"], rel=1e-5)
    assert float(logps.chosen.mean()) == pytest.approx(logged["eval_logps/chosen"], rel=1e-5)


@pytest.mark.row("51")
def test_no_path_of_this_machine_is_written_but_those_of_the_config(root: Path, finished: RunSummary) -> None:
    private = [str(root), tempfile.gettempdir(), str(Path.home()), str(Path.cwd())]
    manifest = json.loads((finished.folder / "manifest.json").read_text())
    del manifest["config"]  # states the paths that its author wrote
    texts = {"manifest.json": json.dumps(manifest)}
    for path in finished.folder.rglob("*"):
        if path.is_file() and path.name not in ("manifest.json", "config.yaml"):
            texts[path.name] = path.read_bytes().decode(errors="replace")
    assert len(texts) > 10
    assert [(name, found) for name, text in texts.items() for found in private if found in text] == []
    adapter = json.loads((finished.folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "base"


# --- what is refused ----------------------------------------------------------------------------------------


def test_a_taken_name_is_refused_and_nothing_changes(root: Path, finished: RunSummary) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")}
    with pytest.raises(InputError, match=r"already holds a run: go on with it by --resume, or give another `name`"):
        run.train(run_config(root), quiet=True, runs_dir=root / "runs")
    assert {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")} == before


@pytest.mark.parametrize("key", ["reference", "kernels"])
def test_what_is_refused_while_it_is_put_together_leaves_no_folder(root: Path, tmp_path: Path, key: str) -> None:
    values = (
        run_config(root).model_dump(mode="json")
        | {
            "reference": {"reference": {"kind": "cached", "store": str(tmp_path / "empty")}},
            "kernels": {"kernels": {"elementwise": "triton"}},
        }[key]
    )
    with pytest.raises(InputError, match=r"log-probs are missing|(needs a|computes on) CUDA|is not installed"):
        run.train(check_config(values), quiet=True, runs_dir=tmp_path / "runs")
    assert not list(tmp_path.iterdir())


def test_a_backend_loads_the_base_and_is_told_everything(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    class Backend:
        def load(self, name: str, **how: Any) -> tuple[Any, None]:
            asked.update(how, name=name)
            return load_base(name, dtype=how["dtype"]), None

    monkeypatch.setattr(run.backends, "named", {"unsloth": Backend()}.__getitem__)
    config = run_config(root, model__backend="unsloth", model__dtype="bfloat16", training__num_train_epochs=1)
    made = json.loads((run.train(config, quiet=True, runs_dir=tmp_path).folder / "manifest.json").read_text())
    assert made["versions"]["unsloth"] is None  # a stand-in has no version
    assert asked == {
        "name": config.model.name, "revision": None, "dtype": "bfloat16", "quantization": None, "shape": None,
        "max_length": config.data.max_length,
    }  # fmt: skip


def test_runs_that_are_no_folder_are_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(InputError, match=r"cannot be made, because .*runs is a file: give another `name`, or another"):
        run.train(run_config(root), quiet=True, runs_dir=tmp_path / "runs")


@pytest.mark.slow
def test_packs_of_a_resumed_run_are_those_it_began_with(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """auto is settled once; a stated number replaces it, and is said to reach the last bits."""
    changes = {"packing__tokens": None, "training__num_train_epochs": 1, "training__save_steps": 1}
    first = run.train(run_config(root, **changes), quiet=True, runs_dir=tmp_path)
    manifest = first.folder / "manifest.json"
    began = json.loads(manifest.read_text())
    assert began["settled"]["tokens_per_pack"] == 2048
    began["settled"]["tokens_per_pack"] = 777  # as on another device
    manifest.write_text(json.dumps(began))
    run.train(run_config(root, **changes), resume=True, runs_dir=tmp_path)
    assert json.loads(manifest.read_text())["settled"]["tokens_per_pack"] == 777
    said = capsys.readouterr().err
    assert "last bits" not in said
    assert "packs: 777 token rows, or one longer pair (as the run began)" in said
    run.train(run_config(root, **changes | {"packing__tokens": 60}), resume=True, runs_dir=tmp_path)
    assert json.loads(manifest.read_text())["settled"]["tokens_per_pack"] == 60
    said = capsys.readouterr().err
    assert "note: packing.tokens: 'auto' -> 60 (allowed: " in said
    assert "packs: 60 token rows, or one longer pair (as stated)" in said


def test_there_must_be_a_run_to_resume(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run to resume; start it without --resume"):
        run.train(run_config(root), resume=True, quiet=True, runs_dir=tmp_path / "runs")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__train": "nowhere.jsonl"}, r"nowhere\.jsonl"),
        ({"data__eval": "nowhere.jsonl"}, r"nowhere\.jsonl"),
        ({"data__train": "{tmp}/broken.jsonl", "data__on_bad_row": "error"}, r"broken\.jsonl.*2"),
        ({"data__max_length": 2}, "max_length"),
        ({"model__name": "{tmp}/no-model"}, "no-model"),
        ({"model__shape": {"model_type": "llama", "hidden_size": 64}}, "hidden_size is 32, the config file states 64"),
        ({"adapter__targets": ["q_prj"]}, "nearest: q_proj"),
    ],
    ids=["train", "eval", "row", "nothing left", "model", "shape", "targets"],
)
def test_wrong_input_is_answered_before_anything_is_written(
    root: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    row = {"prompt": "sort 2 1", "chosen": "1 2", "rejected": "2 1"}
    (tmp_path / "broken.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row | {'chosen': 7})}\n")
    changes = {key: value.format(tmp=tmp_path) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(InputError, match=message):
        run.train(run_config(root, **changes), quiet=True, runs_dir=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.row("2")
def test_a_rate_that_moves_nothing_stops_the_run(root: Path, tmp_path: Path) -> None:
    config = run_config(root, training__learning_rate=1e-60, training__num_train_epochs=1)
    with pytest.raises(UnhealthyRun, match="no trained weight moved at step 1"):
        run.train(config, quiet=True, runs_dir=tmp_path)
    assert not (tmp_path / "toy" / "adapter").exists()


# --- evaluation and seeds -----------------------------------------------------------------------------------


def test_without_held_out_pairs_there_is_no_evaluation(root: Path, tmp_path: Path) -> None:
    config = run_config(root, data__eval=None, training__num_train_epochs=1)
    summary = run.train(config, quiet=True, runs_dir=tmp_path)
    assert summary.held_out == {}
    assert not (summary.folder / "held_out.jsonl").exists()
    assert "held out" not in str(summary)


def test_the_finished_adapter_is_evaluated_even_where_the_last_step_was_not(root: Path, tmp_path: Path) -> None:
    steps = {"training__num_train_epochs": 1, "training__eval_strategy": "steps", "training__eval_steps": 2}
    config = run_config(root, **steps)
    summary = run.train(config, quiet=True, runs_dir=tmp_path)
    lines = metric_lines(summary.folder, key="eval_loss")
    assert [line["step"] for line in lines] == [2, 3]
    assert summary.held_out["eval_loss"] == lines[-1]["eval_loss"]
    assert f"{lines[-1]['eval_rewards/margins']:.4f}"[:5] in (summary.folder / "adapter" / "README.md").read_text()


def initial_and_first_step(folder: Path, **seeds: int) -> tuple[list[torch.Tensor], tuple[str, ...]]:
    """The adapter before training, and the pairs of the first step."""
    made = trainer(folder, pairs(20), **seeds)
    first = next(iter(made.get_train_dataloader()))
    return [p.detach().clone() for p in made.trained.values()], tuple(i for pack in first.packs for i in pack.pair_ids)


@pytest.mark.row("57")
def test_seed_decides_the_adapter_and_data_seed_the_order(tmp_path: Path) -> None:
    adapter, order = initial_and_first_step(tmp_path, seed=1, data_seed=1)
    same, other_order = initial_and_first_step(tmp_path, seed=1, data_seed=2)
    assert all(map(torch.equal, adapter, same))
    assert set(other_order) != set(order)
    other, same_order = initial_and_first_step(tmp_path, seed=2, data_seed=1)
    assert not any(torch.equal(a, b) for a, b in zip(adapter, other, strict=True) if a.any())
    assert same_order == order


@pytest.mark.row("57")
def test_a_run_of_the_same_config_gives_the_same_adapter(root: Path, finished: RunSummary, tmp_path: Path) -> None:
    """Whatever happened in the process before, and in whatever thread: a web page's and Ray's are not the main one."""
    torch.manual_seed(123)
    with ThreadPoolExecutor(1) as thread:
        config = run_config(root, training__logging_steps=1)
        again = thread.submit(run.train, config, quiet=True, runs_dir=tmp_path).result()
    name = "adapter/adapter_model.safetensors"
    assert sha256(again.folder / name) == sha256(finished.folder / name)


@pytest.mark.slow
@pytest.mark.row("55")
def test_a_run_that_max_steps_ended_inside_an_epoch_is_not_trained_further(root: Path, tmp_path: Path) -> None:
    config = run_config(
        root, training__num_train_epochs=None, training__max_steps=4, training__lr_scheduler_type="constant"
    )
    first = run.train(config, quiet=True, runs_dir=tmp_path)
    adapter, lines = sha256(first.folder / "adapter" / "adapter_model.safetensors"), metric_lines(first.folder)
    for _ in range(2):
        again = run.train(config, resume=True, quiet=True, runs_dir=tmp_path)
        assert (again.steps, again.held_out["eval_loss"]) == (4, first.held_out["eval_loss"])
        assert sha256(again.folder / "adapter" / "adapter_model.safetensors") == adapter
        assert metric_lines(first.folder) == lines


@pytest.mark.parametrize("kind", ["disabled_adapter", "cached"])
def test_a_run_on_the_cpu_loads_nothing_on_an_accelerator(root, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(load, "local_device", lambda: torch.device("cuda", 0))
    if kind == "cached":
        config = run_config(root, reference__kind=kind, reference__store=str(tmp_path / "store"))
        run.cache_reference(config, quiet=True)
    else:
        config = run_config(root, training__num_train_epochs=None, training__max_steps=1)
        run.train(config, quiet=True, runs_dir=tmp_path)


def test_a_file_in_place_of_its_config_is_refused():
    with pytest.raises(InputError, match=r"config is of the type str: give `lorafocal\.load_config"):
        run.train("run.yaml")
