"""`FocalPOTrainer`: preference tuning on `transformers.Trainer`, whose loop, schedules and loggers stay in charge.

The dataloader's batch is the whole optimiser step; the collator splits it into packs; `training_step` runs each pack
forward and backward. The loss is the sum over pairs divided by the pairs of the step over all ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from lorafocal.arguments import TRAINER_WORDS_OF_TRL, FocalPOConfig, refuse_unknown
from lorafocal.assembly import (
    Rows,
    StoredReference,
    assemble_policy,
    assemble_ref_model,
    check_data,
    check_pairs,
    opened,
    prepare_layers,
    reference_identity,
    tokenized,
)
from lorafocal.bare_trainer import BareTrainer
from lorafocal.budget import Retry
from lorafocal.caching import CacheReport, cache_reference
from lorafocal.callbacks import EvaluateFirst, ForgetLaterEvaluations, OwnIntervals, SetEpoch, counted_anew, following
from lorafocal.checkpoint import load_state
from lorafocal.comparison import FILLER, Comparison, Part, is_filler
from lorafocal.data.needs import asked_of_packs
from lorafocal.data.packing import Pack, PairCollator, StepBatch
from lorafocal.data.tokens import TokenizedPair
from lorafocal.engines import build_engine, loading_device
from lorafocal.errors import InputError
from lorafocal.evaluations import evaluation_file, write_evaluation
from lorafocal.given import AsMade, as_given, check_beside
from lorafocal.health import HealthCheck, check_first_step
from lorafocal.lineage import Lineage
from lorafocal.metrics import PairMetrics, PairTable, pair_values, sum_keys
from lorafocal.model.adapters import check_trainable
from lorafocal.model.fused import forget
from lorafocal.model.loose import gives_base_back
from lorafocal.model.master import train_in_full
from lorafocal.objectives import entry_of, mean_loss
from lorafocal.optimizers import check_given, schedule_of, settle, tell_another_schedule
from lorafocal.progress import LossWithEvaluation, MetricsFile, ProgressLine, Speed
from lorafocal.reference import check_identity, check_ref_model, check_same_reference
from lorafocal.sampler import NumberedPairs, check_same_order, order_of, order_seed, step_loader
from lorafocal.saving import NO_EARLIER, find_checkpoint, progress_at, publish, what_is_made, write_checkpoint
from lorafocal.tensor_files import check_keys

logger = logging.getLogger(__name__)

# At the end of training transformers counts a step as one sample of batch size 1, estimates FLOPs of unpacked text, and
# averages the loss over the steps since the last resume.
_MISCOUNTED = ("train_samples_per_second", "total_flos", "train_loss")


class FocalPOTrainer(BareTrainer):
    """Trains LoRA adapters, or every weight, with FocalPO, DPO and their like, or on the chosen answers (`"sft"`).

    `train_dataset` and `eval_dataset` hold TRL preference rows (`prompt`, `chosen`, `rejected`; a `datasets.Dataset`
    or a list of dicts). Give `peft_config` for a fresh adapter, a `PeftModel` with a trainable one, or a plain model
    alone: then all of its weights are trained, those in bf16 as fp32 masters (in place). `model` may be a name or
    folder, loaded in bfloat16.

    `args.reference` says what the policy is compared with: "disabled_adapter" (the base), "frozen_copy" (the adapter
    as it is given), "adapter" (a finished one), "moving", "several", or, without an adapter too, "separate_model"
    (`ref_model`) or "cached" (what `cache_reference` has stored). `args.engine` says how processes share all this.

    Raises InputError for anything the caller can put right, before the first step.
    """

    args: FocalPOConfig
    data_collator: PairCollator

    @gives_base_back
    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        ref_model: str | Path | PreTrainedModel | PeftModel | None = None,
        args: FocalPOConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: Sequence[TrainerCallback] | None = (),
        optimizers: tuple[torch.optim.Optimizer | None, Any] | None = (None, None),
        **unknown: Any,
    ) -> None:
        refuse_unknown("FocalPOTrainer", unknown, TRAINER_WORDS_OF_TRL)
        args = args or FocalPOConfig(output_dir="focalpo_output")
        model, ref_model, optimizers = as_given(model, ref_model, args, processing_class, peft_config, optimizers)
        check_beside(args, eval_dataset, callbacks)
        check_ref_model(args.reference, ref_model)
        check_given(optimizers[0], args.loraplus_lr_ratio)
        device = loading_device(args)
        model, processing_class = opened(model, ref_model, processing_class, device)
        given = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        self.data = {
            name: tokenized(rows, name, processing_class, args) for name, rows in given.items() if rows is not None
        }
        check_data(self.data, [model], entry_of(args.objective))  # some adapters start from what a model makes of pairs
        policy = assemble_policy(model, peft_config, args, self._pairs("train_dataset") or [])
        self.objective = args.build_objective()
        self.trained = check_trainable(policy) if isinstance(policy, PeftModel) else train_in_full(policy)
        self.engine = build_engine(args)
        self.made = what_is_made(policy, self.objective, args.strategy, processing_class)
        self.ref_model = None if ref_model is None else assemble_ref_model(ref_model, policy, device)
        self._scorers = [policy, *filter(None, [self.ref_model])]
        check_data(self.data, self._scorers, self.objective.entry)  # the reference's lengths too
        self.reference_identity = reference_identity(args.strategy, policy, self.ref_model)
        super().__init__(
            model=policy,
            args=args,
            data_collator=PairCollator(),  # until the layout is chosen, on the model's own device
            train_dataset=self._pairs("train_dataset"),
            eval_dataset=self._pairs("eval_dataset"),
            processing_class=processing_class,
            optimizers=optimizers,
        )
        for model in self._scorers:
            self.engine.place(model, args.device)
        policy.eval()  # each step sets its own mode again
        self.budget, self.layout, bucket, self.kernels = prepare_layers(self._scorers, args, self._all_pairs())
        asked = asked_of_packs(self.objective.entry, self._pairs("train_dataset") or self._all_pairs())
        self._modules = tuple(policy.modules())
        self.data_collator = PairCollator(self.layout.layout, self.budget.tokens, bucket=bucket, **asked)
        self._retry = Retry(self.data_collator, args.device, self.engine.word)
        self.stored: StoredReference | None = None
        if args.reference == "cached":
            self.stored = StoredReference.of(self.ref_model or policy, args, self.data_collator)
            self.reference_identity["sha256"] = self.stored.store.context.weights_sha256
        self.remove_callback(PrinterCallback)
        output = Path(args.output_dir)
        self.health = HealthCheck(self.engine, self.trained, self._pairs("train_dataset") or [], output)
        self.speed = Speed()
        files = (MetricsFile(output), ForgetLaterEvaluations(output))
        logged = (OwnIntervals(), EvaluateFirst(), LossWithEvaluation(), self.speed)
        for callback in (self.health, SetEpoch(), *logged, *following(self), *files, *(callbacks or ())):
            self.add_callback(callback)
        if not any(isinstance(c, ProgressLine) for c in self.callback_handler.callbacks):
            self.add_callback(ProgressLine())
        self.metrics, self.pairs_seen = PairMetrics(sum_keys(self.objective)), 0
        self._as_made = AsMade(self)
        drawn: dict[str, Any] = {"noisy": args.allow_dropout, "seed": args.seed, "rank": args.process_index}
        drawn |= {"num_groups": len(self.data_collator.groups), "strategy": args.strategy}
        self.compared = Comparison(self.objective, args.reference, self.ref_model, **drawn)

    def _pairs(self, name: str) -> list[TokenizedPair] | None:
        return self.data[name].pairs if name in self.data else None

    def _all_pairs(self) -> list[TokenizedPair]:
        return [pair for part in self.data.values() for pair in part.pairs]

    # ---- data -------------------------------------------------------------------------------------------------

    def cache_reference(self, *, per_token: bool = False, say: Callable[[str], None] = logger.info) -> CacheReport:
        """Compute and store the reference's log-probs of all pairs, as far as the store lacks them.

        Those of single tokens with `per_token`, and where the objective weighs tokens. Raises InputError where the
        reference is not "cached", and for parts changed since the trainer was made.
        """
        self._as_made.check(self)
        if self.stored is None:
            raise InputError(f'the reference is {self.args.reference}: nothing is stored; set `reference="cached"`')
        if self.stored.model is None:
            raise InputError("the reference model was let go once its log-probs were looked up: build a new trainer")
        scored, store, pairs = self.stored.model, self.stored.store, self._all_pairs()
        how: dict[str, Any] = {"collator": self.data_collator, "per_token": per_token or self.stored.per_token}
        how |= {"rank": self.args.process_index, "world": self.args.world_size}
        return cache_reference(scored, pairs, store, say=say, **how)

    def look_up_reference(self, say: Callable[[str], None] = logger.info) -> None:
        """Give all pairs their stored reference, and check some; training and evaluation begin with it.

        Raises InputError for what is missing, altered, foreign or far from a live pass, and for parts changed since.
        """
        self._as_made.check(self)
        if self.stored is None or self.stored.checked is not None or not (pairs := self._all_pairs()):
            return
        found = iter(self.stored.look_up(pairs, seed=self.args.seed))
        for part in self.data.values():
            part.pairs[:] = islice(found, len(part.pairs))  # the lists that the loaders know
        say(str(self.stored.checked))
        if self.ref_model is not None:  # nothing asks it any more, and it is as large as the policy
            self.ref_model = self.compared.ref_model = self.stored.model = None
            del self._scorers[1:]

    def get_train_dataloader(self) -> DataLoader:
        """Whole steps of pairs, in an order of their own each epoch or, with `keep_order`, in that of the data."""
        if self.train_dataset is None:
            raise InputError("train_dataset is missing: there is nothing to train on")
        return step_loader(self.train_dataset, self.data_collator, self.args, seed=order_seed(self.args))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Held-out pairs in their own order."""
        self.look_up_reference()
        if eval_dataset is None or eval_dataset is self.eval_dataset:
            pairs = self.eval_dataset
        else:
            pairs = tokenized(eval_dataset, "eval_dataset", self.processing_class, self.args).pairs
            check_pairs(pairs, "eval_dataset", self._scorers)
            if self.stored is not None:
                pairs = self.stored.look_up(pairs, seed=self.args.seed)
        if pairs is None:
            raise InputError("eval_dataset is missing: there is nothing to evaluate on")
        return step_loader(NumberedPairs(pairs), self.data_collator, self.args, seed=None)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As `optim` names it; with LoRA+, two rates."""
        if self.optimizer is None:
            settle(super().create_optimizer(*args, **kwargs), self.trained, self.args.loraplus_lr_ratio)
        return self.optimizer

    # ---- the step ---------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: StepBatch, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one whole optimiser step on this rank; the step's mean loss, detached."""
        if not (model.training and all(module.training for module in self._modules)):
            model.train()  # a tenth of a small model's step on a GPU; a new wrapper trains, the model within may not
        before = copy(self.metrics)  # sums that are never changed in place

        def undo() -> None:
            self.metrics = copy(before)
            self.health.forget_step()
            forget(self.model)
            for parameter in self.trained.values():
                parameter.grad = None

        loss, step_pairs = self._retry.run(inputs, lambda batch: self._step(model, batch), undo=undo)
        self.health.check_gradients(self.state.global_step)
        if self.state.global_step == 0 and self.objective.turns:  # the metrics are the first step's so far
            check_first_step(self.objective, self.metrics.means(self.args.device)["focal/turned_share"])
        self.engine.step()
        self.compared.state = self._left
        self.pairs_seen += step_pairs
        return loss

    def _step(self, model: nn.Module, batch: StepBatch) -> tuple[Tensor, int]:
        """Gradients add up over packs; only the last one synchronises ranks and lets the optimiser step."""
        packs, step_pairs = self._in_step(batch)
        step = self.compared.step(model, packs, step_pairs, self.state.global_step)
        total = torch.zeros((), device=self.args.device)
        for number, part in enumerate(step.parts):
            last = number == len(packs) - 1
            with self.engine.pack(model, last=last):
                loss = self._part_loss(model, part, step.pairs)
                self.engine.backward(loss, last=last)
            total = total + loss.detach()  # not in place: a float64 model keeps a float64 loss
        self._left = step.state
        return total * self.args.world_size, step_pairs  # transformers logs the mean over ranks

    def _part_loss(self, model: nn.Module, part: Part, step_pairs: int) -> Tensor:
        """This pack's share of the step's mean loss."""
        pack = part.pack
        losses, policy, reference = self.compared(model, part)
        probed = self.args.identity_probe and self.state.global_step == 0
        start = self.compared.probed(model, pack, policy, reference) if probed and reference is not None else None
        if is_filler(pack):
            return policy.chosen.sum().to(losses.losses) * 0.0  # its loss need not be finite: it is made up
        self.health.see_pack(losses.losses, pack.pair_ids, self.state.global_step)
        if start is not None:
            noise = self.stored.noise if self.stored else 0.0
            check_identity(*start, pack.pair_ids, kind=str(self.args.reference), tolerance=noise)
        self.metrics.add(pair_values(self.objective, losses, policy, reference, pack.index.lengths))
        return mean_loss(losses.losses, step_pairs)

    def _in_step(self, batch: StepBatch) -> tuple[tuple[Pack, ...], int]:
        """Packs of this rank, filled up to the longest rank's, and the pairs of the step over all ranks."""
        if self.args.world_size == 1:
            return self._moved(batch.packs), batch.num_pairs
        gathered = self.accelerator.gather(torch.tensor([[batch.num_pairs, len(batch.packs)]], device=self.args.device))
        missing = int(gathered[:, 1].max()) - len(batch.packs)
        packs = batch.packs + self.data_collator([FILLER]).packs * missing
        return self._moved(packs), int(gathered[:, 0].sum())

    def _moved(self, packs: Sequence[Pack]) -> tuple[Pack, ...]:
        return tuple(pack.to(self.args.device, non_blocking=True) for pack in packs)

    # ---- evaluation and logging -------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Means over pairs of all ranks, however they were batched; the held-out pairs' own table is written."""
        model = self.model_wrapped
        model.eval()
        pairs = dataloader.dataset.pairs  # type: ignore[attr-defined]
        metrics, table = PairMetrics(self.metrics.keys), PairTable(len(pairs), self.args.device)

        def seen(batch: StepBatch) -> PairMetrics:
            sums = copy(metrics)
            packs, num_pairs = self._in_step(batch)
            for part in self.compared.step(model, packs, num_pairs).parts:
                losses, policy, reference = self.compared(model, part)
                pack = part.pack
                if is_filler(pack):
                    continue
                sums.add(pair_values(self.objective, losses, policy, reference, pack.index.lengths))
                if reference is not None:
                    table.add([int(place) for place in pack.pair_ids], policy, reference)
            return sums

        for batch in dataloader:
            metrics = self._retry.run(batch, seen, undo=lambda: forget(self.model))
        if pairs is self.eval_dataset and self.objective.entry.reference:
            rows = table.rows([pair.id for pair in pairs])
            if self.is_world_process_zero():
                write_evaluation(evaluation_file(Path(self.args.output_dir), self.state.global_step), rows)
        named = {f"{metric_key_prefix}_{key}": value for key, value in metrics.means(self.args.device).items()}
        return EvalLoopOutput(None, None, named, len(pairs))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Training logs carry means over every pair since the last one, and the pairs seen so far."""
        for name in ("eval_steps_per_second", *(_MISCOUNTED if "total_flos" in logs else ())):
            logs.pop(name, None)
        if "loss" in logs:
            logs |= self.metrics.means(self.args.device)
            logs |= {"pairs_seen": self.pairs_seen, **self.speed.measured(self.pairs_seen)}
            self.metrics.reset()
        super().log(logs, start_time)

    # ---- saving and resuming ----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train, or go on from a checkpoint (`True`: the newest complete one in `output_dir`).

        Raises InputError where the checkpoint is torn or missing; a torn one is never loaded. Where training is refused
        before its first step has ended, log, counts and files are as they were.
        """
        self.look_up_reference()  # while the policy is at its start
        found = find_checkpoint(resume_from_checkpoint, Path(self.args.output_dir), writes=self.args.should_save)
        with counted_anew(self):
            self.engine.begin(self)
            self.trained |= {name: p for name, p in self.model.named_parameters() if name in self.trained}
            if self.ref_model is not None:
                self.ref_model = self.compared.ref_model = self.engine.hold_reference(self.ref_model)
            if found is None:
                return super().train(**kwargs)
            progress = progress_at(found)
            if progress.global_step >= self._schedule["steps"]:
                return self._restore(found, progress)
            return super().train(resume_from_checkpoint=str(found), **kwargs)

    @property
    def _schedule(self) -> dict[str, Any]:
        return schedule_of(self.args, len(self.train_dataset or ()))

    def _restore(self, checkpoint: Path, progress: TrainerState) -> TrainOutput:
        """Take up a run whose last step is done: inside an epoch transformers would train one more."""
        progress.is_local_process_zero = self.is_local_process_zero()
        progress.is_world_process_zero = self.is_world_process_zero()
        self.state = progress
        self._prepare_for_training(self._schedule["steps"], None, str(checkpoint))
        return TrainOutput(progress.global_step, float("nan"), {})

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """As transformers does, but for the checkpoint, which is taken up here under every engine."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.engine.ready(self)
        if resume_from_checkpoint is not None:
            self._take_up(Path(resume_from_checkpoint))
        return prepared

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Everything a resumed run needs, complete or absent."""
        write_checkpoint(
            Path(self.args.output_dir),
            self.state,
            made=self.made,
            keep=self.args.save_total_limit,
            extra={
                "metrics": self.metrics.state(self.args.device),  # of all ranks
                "pairs_seen": self.pairs_seen,
                "earlier": self.made.earlier,
                "reference": self.reference_identity,
                "objective": {name: value.tolist() for name, value in self.compared.state.items()},
                "order": self._order,
                "schedule": self._schedule,
            },
            **self._training(),
        )

    def _take_up(self, checkpoint: Path) -> None:
        """Weights, the optimiser's state and the schedule as they were at the checkpoint."""
        self.made.check_same(checkpoint)
        older = {"objective": {}, "order": self._order, "earlier": NO_EARLIER, "schedule": self._schedule}
        extra = older | load_state(checkpoint, **self._training())
        check_keys(extra, (*older, "metrics", "pairs_seen", "reference"), "state.json")
        self.pairs_seen, self.made.earlier = extra["pairs_seen"], extra["earlier"]  # of the weights, whatever follows
        check_same_reference(extra["reference"], self.reference_identity)
        check_same_order(extra["order"], self._order)
        self.made.take_up(checkpoint)
        if self.is_world_process_zero():
            tell_another_schedule(extra["schedule"], self._schedule, progress_at(checkpoint).global_step)
            self.metrics.load(extra["metrics"])
        left = {name: torch.tensor(value, dtype=torch.float64) for name, value in extra["objective"].items()}
        self.compared.state = {name: value.to(self.args.device) for name, value in left.items()}

    @cached_property
    def _order(self) -> dict[str, Any]:
        return order_of(self._pairs("train_dataset") or [], self.args)

    def _training(self) -> dict[str, Any]:
        """What a step changes, and who holds it."""
        return {"engine": self.engine, "parameters": self.trained, "scheduler": self.lr_scheduler}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Collective: what was trained, as others load it, with its lineage; default: `output_dir`/adapter, or /model.

        An adapter becomes PEFT's files, a whole model transformers'. Raises InputError for a folder with other files.
        """
        target = Path(output_dir or Path(self.args.output_dir) / self.made.folder)
        seen = {"pairs_seen": self.pairs_seen, "trained": self.health.moved}
        publish(target, self.made, self.state, self.engine, **seen)

    def lineage(self) -> Lineage | None:
        """What made the weights; None for a base that was never loaded from anywhere."""
        return self.made.lineage(steps=self.state.global_step, pairs_seen=self.pairs_seen)
