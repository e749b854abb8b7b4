"""Compiled engines that compute a network's features on a CPU: ONNX Runtime, in float32 or in int8.

The backbone alone is compiled, to which most of an inspection's time goes; alignment, density and calibration stay what they are.
An engine is kept only if it scores example images as the network does, within `TOLERANCE`.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from focus_ray.errors import ConfigError
from focus_ray.extras import require_extra
from focus_ray.model.network import FocusNet

TORCH = "torch"
ENGINES = (TORCH, "onnxruntime", "onnxruntime-int8")
TOLERANCE = {"onnxruntime": 0.01, "onnxruntime-int8": 0.05}  # of a score, at the median of the examples
FEWEST_EXAMPLES = 4
MOST_EXAMPLES = 32
QUANTISED = ("Conv", "Add", "MaxPool", "Pad", "Relu")  # kinds of nodes that int8 takes

Levels = tuple[Tensor, Tensor, Tensor]
Compiled = Callable[[Tensor], Levels]


class _Features(nn.Module):
    """Images (B, 3, H, W) in 0..1, aligned -> the three levels."""

    def __init__(self, net: FocusNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Levels:
        return self.net.features(images)[0]


def check_engine(engine: str, net: FocusNet, device: torch.device | str, num_examples: int) -> None:
    """Raises: ConfigError: no such engine, not on this device or for this network, too few examples.
    MissingPackageError: the extra `onnx` is not installed."""
    if engine not in ENGINES:
        raise ConfigError(f"engine={engine!r}: expected one of {', '.join(ENGINES)}")
    if engine == TORCH:
        return
    if torch.device(device).type != "cpu":
        raise ConfigError(
            f"engine={engine} computes on a CPU, and the device is {device}: give device=cpu, or engine=torch"
        )
    if len(net.feature_aligners):
        raise ConfigError(
            f"engine={engine} cannot align features between layers, as this model does: give engine=torch"
        )
    if num_examples < FEWEST_EXAMPLES:
        raise ConfigError(
            f"engine={engine} is checked, and for int8 scaled, by images of good parts of the category, at least "
            f"{FEWEST_EXAMPLES}, got {num_examples}: give examples, paths or bytes of image files"
        )
    require_extra("onnx", f"engine={engine}")


def compile_features(net: FocusNet, engine: str, examples: Tensor) -> Compiled:
    """The features of a network with float32 weights, by an engine that `check_engine` accepts.

    Args:
        examples: (N, 3, S, S) in 0..1, aligned, by which int8 is scaled.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.onnx"
        _export(net, path, examples[:2])
        if engine == "onnxruntime-int8":
            path = _quantised(path, examples.numpy())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # between its calls torch needs the cores
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])

    def features(images: Tensor) -> Levels:
        found = session.run(None, {"images": images.contiguous().numpy()})
        return cast(Levels, tuple(torch.from_numpy(level) for level in found))

    return features


def _export(net: FocusNet, path: Path, example: Tensor) -> None:
    batch = torch.export.Dim("batch")
    with quietly(), torch.no_grad():
        program = torch.onnx.export(
            _Features(net).eval(),
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=["level1", "level2", "level3"],
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
    assert program is not None
    program.save(str(path))


def _quantised(path: Path, examples: NDArray[np.float32]) -> Path:
    """The network of a file in int8, in another file."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, quantised = path.with_name("prepared.onnx"), path.with_name("int8.onnx")
    with quietly():
        quant_pre_process(str(path), str(prepared))
    quantise(prepared, quantised, examples)
    return quantised


def quantise(source: Path, target: Path, images: Iterable[NDArray[Any]], nodes: Sequence[str] | None = None) -> None:
    """Writes a model in int8: weights a channel each, activations by their range over the images [onnxruntime's QDQ].

    Args: images: each as the model's input "images" takes it, without the batch.  nodes: names of those it is done to; None: all.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.rest, None)
            return None if image is None else {"images": image[None]}

    with quietly():
        quantize_static(
            str(source),
            str(target),
            Images(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
            op_types_to_quantize=list(QUANTISED),
            nodes_to_quantize=nodes,
        )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what exporters tell of their own affairs."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
