"""`pytest --benchmark` runs the benchmarks of bench/; plain `pytest` the tests without them."""

from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark",
        dest="run_benchmarks",
        action="store_true",
        help="run the benchmarks of bench/ instead of the tests; all --benchmark-* options of "
        "pytest-benchmark apply (--benchmark-json, --benchmark-compare, --benchmark-histogram)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    run = config.getoption("run_benchmarks")
    if run and not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install '.[bench]'")
    if run:
        config.option.benchmark_only = True
        if config.args_source is not pytest.Config.ArgsSource.ARGS:
            config.args = [str(config.rootpath / "bench")]
    elif not getattr(config.option, "benchmark_only", False):
        config.option.benchmark_skip = True


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """What the kernels ran on, in pytest-benchmark's JSON."""
    import torch

    from bench import timing

    machine_info["resnext_kernels"] = {
        **timing.machine(),
        "versions": timing.versions(),
        "threads": torch.get_num_threads(),
    }
