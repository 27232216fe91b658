"""How the benchmarks measure: works in turn, in fresh processes, under either allocator."""

import ctypes.util
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

GEMM_SIZE = 1024
# glibc gives large blocks back to the system as soon as they are free, and the system clears the pages of the next
# one. These keep and reuse them.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36), "MALLOC_TOP_PAD_": str(2**28)}
# A work that takes longer, in seconds, is not tried with a larger micro-batch.
LONGEST_TRIAL = 1.0

Key = TypeVar("Key")


def allocators() -> dict[str, dict[str, str]]:
    """Allocator -> environment: the default, glibc tuned, and tcmalloc or jemalloc where they are installed."""
    found: dict[str, dict[str, str]] = {"default": {}, "tuned": KEEP_MEMORY}
    for name in ("tcmalloc", "jemalloc"):
        library = ctypes.util.find_library(name)
        if library is not None:
            found[name] = {"LD_PRELOAD": library}
    return found


def in_fresh_process(environment: Mapping[str, str], function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, from a Python that started under `environment`."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes by which a run raises the most that this process holds."""
    forget = Path("/proc/self/clear_refs")
    if forget.is_file():
        forget.write_text("5", "utf-8")  # the peak is what is held now (Linux, man proc_pid_clear_refs)
    before = _peak()
    run()
    return _peak() - before


def _peak() -> int:
    status = Path("/proc/self/status")
    if status.is_file():  # `ru_maxrss` cannot be reset, and counts the process that started this one too
        lines = status.read_text("utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def gemm_work() -> Callable[[], object]:
    """A square matrix product, the measure of what the processor can do."""
    square = torch.randn(GEMM_SIZE, GEMM_SIZE)
    return lambda: square @ square


def gemm_rate(seconds: float) -> float:
    """Floating-point operations per second of `gemm_work`."""
    return 2 * GEMM_SIZE**3 / seconds


def measure(
    work: Mapping[Key, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Key, float]:
    """Median seconds of each kind of work, taken in turn after one round that does not count."""
    seconds: dict[Key, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            start = clock()
            run()
            if number:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def try_sizes(make: Callable[[int], Callable[[], object]], sizes: Sequence[int], rounds: int = 2) -> dict[int, float]:
    """Size -> median seconds of `make(size)`, from the smallest size until it takes too long."""
    seconds: dict[int, float] = {}
    for size in sizes:
        seconds[size] = measure({"work": make(size)}, rounds)["work"]
        if seconds[size] > LONGEST_TRIAL:
            break
    return seconds


def best_size(seconds: Mapping[int, float]) -> int:
    """The size at which a unit costs least."""
    return min(seconds, key=lambda size: seconds[size] / size)
