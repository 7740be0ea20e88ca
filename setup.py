"""Builds resnext_kernels._C from csrc/ with CMake and Ninja; everything else is in pyproject.toml.

Environment variables:
    RESNEXT_KERNELS_NO_EXT=1   install without the compiled library (no C++ compiler needed)
    RESNEXT_KERNELS_CUDA=1|0   demand or switch off the CUDA kernels; unset: built if nvcc is found
    CMAKE_ARGS                 further arguments for CMake
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent / "csrc"
HINT = (
    "resnext_kernels: the compiled library could not be built; the messages above say why.\n"
    "It needs a C++17 compiler with OpenMP (Debian and Ubuntu: apt-get install g++; or set CXX).\n"
    "To install without the compiled library set RESNEXT_KERNELS_NO_EXT=1: the package then works\n"
    "with the backends that need no compiler."
)


class CMakeBuild(build_ext):
    """Builds the one extension, which is one CMake project."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        build_dir = Path(self.build_temp).resolve()
        output_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            *("-S", str(CSRC), "-B", str(build_dir), "-G", "Ninja"),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output_dir}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            # auto unless demanded: a build directory that is used again must not remember it
            f"-DRESNEXT_KERNELS_CUDA={os.environ.get('RESNEXT_KERNELS_CUDA') or 'AUTO'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        if ninja := shutil.which("ninja"):  # an isolated build's own ninja moves every time
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build_dir), "--target", "_C"], check=True)
        except FileNotFoundError:
            raise SystemExit(f"cmake was not found.\n{HINT}") from None
        except subprocess.CalledProcessError:
            raise SystemExit(HINT) from None


without_extension = os.environ.get("RESNEXT_KERNELS_NO_EXT", "0") not in ("", "0")

setup(
    ext_modules=[] if without_extension else [Extension("resnext_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
