"""Stage export: a trained model as files for a phone's runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.export import Runtime
from eval.export.model import export_model
from iris.io.progress import waiting
from iris.stages.engine import WEIGHTS, Context, Stage, Work, content_key


class Export(Stage):
    """Text encoder, generator and decoder for ONNX Runtime or ExecuTorch; see ``eval.export.model.export_model``.

    Args:
        model: leaves a saved model in a folder.
        batch: images that the files make at a time.
        iterations: passes through the core; None: as the model samples, or was trained.
    """

    kind = "export"

    def __init__(
        self, context: Context, model: Work, runtime: Runtime, batch: int = 1, iterations: int | None = None
    ) -> None:
        super().__init__(context, {"model": model})
        self.model, self.runtime, self.batch, self.iterations = model, runtime, batch, iterations

    @property
    def label(self) -> str:
        return f"{self.runtime.name} {self.runtime.precision}"

    @property
    def place(self) -> Path:
        return self.folder / WEIGHTS

    def facts(self) -> dict[str, Any]:
        return {**vars(self.runtime), "batch": self.batch, "iterations": self.iterations}

    def work(self) -> dict[str, Any]:
        runtime, model = self.runtime, self.model.place
        with waiting(self.context.progress, f"exporting to {self.label}"):
            about = export_model(
                model, self.place, runtime.name, runtime.precision, batch=self.batch, iterations=self.iterations
            )
        parts = about["parts"].items()
        return {
            "agreement": {name: one["agreement"] for name, one in parts},
            "versions": about["versions"],
            "content": content_key("model", self.place),
        }
