"""Compiled engines that compute a network's features on a CPU: ONNX Runtime, in float32 or in int8.

Only the backbone is compiled, because it takes most of an inspection's time. Alignment, density and calibration do not change.
An engine is used only if its scores of example images agree with the network's scores within `TOLERANCE`.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from focus_ray.errors import ConfigError, check_extra_is_installed
from focus_ray.features.network import FocusNet

TORCH = "torch"
ENGINES = (TORCH, "onnxruntime", "onnxruntime-int8")
TOLERANCE = {"onnxruntime": 0.01, "onnxruntime-int8": 0.05}  # median relative change of the examples' scores
MIN_EXAMPLES = 4
MAX_EXAMPLES = 32
QUANTISED_OPERATORS = ("Conv", "Add", "MaxPool", "Pad", "Relu")  # ONNX operators that are computed in int8

FeatureLevels = tuple[Tensor, Tensor, Tensor]
FeatureFunction = Callable[[Tensor], FeatureLevels]


class _FeatureExtractor(nn.Module):
    """Module that maps B aligned images (B, 3, H, W), values 0 to 1, to the features of three layers of the backbone."""

    def __init__(self, net: FocusNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> FeatureLevels:
        return self.net.compute_features(images)[0]


def check_engine_support(engine: str, net: FocusNet, device: torch.device | str, num_examples: int) -> None:
    """Checks that an engine can compute the features of a network on a device.

    Args:
        engine: a value of `ENGINES`.
        num_examples: number of example images that the caller has.

    Raises:
        ConfigError: the engine does not exist or does not support this device or network, or there are too few examples.
        MissingPackageError: the package extra `onnx` is not installed.
    """
    if engine == TORCH:
        return
    if engine not in ENGINES:
        raise ConfigError(f"engine={engine!r}: expected one of {', '.join(ENGINES)}")
    if torch.device(device).type != "cpu":
        raise ConfigError(
            f"engine={engine} computes on a CPU, but the device is {device}: give device=cpu, or engine=torch"
        )
    if len(net.feature_aligners):
        raise ConfigError(
            f"engine={engine} cannot align features between layers, as this model does: give engine=torch"
        )
    if num_examples < MIN_EXAMPLES:
        raise ConfigError(
            f"engine={engine} needs at least {MIN_EXAMPLES} example images of good parts of the category, for a check of its "
            f"scores and for the scales of int8, got {num_examples}: give examples, as paths or bytes of image files"
        )
    check_extra_is_installed("onnx", f"engine={engine}")


def compile_feature_extractor(net: FocusNet, engine: str, examples: Tensor) -> FeatureFunction:
    """Exports a network to ONNX and returns a function that computes its features with ONNX Runtime on the CPU.

    The returned function takes B images (B, 3, S, S) and returns the features of three layers of the backbone. S is the side of
    the network's input in pixels.

    Args:
        net: a network with float32 weights.
        engine: onnxruntime or onnxruntime-int8.
        examples: N images (N, 3, S, S), values 0 to 1, after image alignment. The export runs on the first two. For int8, all
            images set the scales that convert floats to integers.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = features_path = Path(folder) / "features.onnx"
        _export_feature_extractor(net, path, examples[:2])
        if engine == "onnxruntime-int8":
            from onnxruntime.quantization.shape_inference import quant_pre_process

            prepared, path = path.with_name("prepared.onnx"), path.with_name("int8.onnx")
            with suppress_exporter_messages():
                quant_pre_process(str(features_path), str(prepared))
            quantise_onnx_model(prepared, path, examples.numpy())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # between two calls of the session torch needs the cores
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])

    def compute_features(images: Tensor) -> FeatureLevels:
        levels = session.run(None, {"images": images.contiguous().numpy()})
        return cast(FeatureLevels, tuple(torch.from_numpy(level) for level in levels))

    return compute_features


def _export_feature_extractor(net: FocusNet, path: Path, example: Tensor) -> None:
    """Writes the network's feature extractor as an ONNX file that accepts every batch size. example: images (B, 3, S, S)."""
    with suppress_exporter_messages(), torch.no_grad():
        program = torch.onnx.export(
            _FeatureExtractor(net).eval(),
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=["level1", "level2", "level3"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    program.save(str(path))


def quantise_onnx_model(
    source: Path, target: Path, images: Iterable[NDArray[Any]], nodes: Sequence[str] | None = None
) -> None:
    """Writes a copy of an ONNX model that computes in int8, in the QDQ format of ONNX Runtime.

    A scale converts floats to integers. Weights get a scale for each channel. Activations get a scale from their range over
    the images.

    Args:
        source: path of the model's ONNX file.
        target: path of the int8 file.
        images: example images for the model's input "images", without the batch dimension.
        nodes: names of the nodes (operations) to quantise, if their kind is in `QUANTISED_OPERATORS`; None: all nodes of these
            kinds.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class ExampleReader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.remaining = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.remaining, None)
            return None if image is None else {"images": image[None]}

    with suppress_exporter_messages():
        quantize_static(
            str(source),
            str(target),
            ExampleReader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
            op_types_to_quantize=list(QUANTISED_OPERATORS),
            nodes_to_quantize=nodes,
        )


@contextlib.contextmanager
def suppress_exporter_messages() -> Iterator[None]:
    """Context manager: suppresses Python warnings, and all log messages up to the level WARNING, in the whole process."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
