"""Outlier detector of images with the interface of scikit-learn: fit, predict, score_samples, decision_function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted

from focus_ray.api import Image, Model, fit


class AnomalyDetector(OutlierMixin, BaseEstimator):
    """Outlier detector of images; X is a list of images, an array (N, H, W, 3) or (N, H, W) of uint8, or one image.

    Args:
        image_size_px: side length to which images are resized.
        weights: weights of the backbone, as model.weights.
        target_fpr: share of good images that may be called outliers.
        settings: further settings, as `focus_ray.fit` takes them.

    Attributes:
        model_: the fitted `Model`.
        offset_: offset of `decision_function`, the negative image threshold.
    """

    def __init__(
        self,
        image_size_px: int = 256,
        weights: str = "default",
        target_fpr: float = 0.05,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.image_size_px, self.weights, self.target_fpr, self.settings = image_size_px, weights, target_fpr, settings

    def fit(self, X: Sequence[Image] | NDArray[Any], y: object = None) -> AnomalyDetector:
        """Fits the model on images X of good parts. y is ignored. Raises: as `focus_ray.fit`."""
        settings = {
            "model__image_size_px": self.image_size_px,
            "model__weights": self.weights,
            "calibration__target_fpr": self.target_fpr,
            **(self.settings or {}),
        }
        self.model_: Model = fit(X, **settings)
        self.offset_ = -self.model_.threshold
        return self

    def score_samples(self, X: Sequence[Image] | NDArray[Any]) -> NDArray[np.float64]:
        """Returns the negative image scores (N,). Higher is more normal."""
        check_is_fitted(self)
        return -np.array([inspection.score for inspection in self.model_.inspect_all(X)], dtype=np.float64)

    def decision_function(self, X: Sequence[Image] | NDArray[Any]) -> NDArray[np.float64]:
        """Returns threshold minus score (N,), which is negative for outliers."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Sequence[Image] | NDArray[Any]) -> NDArray[np.int64]:
        """Returns the verdicts of `Model.inspect` (N,): 1 for good images, -1 for outliers."""
        check_is_fitted(self)
        return np.where([inspection.anomalous for inspection in self.model_.inspect_all(X)], -1, 1).astype(np.int64)

    def p_values(self, X: Sequence[Image] | NDArray[Any]) -> NDArray[np.float64]:
        """Returns p-values (N,) in (0, 1], small if an image differs from the good images; see docs/learn/verdicts.md."""
        check_is_fitted(self)
        return np.array([inspection.p_value for inspection in self.model_.inspect_all(X)], dtype=np.float64)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state with the content of the bundle instead of the model, because a pickle cannot contain folders."""
        state = dict(super().__getstate__())
        if "model_" in state:
            state["model_"] = self.model_.to_files()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "model_" in state:
            state = {**state, "model_": Model.from_files(state["model_"])}
        super().__setstate__(state)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        tags.non_deterministic = False
        return tags
