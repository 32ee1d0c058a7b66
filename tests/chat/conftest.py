"""One run that everything is asked of."""

from __future__ import annotations

import pytest
import torch

from lorafocal.data.encoding import Encoder
from lorafocal.data.toy import toy_tokenizer
from lorafocal.generation.speech import Speech
from tests.saved_run import SavedRun, save_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return save_run(tmp_path_factory.mktemp("chat"), std=0.3, base_dtype=torch.float32, dtype="float32")


@pytest.fixture(scope="session")
def speech() -> Speech:
    return Speech(Encoder.of(toy_tokenizer(), {}), templated=True)
