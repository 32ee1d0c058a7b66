"""The real unsloth beside our own path, on a GPU: in the environment of requirements/unsloth.txt, and in no other.

python -m pytest -m gpu tests/model/backends -s
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from lorafocal.data.toy import toy_tokenizer
from tests.model.backends import one_run
from tests.tiny import relative_difference

# bf16 keeps 8 bits, and the two round in other places: what a wrong mask, rotation or scale does is far beyond these.
LOGPS, GRADIENTS, LOSSES = 0.25, 0.1, 0.02  # nats a token, relative norm, of the loss
SIZES = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def elsewhere(*words: str) -> str:
    """What `one_run` prints in a process of its own."""
    command = [sys.executable, "-m", "tests.model.backends.one_run", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[3])
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def here(backend: str, base: str, folder: str) -> str:
    with redirect_stdout(StringIO()) as said:
        one_run.main(backend, base, Path(folder))
    return said.getvalue()


def run(backend: str, base: Path, folder: Path, asked: Callable[..., str]) -> tuple[dict, dict]:
    """What `one_run` prints, and the tensors that it leaves."""
    folder.mkdir()
    said = asked(backend, str(base), str(folder))
    return json.loads(said.splitlines()[-1]), load_file(folder / "tensors.safetensors")


def compare(first: str, second: str, folder: Path, *, second_by: Callable[..., str] = elsewhere, **sizes: int) -> None:
    """Log-probs with the adapter on and off, gradients and the losses of a short run agree; speeds are printed."""
    base = folder / "base"
    AutoModelForCausalLM.from_config(LlamaConfig(**(SIZES | sizes))).bfloat16().save_pretrained(base)
    toy_tokenizer().save_pretrained(base)
    ours, theirs = run(first, base, folder / "0", elsewhere), run(second, base, folder / "1", second_by)
    print(f"\n{first}: {ours[0]}\n{second}: {theirs[0]}")
    for name in ("on", "off"):
        apart = (ours[1].pop(name) - theirs[1].pop(name)).abs()
        assert apart.max() < LOGPS
        assert apart.mean() < LOGPS / 10
    assert relative_difference(ours[1], theirs[1]) < GRADIENTS
    assert ours[0]["losses"] == pytest.approx(theirs[0]["losses"], abs=LOSSES)


if find_spec("unsloth"):  # its environment is another than the tested one, where there is nothing to run

    @pytest.mark.gpu
    def test_a_real_run_gives_our_own_numbers(tmp_path):
        compare("transformers", "unsloth", tmp_path)


@pytest.mark.engine
def test_the_comparison_finds_our_own_run_equal_to_itself(tmp_path):
    """In a process of its own, and in this one."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    compare("transformers", "transformers", tmp_path, second_by=here, **sizes)
