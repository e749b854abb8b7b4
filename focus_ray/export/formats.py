"""Export formats (ONNX, torch.export, OpenVINO): writes a scorer in a format, and opens a written model to run it."""

from __future__ import annotations

import contextlib
import errno
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from focus_ray.bundle.engine import QUANTISED_OPERATORS, quantise_onnx_model, suppress_exporter_messages
from focus_ray.errors import ConfigError, ExportError, check_extra_is_installed
from focus_ray.export.scorer import BOX, OUTPUTS, ExportableScorer, compute_max_image_side_px
from focus_ray.storage.files import find_os_error

MODEL_FILES = {"onnx": "model.onnx", "torch": "model.pt2", "openvino": "model.xml"}
PRECISIONS = {"onnx": ("fp32", "fp16", "int8"), "torch": ("fp32", "fp16"), "openvino": ("fp32", "fp16", "int8")}
# Without this setting OpenVINO computes in bfloat16 on CPUs that support it.
OPENVINO_SETTINGS = {"INFERENCE_PRECISION_HINT": "f32"}
INPUT = "images"

_REQUIRED_EXTRAS = {"torch": (), "onnx": ("onnx",), "openvino": ("onnx", "openvino")}
_MAX_BATCH_SIZE = 1024

RunModel = Callable[[NDArray[np.uint8]], dict[str, NDArray[Any]]]
"""Function of uint8 images (B, H, W, 3) that returns the outputs of an export by name."""


def check_export_format(to: str, precision: str) -> None:
    """Checks that the format exists in this precision and that its packages are installed.

    Raises:
        ConfigError: the format is unknown, or it does not support the precision.
        MissingPackageError: an extra is not installed.
    """
    if to not in MODEL_FILES:
        raise ConfigError(f"--to {to}: expected one of {', '.join(MODEL_FILES)}")
    if precision not in PRECISIONS[to]:
        hint = ": for int8, give --to onnx or openvino" if precision == "int8" else ""
        raise ConfigError(f"--to {to} --precision {precision}: expected one of {', '.join(PRECISIONS[to])}{hint}")
    for extra in _REQUIRED_EXTRAS[to]:
        check_extra_is_installed(extra, f"focus-ray export --to {to}")


def write_model_files(
    scorer: ExportableScorer, to: str, precision: str, folder: Path, int8_images: Sequence[NDArray[np.uint8]]
) -> None:
    """Writes a scorer as model files of a format to a folder.

    Args:
        to: onnx, torch or openvino.
        precision: fp32, fp16 or int8. For fp16 the scorer must already be in float16.
        int8_images: images of good parts (H, W, 3), which set the value ranges of int8; other precisions do not use them.

    Raises:
        ExportError: the scorer cannot be traced or converted to int8, or uses an operation that the format does not support.
        OSError: a file cannot be written.
    """
    program = trace_scorer(scorer)
    if to == "torch":
        content = io.BytesIO()  # torch's own writer does not report a full disk
        with suppress_exporter_messages():
            torch.export.save(program, content)
        (folder / MODEL_FILES[to]).write_bytes(content.getbuffer())
        return
    outputs = (*OUTPUTS, BOX) if scorer.to_frame.has_padding else OUTPUTS
    path = folder / MODEL_FILES["onnx"]
    backbone = write_onnx(program, path, outputs)
    if precision == "int8":
        quantised = path.with_name("int8.onnx")
        with _raise_as_export_error("the backbone cannot be converted to int8"):
            quantise_onnx_model(path, quantised, int8_images, backbone)
        quantised.replace(path)
    if to == "openvino":
        write_openvino(path, folder / MODEL_FILES[to])
        path.unlink()


def open_exported_model(folder: Path, to: str, num_threads: int = 1) -> RunModel:
    """Opens an exported model in its own runtime on the CPU, and returns a function that runs it.

    Args:
        folder: holds the files of the model.
        to: format of the model: onnx, torch or openvino.
        num_threads: threads of onnxruntime or OpenVINO. PyTorch uses the number of threads of this process instead.
    """
    return {"onnx": _open_onnx, "torch": _open_torch, "openvino": _open_openvino}[to](
        folder / MODEL_FILES[to], num_threads
    )


def trace_scorer(scorer: ExportableScorer) -> torch.export.ExportedProgram:
    """Traces a scorer into a `torch.export` program for image sides from 2 to `compute_max_image_side_px` pixels.

    The batch may have 1 to `_MAX_BATCH_SIZE` images.

    Raises: ExportError: the scorer cannot be traced.
    """
    frame, dim = scorer.to_frame, torch.export.Dim
    max_px = compute_max_image_side_px(frame.height, frame.width)
    sizes = {
        0: dim("batch", min=1, max=_MAX_BATCH_SIZE),
        1: dim("height", min=2, max=max_px),
        2: dim("width", min=2, max=max_px),
    }
    example = torch.zeros(2, frame.height + 7, frame.width + 5, 3, dtype=torch.uint8)
    with suppress_exporter_messages(), torch.no_grad(), _raise_as_export_error("the scorer cannot be traced"):
        program = torch.export.export(scorer, (example,), dynamic_shapes=(sizes,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names files of this machine
    return program


def write_onnx(program: torch.export.ExportedProgram, path: Path, outputs: Sequence[str]) -> list[str]:
    """Writes a traced program as an ONNX file.

    Args: outputs: names of the outputs, in the order of the program.

    Returns: names of the nodes of the backbone that a conversion to int8 quantises.

    Raises:
        ExportError: the program uses an operation that ONNX does not support.
        OSError: the file cannot be written.
    """
    import onnx_ir
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants_ir

    with (
        suppress_exporter_messages(),
        torch.no_grad(),
        _raise_as_export_error("ONNX does not support an operation of the scorer"),
    ):
        # the optimiser of torch.onnx takes minutes for the thousands of nodes of the alignment
        onnx_program = torch.onnx.export(
            program, (), dynamo=True, input_names=[INPUT], output_names=list(outputs), optimize=False, verbose=False
        )
        assert onnx_program is not None
        model = onnx_program.model
        common.InlinePass()(model)
        fold_constants_ir(model)
        for apply_pass in (
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.DeduplicateInitializersPass(),
            common.CommonSubexpressionEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.NameFixPass(),
        ):
            apply_pass(model)
        model.graph.inputs[0].shape = onnx_ir.Shape(["batch", "height", "width", 3])
        for output in model.graph.outputs:
            if output.name != BOX and output.shape is not None:
                output.shape = onnx_ir.Shape(["batch", *list(output.shape)[1:]])
        backbone = [
            str(node.name)
            for node in model.graph
            if node.op_type in QUANTISED_OPERATORS
            and "'net.backbone." in node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        ]
        common.ClearMetadataAndDocStringPass()(model)  # the metadata name files of this machine
        onnx_program.save(str(path))
    return backbone


def write_openvino(source: Path, path: Path) -> None:
    """Converts an ONNX file to OpenVINO files: `path` and a .bin file of the same name.

    Raises:
        ExportError: OpenVINO does not support an operation of the model.
        OSError: the files cannot be written.
    """
    import openvino

    with suppress_exporter_messages(), _raise_as_export_error("OpenVINO does not support an operation of the scorer"):
        model = openvino.convert_model(source)
    try:
        with suppress_exporter_messages():
            openvino.save_model(model, path, compress_to_fp16=False)
    except RuntimeError as error:  # OpenVINO 2026 reports a full disk as "iostream error"
        raise OSError(
            errno.EIO, f"OpenVINO cannot write the model ({error}): check that the disk has free space"
        ) from error


def _open_onnx(path: Path, num_threads: int) -> RunModel:
    """Opens an ONNX file in onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = num_threads, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(None, {INPUT: images}), strict=True))


def _open_openvino(path: Path, num_threads: int) -> RunModel:
    """Opens OpenVINO files on the CPU, with float32 arithmetic."""
    import openvino

    settings: Mapping[str, Any] = {**OPENVINO_SETTINGS, "INFERENCE_NUM_THREADS": num_threads}
    compiled = openvino.Core().compile_model(path, "CPU", settings)

    def run(images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        outputs = compiled(images)
        return {output.get_any_name(): np.array(outputs[output]) for output in compiled.outputs}

    return run


def _open_torch(path: Path, num_threads: int) -> RunModel:
    """Opens a `torch.export` file. `num_threads` has no effect."""
    with suppress_exporter_messages():
        module = torch.export.load(path).module()

    def run(images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        with torch.inference_mode():
            outputs = module(torch.from_numpy(np.ascontiguousarray(images)))
        return {name: value.numpy() for name, value in zip((*OUTPUTS, BOX), outputs, strict=False)}

    return run


@contextlib.contextmanager
def _raise_as_export_error(failure: str) -> Iterator[None]:
    """Context manager: turns any exception of a converter into an `ExportError`, except for problems with files.

    Args: failure: text of the message that says what failed.

    Raises:
        OSError: the exception is or was caused by an `OSError`, such as a full disk.
        ExportError: any other exception occurred.
    """
    try:
        yield
    except Exception as error:
        if (cause := find_os_error(error)) is not None:
            raise cause from None
        lines = str(error).strip().splitlines() or [""]
        raise ExportError(
            f"the model cannot be exported: {failure} ({type(error).__name__}: {lines[0][:300]}). A density, backbone or aligner "
            "of your own must use plain tensor arithmetic without branches on values; otherwise run the bundle with focus_ray"
        ) from error
