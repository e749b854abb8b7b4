"""Module for the training objective of FYD: the weighted sum of the image alignment loss and the fine loss."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from focus_ray.distributed import AllReduceSum, get_world_size, join_batch
from focus_ray.features.alignment.theta import compute_valid_mask
from focus_ray.features.network import FocusNet
from focus_ray.fyd.head import ProjectorPredictorHead
from focus_ray.fyd.losses import (
    compute_fine_feature_loss,
    compute_image_alignment_loss,
    compute_location_std,
    sum_directions,
)
from focus_ray.fyd.settings import TrainConfig

LAST_LEVEL = "last level"  # key of the features (B, C, H, W) whose effective rank is computed once an interval


class TrainingObjective(nn.Module):
    """Computes the total loss of FYD in one module, because DistributedDataParallel needs a single `forward`.

    The constructor also freezes the parameters of `net` and `head` that no loss trains.
    """

    def __init__(self, net: FocusNet, head: ProjectorPredictorHead, config: TrainConfig) -> None:
        super().__init__()
        self.net, self.head, self.config = net, head, config
        self.uses_alignment_loss = config.lambda_ica > 0 and has_trainable_aligner(net)
        self.uses_fine_loss = config.lambda_fine > 0
        if not self.uses_fine_loss:
            # DDP expects a gradient for every parameter that requires one, so freeze those that no loss reaches
            for name, parameter in iterate_all_parameters(net, head):
                if not name.startswith("image_aligner."):
                    parameter.requires_grad_(False)
        if not self.uses_alignment_loss and not self.uses_fine_loss and net.image_aligner is not None:
            net.image_aligner.requires_grad_(False)

    def forward(self, images: Tensor, pairs: Tensor, first: int = 0) -> dict[str, Tensor]:
        """Computes this worker's part of the losses of a global batch of B images.

        The mean over all workers, which DistributedDataParallel takes of the gradients, is the loss of the global batch.

        Args:
            images: (b, 3, H, W) in 0..1, this worker's images.
            pairs: (B,), position of the partner of each image in the global batch, for the image alignment loss.
            first: position of this worker's first image in the global batch.

        Returns: name -> tensor. 'loss' is the weighted sum, a scalar. 'loss_ica' and 'loss_fine' are the losses without weights,
            if they are used. With the fine loss, also 'feature_std' (`compute_location_std` of the projected features), and
            `LAST_LEVEL`, the features of layer 3 of this worker's images. The mean of each scalar over all workers is its value
            for the global batch.
        """
        aligned = self.net(images)
        partners = pairs[first : first + len(images)]
        share = len(images) * get_world_size() / len(pairs)  # weight of this worker in the mean over workers
        parts: dict[str, Tensor] = {}
        total = images.new_zeros(())
        if self.uses_alignment_loss:
            joined, valid = join_batch(aligned.image, first, len(pairs)), None
            if aligned.theta_image is not None:
                valid = compute_valid_mask(aligned.theta_image, *aligned.image.shape[2:])
                valid = valid & (join_batch(valid.byte(), first, len(pairs))[partners] > 0)
            parts["loss_ica"] = share * compute_image_alignment_loss(aligned.image, joined[partners], valid)
            total = total + self.config.lambda_ica * parts["loss_ica"]
        if self.uses_fine_loss:
            projected, predicted = self.head(aligned.levels[2])
            directions = sum_directions(projected)
            if get_world_size() > 1:
                directions = AllReduceSum.apply(directions)
            parts["loss_fine"] = share * compute_fine_feature_loss(predicted, projected, directions, len(pairs))
            total = total + self.config.lambda_fine * parts["loss_fine"]
            parts["feature_std"] = share * compute_location_std(projected)
            parts[LAST_LEVEL] = aligned.levels[2].detach()
        return {"loss": total, **parts}


def has_trainable_aligner(net: FocusNet) -> bool:
    """Returns whether the image aligner has parameters that gradient descent can change."""
    return net.image_aligner is not None and any(p.requires_grad for p in net.image_aligner.parameters())


def iterate_all_parameters(net: FocusNet, head: ProjectorPredictorHead) -> Iterator[tuple[str, nn.Parameter]]:
    """Generator: yields (name, parameter) for all parameters of the network, then for all parameters of the head."""
    yield from net.named_parameters()
    yield from head.named_parameters()
