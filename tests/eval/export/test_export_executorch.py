"""ExecuTorch's files compute what PyTorch computes, in its C++ runtime, in a process with and without PyTorch."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from exported_models import small_generator, small_mixer, small_pipeline
from torch import nn

from iris.errors import SettingError

pytest.importorskip("executorch", reason="ExecuTorch is an extra: uv sync --extra executorch")
if not shutil.which("c++"):
    pytest.skip("the C++ runtime's interface needs a compiler", allow_module_level=True)

from eval.export.executorch import lower, methods_of, operators_of, write_part
from eval.export.host.executorch import ExecutorchPart
from eval.export.model import check_part
from eval.export.parts import ExportPart, GeneratorPart, agreement, parts_of

ALLOWED = {"fp32": 1e-3, "fp16": 5e-3, "int8": 5e-2}


def part_of(module, *shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return ExportPart("part", module.eval(), (x,), ("x",), ("y",))


def error_of(part, tmp_path, dtype="fp32"):
    """Relative distance from PyTorch after lowering, writing, reading and running."""
    entry = write_part(part, dtype, tmp_path)
    return check_part(tmp_path / entry["file"], entry, part, "executorch")["rms"]


# A lowering takes seconds for each of its subgraphs; reports/mobile has all mixers, and all precisions.
@pytest.mark.long
@pytest.mark.parametrize("name", ["grfm", "attention"])
def test_mixers_agree_at_16x16_tokens(name, tmp_path):
    assert error_of(part_of(small_mixer(name), 1, 16, 16, 16), tmp_path) < ALLOWED["fp32"]


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """A small generator of three passes, its file and what is known of it."""
    folder = tmp_path_factory.mktemp("executorch")
    part = parts_of(small_pipeline(mixer="identity"), iterations=3)["generator"]
    entry = write_part(part, "fp32", folder)
    return part, folder / entry["file"], entry


@pytest.mark.long
@pytest.mark.xdist_group("exported_executorch")
def test_a_generator_is_three_methods(generator):
    part, _, entry = generator
    assert set(entry["methods"]) == {"start", "pass", "read"}
    assert all(method["planned_bytes"] > 0 for method in entry["methods"].values())
    start = entry["methods"]["start"]
    assert start["delegates"] > 0 and "executorch_call_delegate" not in start["undelegated"]
    assert start["inputs"]["z"] == {"shape": list(part.inputs[0].shape), "dtype": "float32"}


@pytest.mark.long
@pytest.mark.xdist_group("exported_executorch")
def test_one_file_serves_any_number_of_iterations(generator):
    part, path, entry = generator
    for iterations in (1, 3, 5):
        longer = replace(part, module=GeneratorPart(part.module.generator, iterations))
        assert check_part(path, entry, longer, "executorch")["rms"] < ALLOWED["fp32"]
    assert agreement(longer.outputs(), part.outputs())["rms"] > 1e-2  # the number of passes matters


@pytest.mark.long
@pytest.mark.xdist_group("exported_executorch")
def test_inputs_of_another_shape_are_refused(generator):
    part, path, entry = generator
    known = {name: x.numpy() for name, x in zip(part.input_names, part.inputs, strict=True)}
    with pytest.raises(ValueError, match=r"z must be \[1, "):
        ExecutorchPart(path, entry).run("start", known | {"z": known["z"][:, :1]})


def test_a_generator_whose_passes_differ_is_exported_whole():
    from iris.nn.depth import Depth

    part = replace(
        parts_of(small_pipeline(mixer="identity"))["generator"],
        module=GeneratorPart(small_generator(mixer="identity", depth=Depth(share=False)), 2),
    )
    assert set(methods_of(part)) == {"forward"}


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


def test_text_is_quantised_for_several_captions_at_once(tmp_path):
    assert (
        1e-3 < error_of(parts_of(small_pipeline(mixer="identity"), batch=2)["text"], tmp_path, "int8") < ALLOWED["int8"]
    )


def test_layer_norm_in_half_precision_is_computed_in_float32(tmp_path):
    """ExecuTorch 1.5.1's own is off by more than half of its output at this width."""
    torch.manual_seed(0)
    assert 1e-5 < error_of(part_of(nn.Sequential(nn.LayerNorm(384)), 4, 384), tmp_path, "fp16") < ALLOWED["fp16"]


def test_xnnpack_computes_the_erf_form_of_gelu(tmp_path):
    """What the module's text says of ExecuTorch 1.5.1; once it keeps the form, this fails and the text can go."""

    class TanhGELU(nn.Module):
        def forward(self, x):
            return F.gelu(x, approximate="tanh")

    part = part_of(TanhGELU(), 1, 64, 64)
    entry = write_part(part, "fp32", tmp_path)
    y = ExecutorchPart(tmp_path / entry["file"], entry).run("forward", {"x": part.inputs[0].numpy()})["y"]
    erf, tanh = F.gelu(part.inputs[0]), part.outputs()[0]
    assert agreement([y], [erf])["rms"] < 1e-6 and 1e-5 < agreement([y], [tanh])["rms"] < ALLOWED["fp32"]


def test_complex_numbers_are_why_the_transform_is_a_product():
    class Transform(nn.Module):
        def forward(self, x):
            spectrum = torch.fft.rfft2(x)
            return torch.fft.irfft2(torch.complex(spectrum.real, spectrum.imag), x.shape[-2:])

    with pytest.raises(Exception, match="aten.complex"):
        lower({"forward": part_of(Transform(), 1, 8, 8)})


def test_nothing_is_left_to_portable_kernels_of_what_xnnpack_takes():
    found = operators_of(lower({"forward": part_of(nn.Linear(16, 16), 1, 16)}).exported_program("forward"))
    assert found == {"delegates": 1, "undelegated": {}}


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(SettingError, match="missing.pte cannot be loaded .*opening failed, ExecuTorch error"):
        ExecutorchPart(tmp_path / "missing.pte", {"methods": {}})
    (tmp_path / "damaged.pte").write_bytes(b"not a program" * 100)
    with pytest.raises(SettingError, match="damaged.pte cannot be loaded .*opening failed, ExecuTorch error 0x23"):
        ExecutorchPart(tmp_path / "damaged.pte", {"methods": {}})
