"""What an evaluation writes: every held-out pair once, in order, with the very numbers of a pass of its own."""

from __future__ import annotations

import gc
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from lorafocal.data.packing import share_prefixes
from lorafocal.evaluations import EvaluatedPair, evaluation_files, read_evaluation
from lorafocal.metrics import PairMetrics, PairTable, pair_values, sum_keys
from lorafocal.objectives import PairLogps, build_objective
from lorafocal.policy import sequence_logps
from lorafocal.reference import DisabledAdapterReference
from tests.tiny import pairs, tiny_policy, trainer


def repeated_ids(count: int):
    """Held-out pairs of which two have one id, as a user's file may have them."""
    held_out = pairs(count, seed=5)
    return [*held_out[:-1], replace(held_out[-1], id=held_out[2].id)]


@pytest.mark.row("22")
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_table_has_each_pair_once_in_order_with_its_log_probs(tmp_path, layout):
    held_out = repeated_ids(11)
    run = trainer(
        tmp_path, pairs(4), held_out, model=tiny_policy(), identity_probe=False, pairs_per_step=3, layout=layout
    )
    logged = run.evaluate()
    rows = read_evaluation(tmp_path / "evaluations" / "step-0.jsonl")
    assert [row.id for row in rows] == [pair.id for pair in held_out]
    if layout == "packed":
        pack = share_prefixes(held_out)
        with torch.no_grad():
            logps = (*sequence_logps(run.model, pack), *DisabledAdapterReference(run.model).logps(pack))
        for name, expected in zip(EvaluatedPair.__slots__[1:], logps, strict=True):
            written = torch.tensor([getattr(row, name) for row in rows])
            torch.testing.assert_close(written, expected, rtol=1e-6, atol=1e-5)
    for side in ("chosen", "rejected"):
        for model, key in (("policy", f"logps/{side}"), ("reference", f"logps/reference_{side}")):
            mean = sum(getattr(row, f"{model}_{side}") for row in rows) / len(rows)
            assert logged[f"eval_{key}"] == pytest.approx(mean, rel=1e-12)
    fell = sum(row.policy_chosen < row.reference_chosen for row in rows) / len(rows)
    assert logged["eval_focal/chosen_fell_share"] == fell


def test_a_run_writes_one_table_an_evaluation_and_another_data_set_writes_none(tmp_path):
    run = trainer(tmp_path, pairs(8), pairs(5, seed=3), eval_strategy="steps", eval_steps=2, max_steps=4)
    run.evaluate(pairs(3, seed=9))
    assert evaluation_files(tmp_path) == {}
    run.train()
    assert list(evaluation_files(tmp_path)) == [2, 4]


def test_pairs_of_the_training_are_evaluated_under_a_name_of_theirs(tmp_path):
    run = trainer(tmp_path, pairs(8), pairs(5, seed=3), max_steps=1)
    assert run.evaluate(metric_key_prefix="train")["train_loss"] == run.evaluate()["eval_loss"]
    run.train()
    assert not any(
        {"train_loss", "total_flos", "train_samples_per_second"} & line.keys() for line in run.state.log_history[2:]
    )


@pytest.mark.slow
@pytest.mark.row("55")
def test_resuming_drops_the_tables_of_weights_that_are_gone(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    data, held_out = pairs(8), pairs(5, seed=3)
    whole = trainer(tmp_path, data, held_out, **settings)
    whole.train()
    before = {step: read_evaluation(path) for step, path in evaluation_files(tmp_path).items()}
    assert list(before) == [1, 2, 3]
    resumed = trainer(tmp_path, data, held_out, **(settings | {"eval_steps": 3}))
    resumed.train(resume_from_checkpoint=True)
    assert {step: read_evaluation(path) for step, path in evaluation_files(tmp_path).items()} == before
    trainer(tmp_path, data, held_out, max_steps=1).train()
    assert evaluation_files(tmp_path) == {}


@pytest.mark.slow
@pytest.mark.row("38")
def test_evaluation_keeps_scalars_only(tmp_path, monkeypatch):
    """Tensors alive at a pack do not grow with the packs before it, but for the table of 40 bytes a pair."""
    held_out = pairs(16, seed=3)
    run = trainer(tmp_path, pairs(4), held_out, tokens_per_pack=1, pairs_per_step=1)
    counts, elements = [], []
    add = PairTable.add

    def counted(self, *args) -> None:
        add(self, *args)
        gc.collect()
        alive = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        counts.append(len(alive))
        elements.append(sum(t.numel() for t in alive))

    monkeypatch.setattr(PairTable, "add", counted)
    run.evaluate()
    assert len(counts) == 16
    assert max(counts[5:]) - min(counts[5:]) <= 8
    assert max(elements[5:]) - min(elements[5:]) <= 16 * 97  # less than one row of logits a pair


OBJECTIVE = build_objective("focalpo", beta=0.3, gamma=0.05)
RAGGED = ((0, 2, 3), (1,))  # places of the pairs that each of two ranks has


def made_up() -> tuple[PairLogps, PairLogps]:
    values = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) * 10
    return PairLogps(values[0], values[1]), PairLogps(values[2], values[3])


def share_of(places: list[int]) -> tuple[dict[str, float], list[EvaluatedPair]]:
    """Means and table after adding these pairs; over all ranks where there are several."""
    metrics, table = PairMetrics(sum_keys(OBJECTIVE)), PairTable(4, torch.device("cpu"))
    for place in places:
        policy, reference = (PairLogps(*(t[[place]] for t in logps)) for logps in made_up())
        lengths = torch.tensor([3 + 2 * place, 5])
        metrics.add(pair_values(OBJECTIVE, OBJECTIVE(policy, reference), policy, reference, lengths))
        table.add([place], policy, reference)
    return metrics.means(torch.device("cpu")), table.rows("abcd")


def rank_share(rank: int, folder, results) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results.put((rank, dist.get_world_size(), *share_of(RAGGED[rank])))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.engine
@pytest.mark.row("16")
def test_two_uneven_ranks_log_the_means_and_the_table_of_all_pairs(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    ranks = [context.Process(target=rank_share, args=(rank, tmp_path, results)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    answers = [results.get() for _ in ranks]
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    means, rows = share_of([0, 1, 2, 3])
    of_some = ("ranking/kept", "ranking/mended", "rewards/accuracies_where_wrong", "rewards/length_correlation")
    assert {*of_some, "focal/effective_share"} <= means.keys()
    for _, world, their_means, their_rows in answers:
        assert world == 2
        assert their_means == pytest.approx(means, rel=1e-12)
        assert their_means["rewards/accuracies"] == means["rewards/accuracies"]
        assert their_rows == rows
