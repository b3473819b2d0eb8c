"""ExecuTorch's files compute what PyTorch computes, in its Python runtime and in its C++ runtime without PyTorch."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exported_models import small_generator, small_mixer, small_pipeline
from torch import nn

from iris.errors import SettingError

pytest.importorskip("executorch", reason="ExecuTorch is an extra: pip install executorch==1.5.1")

from eval.export.executorch import (
    MANIFEST,
    WHOLE,
    Program,
    agreement,
    export_executorch,
    lower,
    methods_of,
    operators_of,
    run_file,
)
from eval.export.executorch_host import Host, HostError, progress_of, run_in_passes
from eval.export.parts import ExportPart, GeneratorPart, parts_of

ALLOWED = {"fp32": 1e-3, "fp16": 5e-3, "int8": 5e-2}
needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="the C++ runtime's interface needs a compiler")


def part_of(module, *shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return ExportPart("part", module.eval(), (x,), ("x",), ("y",))


def error_of(part, tmp_path, dtype="fp32"):
    """Relative distance from PyTorch after lowering, writing, reading and running."""
    path = tmp_path / "part.pte"
    path.write_bytes(lower({WHOLE: part}, dtype).to_executorch().buffer)
    return agreement(run_file(path, part), part.outputs())["rms"]


# A lowering takes seconds for each of its subgraphs; reports/mobile has all mixers, and all precisions.
@pytest.mark.parametrize("name", ["grfm", "attention"])
def test_mixers_agree_at_16x16_tokens(name, tmp_path):
    assert error_of(part_of(small_mixer(name), 1, 16, 16, 16), tmp_path) < ALLOWED["fp32"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A small pipeline's parts and the folder they were exported to."""
    folder = tmp_path_factory.mktemp("executorch")
    parts = parts_of(small_pipeline(mixer="identity"), iterations=3)
    return parts, folder, export_executorch(parts, folder)


@pytest.mark.xdist_group("exported_executorch")
def test_the_manifest_says_what_was_written(exported):
    parts, folder, manifest = exported
    assert json.loads((folder / MANIFEST).read_text()) == manifest
    assert {one["part"]: set(one["methods"]) for one in manifest["files"]} == {
        "decoder": {"forward"},
        "generator": {"start", "pass", "read"},
        "text": {"forward"},
    }
    for one in manifest["files"]:
        assert one["bytes"] == (folder / one["file"]).stat().st_size and one["agreement"]["rms"] < ALLOWED["fp32"]
        assert all(method["planned_bytes"] > 0 for method in one["methods"].values())
    start = next(one for one in manifest["files"] if one["part"] == "generator")["methods"]["start"]
    assert start["delegates"] > 0 and "executorch_call_delegate" not in start["undelegated"]
    assert start["inputs"]["z"] == {"shape": list(parts["generator"].inputs[0].shape), "dtype": "float32"}
    assert set(manifest["versions"]) == {"executorch", "torch", "torchao"}


@pytest.mark.xdist_group("exported_executorch")
def test_one_file_serves_any_number_of_iterations(exported):
    parts, folder, _ = exported
    generator = parts["generator"].module.generator
    for iterations in (1, 5):
        longer = replace(parts["generator"], module=GeneratorPart(generator, iterations))
        outputs = run_file(folder / "generator.fp32.pte", longer)
        assert agreement(outputs, longer.outputs())["rms"] < ALLOWED["fp32"]
    assert agreement(outputs, parts["generator"].outputs())["rms"] > 1e-2  # the number of passes matters


@needs_compiler
@pytest.mark.xdist_group("exported_executorch")
def test_the_runtime_without_pytorch_computes_the_same(exported):
    parts, folder, manifest = exported
    part = parts["generator"]
    methods = next(one["methods"] for one in manifest["files"] if one["part"] == "generator")
    host = Host(folder / "generator.fp32.pte", methods)
    inputs = {name: x.numpy() for name, x in zip(part.input_names, part.inputs, strict=True)}
    velocity = run_in_passes(host.run, inputs, [np.array([done]) for done in progress_of(3)])
    np.testing.assert_array_equal(velocity, run_file(folder / "generator.fp32.pte", part)[0].numpy())
    with pytest.raises(ValueError, match=r"z must be \[1, "):
        host.run("start", inputs | {"z": inputs["z"][:, :1]})
    host.close()


@needs_compiler
@pytest.mark.xdist_group("exported_executorch")
def test_a_whole_model_runs_in_a_process_without_pytorch(exported):
    _, folder, _ = exported
    code = (
        "import sys; from eval.export.executorch_measuring import load_for_measuring\n"
        f"generate = load_for_measuring({{'folder': {str(folder)!r}, 'steps': 2, 'iterations': 3}})\n"
        "images = generate(); assert images.shape == (1, 3, 16, 16) and images.std() > 0\n"
        "assert set(generate.parts) == {'text', 'generator', 'decoder'} and generate.parts['generator'].count == 2\n"
        "for part in generate.parts.values(): part()\n"
        "assert 'torch' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_a_generator_whose_passes_differ_is_exported_whole():
    from iris.nn.depth import Depth

    part = replace(
        parts_of(small_pipeline(mixer="identity"))["generator"],
        module=GeneratorPart(small_generator(mixer="identity", depth=Depth(share=False)), 2),
    )
    assert set(methods_of(part)) == {WHOLE}
    assert set(methods_of(part, passes=False)) == {WHOLE}


def test_quantised_are_the_linear_layers_that_are_not_precise(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(32, 32, 3, padding=1, groups=32)
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):  # a linear layer on a convolution's permuted output: ExecuTorch 1.5.1 refuses it as it is
            return self.second(self.first(self.convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))

    torch.manual_seed(0)
    part = part_of(Two(), 1, 4, 4, 32)
    both, none = (
        error_of(part, tmp_path, "int8"),
        error_of(replace(part, precise=("first.weight", "second.weight")), tmp_path, "int8"),
    )
    assert none < 1e-6 < 1e-3 < both < ALLOWED["int8"]


def test_layer_norm_in_half_precision_is_computed_in_float32(tmp_path):
    """ExecuTorch 1.5.1's own is off by more than half of its output at this width."""
    torch.manual_seed(0)
    assert 1e-5 < error_of(part_of(nn.Sequential(nn.LayerNorm(384)), 4, 384), tmp_path, "fp16") < ALLOWED["fp16"]


def test_xnnpack_computes_the_erf_form_of_gelu(tmp_path):
    """What the module's text says of ExecuTorch 1.5.1; once it keeps the form, this fails and the text can go."""

    class TanhGELU(nn.Module):
        def forward(self, x):
            return F.gelu(x, approximate="tanh")

    part, path = part_of(TanhGELU(), 1, 64, 64), tmp_path / "part.pte"
    path.write_bytes(lower({WHOLE: part}).to_executorch().buffer)
    (y,) = run_file(path, part)
    erf, tanh = F.gelu(part.inputs[0]), part.outputs()[0]
    assert agreement([y], [erf])["rms"] < 1e-6 and 1e-5 < agreement([y], [tanh])["rms"] < ALLOWED["fp32"]


def test_complex_numbers_are_why_the_transform_is_a_product():
    class Transform(nn.Module):
        def forward(self, x):
            spectrum = torch.fft.rfft2(x)
            return torch.fft.irfft2(torch.complex(spectrum.real, spectrum.imag), x.shape[-2:])

    with pytest.raises(Exception, match="aten.complex"):
        lower({WHOLE: part_of(Transform(), 1, 8, 8)})


def test_nothing_is_left_to_portable_kernels_of_what_xnnpack_takes():
    found = operators_of(lower({WHOLE: part_of(nn.Linear(16, 16), 1, 16)}).exported_program(WHOLE))
    assert found == {"delegates": 1, "undelegated": {}}


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"dtypes": "fp8"}, "export.dtype='fp8'"),
        ({"scan": "loop"}, "scan='loop'"),
        ({"dtypes": ()}, "at least one part and one dtype"),
    ],
)
def test_bad_settings_are_named_before_anything_is_lowered(tmp_path, wrong, error):
    with pytest.raises((SettingError, ValueError), match=error):
        export_executorch({"part": part_of(nn.Linear(4, 4), 1, 4)}, tmp_path / "new", **wrong)


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(SettingError, match="is not a file"):
        Program(tmp_path / "missing.pte")
    with pytest.raises(ValueError, match="finite"):
        agreement([torch.tensor([float("nan")])], [torch.ones(1)])


@needs_compiler
def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "damaged.pte").write_bytes(b"not a program" * 100)
    with pytest.raises(HostError, match="damaged.pte: opening failed, ExecuTorch error 0x23"):
        Host(tmp_path / "damaged.pte", {})
    with pytest.raises(SettingError, match="threads=0"):
        Host(tmp_path / "damaged.pte", {}, threads=0)
