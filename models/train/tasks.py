"""The task generators of core/task, loaded as a shared library so that there is only one copy of them.

Seeds below 2^63 are for recording and evaluation; training draws from the seeds above.
"""
import ctypes
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TRAINING_SEEDS = 1 << 63


@dataclass(frozen=True)
class Problem:
    family: str
    seed: int
    prompt: str
    completion: str
    answer: str


def _build():
    """Builds the library unless KVLAPSE_TASK_LIBRARY names one."""
    given = os.environ.get("KVLAPSE_TASK_LIBRARY")
    if given:
        return given
    out = Path(tempfile.mkdtemp(prefix="kvlapse_task_")) / "libkvlapse_task.so"
    sources = sorted(str(p) for p in (REPOSITORY / "core" / "task").glob("*.cpp"))
    subprocess.run([os.environ.get("CXX", "g++"), "-std=c++20", "-O2", "-shared", "-fPIC", "-static-libstdc++",
                    "-static-libgcc", "-I", str(REPOSITORY), *sources, "-o", str(out)], check=True)
    os.environ["KVLAPSE_TASK_LIBRARY"] = str(out)  # child processes use the same one
    return str(out)


_library = ctypes.CDLL(_build())
_library.kvlapse_task_family.restype = ctypes.c_char_p
_library.kvlapse_task_make.restype = ctypes.c_int64
_library.kvlapse_task_make.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p,
                                       ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)]
_CAPACITY = 1 << 16
_buffer = ctypes.create_string_buffer(_CAPACITY)
_lengths = (ctypes.c_int64 * 3)()


def _families():
    found = {}
    for i in range(_library.kvlapse_task_family_count()):
        sizes = (ctypes.c_int * 3)()
        name = _library.kvlapse_task_family(i, sizes).decode()
        found[name] = tuple(sizes)
    return found


FAMILIES = _families()  # name -> (smallest, largest, default size)


def make(family, seed, size=0):
    total = _library.kvlapse_task_make(family.encode(), seed, size, _buffer, _CAPACITY, _lengths)
    if not 0 <= total <= _CAPACITY:
        raise ValueError(f"no problem for family {family}, size {size}: expected one of {FAMILIES}, got {total}")
    text = ctypes.string_at(_buffer, total).decode()
    a, b = _lengths[0], _lengths[0] + _lengths[1]
    return Problem(family, seed, text[:a], text[a:b], text[b:])
