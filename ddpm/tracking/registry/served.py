"""The registered model, as MLflow loads it. The model's folder contains the code and the checkpoint, so no checkout is needed.

Each row of the input requests images:

- n: the number of images.
- seed, steps, sampler: optional; by default the values with which the model was registered. The same seed gives the same images.
- label: optional, for a conditional model: the name or number of a class. Without a label, the classes are mixed.

The output holds the images of all rows in order: uint8 [N, C, H, W].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

BATCH = 128
MOST = 100_000  # the largest number of images per row


class ImageModel(PythonModel):
    """A checkpoint, and the sampler settings with which the model was promoted."""

    def load_context(self, context: Any) -> None:
        from ddpm.files import checkpoint
        from ddpm.runtime.device import find_device

        config = context.model_config
        self.settings = dict(config["settings"])
        self.seed = int(config["seed"])
        self.device = find_device("auto")
        folder = Path(context.artifacts["checkpoint"])
        self.denoiser, self.model = checkpoint.load(folder, self.device, self.settings.pop("clip"))
        if self.model.weights_sha256 != config.get("weights_sha256", self.model.weights_sha256):
            raise ValueError(
                f"{folder}: the checkpoint is not the one that was registered; restore the artifacts of the model"
            )

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> np.ndarray:
        """Returns images, uint8 [N, C, H, W]. Raises ValueError if an input is invalid, such as an unknown sampler or class."""
        given = (
            {key: value for key, value in row.items() if not pd.isna(value)} for row in model_input.to_dict("records")
        )
        return np.concatenate([self._images(**row) for row in given])

    def _images(
        self,
        n: int,
        seed: int | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        label: str | None = None,
    ) -> np.ndarray:
        from ddpm.runtime.drawing import class_labels, draw, with_sampler

        if not 1 <= n <= MOST:
            raise ValueError(f"n = {n} must lie in 1 ... {MOST}")
        settings = with_sampler(self.settings, sampler or self.settings["sampler"])
        chosen = int(steps) if steps else settings["steps"]
        images, _ = draw(
            self.denoiser,
            tuple(self.model.data.shape),
            range(int(n)),
            seed=self.seed if seed is None else int(seed),
            batch=BATCH,
            steps=chosen,
            settings={key: value for key, value in settings.items() if key != "steps"},
            device=self.device,
            labels=class_labels(self.model, int(n), label),
        )
        return images


set_model(ImageModel())
