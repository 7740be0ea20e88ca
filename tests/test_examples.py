"""The example does what README shows: it trains a ResNeXt on real images."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import resnext_kernels

PACKAGES = str(Path(resnext_kernels.__file__).parents[1])
SCRIPT = Path(__file__).parents[1] / "examples" / "train_fashion_mnist.py"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """The example on the package that is under test."""
    path = os.pathsep.join([PACKAGES, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, SCRIPT, *args],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path.strip(os.pathsep)},
    )


@pytest.mark.skipif(
    not FASHION_MNIST.exists(), reason="Debian's package dataset-fashion-mnist is not installed"
)
def test_quick() -> None:
    done = run("--quick")
    assert done.returncode == 0, done.stderr
    assert "3000 training and 1000 test images" in done.stdout
    found = re.search(r"first 10 steps ([\d.]+), of the last 10 ([\d.]+)", done.stdout)
    assert found, done.stdout
    first, last = map(float, found.groups())
    assert last < first / 2


def test_digits_and_comparison() -> None:
    done = run("--dataset", "digits", "--depth", "11", "--epochs", "2", "--compare")
    assert done.returncode == 0, done.stderr
    accuracies = [float(a) for a in re.findall(r"test accuracy ([\d.]+)%", done.stdout)]
    assert len(accuracies) == 2
    assert accuracies[-1] > 80  # chance is 10
    assert re.search(r"plain PyTorch +[\d.]+ +[\d.]+\nresnext_kernels +[\d.]+ +[\d.]+", done.stdout)


def test_missing_data_is_an_error(tmp_path: Path) -> None:
    done = run("--data", str(tmp_path))
    assert done.returncode == 1
    assert f"--data {tmp_path} has no train-images-idx3-ubyte.gz" in done.stderr
    assert "dataset-fashion-mnist" in done.stderr
    assert "--dataset digits" in done.stderr
