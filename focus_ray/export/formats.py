"""The formats of an export: how a scorer is written in each, and how each is run."""

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

from focus_ray.bundle.engine import QUANTISED, quantise, suppress_exporter_messages
from focus_ray.errors import ConfigError, ExportError
from focus_ray.export.scorer import BOX, OUTPUTS, Scorer, longest_side
from focus_ray.extras import require_extra
from focus_ray.storage import find_os_error

MODEL = {"onnx": "model.onnx", "torch": "model.pt2", "openvino": "model.xml"}
PRECISIONS = {"onnx": ("fp32", "fp16", "int8"), "torch": ("fp32", "fp16"), "openvino": ("fp32", "fp16", "int8")}
# of OpenVINO, which would take bfloat16 by itself where a CPU has it
OPENVINO_SETTINGS = {"INFERENCE_PRECISION_HINT": "f32"}
INPUT = "images"

_NEEDS = {"torch": (), "onnx": ("onnx",), "openvino": ("onnx", "openvino")}
_MOST_IMAGES = 1024  # of a batch

Run = Callable[[NDArray[np.uint8]], dict[str, NDArray[Any]]]
"""uint8 images (B, H, W, 3) -> an export's outputs, by name."""


def check_format(to: str, precision: str) -> None:
    """Raises: ConfigError: no such format, or not in this precision.  MissingPackageError: an extra is not installed."""
    if to not in MODEL:
        raise ConfigError(f"--to {to}: expected one of {', '.join(MODEL)}")
    if precision not in PRECISIONS[to]:
        hint = ": for int8, give --to onnx or openvino" if precision == "int8" else ""
        raise ConfigError(f"--to {to} --precision {precision}: expected one of {', '.join(PRECISIONS[to])}{hint}")
    for extra in _NEEDS[to]:
        require_extra(extra, f"focus-ray export --to {to}")


def write_model(scorer: Scorer, to: str, precision: str, folder: Path, scaling: Sequence[NDArray[np.uint8]]) -> None:
    """Writes the model's files.

    Args: scaling: images of good parts (H, W, 3), by which int8 is scaled.

    Raises: ExportError: the scorer cannot be traced, or the format does not have what it does.
    """
    program = trace(scorer)
    if to == "torch":
        content = io.BytesIO()  # torch's own writing does not say that a disk is full
        with suppress_exporter_messages():
            torch.export.save(program, content)
        (folder / MODEL[to]).write_bytes(content.getbuffer())
        return
    outputs = (*OUTPUTS, BOX) if scorer.to_frame.pads else OUTPUTS
    path = folder / MODEL["onnx"]
    backbone = write_onnx(program, path, outputs)
    if precision == "int8":
        quantised = path.with_name("int8.onnx")
        with _told("its backbone cannot be brought to int8"):
            quantise(path, quantised, scaling, backbone)
        quantised.replace(path)
    if to == "openvino":
        write_openvino(path, folder / MODEL[to])
        path.unlink()


def open_model(folder: Path, to: str, num_threads: int = 1) -> Run:
    """An export as its users run it, on the CPU."""
    return {"onnx": _open_onnx, "torch": _open_torch, "openvino": _open_openvino}[to](folder / MODEL[to], num_threads)


def trace(scorer: Scorer) -> torch.export.ExportedProgram:
    frame, dim = scorer.to_frame, torch.export.Dim
    longest = longest_side(frame.height, frame.width)
    sizes = {
        0: dim("batch", min=1, max=_MOST_IMAGES),
        1: dim("height", min=2, max=longest),
        2: dim("width", min=2, max=longest),
    }
    example = torch.zeros(2, frame.height + 7, frame.width + 5, 3, dtype=torch.uint8)
    with suppress_exporter_messages(), torch.no_grad(), _told("it cannot be traced"):
        program = torch.export.export(scorer, (example,), dynamic_shapes=(sizes,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # which names this machine's files
    return program


def write_onnx(program: torch.export.ExportedProgram, path: Path, outputs: Sequence[str]) -> list[str]:
    """Returns: the names of the backbone's nodes, of the kinds that int8 takes."""
    import onnx_ir
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants_ir

    with suppress_exporter_messages(), torch.no_grad(), _told("ONNX does not have all that it does"):
        # its own optimiser takes minutes over the alignment's thousands of nodes
        made = torch.onnx.export(
            program, (), dynamo=True, input_names=[INPUT], output_names=list(outputs), optimize=False, verbose=False
        )
        assert made is not None
        model = made.model
        common.InlinePass()(model)
        fold_constants_ir(model)
        for one in (
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.DeduplicateInitializersPass(),
            common.CommonSubexpressionEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.NameFixPass(),
        ):
            one(model)
        model.graph.inputs[0].shape = onnx_ir.Shape(["batch", "height", "width", 3])
        for output in model.graph.outputs:
            if output.name != BOX and output.shape is not None:
                output.shape = onnx_ir.Shape(["batch", *list(output.shape)[1:]])
        backbone = [
            str(node.name)
            for node in model.graph
            if node.op_type in QUANTISED
            and "'net.backbone." in node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        ]
        common.ClearMetadataAndDocStringPass()(model)  # which name this machine's files
        made.save(str(path))
    return backbone


def write_openvino(source: Path, path: Path) -> None:
    import openvino

    with suppress_exporter_messages(), _told("OpenVINO does not have all that it does"):
        model = openvino.convert_model(source)
    try:
        with suppress_exporter_messages():
            openvino.save_model(model, path, compress_to_fp16=False)
    except RuntimeError as error:  # of a full disk OpenVINO 2026 says "iostream error"
        raise OSError(errno.EIO, f"OpenVINO cannot write it ({error}); see that the disk has room") from error


def _open_onnx(path: Path, num_threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = num_threads, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(None, {INPUT: images}), strict=True))


def _open_openvino(path: Path, num_threads: int) -> Run:
    import openvino

    settings: Mapping[str, Any] = {**OPENVINO_SETTINGS, "INFERENCE_NUM_THREADS": num_threads}
    compiled = openvino.Core().compile_model(path, "CPU", settings)

    def run(images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        found = compiled(images)
        return {output.get_any_name(): np.array(found[output]) for output in compiled.outputs}

    return run


def _open_torch(path: Path, num_threads: int) -> Run:
    with suppress_exporter_messages():
        module = torch.export.load(path).module()

    def run(images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        with torch.inference_mode():
            found = module(torch.from_numpy(np.ascontiguousarray(images)))
        return {name: value.numpy() for name, value in zip((*OUTPUTS, BOX), found, strict=False)}

    return run


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """What a converter raises, of whatever type, as an `ExportError`; but an `OSError`, such as a full disk, as it is."""
    try:
        yield
    except Exception as error:
        if (cause := find_os_error(error)) is not None:
            raise cause from None
        lines = str(error).strip().splitlines() or [""]
        raise ExportError(
            f"the model cannot be exported: {what} ({type(error).__name__}: {lines[0][:300]}). A density, backbone or aligner "
            "of your own must be plain tensor arithmetic without branches on values; else run the bundle with focus_ray"
        ) from error
