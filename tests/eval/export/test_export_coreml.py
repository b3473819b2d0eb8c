"""Core ML converts the parts. It is not run: its runtime is a part of macOS and iOS."""

import pytest
import torch
from exported_models import small_mixer, small_pipeline

from iris.errors import SettingError

pytest.importorskip("coremltools", reason="coremltools is an extra: pip install coremltools")

from eval.export.coreml import convert_coreml
from eval.export.parts import ExportPart, parts_of


def mixer_part(module):
    x = torch.randn(1, 8, 8, 16, generator=torch.Generator().manual_seed(0))
    return ExportPart("mixer", module, (x,), ("x",), ("y",))


@pytest.mark.parametrize("name", ["grfm", "attention"])
def test_mixers_convert(name):
    found = convert_coreml(mixer_part(small_mixer(name)))
    assert found.status == "converted, not run" and found.converted and found.why == ""
    assert found.operations["linear"] >= 2 and "const" not in found.operations and found.size > 0


def test_all_parts_convert_and_are_kept(tmp_path):
    for name, part in parts_of(small_pipeline(mixer="conv3"), iterations=1).items():
        found = convert_coreml(part, "fp32", tmp_path)
        assert found.status == "converted, not run", (name, found.why)
        assert (tmp_path / f"{name}.fp32.mlpackage").is_dir()


def test_what_does_not_convert_is_told():
    class Transform(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.eigvalsh(x)

    found = convert_coreml(mixer_part(Transform()))
    assert not found.converted and found.size == 0
    assert "eigh" in found.status and found.status.startswith("not converted: ")


def test_a_wrong_precision_is_named():
    with pytest.raises(SettingError, match="runtime.precision='int8'"):
        convert_coreml(mixer_part(small_mixer("identity")), "int8")
