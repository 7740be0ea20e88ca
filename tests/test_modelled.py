"""`python -m bench.modelled`: its floors, rows, files and tables; wrong kernels get no row."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tqdm", reason="the harness needs the extra [bench]")
pytest.importorskip("cpuinfo", reason="the harness needs the extra [bench]")

from bench import modelled
from bench.emulator import EMULATORS, Emulator, TritonEmulator
from resnext_kernels.backends import reference
from resnext_kernels.problem import ConvProblem

LAYER = (128, 6, 2)  # channels, height, stride
PROBLEM = ConvProblem(2, 6, 6, 128, groups=32, stride=2, dtype=torch.float16, device_type="cuda")


def made_row(who: str, layer: int, name: str, ratio: float) -> modelled.Row:
    """A row as `layer_rows` makes it."""
    c, h, stride = modelled.LAYERS[layer]
    kernels = [
        {"kernel": "conv", "bound": "alu", "bound_us": 9.0},
        {"kernel": "sum", "bound": "dram", "bound_us": 1.0},
    ]
    return {
        "backend": who, "pass": name, "n": 32, "c": c, "h": h, "groups": 32, "d": c // 32,
        "stride": stride, "commit": "0" * 12,
        "gpus": {
            gpu: {"ratio": ratio, "bar": modelled.bar_of(who, name, gpu), "kernels": kernels}
            for gpu in modelled.GPUS
        },
    }  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelled, "LAYERS", (LAYER,))


def require(who: str) -> None:
    reason = modelled.SUBJECTS[who].emulator.why_not()
    if reason is not None:
        pytest.skip(reason)


def test_compulsory_bytes_are_those_of_the_tensors() -> None:
    t = modelled.Tensors.of(PROBLEM)
    read = {
        "eval": [t.x, t.weight],
        "forward": [t.x, t.weight],
        "normalize": [t.z],
        "backward": [t.dy, t.z, t.dy, t.z, t.x, t.weight],
    }
    for name, tensors in read.items():
        results = modelled.run_pass(reference, name, t)
        written = [r for r in results if r.dim() == 4]  # not the vectors
        expected = sum(v.numel() * v.element_size() for v in [*tensors, *written])
        assert modelled.compulsory_bytes(PROBLEM, name) == expected, name


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("who", modelled.SUBJECTS)
def test_rows(who: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require(who)
    arguments = ["--backends", who, "--layers", "0", "--batch", "2", "--kernels"]
    assert modelled.main([*arguments, "--output", str(tmp_path)]) == 0
    rows = modelled.load(who, tmp_path)
    assert [r["pass"] for r in rows] == list(modelled.SUBJECTS[who].bars)
    for row in rows:
        assert (row["backend"], row["n"], row["c"], row["d"]) == (who, 2, 128, 4)
        assert list(row["gpus"]) == list(modelled.GPUS)
        for g in row["gpus"].values():
            assert g["bound_us"] == pytest.approx(
                sum(k["bound_us"] for k in g["kernels"]), rel=1e-4
            )
            assert g["ratio"] == pytest.approx(g["bound_us"] / g["floor_us"], rel=1e-4)
            assert g["ratio"] >= g["dram_ratio"] * (1 - 1e-4) >= 0.9
            for k in g["kernels"]:
                assert k["bound_us"] == k["times_us"][k["bound"]] == max(k["times_us"].values())
            convolves = row["pass"] != "normalize"
            assert (g["tensor_core_waste"] or 0) >= convolves
    text = capsys.readouterr().out
    assert all(k["kernel"] in text for g in rows[0]["gpus"].values() for k in g["kernels"])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("who", EMULATORS)
def test_launches_are_run_for_each_gpu_that_they_depend_on(
    who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(who)
    made: Counter[str] = Counter()
    original = Emulator.__init__

    def counting(self: Emulator, device: str, **options: Any) -> None:
        made[device] += 1
        original(self, device, **options)

    monkeypatch.setattr(Emulator, "__init__", counting)
    assert modelled.main(["--backends", who, "--passes", "eval", "--batch", "1"]) == 0
    per_device = EMULATORS[who].per_device
    assert made == Counter(modelled.GPUS if per_device else modelled.GPUS[:1])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("who", EMULATORS)
def test_a_wrong_kernel_gets_no_row(
    who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(who)
    module = importlib.import_module(modelled.SUBJECTS[who].module)
    right = module.conv_affine_relu
    monkeypatch.setattr(module, "conv_affine_relu", lambda *a, **k: right(*a, **k) * 1.01)
    arguments = ["--backends", who, "--passes", "eval", "--batch", "1", "--output", str(tmp_path)]
    with pytest.raises(AssertionError, match=f"{who}, eval, A100, result 0: error"):
        modelled.main(arguments)
    assert not list(tmp_path.iterdir())


def test_a_row_takes_the_place_of_its_like(tmp_path: Path) -> None:
    for layer, name, ratio in ((1, "eval", 1.0), (0, "backward", 2.0), (0, "eval", 3.0)):
        modelled.keep(made_row("cuda", layer, name, ratio), tmp_path)
    modelled.keep(made_row("cuda", 0, "eval", 4.0), tmp_path)
    document = json.loads(modelled.file_of("cuda", tmp_path).read_text())
    assert document["modelled"] is True
    found = [(*modelled.key_of(r)[1:], r["gpus"]["A100"]["ratio"]) for r in document["rows"]]
    assert found == [(0, 0, 4.0), (0, 3, 2.0), (1, 0, 1.0)]
    assert modelled.load("triton", tmp_path) == []


def test_readme_block() -> None:
    kept = {
        "cuda": [made_row("cuda", 0, "eval", 1.2), made_row("cuda", 0, "normalize", 1.0)],
        "triton": [made_row("triton", 0, "eval", 1.2), made_row("triton", 6, "eval", 1.9)],
        "plain_triton": [made_row("plain_triton", 0, "eval", 9.0)],
    }
    lines = modelled.readme_block(kept).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:4]]
    missed = "1.20 alu, MISSED 1.1"
    assert rows[0] == [
        "56, C=128, 32x4, stride 1", "eval",
        missed, "1.20 alu", "1.20 alu", "1.20 alu", "9.00 alu", "9.00 alu",
    ]  # fmt: skip
    triton = ["1.90 alu, MISSED 1.4", "1.90 alu, MISSED 1.8"]
    assert rows[1] == ["7, C=1024, 32x32, stride 1", "eval", "", "", *triton, "", ""]
    assert lines[4] == ""  # normalize has no bar
    assert lines[5].startswith("- `cuda`, 1 of 2 bars reached, at 000000000000 (")
    assert lines[6].startswith("- `triton`, 2 of 4 bars reached")
    assert lines[7].startswith("- `plain_triton`, no bars")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backends", "cpu"], "invalid choice: 'cpu'"),
        (["--layers", "7"], "invalid choice: 7"),
        (["--passes", "train"], "invalid choice: 'train'"),
        (["--batch", "0"], "--batch 0: has to be 1 or more"),
        (["--gpus", "A100", "--output", "bench/results"], "of batch 32 on both GPUs"),
        (["--batch", "1", "--output", str(modelled.RESULTS)], "of batch 32 on both GPUs"),
    ],
)
def test_wrong_option_is_explained(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(Emulator, "why_not", classmethod(lambda cls: None))
    with pytest.raises(SystemExit) as stopped:
        modelled.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_emulated_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Emulator, "why_not", classmethod(lambda cls: f"no {cls.backend} here"))
    for arguments in ([], ["--backends", "cuda", "triton"]):
        with pytest.raises(SystemExit):
            modelled.main(arguments)
        message = "cannot be modelled here: cuda: no cuda here; triton: no triton here"
        assert message in capsys.readouterr().err
    monkeypatch.setattr(TritonEmulator, "why_not", classmethod(lambda cls: None))
    monkeypatch.setattr(modelled, "layer_rows", lambda *args: [])
    assert modelled.main([]) == 0
    assert "left out: cuda: no cuda here\n" in capsys.readouterr().err
