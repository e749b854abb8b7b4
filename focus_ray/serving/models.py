"""The models a replica holds: within a budget of bytes, the least recently used going first; equal backbones held once."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from focus_ray.bundle.bundle import read_bundle
from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.registry import Version
from focus_ray.errors import BundleError
from focus_ray.fitting.scoring import Detector
from focus_ray.precision import compute_dtype
from focus_ray.serving.source import version_key


@dataclass(frozen=True)
class Model:
    """A loaded version. num_bytes: its tensors, without the backbone, which others may share."""

    version: Version
    inspector: Inspector
    num_bytes: int


class Backbones:
    """Backbones by the hash of their tensors: models trained from one set of weights share one, and so one pass."""

    def __init__(self) -> None:
        self._by_hash: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()  # loader threads put in what the event loop counts

    def share(self, detector: Detector, dtype: torch.dtype) -> None:
        """Puts the one backbone of these tensors in the detector's place for it. To be called before batch norms are fused.

        Args: dtype: what it is to compute in.
        """
        digest = f"{hash_module(detector.net.backbone)} {dtype}"
        with self._lock:
            known = self._by_hash.setdefault(digest, detector.net.backbone)
        detector.net.backbone = known  # type: ignore[assignment]

    @property
    def num_bytes(self) -> int:
        """Of all that some model still uses."""
        with self._lock:
            there = list(self._by_hash.values())
        return sum(_size(backbone.parameters()) + _size(backbone.buffers()) for backbone in there)


class ModelCache:
    """Versions in memory."""

    def __init__(
        self,
        budget_bytes: int,
        device: str,
        executor: Executor,
        on_load: Callable[[Version, float], None] = lambda version, seconds: None,
        on_drop: Callable[[Version], None] = lambda version: None,
    ) -> None:
        """
        Args:
            executor: that reads bundles; how many it reads at once bounds what loading costs beyond the budget.
            on_load: told the seconds.
        """
        self.budget_bytes, self.device, self.executor = budget_bytes, device, executor
        self.on_load, self.on_drop = on_load, on_drop
        self._models: OrderedDict[str, Model] = OrderedDict()
        self._loading: dict[str, asyncio.Task[Model]] = {}
        self._backbones = Backbones()

    @property
    def num_bytes(self) -> int:
        return sum(model.num_bytes for model in self._models.values()) + self._backbones.num_bytes

    @property
    def keys(self) -> list[str]:
        """Least recently used first."""
        return list(self._models)

    async def get(self, version: Version) -> Model:
        """The model, loaded and verified first where it is not here; requests for one version share one load.

        Raises: BundleError: missing, damaged, larger than the budget, or not what was published. The others stay.
        """
        key = version_key(version)
        model = self._models.get(key)
        if model is not None:
            self._models.move_to_end(key)
            return model
        task = self._loading.get(key)
        if task is None:
            task = self._loading[key] = asyncio.create_task(self._load(key, version))
            task.add_done_callback(lambda _: self._loading.pop(key, None))
        return await asyncio.shield(task)  # one request that is given up must not take the load from the others

    async def _load(self, key: str, version: Version) -> Model:
        started = time.perf_counter()
        model = await asyncio.get_running_loop().run_in_executor(self.executor, self._read, version)
        self._models[key] = model
        while self.num_bytes > self.budget_bytes and len(self._models) > 1:
            _, dropped = self._models.popitem(last=False)
            self.on_drop(dropped.version)
        self.on_load(version, time.perf_counter() - started)
        return model

    def _read(self, version: Version) -> Model:
        bundle = read_bundle(version.uri, self.device, max_bytes=self.budget_bytes)
        if bundle.version != version.sha256:
            raise BundleError(f"{version.uri}: not the bundle that was published as {version.name}: publish it again")
        self._backbones.share(bundle.detector, compute_dtype(bundle.config.model.precision, self.device))
        bundle.detector.net.projector = nn.Sequential()  # f and g do not score [kin]
        bundle.detector.net.predictor = nn.Identity()
        inspector = Inspector(bundle, self.device)
        return Model(version, inspector, _size(own_tensors(bundle.detector)))


def own_tensors(detector: Detector) -> Iterator[Tensor]:
    """All tensors of a detector but its backbone's."""
    net, shared = detector.net, {id(tensor) for tensor in _tensors(detector.net.backbone)}
    yield from (tensor for tensor in _tensors(net) if id(tensor) not in shared)
    yield from _tensors(detector.reduction)
    yield from _held_by(detector.density)
    yield from detector.map_generator
    if detector.seen_mask is not None:
        yield detector.seen_mask
    yield from detector.profile or ()


def _held_by(thing: object) -> Iterator[Tensor]:
    """The tensors of an object of ours and of those that it is made of."""
    for value in vars(thing).values():
        if isinstance(value, Tensor):
            yield value
        elif type(value).__module__.startswith("focus_ray.density"):
            yield from _held_by(value)


def hash_module(module: nn.Module) -> str:
    """SHA-256 of the type and of every tensor's name, type, shape and values."""
    digest = hashlib.sha256(repr(module).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _size(tensors: Iterator[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
