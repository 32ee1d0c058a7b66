"""Build the stubs against the installed torch, and run pytest on them, with values in every process."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
RUNTIME, DRIVER = re.compile(r"(__)?cuda\w+|cublas\w+"), re.compile(r"cu[A-Z]\w+")
USES_THEM = ("torch/lib/libtorch_cuda.so", "torch/lib/libc10_cuda.so", "torch/lib/libtorch_python.so",
             "torch/lib/libcaffe2_nvrtc.so", "torch/lib/libtorch_cuda_linalg.so")  # fmt: skip
OF_TRITON = "cuDeviceGetName cuCtxSetLimit cuCtxGetLimit cuLaunchKernelEx cuFuncSetCacheConfig cuModuleUnload".split()
TRITONS_HEADERS = "triton/backends/nvidia/include"  # has the compiler's part, which the runtime's wheel leaves out


def main() -> int:
    if importlib.util.find_spec("nvidia") is None:
        print("torch's CUDA build is not installed here: `pip install torch` from the usual index")
        return 2
    site = Path(importlib.util.find_spec("torch").origin).parents[1]  # type: ignore[union-attr, arg-type]
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder)
        build(site, built)
        (built / "sitecustomize.py").write_text("import tests.stub_gpu.values", encoding="utf-8")  # in children too
        paths = (str(built), str(HERE.parents[1]), os.environ.get("PYTHONPATH"))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "LD_PRELOAD": str(built / "libcudart_stub.so"),
            "LD_LIBRARY_PATH": str(built),
            "TRITON_LIBCUDA_PATH": str(built),
            "TRITON_INTERPRET": "1",
            "PYTORCH_ALLOC_CONF": "expandable_segments:False",  # unsloth asks for what the driver's stub has not
            "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
        }
        asked = sys.argv[1:] or ["-m", "gpu"]
        command = [sys.executable, "-m", "pytest", "-q", *asked]
        return subprocess.run(command, env=environment).returncode


def build(site: Path, into: Path) -> None:
    """libcudart_stub.so, which stands in for the runtime and cuBLAS, and libcuda.so.1, for the driver."""
    libraries = [site / name for name in USES_THEM]
    libraries += sorted(site.glob("bitsandbytes/libbitsandbytes_cuda13*.so"))
    wanted = {name for library in libraries if library.exists() for name in undefined(library)} | set(OF_TRITON)
    includes = [f"-I{path}" for path in sorted(site.glob("nvidia/cu*/include"))]
    shared_library(
        HERE / "runtime.c",
        RUNTIME,
        wanted,
        into / "libcudart_stub.so",
        [*includes, "-idirafter", str(site / TRITONS_HEADERS)],
    )
    shared_library(HERE / "driver.c", DRIVER, wanted, into / "libcuda.so.1", ["-Wl,-soname,libcuda.so.1"])
    (into / "libcuda.so").symlink_to("libcuda.so.1")


def shared_library(source: Path, names: re.Pattern[str], wanted: set[str], to: Path, options: list[str]) -> None:
    """What `source` defines, and a function that returns 0 for each other name that is wanted."""
    compiled = to.with_suffix(".o")
    gcc("-c", "-fPIC", "-O1", "-w", *[o for o in options if not o.startswith("-Wl")], str(source), "-o", str(compiled))
    own = set(re.findall(r" T (\w+)", output("nm", str(compiled))))
    rest = to.with_suffix(".rest.c")
    lines = [f"long {name}(void) {{ return 0; }}" for name in sorted(wanted - own) if names.fullmatch(name)]
    rest.write_text("\n".join(lines), encoding="utf-8")
    gcc("-shared", "-fPIC", "-w", *options, str(compiled), str(rest), "-o", str(to), "-ldl")


def undefined(library: Path) -> list[str]:
    return re.findall(r" U (\w+)", output("nm", "-D", "--undefined-only", str(library)))


def gcc(*arguments: str) -> None:
    subprocess.run(["gcc", *arguments], check=True)


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
