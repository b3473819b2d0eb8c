"""A part of an exported model in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from iris.errors import SettingError

ERRORS = 3  # ONNX Runtime's level of logging; it warns of what it cannot fold in half precision


class OnnxPart:
    """See ``eval.export.host.pipeline.OpenPart``. One method, "forward".

    ``lean`` keeps ONNX Runtime from copying the weights into a layout that is faster: they stay pages of the file, which the
    system can take back.

    Raises:
        SettingError: the file cannot be loaded.
    """

    def __init__(self, path: Path, entry: Mapping[str, Any], threads: int = 1, lean: bool = False) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, ERRORS
        options.add_session_config_entry("session.disable_prepacking", "1" if lean else "0")
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own classes share no other base
            raise SettingError(f"model={path.parent}: {path.name} cannot be loaded ({error})") from error

    def run(self, method: str, known: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        inputs = {given.name: known[given.name] for given in self._session.get_inputs()}
        names = [made.name for made in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, inputs), strict=True))

    def close(self) -> None:
        del self._session
