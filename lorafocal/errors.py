"""The two ends a run can come to that are not bugs: wrong input, and numbers that went bad; and others' errors told."""

import errno
import re
from pathlib import Path

# What the system says of a full disk, of a used-up quota, and of a file above the limit for one.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# What others than torch's allocator say of a device: libraries that ask the driver for memory of their own, and the
# driver, to torch or to Triton, of a kernel that is loaded where it is called first.
_NO_MEMORY = re.compile(
    r"[A-Z]+_STATUS_ALLOC_FAILED|(CUDA|HIP)( driver)? error: out of memory|Triton Error \[\w+\]: out of memory"
)


class InputError(ValueError):
    """Wrong input: the message says what is wrong, where (file, row or key), and the way out.

    The command line prints the message alone and exits with code 2; Python callers may catch it
    as a `ValueError`.
    """


class FullDisk(InputError):
    """A run ended because there was no room: `where`, and the way out of a single run."""

    def __init__(self, where: str, way_out: str) -> None:
        super().__init__(f"{where}; {way_out}")
        self.where = where


class UnhealthyRun(RuntimeError):
    """A run that must not go on; its last checkpoint is untouched. The command line exits with code 1."""


def unreadable(file: Path, error: OSError | UnicodeDecodeError) -> InputError:
    """What is said of a file that cannot be opened, or is no text."""
    return InputError(f"{file} cannot be read ({getattr(error, 'strerror', None) or error})")


def first_line(error: BaseException) -> str:
    """What another library's error says, as much as a message has room for."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def ran_out(error: BaseException) -> bool:
    """Whether a device had no memory left, whoever says it; what torch's allocator kept then helps to try again."""
    torch_says = type(error).__name__ == "OutOfMemoryError"  # which may not even be imported
    return torch_says or _NO_MEMORY.search(str(error)) is not None
