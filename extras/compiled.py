"""native.c as a library of this process, compiled on demand by gcc, or another compiler that has OpenMP.

That takes about a second and only Python's own modules, so that it can run while PyTorch is imported. The library is
not kept on disk, where someone could replace it.
"""

import ctypes
import functools
import os
import platform
import shlex
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).with_name("native.c")
FLAGS = [
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fassociative-math",
    "-fno-signed-zeros",
    "-fno-trapping-math",
    "-fno-math-errno",
]
FLAGS += ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []


def compiler():
    return shlex.split(os.environ.get("CC", "cc"))


def build():
    """-> a temporary folder with native.so in it."""
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    command = [*compiler(), *FLAGS, "-shared", "-fPIC", str(SOURCE), "-o", str(Path(folder.name) / "native.so"), "-lm"]
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=60)
    return folder


@functools.cache
def begin():
    """Start to compile in the background -> a future of the folder."""
    return ThreadPoolExecutor(1).submit(build)


@functools.cache
def load():
    """native.c as a library, or None if it can't be compiled."""
    try:
        with begin().result() as folder:
            found = ctypes.CDLL(str(Path(folder) / "native.so"))  # it stays in memory when the file is gone
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    number, pointer, small = ctypes.c_long, ctypes.c_void_p, ctypes.c_int
    found.gpt_linear.argtypes = [*[pointer] * 3, number, pointer, small]
    found.gpt_blocks.argtypes = [pointer, number, *[pointer] * 3, *[number] * 5, pointer, small]
    found.gpt_linear.restype = found.gpt_blocks.restype = None
    return found
