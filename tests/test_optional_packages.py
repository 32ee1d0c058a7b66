"""Nothing but the core libraries is needed to train: TRL, unsloth and the like may be missing, old or broken."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lorafocal.arguments import FocalPOConfig
from lorafocal.endpoints import Endpoint
from lorafocal.endpoints.client import Client
from lorafocal.errors import InputError
from lorafocal.evaluate import bradley_terry
from lorafocal.evaluate.alpaca_package import alpaca_eval
from lorafocal.evaluate.harness import find_tasks

OPTIONAL = (
    "trl unsloth bitsandbytes liger_kernel flash_attn flash_attn_interface kernels deepspeed xformers wandb tensorboard"
    " trackio mlflow sentencepiece torchvision triton alpaca_eval lm_eval openai sklearn vllm"
).split()

SCRIPT = """
import importlib, pkgutil, sys
for name in sys.argv[2].split(","):
    sys.modules[name] = None  # an import of it fails, and it counts as not installed
import lorafocal
for module in pkgutil.walk_packages(lorafocal.__path__, "lorafocal."):
    # The first reads TRL's own defaults, the second is Triton's, behind a door of its own.
    if not module.name.startswith(("lorafocal.compat.trl_yaml", "lorafocal.ops.triton", "lorafocal.__main__")):
        importlib.import_module(module.name)
from pathlib import Path
from tests.tiny import pairs, trainer
made = trainer(Path(sys.argv[1]), pairs(9), pairs(3), max_steps=2)
made.train()
made.save_model()
print("trained", made.state.global_step)
"""


@pytest.mark.engine
@pytest.mark.row("61")
def test_every_module_loads_and_a_run_works_without_any_optional_package(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), ",".join(OPTIONAL)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert "trained 2" in done.stdout, done.stderr[-2000:]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_deepspeed_that_is_too_old_is_refused_by_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its stage 1 would hold everything whole, without a word."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("lorafocal.engines.zero.version", lambda package: "0.18.6")
    with pytest.raises(InputError, match=r"DeepSpeed 0\.18\.6 is installed, and 0\.19\.8 is the oldest"):
        FocalPOConfig(output_dir=str(tmp_path), engine="zero1", use_cpu=True)


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_an_engine_of_deepspeed_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=rf"engine {engine} .* not installed: pip install 'lorafocal\[deepspeed\]'"):
        FocalPOConfig(output_dir=str(tmp_path), engine=engine)


@pytest.mark.parametrize(
    ("package", "door"),
    [
        ("alpaca_eval.metrics", lambda: alpaca_eval().__enter__()),
        ("lm_eval.tasks", lambda: find_tasks(["gsm8k"], None, ())),
        ("openai", lambda: Client(Endpoint("judge", "http://127.0.0.1:9/v1"))),
        ("sklearn.linear_model", bradley_terry.library),
    ],
    ids="alpaca-eval lm-eval openai scikit-learn".split(),
)
def test_what_judges_and_benchmarks_need_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, package: str, door: Callable[[], object]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"pip install 'lorafocal\[eval\]'$"):
        door()


def test_a_harness_that_this_transformers_is_too_new_for_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """lm-eval 0.4.9 names a class that transformers 5 no longer has."""
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval/__init__.py").write_text("import transformers\ntransformers.AutoModelForVision2Seq\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match=r"has no attribute AutoModelForVision2Seq.*pip install 'lorafocal\[eval\]'"):
        find_tasks(["gsm8k"], None, ())
