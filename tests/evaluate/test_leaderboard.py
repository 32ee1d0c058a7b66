"""The harness on a model with its adapter attached: against the merged model and plain transformers; refusals."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorafocal.data.toy import toy_prompts, toy_tokenizer
from lorafocal.errors import InputError
from lorafocal.evaluate import leaderboard
from lorafocal.evaluate.harness import Measured, TaskRun, fetch_data, find_tasks
from lorafocal.evaluate.leaderboard import LEADERBOARD, evaluate_leaderboard
from lorafocal.evaluate.result import Result, read_result
from lorafocal.model.saved import open_adapter, read_adapter
from lorafocal.release.merge import merge_adapter
from tests.saved_run import SavedRun, save_run

ANSWER_TOKENS = 12  # more than the 7 that the base's own generation config allows
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {docs}, train: {docs}}}}}
test_split: test
fewshot_split: train
doc_to_text: "{{{{question}}}}"
{more}
metadata: {{version: 2.0}}
"""
CHOICE = """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
num_fewshot: 1
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""
CONTINUED = """output_type: loglikelihood
doc_to_target: " {{choices[0]}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]"""
WRITTEN = """output_type: generate_until
doc_to_target: "{{written}}"
generation_kwargs: {until: ["<never>"], do_sample: false, max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""
GROUP = """
group: both
task: [chosen, continued]
aggregate_metric_list: [{metric: acc, filter_list: [none]}]
metadata: {version: 1.0}
"""


def quiet(text: str) -> None:
    """Where progress goes."""


def questions() -> list[dict[str, Any]]:
    found = []
    for number, prompt in enumerate(toy_prompts(16, seed=4, held_out=True)):
        digits = prompt[-1]["content"].split()[1:]
        found.append({"question": prompt[-1]["content"], "choices": [digits[0], digits[-1], "9 9"], "gold": number % 3})
    return found


def greedy(model: PreTrainedModel, text: str) -> str:
    """One answer, by plain transformers."""
    tokenizer = toy_tokenizer()
    inputs = tokenizer(text, return_tensors="pt")
    length = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    output = model.generate(**inputs, **length)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(output, skip_special_tokens=True)


def perplexity(model: torch.nn.Module, docs: Sequence[dict[str, Any]]) -> float:
    """By the definition, one text at a time."""
    tokenizer, sums = toy_tokenizer(), []
    for doc in docs:
        asked = tokenizer(doc["question"])["input_ids"]
        whole = tokenizer(f"{doc['question']} {doc['choices'][0]}")["input_ids"]
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([whole])).logits[0, :-1].double().log_softmax(-1)
        answer = torch.tensor(whole[len(asked) :])
        sums.append(float(logps[len(asked) - 1 :].gather(-1, answer[:, None]).sum()))
    return math.exp(-sum(sums) / len(sums))


@pytest.fixture(scope="module", autouse=True)
def without_a_look_at_the_machine() -> Iterator[None]:
    """The harness describes the machine after each task, which takes seconds and goes into no result of ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        patch.setattr("lm_eval.evaluator.get_git_commit_hash", lambda: None)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return save_run(tmp_path_factory.mktemp("leaderboard"), std=0.2, base_dtype=torch.float32, dtype="float32")


@pytest.fixture(scope="module")
def merged(run: SavedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "merged"
    merge_adapter(run.adapter, out, dtype="float32")
    return out


@pytest.fixture(scope="module")
def tasks(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks and a group; the right text of `written` is what the merged model writes by plain transformers."""
    folder = tmp_path_factory.mktemp("tasks")
    model = AutoModelForCausalLM.from_pretrained(merged)
    docs = [doc | {"written": greedy(model, doc["question"])} for doc in questions()]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, more in {"chosen": CHOICE, "continued": CONTINUED, "written": WRITTEN}.items():
        text = TASK.format(name=name, docs=folder / "docs.jsonl", more=more)
        (folder / f"{name}.yaml").write_text(text)
    (folder / "both.yaml").write_text(GROUP)
    return folder


def evaluate(target: Path, tasks: Path, names: Sequence[str] = ("chosen", "continued"), **more: Any) -> Result:
    return evaluate_leaderboard(target, tasks=names, task_folder=tasks, say=quiet, **more)


@pytest.fixture(scope="module")
def attached(run: SavedRun, tasks: Path) -> Result:
    return evaluate(run.folder, tasks, ["chosen", "continued", "written"])


def test_an_attached_adapter_scores_as_the_merged_model_and_as_plain_transformers(
    run: SavedRun, merged: Path, tasks: Path, attached: Result
) -> None:
    whole, base = evaluate(merged, tasks), evaluate(run.base, tasks)
    ours, theirs = attached.scores["continued/perplexity"].value, whole.scores["continued/perplexity"].value
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert attached.scores["chosen/acc"] == whole.scores["chosen/acc"]
    assert abs(base.scores["continued/perplexity"].value / ours - 1) > 0.01, "the adapter matters"
    docs = [json.loads(line) for line in (tasks / "docs.jsonl").read_text().splitlines()]
    live = open_adapter(read_adapter(run.adapter), dtype="float32")
    assert ours == pytest.approx(perplexity(live, docs), rel=1e-4)


@pytest.mark.row("58")
def test_answers_are_as_long_as_the_task_says_whatever_the_model_s_own_config_says(
    run: SavedRun, attached: Result
) -> None:
    """The base's generation config stops after 7 tokens, which would cut every answer."""
    config = json.loads((run.base / "generation_config.json").read_text())
    assert config["max_new_tokens"] < ANSWER_TOKENS
    assert attached.scores["written/exact_match"].value == 100


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_head_stays_the_trained_one(tmp_path: Path, tasks: Path, tied: bool) -> None:
    """The harness ties weights anew when it takes a model."""
    run = save_run(tmp_path, tied=tied, base_dtype=torch.float32, dtype="float32", modules_to_save=["lm_head"])
    result = evaluate(run.folder, tasks, ["continued"])
    docs = [json.loads(line) for line in (tasks / "docs.jsonl").read_text().splitlines()]
    live = open_adapter(read_adapter(run.adapter), dtype="float32")
    assert result.scores["continued/perplexity"].value == pytest.approx(perplexity(live, docs), rel=1e-4)


def test_a_result_says_what_ran_and_names_no_place(run: SavedRun, attached: Result, tmp_path: Path) -> None:
    chosen = attached.settings["tasks"]["chosen/acc"]
    assert {key: chosen[key] for key in ("few_shot", "version", "documents", "of")} == {
        "few_shot": 1,
        "version": "2.0",
        "documents": 16,
        "of": 16,
    }
    assert attached.scores["chosen/acc"].standard_error > 0
    assert attached.settings["chat_template"] is False
    assert {"lm-eval", "transformers", "torch"} <= attached.versions.keys()
    assert attached.target["kind"] == "adapter"
    assert {"docs.jsonl", "chosen.yaml"} <= attached.inputs.keys()
    assert not any("leaderboard of 2023" in note for note in attached.notes), "no leaderboard task ran"
    attached.write(tmp_path / "result.json")
    assert str(run.folder.parent) not in (tmp_path / "result.json").read_text()
    assert read_result(tmp_path / "result.json").scores == attached.scores


def test_a_group_has_a_number_of_its_own_and_a_limit_is_told(run: SavedRun, tasks: Path) -> None:
    result = evaluate(run.folder, tasks, ["both"], limit=5)
    assert [*result.scores] == ["both/acc"]
    assert result.counts["documents/both/acc"] == 10
    assert any("only the first 5 documents" in note for note in result.notes)


def test_contexts_that_do_not_fit_are_counted(run: SavedRun, tasks: Path, tmp_path: Path) -> None:
    long = [doc | {"question": " ".join([doc["question"]] * 12)} for doc in questions()[:4]]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in long))
    text = TASK.format(name="long", docs=tmp_path / "docs.jsonl", more=CONTINUED)
    (tmp_path / "long.yaml").write_text(text)
    result = evaluate(run.folder, tmp_path, ["long"])
    assert result.counts["cut_contexts"] > 0
    assert any("did not fit into the model" in note for note in result.notes)


def test_a_killed_evaluation_goes_on_with_the_tasks_that_are_left(
    run: SavedRun, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attached: Result
) -> None:
    names, started, original = ["chosen", "continued", "written"], [], leaderboard.run_task

    def killed(wrapped: Any, manager: Any, task: str, **how: Any) -> TaskRun:
        started.append(task)
        if started == ["chosen", "continued"]:
            raise KeyboardInterrupt
        return original(wrapped, manager, task, **how)

    monkeypatch.setattr(leaderboard, "run_task", killed)
    journal = tmp_path / "journal.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate(run.folder, tasks, names, journal=journal)
    assert evaluate(run.folder, tasks, names, journal=journal) == attached
    assert started == ["chosen", "continued", "continued", "written"]
    evaluate(run.folder, tasks, ["chosen"], journal=journal, limit=3)
    evaluate(run.base, tasks, ["chosen"], journal=journal)
    assert started[4:] == ["chosen", "chosen"], "another setting or model finds nothing"
    journal.write_text("[]")
    with pytest.raises(InputError, match="is not a leaderboard's journal"):
        evaluate(run.folder, tasks, ["chosen"], journal=journal)


# ---- the leaderboard's own numbers, of made-up runs


def made_up(task: str) -> TaskRun:
    rows = {
        "arc_challenge": [("arc_challenge", "acc", "none", 0.1), ("arc_challenge", "acc_norm", "none", 0.6)],
        "hellaswag": [("hellaswag", "acc_norm", "none", 0.8)],
        "truthfulqa_mc2": [("truthfulqa_mc2", "acc", "none", 0.5)],
        "winogrande": [("winogrande", "acc", "none", 0.7)],
        "gsm8k": [("gsm8k", "exact_match", "strict-match", 0.3), ("gsm8k", "exact_match", "flexible-extract", 0.4)],
        "mmlu": [("mmlu", "acc", "none", 0.65), ("mmlu_a", "acc", "none", 0.8), ("mmlu_b", "acc", "none", 0.4)],
    }[task]
    return TaskRun(
        tuple(
            Measured(name, metric, answers, value, 0.01, 5, "1.0", 100, 100, group=name == "mmlu")
            for name, metric, answers, value in rows
        ),
        0,
    )


@pytest.fixture
def without_a_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaderboard, "find_tasks", lambda names, *rest: dict.fromkeys(names))
    monkeypatch.setattr(leaderboard, "fetch_data", lambda *a: None)
    monkeypatch.setattr(leaderboard, "language_model", lambda *a: None)
    monkeypatch.setattr(leaderboard, "run_task", lambda wrapped, manager, task, **how: made_up(task))


def test_the_average_is_of_all_six_by_the_leaderboards_metrics(run: SavedRun, without_a_harness: None) -> None:
    result = evaluate_leaderboard(run.folder, say=quiet)
    values = {name: score.value for name, score in result.scores.items()}
    assert values == pytest.approx(
        {
            "arc_challenge": 60,
            "hellaswag": 80,
            "mmlu": 65,
            "truthfulqa_mc2": 50,
            "winogrande": 70,
            "gsm8k": 30,
            "average": 355 / 6,
        }
    )
    assert result.scores["average"].standard_error == pytest.approx(math.sqrt(6) / 6)
    notes = " ".join(result.notes)
    assert "the leaderboard averaged the subjects, which gives 60.00" in notes
    assert "(flexible-extract) gives 40.00" in notes
    assert "commit b281b09" in notes


def test_there_is_no_average_of_five(run: SavedRun, without_a_harness: None) -> None:
    result = evaluate_leaderboard(run.folder, tasks=[name for name in LEADERBOARD if name != "gsm8k"], say=quiet)
    assert "average" not in result.scores
    assert any("no average, which is of six tasks: gsm8k did not run" in note for note in result.notes)


# ---- refusals


def test_a_folder_cannot_stand_in_for_a_task_of_the_leaderboard(run: SavedRun, tmp_path: Path) -> None:
    text = TASK.format(name="gsm8k", docs=tmp_path / "docs.jsonl", more=CONTINUED)
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match="defines gsm8k, a name of the leaderboard"):
        evaluate(run.folder, tmp_path, ["gsm8k"])


def test_what_cannot_run_is_refused_in_a_sentence(
    run: SavedRun, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="at least one task"):
        evaluate(run.folder, tasks, [])
    with pytest.raises(InputError, match="is no folder"):
        evaluate(run.folder, tmp_path / "absent")
    text = TASK.format(name="lost", docs=tmp_path / "absent.jsonl", more=CONTINUED)
    (tmp_path / "lost.yaml").write_text(text)
    with pytest.raises(InputError, match="the task lost cannot be made ready"):
        evaluate(run.folder, tmp_path, ["lost"])
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"need lm-eval, .* pip install 'lorafocal\[eval\]'"):
        evaluate(run.folder, tasks)


@pytest.mark.slow
@pytest.mark.newest
def test_the_six_are_in_the_installed_harness_and_need_their_data(
    run: SavedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import tasks

    held = ("arc", "gsm8k", "hellaswag", "mmlu/default", "truthfulqa", "winogrande")
    folders = [str(Path(tasks.__file__).parent / name) for name in held]
    of_these = partial(tasks.TaskManager, include_path=folders, include_defaults=False)  # all 14,000 take a while
    monkeypatch.setattr(tasks, "TaskManager", of_these)
    managers = find_tasks([*LEADERBOARD], None, ())
    index = managers["gsm8k"].task_index
    for name, headline in LEADERBOARD.items():
        config = index[name].cfg
        metrics = config.get("metric_list") or config["aggregate_metric_list"]
        assert headline.metric in {entry["metric"] for entry in metrics}
    assert {entry["name"] for entry in index["gsm8k"].cfg["filter_list"]} >= {"strict-match", "flexible-extract"}
    with pytest.raises(InputError, match=r"arc_challenge cannot be made ready .*OfflineModeIsEnabled.*HF_HOME"):
        fetch_data(managers, quiet)
    with pytest.raises(InputError, match="there is no task 'helaswag'; did you mean hellaswag"):
        evaluate_leaderboard(run.folder, tasks=["helaswag"], say=quiet)
