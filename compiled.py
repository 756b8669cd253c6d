"""native.c as a library of this process, compiled when it is asked for: by gcc, or what else knows OpenMP.

That takes about a second, and nothing but Python's own modules, so that it can begin before PyTorch is imported. No file is
kept: what ran would otherwise be what lay there.
"""

import ctypes
import functools
import os
import platform
import shlex
import subprocess
import tempfile
import threading
from pathlib import Path

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ["-O3", "-march=native", "-fopenmp", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"]
FLAGS += ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
compiling = threading.Lock()


@functools.cache
def compiled():
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "native.so"
        command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, "-shared", "-fPIC", str(SOURCE), "-o", str(target), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
            found = ctypes.CDLL(str(target))  # it stays in memory when the file is gone
        except (OSError, subprocess.SubprocessError):
            return None
    number, pointer, small = ctypes.c_long, ctypes.c_void_p, ctypes.c_int
    found.gpt_linear.argtypes = [*[pointer] * 3, number, pointer, small]
    found.gpt_blocks.argtypes = [pointer, number, *[pointer] * 3, *[number] * 5, pointer, small]
    found.gpt_linear.restype = found.gpt_blocks.restype = None
    return found


def library():
    """native.c as a library, or None where it can't be compiled; whoever asks while it is being compiled waits."""
    with compiling:
        return compiled()


def begin():
    """Let it be compiled beside what comes next."""
    threading.Thread(target=library).start()
