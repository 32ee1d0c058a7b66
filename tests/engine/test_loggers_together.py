"""A service that does not start is one process's to find, and no other is left waiting for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from lorafocal.errors import InputError
from lorafocal.loggers import Service
from tests.engine.forked import forked_ranks

pytestmark = pytest.mark.engine


class OutOfReach(TrainerCallback):
    """As transformers' are: it tells the service of the first process alone."""

    def on_train_begin(self, args, state, control, **known):
        if state.is_world_process_zero:
            raise ConnectionError("out of reach")


def test_where_it_fails_for_one_process_all_of_them_end(tmp_path):
    def begin(rank: int) -> None:
        service = Service("trackio", OutOfReach(), print)
        state = SimpleNamespace(is_world_process_zero=rank == 0)
        with pytest.raises(InputError, match="trackio does not start" if rank == 0 else "rank 0 could not"):
            service.on_train_begin(None, state, None)

    assert forked_ranks(begin, tmp_path) == [0, 0]
