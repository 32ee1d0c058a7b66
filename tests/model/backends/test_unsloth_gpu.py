"""The real unsloth beside our own path, on a GPU: in the environment of requirements/unsloth.txt, and in no other.

python -m pytest -m gpu tests/model/backends -s
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from lorafocal.data.toy import toy_tokenizer
from lorafocal.model import load
from lorafocal.model.load import load_base
from tests.model.backends import one_run
from tests.tiny import relative_difference

# How far log-probs (nats a token), gradients (relative norm) and losses may be apart. bf16 keeps 8 bits, and the two
# round in other places: what a wrong mask, rotation or scale does is far beyond these.
BOUNDS = {"bfloat16": (0.25, 0.1, 0.02), "float32": (1e-5, 1e-5, 1e-6)}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # which cannot compute in bf16
SIZES = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def elsewhere(*words: str) -> str:
    """What `one_run` prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.backends.one_run", *words],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[3],
        env=os.environ | {"UNSLOTH_RMSNORM_MULTIROW": "0"} if INTERPRETED else None,  # tried past our values otherwise
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def here(backend: str, base: str, folder: str, dtype: str) -> str:
    with redirect_stdout(StringIO()) as said:
        one_run.main(backend, base, Path(folder), dtype)
    return said.getvalue()


def run(backend: str, base: Path, folder: Path, dtype: str, asked: Callable[..., str]) -> tuple[dict, dict]:
    """What `one_run` prints, and the tensors that it leaves."""
    folder.mkdir()
    said = asked(backend, str(base), str(folder), dtype)
    return json.loads(said.splitlines()[-1]), load_file(folder / "tensors.safetensors")


def compare(
    first: str, second: str, folder: Path, dtype: str, *, second_by: Callable[..., str] = elsewhere, **sizes: int
) -> None:
    """Log-probs with the adapter on and off, gradients and the losses of a short run agree; speeds are printed."""
    base, (of_logps, of_gradients, of_losses) = folder / "base", BOUNDS[dtype]
    AutoModelForCausalLM.from_config(LlamaConfig(**(SIZES | sizes))).bfloat16().save_pretrained(base)
    toy_tokenizer().save_pretrained(base)
    ours = run(first, base, folder / "0", dtype, elsewhere)
    theirs = run(second, base, folder / "1", dtype, second_by)
    print(f"\n{first}: {ours[0]}\n{second}: {theirs[0]}")
    for name in ("on", "off"):
        apart = (ours[1].pop(name) - theirs[1].pop(name)).abs()
        assert apart.max() < of_logps
        assert apart.mean() < of_logps / 10
    assert relative_difference(ours[1], theirs[1]) < of_gradients
    assert ours[0]["losses"] == pytest.approx(theirs[0]["losses"], abs=of_losses)


if find_spec("unsloth"):  # its environment is another than the tested one, where there is nothing to run

    @pytest.mark.gpu
    def test_a_real_run_gives_our_own_numbers(tmp_path):
        if INTERPRETED:
            compare("transformers", "unsloth", tmp_path, "float32", **SMALL)
        else:
            compare("transformers", "unsloth", tmp_path, "bfloat16")


@pytest.mark.engine
@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_comparison_finds_our_own_run_equal_to_itself(tmp_path, monkeypatch, dtype):
    """In a process of its own, and in this one, where loading draws random numbers as unsloth's does."""

    def drawing(base: str, dtype: str):
        torch.rand(3)
        return load_base(base, dtype=dtype)

    monkeypatch.setattr(load, "load_base", drawing)
    compare("transformers", "transformers", tmp_path, dtype, second_by=here, **SMALL)
