"""A trial's model as MLflow loads and serves it: captions in, images out. MLflow runs this file (a model from code), so
that nothing is pickled; the weights are the pipeline's own safetensors.

    model = mlflow.pyfunc.load_model("models:/<model id>")
    images = model.predict(["a red circle"])                            # uint8 [1, H, W, 3]
    images = model.predict(["a red circle"], params={"steps": 8, "seed": 1})
"""

from __future__ import annotations

from typing import Any

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel


class TextToImage(PythonModel):
    """``IrisPipeline`` behind MLflow's interface; params are the fields of ``SamplingSettings`` and ``seed``."""

    _skip_type_hint_validation = True  # MLflow's word: the logged signature says what goes in

    def load_context(self, context: Any) -> None:
        """Load the weights that lie beside the model."""
        from iris.pipeline import IrisPipeline

        self.pipeline = IrisPipeline.from_pretrained(context.artifacts["pipeline"])
        self.sample = dict(context.model_config["sample"])

    def predict(self, context: Any, model_input, params: dict[str, Any] | None = None) -> np.ndarray:
        """Images uint8 [N, H, W, 3] of N captions: a list, an array, or a table with one column of them."""
        captions = [str(text) for text in np.asarray(model_input).reshape(-1)]
        given = dict(params or {})
        seed = int(given.pop("seed", 0))
        settings = self.pipeline.sampling_settings(**self.sample | given)
        return self.pipeline.generate(captions, settings, seed).numpy()


mlflow.models.set_model(TextToImage())
