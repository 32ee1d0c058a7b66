"""The tests marked `gpu` where there is no GPU: torch's CUDA build over a CUDA runtime that computes nothing.

    python -m tests.stub_gpu [arguments of pytest]     # by default: -m gpu

Device memory is the host's, launches return at once; torch's own host code, device checks and caching allocator are the
real ones. Each operation is then computed on the host in the same memory, so that values are right. It needs torch's
CUDA build (2.11 was tried), gcc and binutils. What it cannot show: speed, a kernel's own faults, several GPUs, cuDNN.
Triton's kernels run in its interpreter, which rounds bf16 towards zero. Values that are printed are not computed.
"""
