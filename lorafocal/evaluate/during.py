"""Answers on the way: a callback that generates to a few held-out prompts every so many steps, and has them judged.

`lorafocal.run.train` is given `callbacks` at the door, so that the trainer imports nothing from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import TrainerCallback

from lorafocal.config import Config
from lorafocal.data.prepare import Part
from lorafocal.trainer import FocalPOTrainer


def callbacks(config: Config, trainer: FocalPOTrainer, data: Mapping[str, Part]) -> Sequence[TrainerCallback]:
    """What `config.evaluation` asks for; none without that section.

    A trial answer is written and judged at once. Raises InputError where that fails, before the run writes anything.
    """
    if config.evaluation is None:
        return ()
    raise NotImplementedError
