"""Out of a GPU's memory inside a step: it is done again in smaller packs, and nothing of the first attempt is left."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafocal import comparison, reference
from lorafocal.budget import Retry
from lorafocal.data.packing import PairCollator
from lorafocal.errors import InputError
from lorafocal.model.stand_ins import StandIn
from lorafocal.trainer import FocalPOTrainer
from tests import tiny
from tests.engine import launches, out_of_memory_run
from tests.tiny import pairs, relative_difference, tiny_policy

pytestmark = pytest.mark.slow

DATA = pairs(14)
TOKENS = 60
PACKS = 5
TIMED = {
    "train_runtime",
    "train_steps_per_second",
    "eval_runtime",
    "eval_samples_per_second",
    "pairs_per_s",
    "peak_gib",
}


def made(folder, **settings: Any) -> FocalPOTrainer:
    settings = {
        "model": tiny_policy(dtype=torch.float64),
        "identity_probe": False,
        "tokens_per_pack": TOKENS,
    } | settings
    made = tiny.trainer(folder, DATA, pairs(9, seed=4), **settings)
    made.create_optimizer_and_scheduler(4)
    return made


def step_of(run: FocalPOTrainer) -> tuple[dict[str, Tensor], dict[str, float], float]:
    """Gradients, logged means and loss of one step."""
    loss = run.training_step(run.model, run.get_train_dataloader().collate_fn(run.train_dataset))
    gradients = {name: p.grad.clone() for name, p in run.trained.items() if p.grad is not None}
    return gradients, run.metrics.means(run.args.device), float(loss)


class RunsOut:
    """Raises what CUDA raises at call number `at` (from 0) of what it wraps, before or after the work."""

    def __init__(self, call: Callable[..., Any], at: int, *, after: bool = False) -> None:
        self.call, self.at, self.after, self.calls = call, at, after, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        broken = self.calls == self.at + 1
        if not broken or self.after:
            result = self.call(*args, **kwargs)
        if broken:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return result


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return step_of(made(tmp_path_factory.mktemp("whole")))


def check_same(ours, theirs) -> None:
    assert relative_difference(ours[0], theirs[0]) < 1e-12
    assert ours[1] == pytest.approx(theirs[1], rel=1e-12)
    assert ours[2] == pytest.approx(theirs[2], rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["policy", "reference", "backward", "after the backward"])
def test_a_step_that_ran_out_is_done_again_with_the_same_result(tmp_path, monkeypatch, uninterrupted, where):
    assert len(PairCollator(tokens_per_pack=TOKENS)(DATA).packs) == PACKS
    for number in (0, PACKS - 1):
        run = made(tmp_path)
        if where == "policy":
            monkeypatch.setattr(comparison, "token_logps", breaking := RunsOut(comparison.token_logps, number))
        elif where == "reference":
            monkeypatch.setattr(reference, "token_logps", breaking := RunsOut(reference.token_logps, number))
        else:
            breaking = RunsOut(run.engine.backward, number, after="after" in where)
            monkeypatch.setattr(run.engine, "backward", breaking)
        check_same(step_of(run), uninterrupted)
        assert breaking.calls > PACKS
        assert run.pairs_seen == len(DATA)
        assert sorted(run.health._step_ids) == sorted(pair.id for pair in DATA)
        monkeypatch.undo()


def test_cublas_without_memory_for_a_handle_is_told_from_other_errors(tmp_path, monkeypatch, uninterrupted):
    """It is made in the first product of a thread: of the backward's, after a forward that took all there was."""

    def broken(message: str) -> FocalPOTrainer:
        run = made(tmp_path)
        backward, errors = run.engine.backward, [RuntimeError(message)]

        def fails_once(*given: Any, **settings: Any) -> None:
            if errors:
                raise errors.pop()
            backward(*given, **settings)

        monkeypatch.setattr(run.engine, "backward", fails_once)
        return run

    no_handle = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    check_same(step_of(broken(no_handle)), uninterrupted)
    with pytest.raises(RuntimeError, match="INVALID_VALUE"):
        step_of(broken("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm`"))


@pytest.mark.parametrize("evaluated", [False, True])
def test_what_waited_for_layers_that_were_not_called_is_let_go_before_the_step_is_done_again(
    tmp_path, monkeypatch, evaluated
):
    """Query, key and value are computed together; memory runs out between them."""
    run = made(tmp_path)
    [_, last] = run.model.get_base_model().model.layers
    shared = StandIn.of(last.self_attn.q_proj).shared
    waiting: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def breaking(*_: Any) -> None:
        if not alive:
            waiting.extend(weakref.ref(one.output) for one in shared._waiting.values())
            raise torch.OutOfMemoryError("CUDA out of memory")

    last.self_attn.k_proj.register_forward_pre_hook(breaking)
    give_back = Retry._give_back
    monkeypatch.setattr(
        Retry,
        "_give_back",
        lambda retry: give_back(retry) or alive.append(sum(output() is not None for output in waiting)),
    )
    run.evaluate() if evaluated else step_of(run)
    assert len(waiting) == 2
    assert alive == [0]
    assert not shared._waiting
    assert shared._left_lying == 0


@pytest.mark.parametrize("number", range(3))
def test_a_backward_that_breaks_off_leaves_no_gradient_behind(tmp_path, uninterrupted, number):
    """Half of the tensors have got their gradient by then."""
    run = made(tmp_path)
    names = list(run.trained)
    broken = RunsOut(lambda gradient: gradient, number)
    run.trained[names[len(names) // 2]].register_hook(broken)
    check_same(step_of(run), uninterrupted)
    assert broken.calls > PACKS


def test_it_shrinks_until_the_step_fits_and_stays_small(tmp_path, monkeypatch, uninterrupted):
    run, longest = made(tmp_path), max(pair.shared_length for pair in DATA)
    rows: list[int] = []

    def limited(model: Any, pack: Any, *more: Any) -> Any:
        rows.append(pack.num_rows)
        if pack.num_rows > longest + 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return token_logps(model, pack, *more)

    token_logps = comparison.token_logps
    monkeypatch.setattr(comparison, "token_logps", limited)
    check_same(step_of(run), uninterrupted)
    before = len(rows)
    step_of(run)
    assert max(rows[before:]) <= longest + 2


@pytest.mark.slow
def test_a_whole_run_with_evaluations_is_the_uninterrupted_one(tmp_path, monkeypatch):
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2}
    logs = []
    for at in (None, 2, 9, 21):
        run = made(tmp_path / str(at), **settings)
        if at is not None:
            monkeypatch.setattr(comparison, "token_logps", RunsOut(comparison.token_logps, at))
        run.train()
        monkeypatch.undo()
        logs.append([{k: v for k, v in entry.items() if k not in TIMED} for entry in run.state.log_history])
    for entries in logs[1:]:
        for ours, theirs in zip(entries, logs[0], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9)


@pytest.mark.slow
def test_evaluation_is_done_again_too(tmp_path, monkeypatch):
    expected = made(tmp_path / "whole").evaluate()
    table = (tmp_path / "whole" / "evaluations" / "step-0.jsonl").read_text()
    for name, module in (("policy", comparison), ("reference", reference)):
        run = made(tmp_path / name)
        monkeypatch.setattr(module, "token_logps", breaking := RunsOut(module.token_logps, 1))
        found = run.evaluate()
        monkeypatch.undo()
        assert breaking.calls > 3
        keys = expected.keys() - TIMED
        assert {k: found[k] for k in keys} == pytest.approx({k: expected[k] for k in keys}, rel=1e-12)
        assert len((tmp_path / name / "evaluations" / "step-0.jsonl").read_text().splitlines()) == len(
            table.splitlines()
        )


def test_a_pair_that_does_not_fit_alone_is_refused_with_what_to_change(tmp_path, monkeypatch):
    run = made(tmp_path)

    def never(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(comparison, "token_logps", never)
    with pytest.raises(InputError, match=r"the longest pair needs by itself: .*activation_checkpointing.*max_length"):
        step_of(run)


def test_beyond_one_process_the_run_ends_and_says_how_to_go_on(tmp_path, monkeypatch):
    run = made(tmp_path)
    run._retry.engine = "zero3"
    monkeypatch.setattr(comparison, "token_logps", RunsOut(comparison.token_logps, 0))
    with pytest.raises(InputError, match=r"process 0 \(zero3\): .*packing\.tokens: \d+`"):
        step_of(run)


@pytest.mark.engine
def test_two_processes_of_which_one_runs_out_end_within_the_limit(tmp_path):
    code, output = launches.run([*launches.TORCHRUN, out_of_memory_run.__file__, str(tmp_path)])
    assert code != 0
    assert "rank 1: process 1 (ddp): the device ran out of memory with packs of up to" in output
    assert "start it with `packing.tokens: " in output


def test_other_errors_pass_through(tmp_path, monkeypatch):
    run = made(tmp_path)

    def broken(*_: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(comparison, "token_logps", broken)
    with pytest.raises(RuntimeError, match="something else"):
        step_of(run)
