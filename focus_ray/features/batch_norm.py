"""Module for batch norm over the batches of all workers, and for folding batch norms into convolutions for inference."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from focus_ray.distributed import AllReduceSum, get_world_size


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the statistics of the joined batch of all workers, on any device (SyncBatchNorm needs a GPU)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises (B, C, H, W): in training with the batch statistics of all workers, otherwise with running statistics.

        In training, it also updates the running statistics.
        """
        if not self.training or get_world_size() == 1:
            return super().forward(x)
        values = x.float()
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        # subtract a point near the mean, equal on all workers, before squaring: otherwise float32 loses small variances
        shift_point = self.running_mean.float()
        values = values - shift_point[:, None, None]
        count = values.numel() / values.shape[1]
        sums = torch.cat([values.sum((0, 2, 3)), values.square().sum((0, 2, 3)), values.new_full((1,), count)])
        sums = AllReduceSum.apply(sums)
        total = sums[-1].detach()
        mean = sums[: self.num_features] / total
        variance = (sums[self.num_features : -1] / total - mean.square()).clamp_min(0)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            # without a momentum, the running statistics are the mean over all batches
            weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean + shift_point, weight)
            self.running_var.lerp_(variance * (total / (total - 1).clamp_min(1)), weight)
        scale = (variance + self.eps).rsqrt() * self.weight
        shift = -mean * scale + self.bias
        return (values * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


def use_global_batch_norm(module: nn.Module) -> None:
    """Turns every `nn.BatchNorm2d` inside a module into a `GlobalBatchNorm2d`, in place; the weights do not change."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = GlobalBatchNorm2d


def prepare_backbone_for_inference(backbone: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Folds the batch norms of a backbone into convolutions and converts the backbone to a number type, in place."""
    fuse_batch_norms(backbone)
    backbone.to(dtype)


@contextmanager
def use_inference_backbone(net: nn.Module, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Context manager: replaces `net.backbone` by a copy that is prepared for inference, inside the with block only."""
    original = net.backbone
    assert isinstance(original, nn.Module)
    prepared = copy.deepcopy(original)
    prepare_backbone_for_inference(prepared, dtype)
    net.backbone = prepared
    try:
        yield
    finally:
        net.backbone = original


def fuse_batch_norms(module: nn.Module) -> None:
    """Folds each batch norm that directly follows a convolution into this convolution, in place, to speed up inference.

    The results are the same as in evaluation mode before, up to rounding. The module cannot be trained any more.
    """
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    names = list(module._modules)
    for first, second in itertools.pairwise(names):
        conv, norm = module._modules[first], module._modules[second]
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and conv.out_channels == norm.num_features:
            module._modules[first] = fuse_conv_bn_eval(conv.eval(), norm.eval())
            module._modules[second] = nn.Identity()
    for child in module.children():
        fuse_batch_norms(child)
