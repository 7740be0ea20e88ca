"""The choice between configurations of a kernel by timing them, remembered on disk.

Off unless `autotune()` or RESNEXT_KERNELS_AUTOTUNE=1 asks for it: a backend then takes the first
of its candidates, the choice of its table. Timing is `triton.testing.do_bench`'s. A result is one
JSON file in RESNEXT_KERNELS_CACHE, else in resnext_kernels/ of XDG_CACHE_HOME or ~/.cache, under
the hash of all that it depends on: device, versions, kernel source, problem and candidates.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

__all__ = ["autotune", "choose", "directory", "enabled"]

_ENVIRONMENT = "RESNEXT_KERNELS_AUTOTUNE"
_CACHE = "RESNEXT_KERNELS_CACHE"
_asked: bool | None = None
_chosen: dict[str, Any] = {}  # by the file's name: what this process has tuned or read
_lock = threading.Lock()  # two candidates timed at once would disturb each other

Config = TypeVar("Config")  # a dataclass of plain numbers


def autotune(on: bool = True) -> None:
    """Time the configurations of the Triton kernels at the first call of each problem, or not.

    For the whole process, as `torch.backends.cudnn.benchmark`, and before the environment variable
    RESNEXT_KERNELS_AUTOTUNE. Results of a problem may differ between two configurations by
    roundings. While a CUDA graph is captured nothing is timed: run each problem once before.

    Args:
        on: False takes the configurations of the table, even where timed ones are known.
    """
    global _asked
    _asked = on


def enabled(device: torch.device) -> bool:
    """Whether configurations are timed on this device: CUDA ones alone are.

    Raises:
        ValueError: If RESNEXT_KERNELS_AUTOTUNE is neither 0 nor 1.
    """
    if device.type != "cuda":
        return False
    if _asked is not None:
        return _asked
    text = os.environ.get(_ENVIRONMENT) or "0"
    if text not in ("0", "1"):
        raise ValueError(f"{_ENVIRONMENT} must be '0' or '1', got {text!r}")
    return text == "1"


def directory() -> Path:
    """Where results are kept."""
    if given := os.environ.get(_CACHE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnext_kernels"


def choose(
    candidates: Sequence[Config],
    run: Callable[[Config], Any],
    *,
    device: torch.device,
    source: str,
    problem: dict[str, Any],
) -> Config:
    """The fastest candidate; the first one where nothing is known and a CUDA graph is captured.

    Args:
        candidates: Configurations, the table's choice first.
        run: Enqueues the kernel with a configuration, as often as it is called.
        device: The tensors' own, a CUDA device.
        source: Hash of the kernel's source.
        problem: Everything else that the times depend on, plain values.
    """
    key = _key(candidates, device, source, problem)
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest() + ".json"
    with _lock, torch.cuda.device(device):
        if name not in _chosen:
            path = directory() / name
            found = _read(path, key, candidates)
            if found is None:
                if torch.cuda.is_current_stream_capturing():
                    return candidates[0]
                times = [_time_ms(run, config) for config in candidates]
                found = candidates[times.index(min(times))]
                _write(path, key, candidates, times, found)
            _chosen[name] = found
        best: Config = _chosen[name]
    return best


def _key(
    candidates: Sequence[Any], device: torch.device, source: str, problem: dict[str, Any]
) -> dict[str, Any]:
    import triton

    return {
        "device": torch.cuda.get_device_name(device),
        "triton": triton.__version__,
        "torch": torch.__version__,
        "source": source,
        "problem": problem,
        "candidates": [asdict(config) for config in candidates],
    }


def _time_ms(run: Callable[[Config], Any], config: Config) -> float:
    """Median of many calls; infinite for what does not fit the device."""
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    try:
        return float(do_bench(lambda: run(config), return_mode="median"))
    except (OutOfResources, PTXASError):
        return math.inf


def _read(path: Path, key: dict[str, Any], candidates: Sequence[Config]) -> Config | None:
    """The candidate that the file names; None, with a warning, for a file that makes no sense."""
    try:
        stored = json.loads(path.read_text())
        if stored["key"] != key:
            raise ValueError("it is about something else")
        return candidates[key["candidates"].index(stored["chosen"])]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"{path}: not a result of autotuning ({type(error).__name__}: {error}); tuning anew",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _write(
    path: Path,
    key: dict[str, Any],
    candidates: Sequence[Any],
    times_ms: Sequence[float],
    chosen: Any,
) -> None:
    """In one step, so that another process reads all or nothing; a warning where it cannot be."""
    times = [t if math.isfinite(t) else None for t in times_ms]
    text = json.dumps({"key": key, "times_ms": times, "chosen": asdict(chosen)}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        warnings.warn(
            f"{path}: the result of autotuning cannot be written ({error}); it is known to this "
            "process alone",
            RuntimeWarning,
            stacklevel=2,
        )
