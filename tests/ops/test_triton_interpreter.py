"""The Triton kernels on a CPU, in Triton's interpreter, against the definitions: shapes and strides nobody aligned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafocal.errors import InputError
from lorafocal.ops import elementwise
from tests.triton_cases import CASES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TOLERANCES = {"torch.float32": 2e-6, "torch.float64": 1e-13}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What one process in which kernels are interpreted found: {"case dtype": [worst difference, where]}."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.triton_interpreted"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    if "interpreter" in results:
        pytest.skip(results["interpreter"])
    return results


@pytest.mark.engine
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_equals_its_definition(name, dtype, found):
    difference, where = found[f"{name} {dtype}"]
    assert difference <= TOLERANCES[dtype], where


@pytest.mark.engine
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.float64", "torch.bfloat16"])
def test_the_check_before_the_first_step_takes_the_kernels(dtype, found):
    assert "2 MLP blocks" in found[f"a model {dtype}"]
    assert "2 rotary embeddings" in found[f"a model {dtype}"]


def test_triton_without_a_cuda_device_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"needs a CUDA device.*use torch"):
        elementwise.load("triton")


def test_triton_that_is_not_installed_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in [name for name in sys.modules if name.startswith("lorafocal.ops.triton")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(InputError, match=r"pip install triton"):
        elementwise.load("triton")


def test_nothing_but_the_choice_imports_the_kernels():
    """Without Triton everything else works: no module of the package needs it."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import lorafocal.ops.logps, lorafocal.ops.elementwise as e; assert e.load('torch') is e.TORCH\n"
        "assert not [m for m in sys.modules if m.startswith('lorafocal.ops.triton')]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
