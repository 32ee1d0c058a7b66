"""The services of `training.report_to`, through transformers' callbacks: one training is one run of theirs.

By itself such a callback leaves the service's run open, so that the next training of a sweep would write into it, and a
service that cannot be reached ends the training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from lorafocal.errors import InputError, first_line
from lorafocal.progress import beside_progress
from lorafocal.together import all_or_none
from lorafocal.training_fields import LOGGERS


class _Open(NamedTuple):
    """A service that keeps its run open in the process; both functions take its module."""

    has_run: Callable[[Any], bool]
    end: Callable[[Any, bool], object]  # and whether the training was whole


_OPEN = {
    "wandb": _Open(lambda wandb: wandb.run is not None, lambda wandb, whole: wandb.finish(exit_code=0 if whole else 1)),
    "mlflow": _Open(
        lambda mlflow: mlflow.active_run() is not None,
        lambda mlflow, whole: mlflow.end_run("FINISHED" if whole else "FAILED"),
    ),
    "swanlab": _Open(
        lambda swanlab: swanlab.has_run() if hasattr(swanlab, "has_run") else swanlab.get_run() is not None,
        lambda swanlab, whole: swanlab.finish(),
    ),
    "comet_ml": _Open(
        lambda comet: comet.get_running_experiment() is not None,
        lambda comet, whole: comet.end(),
    ),
}
_WHOLE_AT_END = ("wandb", "mlflow")  # at its end the callback says that the training was whole, or uploads its model


class Service(TrainerCallback):
    """One service and its run. It may refuse a training at its start; where it fails later, the training goes on."""

    def __init__(self, name: str, callback: TrainerCallback, say: Callable[[str], None]) -> None:
        self._name, self._callback, self._say = name, callback, say
        self._told, self._works = False, True
        self._given = False  # its run was open before, so whoever opened it ends it

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises InputError, on every rank, where the service does not start."""
        with all_or_none():
            try:
                self._meet(state)
                self._callback.on_train_begin(args, state, control, **kwargs)
            except Exception as error:
                raise InputError(
                    f"training.report_to: {self._name} does not start ({first_line(error)}). Put that right, or leave"
                    f" {self._name} out: metrics.jsonl is always written"
                ) from error

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first event of a run that is resumed after its last step, and evaluated: it begins here."""
        if not self._told:
            self._try(lambda: self._meet(state))
            self._try(lambda: self._callback.on_train_begin(args, state, control, **kwargs))
        self._try(lambda: self._callback.on_log(args, state, control, **kwargs))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._try(lambda: self._callback.on_save(args, state, control, **kwargs))

    def end(self, trainer: Trainer, *, whole: bool) -> None:
        """After the last evaluation, which may come after the last step; not at `on_train_end`."""
        if not self._told:
            return
        if whole or self._name not in _WHOLE_AT_END:
            known = {"model": trainer.model, "processing_class": trainer.processing_class}
            self._try(lambda: self._callback.on_train_end(trainer.args, trainer.state, trainer.control, **known))
        if trainer.state.is_world_process_zero and self._name in _OPEN and not self._given:
            self._works = True  # also of a service that failed: the next run is not to be written into this one
            self._try(lambda: self._end(whole))

    def _meet(self, state: Any) -> None:
        """Before the first word: a service that then fails half-way has a run to be ended, too."""
        if not self._told and state.is_world_process_zero and self._name in _OPEN:
            self._given = _OPEN[self._name].has_run(import_module(self._name))
        self._told = True

    def _end(self, whole: bool) -> None:
        opened, module = _OPEN[self._name], import_module(self._name)
        if opened.has_run(module):
            opened.end(module, whole)

    def _try(self, tell: Callable[[], object]) -> None:
        if not self._works:
            return
        try:
            tell()
        except Exception as error:  # noqa: BLE001 -- whatever a service raises: the training goes on
            self._works = False
            self._say(
                f"note: {self._name} failed, and gets no more of this run ({first_line(error)}); metrics.jsonl does"
            )


@contextmanager
def services(trainer: Trainer) -> Iterator[None]:
    """Within, each logger of `trainer` is a `Service`, whose run ends with the block."""
    say = beside_progress(trainer)
    names = {INTEGRATION_TO_CALLBACK[name]: name for name in LOGGERS}
    callbacks = trainer.callback_handler.callbacks
    made = {n: Service(names[type(c)], c, say) for n, c in enumerate(callbacks) if type(c) in names}
    for number, service in made.items():
        callbacks[number] = service
    try:
        yield
    except Exception:  # an interruption is not to wait for a network
        for service in made.values():
            service.end(trainer, whole=False)
        raise
    for service in made.values():
        service.end(trainer, whole=trainer.state.global_step >= trainer.state.max_steps)
