"""Scores: against plain transformers, live against reloaded, through files, and on merged models."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM, PreTrainedModel

from lorafocal.arguments import FocalPOConfig
from lorafocal.data.held_out import read_held_out, write_held_out
from lorafocal.data.packing import PairCollator
from lorafocal.data.tokens import TokenizedPair
from lorafocal.data.toy import toy_preferences
from lorafocal.errors import InputError
from lorafocal.evaluate.score import PairScore, ScoreReport, pair_logps, pair_scores, score_file
from lorafocal.generation.subject import Subject
from lorafocal.lineage import LINEAGE_FILE
from lorafocal.model.load import load_base, load_tokenizer
from lorafocal.model.quantized import dequantized_weight, quantization_of
from lorafocal.model.saved import cast_parameters, open_adapter, read_adapter
from lorafocal.objectives.inputs import PairLogps
from lorafocal.policy import prepare_policy, sequence_logps
from lorafocal.reference import DisabledAdapterReference
from lorafocal.release.merge import merge_adapter
from lorafocal.trainer import FocalPOTrainer
from tests.saved_run import BETA, SavedRun, edit_json, other_tokenizer, quantized_checkpoint, save_base, save_run


@pytest.fixture
def run(tmp_path: Path) -> SavedRun:
    return save_run(tmp_path, base_dtype=torch.float32, dtype="float32")


def plain_logps(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> float:
    """One sequence at a time, by the definition."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum().item()


def numbers(score: PairScore) -> dict[str, float]:
    return {name: value for name, value in score.as_dict().items() if name != "id"}


@pytest.mark.row("22")
def test_an_adapter_s_scores_are_plain_transformers_to_float32_rounding(run: SavedRun) -> None:
    report = score_file(run.adapter, run.folder / "held_out.jsonl")
    base = AutoModelForCausalLM.from_pretrained(run.base)
    policy = PeftModel.from_pretrained(base, run.adapter)
    assert [score.id for score in report.scores] == [pair.id for pair in run.pairs]
    for pair, score in zip(run.pairs, report.scores, strict=True):
        chosen, rejected = (plain_logps(policy, pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids))
        with policy.disable_adapter():
            base_chosen = plain_logps(policy, pair.prompt_ids, pair.chosen_ids)
            base_rejected = plain_logps(policy, pair.prompt_ids, pair.rejected_ids)
        assert score.chosen_logps == pytest.approx(chosen, rel=1e-5)
        assert score.rejected_logps == pytest.approx(rejected, rel=1e-5)
        assert score.reference_chosen_logps == pytest.approx(base_chosen, rel=1e-5)
        assert score.reference_rejected_logps == pytest.approx(base_rejected, rel=1e-5)
        assert score.chosen_reward == pytest.approx(BETA * (chosen - base_chosen), abs=1e-5)
        assert score.margin == pytest.approx(BETA * (chosen - base_chosen - rejected + base_rejected), abs=1e-5)
        assert (score.chosen_tokens, score.rejected_tokens) == (len(pair.chosen_ids), len(pair.rejected_ids))


@pytest.mark.row("22")
def test_live_model_and_reloaded_adapter_score_alike(run: SavedRun) -> None:
    policy = open_adapter(read_adapter(run.adapter), dtype="float32")
    prepare_policy(policy)
    scored = partial(pair_logps, pairs=run.pairs, device=policy.device)
    ours, reference = scored(partial(sequence_logps, policy)), scored(DisabledAdapterReference(policy).logps)
    live = pair_scores(run.pairs, ours, reference, BETA)
    for before, after in zip(live, score_file(run.adapter, run.folder / "held_out.jsonl").scores, strict=True):
        assert before.id == after.id
        assert numbers(before) == pytest.approx(numbers(after), rel=1e-5, abs=1e-5)


@pytest.mark.slow
@pytest.mark.row("22", "9")
@pytest.mark.parametrize(
    ("quantization", "variant"),
    [
        (None, {}),
        ("nf4", {}),
        ("fp4-double", {"use_rslora": True}),
        ("int8", {}),
        ("nf4", {"use_dora": True}),
        (None, {"modules_to_save": ["lm_head", "norm"]}),
        ("nf4", {"trainable_token_indices": [3, 5]}),
    ],
)
def test_the_last_evaluation_of_a_run_is_the_score_of_its_adapter(
    run: SavedRun, tmp_path: Path, quantization: str | None, variant: dict[str, Any]
) -> None:
    rows = toy_preferences(24, seed=3, held_out=True)
    trainer = FocalPOTrainer(
        model=load_base(str(run.base), dtype="float32", quantization=quantization, device=torch.device("cpu")),
        args=FocalPOConfig(
            output_dir=str(tmp_path / "trained"),
            beta=BETA,
            pairs_per_step=8,
            learning_rate=1e-2,
            max_steps=4,
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=rows,
        eval_dataset=rows[:10],
        processing_class=load_tokenizer(str(run.base)),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **variant),
    )
    trainer.train()
    evaluation = trainer.evaluate()
    trainer.save_model()
    write_held_out(tmp_path / "pairs.jsonl", trainer.data["eval_dataset"].pairs)
    scores = score_file(tmp_path / "trained" / "adapter", tmp_path / "pairs.jsonl", base=str(run.base)).as_dict()
    shared = {key: value for key, value in scores.items() if f"eval_{key}" in evaluation}
    assert {"rewards/margins", "rewards/accuracies", "rewards/ties", "logps/chosen"} <= shared.keys()
    assert shared == pytest.approx({key: evaluation[f"eval_{key}"] for key in shared}, abs=1e-5)
    assert abs(shared["rewards/margins"]) > 1e-3


@pytest.mark.row("22", "9")
def test_the_quantisation_of_training_is_found_in_the_run_the_lineage_or_the_checkpoint(tmp_path: Path) -> None:
    run = save_run(tmp_path, quantization="fp4")
    config = run.folder / "config.yaml"
    assert read_adapter(run.adapter).quantization == "fp4"
    edit_json(run.adapter / "lorafocal.json", quantization=None)
    assert read_adapter(run.adapter).quantization == "fp4"
    edit_json(run.adapter / "lorafocal.json", quantization="nf4")
    with pytest.raises(InputError, match=r"config\.yaml says that its base was fp4, lorafocal\.json says nf4"):
        read_adapter(run.adapter)
    edit_json(config, model={"name": str(run.base), "dtype": "bfloat16"})
    saved = read_adapter(run.adapter)
    assert saved.quantization == "nf4"
    assert quantization_of(open_adapter(saved, dtype="bfloat16")) == "nf4"
    (run.adapter / "lorafocal.json").unlink()
    assert read_adapter(run.adapter).quantization is None
    stored = quantized_checkpoint(run.base, tmp_path / "stored", "nf4-double")
    other_tool = read_adapter(run.adapter, base=str(stored))
    assert other_tool.quantization == "nf4-double"
    assert "quantised alike, is not known" in other_tool.notes[0]


@pytest.mark.row("9", "S13")
def test_a_base_that_is_stored_in_another_precision_is_refused(tmp_path: Path) -> None:
    run = save_run(tmp_path, quantization="nf4")
    stored = {word: quantized_checkpoint(run.base, tmp_path / word, word) for word in ("fp4", "nf4")}
    with pytest.raises(InputError, match=r"trained on a base quantised to nf4, but .*fp4 is stored as fp4.*--base"):
        score_file(run.adapter, run.folder / "held_out.jsonl", base=str(stored["fp4"]))
    with pytest.raises(InputError, match="sha256"):
        score_file(run.adapter, run.folder / "held_out.jsonl", base=str(stored["nf4"]))
    floats = save_run(tmp_path / "floats")
    with pytest.raises(InputError, match=r"trained on a float base, but .*nf4 is stored as nf4"):
        score_file(floats.adapter, run.folder / "held_out.jsonl", base=str(stored["nf4"]))


@pytest.mark.row("22")
def test_a_cast_leaves_quantised_weights_alone_and_computes_with_the_same(tmp_path: Path) -> None:
    for word in ("nf4-double", "int8"):
        base = load_base(str(save_base(tmp_path / word, dtype=torch.float32)), dtype="bfloat16", quantization=word)
        layer = base.model.layers[0].mlp.up_proj
        held, x = layer.weight.data.clone(), torch.randn(3, 32).to(base.device)
        cast_parameters(base, torch.float32)
        assert torch.equal(layer.weight.data, held)
        assert {p.dtype for p in base.parameters() if p.is_floating_point()} == {torch.float32}
        exact = x.double() @ dequantized_weight(layer).double().T
        torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-6)


def test_scoring_without_bitsandbytes_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path, quantization="nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"pip install 'lorafocal\[quant\]'"):
        score_file(run.adapter, run.folder / "held_out.jsonl")


@pytest.mark.row("22")
def test_a_checkpoint_that_is_quantised_already_is_scored_as_the_base_it_was_made_of(tmp_path: Path) -> None:
    run = save_run(tmp_path, quantization="nf4")
    stored = quantized_checkpoint(run.base, tmp_path / "stored", "nf4")
    reference = [
        score.reference_chosen_logps for score in score_file(run.adapter, run.folder / "held_out.jsonl").scores
    ]
    alone = [score.chosen_logps for score in score_file(stored, run.folder / "held_out.jsonl").scores]
    assert alone == pytest.approx(reference, rel=1e-5)


@pytest.mark.row("F12")
def test_a_model_that_packs_would_get_wrong_is_scored_in_rows(run: SavedRun, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(run.base))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = FalconForCausalLM(FalconConfig(vocab_size=len(tokenizer), **sizes, alibi=False)).eval()
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "falcon")
    report = score_file(tmp_path / "falcon", run.folder / "held_out.jsonl")
    for pair, score in zip(run.pairs, report.scores, strict=True):
        assert score.chosen_logps == pytest.approx(plain_logps(model, pair.prompt_ids, pair.chosen_ids), rel=1e-5)


def test_rows_and_token_ids_give_the_same_scores(run: SavedRun, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in toy_preferences(12, seed=3, held_out=True)))
    from_rows = score_file(run.adapter, rows).scores
    from_ids = score_file(run.adapter, run.folder / "held_out.jsonl").scores
    assert [score.margin for score in from_rows] == [score.margin for score in from_ids]


def test_rows_are_read_as_the_run_read_its_own_by_its_adapter_and_by_its_whole_model(
    run: SavedRun, tmp_path: Path
) -> None:
    """A `truncation` of the run's own gives other tokens than the default."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in toy_preferences(12, seed=3, held_out=True)))
    shutil.copytree(run.base, run.folder / "model")
    shutil.copy(run.adapter / "lorafocal.json", run.folder / "model")
    longest = max(pair.longest for pair in run.pairs)
    config = {"model": {"name": str(run.base)}, "data": {"max_length": longest - 1, "truncation": "keep_start"}}
    (run.folder / "config.yaml").write_text(json.dumps(config))
    adapter, whole, base = (score_file(one, rows) for one in (run.adapter, run.folder / "model", run.base))
    tokens = [[score.chosen_tokens for score in report.scores] for report in (adapter, whole, base)]
    assert tokens[0] == tokens[1]
    assert tokens[0] != tokens[2]


def test_the_pack_size_and_repeated_ids_change_nothing(run: SavedRun) -> None:
    policy = open_adapter(read_adapter(run.adapter), dtype="float32")
    prepare_policy(policy)
    twice = [TokenizedPair("same", p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in run.pairs]
    small, large = (
        pair_logps(
            partial(sequence_logps, policy), twice, device=policy.device, collator=PairCollator(tokens_per_pack=tokens)
        ).chosen.tolist()
        for tokens in (1, 100_000)
    )
    assert small == pytest.approx(large, rel=1e-5)
    assert len(set(large)) > 1


def test_a_merged_model_scores_like_its_adapter(run: SavedRun, tmp_path: Path) -> None:
    held_out = run.folder / "held_out.jsonl"
    merge_adapter(run.adapter, tmp_path / "out", dtype="float32")
    adapter = score_file(run.adapter, held_out)
    merged = score_file(tmp_path / "out", held_out, reference=str(run.base))
    assert merged.margins == pytest.approx(adapter.margins, abs=1e-5)
    alone = score_file(tmp_path / "out", held_out)
    assert alone.margins == []
    assert "rewards/margins" not in alone.as_dict()
    assert alone.scores[0].chosen_logps == merged.scores[0].chosen_logps
    assert alone.beta == BETA
    assert score_file(run.folder, held_out).scores == adapter.scores


@pytest.mark.row("7", "22")
def test_a_reference_that_reads_token_ids_otherwise_is_refused(run: SavedRun, tmp_path: Path) -> None:
    other = other_tokenizer(save_base(tmp_path / "other", dtype=torch.float32))
    with pytest.raises(InputError, match=r"other does not share the tokenizer: 2 tokens have another id there"):
        score_file(run.adapter, run.folder / "held_out.jsonl", reference=str(other))


def test_simpo_s_beta_scales_no_reward_against_a_reference(run: SavedRun) -> None:
    assert read_adapter(run.adapter).beta == BETA
    file = run.adapter / "lorafocal.json"
    made = json.loads(file.read_text()) | {"objective": {"name": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.5}}
    file.write_text(json.dumps(made))
    assert read_adapter(run.adapter).beta is None


def test_totals_table_and_file(run: SavedRun, tmp_path: Path) -> None:
    report = score_file(run.adapter, run.folder / "held_out.jsonl", out=tmp_path / "scores.jsonl")
    totals = report.as_dict()
    assert totals["pairs"] == len(run.pairs)
    assert totals["rewards/accuracies"] == sum(margin > 0 for margin in report.margins) / len(run.pairs)
    assert totals["rewards/margins"] == pytest.approx(totals["rewards/chosen"] - totals["rewards/rejected"])
    assert "rewards/accuracies" in report.table()
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [score.as_dict() for score in report.scores]
    assert str(tmp_path) not in json.dumps(totals)


def test_what_has_no_reference_or_no_beta_has_fewer_totals(run: SavedRun) -> None:
    policy = PairLogps(torch.tensor([-3.0, -9.0]), torch.tensor([-5.0, -4.0]))
    alone, compared, whole = (
        ScoreReport("model", beta, pair_scores(run.pairs[:2], policy, reference, beta)).as_dict()
        for reference, beta in ((None, BETA), (PairLogps(policy.rejected, policy.chosen), None), (policy, BETA))
    )
    assert {key for key in alone if "/" in key} == {"logps/chosen", "logps/rejected", "ranking/policy"}
    assert (compared["ranking/kept"], compared["ranking/mended"]) == (0.0, 1.0)
    assert compared["displacement/chosen"] == -1.5
    assert "rewards/margins" not in compared
    assert {"rewards/margins", "rewards/accuracies_where_right"} <= whole.keys()
    assert not [key for key in whole if key.startswith("focal/w")]  # nobody says what it was trained by


def test_a_tie_counts_as_wrong_and_apart(run: SavedRun) -> None:
    pairs = run.pairs[:2]
    same = PairLogps(torch.zeros(2), torch.zeros(2))
    totals = ScoreReport("model", BETA, pair_scores(pairs, same, same, BETA)).as_dict()
    assert (totals["rewards/ties"], totals["rewards/accuracies"]) == (1.0, 0.0)


def test_answers_come_back_in_the_order_of_the_pairs(run: SavedRun) -> None:
    def count_tokens(pack) -> PairLogps:  # type: ignore[no-untyped-def]
        return PairLogps(*pack.index.lengths.float().split(pack.num_pairs))

    found = pair_logps(count_tokens, run.pairs, device=torch.device("cpu"), collator=PairCollator(tokens_per_pack=40))
    assert found.chosen.tolist() == [len(pair.chosen_ids) for pair in run.pairs]
    assert found.rejected.tolist() == [len(pair.rejected_ids) for pair in run.pairs]


def test_held_out_pairs_read_back(run: SavedRun, tmp_path: Path) -> None:
    write_held_out(tmp_path / "pairs.jsonl", run.pairs)
    assert read_held_out(tmp_path / "pairs.jsonl") == run.pairs


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "not JSON"),
        pytest.param("[" * 100_000, "not JSON", id="deep"),
        ('{"id": 3, "prompt_ids": [1], "chosen_ids": [1], "rejected_ids": [2]}', "expected"),
        ('{"id": "a", "prompt_ids": [1], "chosen_ids": [], "rejected_ids": [2]}', "chosen_ids"),
        ('{"id": "a", "prompt_ids": [1], "chosen_ids": [1], "rejected_ids": [true]}', "rejected_ids"),
        ('{"id": "a", "prompt_ids": [1], "chosen_ids": [1]}', "rejected_ids"),
    ],
)
def test_a_broken_line_is_named(run: SavedRun, tmp_path: Path, line: str, named: str) -> None:
    path = tmp_path / "pairs.jsonl"
    write_held_out(path, run.pairs[:1])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match=rf"pairs\.jsonl:2.*{named}"):
        score_file(run.adapter, path)


def test_a_first_line_that_is_too_deep_is_one_of_rows(run: SavedRun, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"rows\.jsonl, row 1: .*nested too deeply"):
        score_file(run.adapter, path)


def test_a_damaged_lineage_is_refused_before_weights_are_loaded(run: SavedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where --beta says what is read of it otherwise: its objective decides what is measured."""
    (run.base / LINEAGE_FILE).write_text("{")
    monkeypatch.setattr(Subject, "load", lambda _: pytest.fail("weights are loaded"))
    for beta in (None, BETA):
        with pytest.raises(InputError, match=r"lorafocal\.json is not a lineage file"):
            score_file(run.base, run.folder / "held_out.jsonl", beta=beta)


def test_input_that_cannot_be_scored_is_refused(run: SavedRun, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl is no file"):
        score_file(run.adapter, tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="beta"):
        score_file(run.adapter, run.folder / "held_out.jsonl", beta=0.0)
    folder = make_run_folder(tmp_path)
    with pytest.raises(InputError, match="holds no adapter and no model"):
        score_file(folder, run.folder / "held_out.jsonl")
    with pytest.raises(InputError, match="missing"):
        score_file(run.adapter, run.folder / "held_out.jsonl", out=tmp_path / "missing" / "scores.jsonl")
    foreign = tmp_path / "foreign.jsonl"
    write_held_out(foreign, [TokenizedPair("far", [1], [2], [99_999])])
    with pytest.raises(InputError, match=r"far.*99999"):
        score_file(run.adapter, foreign)
    with pytest.raises(InputError, match="no_model"):
        score_file(tmp_path / "no_model", run.folder / "held_out.jsonl")


def make_run_folder(tmp_path: Path) -> Path:
    """A run that was given up before it saved an adapter."""
    (tmp_path / "a-run").mkdir()
    (tmp_path / "a-run" / "manifest.json").write_text("{}")
    return tmp_path / "a-run"
