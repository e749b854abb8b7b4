"""A cache of loaded models with a limit in bytes: the least recently used model is dropped first. Equal backbones are shared."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from focus_ray.bundle.bundle import read_bundle
from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.registry import Version
from focus_ray.detect.detector import Detector
from focus_ray.errors import BundleError
from focus_ray.precision import choose_compute_dtype
from focus_ray.serving.metrics import MetricsRecorder
from focus_ray.serving.source import get_version_key


@dataclass(frozen=True)
class LoadedModel:
    """A version whose model is in memory.

    Attributes:
        inspector: scores images with the model.
        num_bytes: size of the model's tensors without the backbone, which other models may share.
    """

    version: Version
    inspector: Inspector
    num_bytes: int


class SharedBackbones:
    """Shares one backbone between models whose backbones have the same structure, weights and data type.

    This saves memory, and such models can share a forward pass. A backbone stays in memory while a model uses it.
    """

    def __init__(self) -> None:
        self._by_hash: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()  # loader threads add backbones while the event loop counts them

    def share_backbone(self, detector: Detector, dtype: torch.dtype) -> None:
        """Replaces the backbone of a detector, in place, by an equal backbone of another loaded model if there is one.

        Call it before batch norms are fused, because fusing changes the weights.

        Args: dtype: type in which the backbone computes; backbones are equal only with the same type.
        """
        digest = f"{hash_module(detector.net.backbone)} {dtype}"
        with self._lock:
            shared = self._by_hash.setdefault(digest, detector.net.backbone)
        detector.net.backbone = shared  # type: ignore[assignment]

    @property
    def num_bytes(self) -> int:
        """Number of bytes of all shared backbones in memory."""
        with self._lock:
            backbones = list(self._by_hash.values())
        return sum(tensor.nbytes for backbone in backbones for tensor in _iterate_module_tensors(backbone))


class ModelCache:
    """A cache of loaded versions, whose size stays at most `budget_bytes`. The version that was loaded last always stays."""

    def __init__(
        self,
        budget_bytes: int,
        device: str,
        metrics: MetricsRecorder,
        on_drop: Callable[[Version], None] = lambda version: None,
    ) -> None:
        """Creates an empty cache. One thread reads bundles, which limits the memory that loading needs above the budget.

        Args:
            budget_bytes: largest size of all models and backbones together.
            device: cpu or cuda; the models are loaded on it.
            metrics: receives the duration of each load, the number of drops, and the size of the cache.
            on_drop: called after a version was dropped from memory.
        """
        self.budget_bytes, self.device, self.metrics, self.on_drop = budget_bytes, device, metrics, on_drop
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._models: OrderedDict[str, LoadedModel] = OrderedDict()
        self._loading: dict[str, asyncio.Task[LoadedModel]] = {}
        self._backbones = SharedBackbones()

    @property
    def num_bytes(self) -> int:
        """Number of bytes of all models and backbones in memory."""
        return sum(model.num_bytes for model in self._models.values()) + self._backbones.num_bytes

    @property
    def loaded_keys(self) -> list[str]:
        """The key (`get_version_key`) of each loaded version, the least recently used first."""
        return list(self._models)

    async def get_or_load(self, version: Version) -> LoadedModel:
        """Returns the model of a version; loads and verifies it first if it is not in memory, which may drop other models.

        Simultaneous calls for a version share one load.

        Raises: BundleError: the bundle is missing, damaged, larger than the budget, or not the published one. Then no model is
            dropped.
        """
        key = get_version_key(version)
        model = self._models.get(key)
        if model is not None:
            self._models.move_to_end(key)
            return model
        task = self._loading.get(key)
        if task is None:
            task = self._loading[key] = asyncio.create_task(self._load_model(key, version))
            task.add_done_callback(lambda _: self._loading.pop(key, None))
        return await asyncio.shield(task)  # a cancelled request must not cancel the load of other requests

    async def _load_model(self, key: str, version: Version) -> LoadedModel:
        """Loads a model, and drops the least recently used models until all fit into the budget.

        Raises: BundleError: as `get_or_load`.
        """
        started = time.perf_counter()
        model = await asyncio.get_running_loop().run_in_executor(self.executor, self._read_verified_model, version)
        self._models[key] = model
        while self.num_bytes > self.budget_bytes and len(self._models) > 1:
            _, dropped = self._models.popitem(last=False)
            self.metrics.record("models_dropped", team=dropped.version.team, category=dropped.version.category)
            self.on_drop(dropped.version)
        seconds = time.perf_counter() - started
        self.metrics.record("load_seconds", seconds, team=version.team, category=version.category)
        self.metrics.record("models", len(self._models))
        self.metrics.record("model_bytes", self.num_bytes)
        return model

    def _read_verified_model(self, version: Version) -> LoadedModel:
        """Reads and verifies the bundle of a version, and returns its model on the device. Blocks.

        Raises: BundleError: the bundle is missing, damaged, larger than the budget, or not the published one.
        """
        bundle = read_bundle(version.uri, self.device, max_bytes=self.budget_bytes)
        if bundle.version != version.sha256:
            raise BundleError(f"{version.uri}: not the bundle that was published as {version.name}: publish it again")
        self._backbones.share_backbone(
            bundle.detector, choose_compute_dtype(bundle.config.model.precision, self.device)
        )
        inspector = Inspector(bundle, self.device)
        return LoadedModel(
            version, inspector, sum(tensor.nbytes for tensor in iterate_non_backbone_tensors(bundle.detector))
        )


def iterate_non_backbone_tensors(detector: Detector) -> Iterator[Tensor]:
    """Generator: yields the tensors of a detector without the tensors of its backbone."""
    net, shared = detector.net, {id(tensor) for tensor in _iterate_module_tensors(detector.net.backbone)}
    yield from (tensor for tensor in _iterate_module_tensors(net) if id(tensor) not in shared)
    yield from _iterate_module_tensors(detector.reduction)
    yield from _iterate_component_tensors(detector.density)
    yield from detector.map_generator
    if detector.coverage_mask is not None:
        yield detector.coverage_mask
    yield from detector.profile or ()


def _iterate_component_tensors(component: object) -> Iterator[Tensor]:
    """Generator: yields the tensors in the attributes of a density, and in attributes that are objects of `focus_ray.density`."""
    for value in vars(component).values():
        if isinstance(value, Tensor):
            yield value
        elif type(value).__module__.startswith("focus_ray.density"):
            yield from _iterate_component_tensors(value)


def hash_module(module: nn.Module) -> str:
    """Returns a SHA-256 that is equal for torch modules with the same structure and the same tensors.

    It covers the text of the module, and name, type, shape and values of every parameter and buffer of its state.
    """
    digest = hashlib.sha256(repr(module).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _iterate_module_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Generator: yields the parameters and buffers of a module."""
    yield from module.parameters()
    yield from module.buffers()
