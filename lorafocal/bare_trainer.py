"""transformers' Trainer without what it would do of its own accord: here steps are counted, kept and resumed by us."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from lorafocal.errors import InputError

# What TRL's and transformers' trainers call in a step, and nothing calls here.
_NEVER_CALLED = ("compute_loss", "_compute_loss", "prediction_step", "get_batch_loss_metrics", "dpo_loss")


class BareTrainer(Trainer):
    """What is left: its loop, its schedule, its callbacks and its logs."""

    def __init_subclass__(cls, **more: Any) -> None:
        """Raises InputError for a subclass with a loss or an evaluation of its own, which would never be called."""
        super().__init_subclass__(**more)
        if own := [name for name in _NEVER_CALLED if getattr(cls, name, None) is not getattr(BareTrainer, name, None)]:
            raise InputError(
                f"{cls.__name__} defines {', '.join(own)}, which nothing calls here, so it would be ignored: a loss is"
                " an objective (FocalPOConfig(objective=...); docs/design.md adds one of your own); `training_step`,"
                " `evaluate` and `log` may be overridden"
            )

    def add_callback(self, callback: Any) -> None:
        """Raises InputError for what is none, and for one that chooses among checkpoints: none is the best here."""
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise InputError(f"a callback is of the type {kind.__name__}: give a transformers.TrainerCallback")
        if isinstance(callback, EarlyStoppingCallback) or callback is EarlyStoppingCallback:
            raise InputError(
                "EarlyStoppingCallback stops by the best checkpoint, and none is chosen during training: keep"
                " checkpoints (save_steps), compare them by `lorafocal score`, and go on from the best"
            )
        super().add_callback(callback)

    def predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """There are no predictions: `evaluate(rows)` measures pairs."""
        raise InputError(
            "predict: pairs have none; `evaluate(rows)` gives their metrics, `lorafocal score` each pair's"
        )

    def compute_loss(self, *args: Any, **kwargs: Any) -> NoReturn:
        """A batch is a whole step of packs, which is no model's input."""
        raise InputError(
            "compute_loss: a batch is a whole step, and `training_step` runs it; `evaluate(rows)` gives the loss of"
            " pairs, `lorafocal.policy` the log-probs of a pack"
        )

    def prediction_step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """As `predict`."""
        self.predict()

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As held-out pairs'."""
        return self.get_eval_dataloader(test_dataset)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:
        """transformers' would upload the whole of `output_dir`, to a repository that may be public."""
        raise InputError(
            "push_to_hub: a run never uploads; after `trainer.save_model()`, `lorafocal export ADAPTER --as adapter"
            " --out BUNDLE --push OWNER/NAME` shows the files and asks first, or use the hub's own client"
        )

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> NoReturn:
        """It needs a `model_init`, which is no argument here."""
        raise InputError(
            "hyperparameter_search: not from Python; `lorafocal sweep CONFIG --grid training.learning_rate=1e-6,5e-6`"
            " trains a grid and names the best by held-out pairs, or make a trainer for each point"
        )

    def num_examples(self, dataloader: DataLoader) -> int:
        """Pairs."""
        return len(dataloader.dataset)  # type: ignore[arg-type]

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        """Pairs are counted in `training_step`, over all ranks."""

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: transformers' formula does not know packs."""
        return 0

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Weights come back together with the optimiser's state, strictly, by name."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """None is needed: the order of pairs is a function of seed and epoch, and dropout is off."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        """None exists: float16 is refused."""
