"""Triton kernels of the elementwise functions: the signatures of `lorafocal.ops.elementwise`, on a CUDA device.

Imported by `elementwise.load("triton")` alone: nothing else needs Triton. Each rounds where its definition does.
"""

from subprocess import CalledProcessError

import triton
from triton.errors import TritonError

from lorafocal.ops.elementwise import Elementwise
from lorafocal.ops.triton.head import head_fold_
from lorafocal.ops.triton.norm import rms_norm, rms_norm_backward
from lorafocal.ops.triton.rope import rope, rope_backward
from lorafocal.ops.triton.swiglu import swiglu, swiglu_backward_

TRITON = Elementwise(
    f"triton {triton.__version__}", swiglu, swiglu_backward_, rms_norm, rms_norm_backward, rope, rope_backward,
    head_fold_, failures=(RuntimeError, TritonError, CalledProcessError, AssertionError, OSError),
)  # fmt: skip
