"""Module for image alignment by congealing [ours]: aligns each image to the mean image (template) of aligned normal images.

This file is long, because search, refinement and learning share one state: the template and its bounds.

FYD trains its image transformer to minimise the pairwise distance of aligned images. The mean squared distance over pairs is
twice the mean squared distance to the mean image. So the same objective can be minimised with the mean image alone: align every
image to a template, use the mean of the aligned images as the next template, and repeat (congealing; Miller, Matsakis, Viola
2000).

An image is aligned in two steps. Therefore rotations over the full circle are possible, unlike with gradient descent from the
identity.

(a) Search: an exhaustive masked normalised cross-correlation over all angles and bounded shifts at low resolution. It is one
    convolution with a set of rotated templates.
(b) Refinement: Gauss-Newton steps at rising resolution (Lucas and Kanade; Baker and Matthews 2004, inverse compositional). Each
    image has a gain and a bias. A mask excludes padded borders, and robust weights reduce the influence of defects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus_ray.features.alignment.pairwise import measure_pairwise_l2
from focus_ray.features.alignment.theta import (
    GROUP_COMPONENTS,
    build_identity_theta,
    build_rotation_theta,
    build_theta_from_components,
    compose_theta,
    compute_rotation_angle,
    compute_valid_mask,
    downsample_antialiased,
    invert_theta,
    split_parameters_by_component,
    warp_images,
    wrap_angle,
)


@dataclass
class AlignmentReport:
    """The result of `CongealingAligner.fit`: whether alignment helps, and by how much.

    enabled: whether images are aligned.
    drop: relative decrease, by alignment, of the pairwise L2 distance of held-out images.
    l2_identity, l2_aligned: pairwise L2 distance of held-out images before and after alignment.
    restart_costs: mean cost (how badly images match the template) of the images after the start from each first template.
    round_costs: mean cost of the images before each later round; empty if the fit stopped early.
    angle_bound_deg, shift_bound: largest allowed rotation in degrees, and largest allowed shift in x and y, in half widths. If
        alignment helps, this is the largest movement in training, plus a margin.
    """

    enabled: bool
    drop: float
    l2_identity: float
    l2_aligned: float
    restart_costs: list[float]
    round_costs: list[float]
    angle_bound_deg: float
    shift_bound: list[float]


class CongealingAligner(nn.Module):
    """Computes the transform theta (see `alignment.theta`) that aligns an image to a template of normal images.

    `fit` learns the template. Before, theta is the identity. In shapes, F is FINE_PX and S the side of the resolution in use.
    Prepared images are the result of `standardise_images`.

    Attributes:
        template: (F, F), grey mean image.
        weight: (F, F), share of training images that show each pixel.
        enabled: bool, whether images are aligned.
        angle_bound, shift_centre, shift_bound: limits of the transform, in radians and half widths: the movement in training,
            plus a margin. A physical part outside these limits is an anomaly, and alignment must not hide it.
    """

    FINE_PX, MIDDLE_PX, COARSE_PX = 128, 64, 32  # search at the coarse resolution, Gauss-Newton steps at all three
    NUM_ANGLES = 72  # angles of the search, 5 degrees apart
    NUM_CANDIDATES = 3  # to refine before the choice, because parts rotated by 180 degrees look alike at 32 px
    COARSE_STEPS, MIDDLE_STEPS, FINE_STEPS = 4, 4, 2
    MIN_OVERLAP = 0.6  # share of the template's weight that must lie inside the image
    OUT_OF_BOUNDS_PENALTY = 4.0  # subtracted from the correlation (-1..1) of a movement outside the learnt bounds
    ROBUST_STDS = 3.0  # a residual above this many standard deviations comes from a defect or shadow
    # largest increment, in half widths and radians: the linear model of Lucas and Kanade is not valid beyond
    MAX_STEP = 0.3
    MIN_GAIN = 0.1  # smallest gain, because an increment is divided by it
    OVERLAP_PENALTY = 5.0  # added to the cost per missing share of overlap
    DAMPING = 1e-3  # of Levenberg and Marquardt, as a share of the normal matrix's diagonal
    EPSILON = 1e-6  # keeps the matrices of a flat image invertible
    MIN_STD, MIN_VARIANCE = (
        1e-4,
        1e-3,
    )  # a smaller variation, in units of the image's standard deviation, counts as flat
    ALIGN_BATCH, MEAN_BATCH = 32, 64  # images at the same time: bounds the memory of a fit
    GIVE_UP_MARGIN = 0.05  # stop after the first start if its drop is below min_drop by more than this
    START_IMAGES = 64  # images that the restarts use
    MIN_SEEN_SHARE = 0.02  # a pixel that a smaller share of the images shows gets the level of the background
    BOUND_MARGIN = 1.25  # bounds for later images, relative to the movement in training
    BOUND_ANGLE_DEG, BOUND_SHIFT = 5.0, 0.04  # added to the bounds; shift in half widths
    FREE_ANGLE_DEG = 120.0  # if training images rotate further, any angle is allowed
    COMMON_DIRECTION = 0.5  # a set of angles has a mean direction if its mean resultant length exceeds this
    NUM_RESTARTS, COARSE_ROUNDS, FINE_ROUNDS = 4, 3, 4

    def __init__(self, group: str, max_shift: float = 0.4, max_scale: float = 1.15, min_drop: float = 0.25) -> None:
        """
        Args:
            group: transform group, a key of `GROUP_COMPONENTS`.
            max_shift: bound of the translation, in half widths.
            max_scale: bound of zooming in or out, if the group contains scale.
            min_drop: `fit` disables the aligner unless the pairwise L2 of held-out normal images falls by this share.
        """
        super().__init__()
        self.group, self.components = group, GROUP_COMPONENTS[group]
        self.has_rotation, self.has_shift = "r" in self.components, "t" in self.components
        self.max_shift, self.max_scale, self.min_drop = max_shift, max_scale, min_drop
        # largest shift of the search, in coarse pixels
        self.radius = math.ceil(max_shift * self.COARSE_PX / 2) if self.has_shift else 0
        self.template: Tensor
        self.weight: Tensor
        self.enabled: Tensor
        self.angle_bound: Tensor
        self.shift_centre: Tensor
        self.shift_bound: Tensor
        self.register_buffer("template", torch.zeros(self.FINE_PX, self.FINE_PX))
        self.register_buffer("weight", torch.ones(self.FINE_PX, self.FINE_PX))
        self.register_buffer("enabled", torch.tensor(False))
        self.register_buffer("angle_bound", torch.tensor(math.pi))
        self.register_buffer("shift_centre", torch.zeros(2))
        self.register_buffer("shift_bound", torch.full((2,), max_shift))
        self._correlation_terms: tuple[Tensor, ...] | None = None  # cache of `_compute_correlation_terms`

    # ---- images
    def standardise_images(self, images: Tensor) -> Tensor:
        """Converts square images (B, 3, H, W) to grey images (B, F, F) with mean 0 and standard deviation 1.

        Raises: ValueError: images are not square.
        """
        if images.shape[-1] != images.shape[-2]:
            raise ValueError(f"images have shape {tuple(images.shape)}, expected H = W: resize them to squares")
        grey = images.float().mean(1, keepdim=True)
        if grey.shape[-1] != self.FINE_PX:
            grey = downsample_antialiased(grey, self.FINE_PX)
        grey = grey[:, 0]
        grey = grey - grey.mean((1, 2), keepdim=True)
        return grey / grey.std((1, 2), keepdim=True).clamp_min(self.MIN_STD)

    @staticmethod
    def _downsample_by_averaging(x: Tensor, size: int) -> Tensor:
        """Resizes images (B, S, S) to a smaller size (B, size, size) by averaging."""
        return x if x.shape[-1] == size else F.adaptive_avg_pool2d(x[:, None], size)[:, 0]

    # ---- (a) exhaustive search
    def set_template(self, template: Tensor, weight: Tensor) -> None:
        """Replaces template and weight, both (F, F), and clears the cache of rotated templates."""
        self.template.copy_(template)
        self.weight.copy_(weight)
        self._correlation_terms = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Loads a state dict, and clears the cache of rotated templates, which belongs to the old template."""
        super()._load_from_state_dict(*args, **kwargs)
        self._correlation_terms = None

    def _compute_correlation_terms(self) -> tuple[Tensor, ...]:
        """Computes, and caches, the terms of the correlation that do not depend on the image: rotated templates and their sums.

        There are K angles and, for each angle, n x n shifts with n = 2 * radius + 1.

        Returns: kernels (2K, 1, S, S) of weighted templates and weights; sum of weights, mean and variance of the template
            inside the image, and penalty, all (K, n, n); angles (K,) in radians.
        """
        if self._correlation_terms is not None and self._correlation_terms[0].device == self.template.device:
            return self._correlation_terms
        size, radius = self.COARSE_PX, self.radius
        device = self.template.device
        num = self.NUM_ANGLES if self.has_rotation else 1
        angles = torch.arange(num, device=device) * (2 * math.pi / num)
        # the rotated template in the frame of the input image, at shift 0: T(theta^-1 x)
        back = invert_theta(build_rotation_theta(angles.float()))
        pair = self._downsample_by_averaging(torch.stack([self.template, self.weight]), size)
        rotated = warp_images(pair.expand(num, -1, -1, -1), back, "zeros")
        weight = rotated[:, 1].clamp_min(0)
        template = warp_images(pair[:1].expand(num, 1, -1, -1), back, "border")[:, 0]
        kernels = torch.cat([weight * template, weight, weight * template**2])[:, None]  # (3K, 1, S, S)
        frame = torch.ones(1, 1, size, size, device=device)
        sums = F.conv2d(F.pad(frame, [radius] * 4), kernels)[0]  # correlation with the mask of the image's frame
        wt, w, wtt = sums.split(num)  # sums of w t, w and w t^2 inside the image, (K, n, n) each
        w = w.clamp_min(self.MIN_VARIANCE)
        mean_t = wt / w
        var_t = (wtt / w - mean_t**2).clamp_min(self.MIN_STD)
        overlap = w / w.max()
        penalty = (self.MIN_OVERLAP - overlap).clamp_min(0) * 5
        is_beyond = wrap_angle(angles.float()).abs() > self.angle_bound + math.pi / num
        penalty = penalty + self.OUT_OF_BOUNDS_PENALTY * is_beyond[:, None, None]
        if self.has_shift:
            px = (torch.arange(2 * radius + 1, device=device) - radius) * (2 / size)
            outside = [(px - c).abs() > b + 1 / size for c, b in zip(self.shift_centre, self.shift_bound, strict=True)]
            penalty = penalty + self.OUT_OF_BOUNDS_PENALTY * (outside[1][:, None] | outside[0][None, :])
        self._correlation_terms = (kernels[: 2 * num], w, mean_t, var_t, penalty, angles)
        return self._correlation_terms

    def search_transforms(self, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """Searches for each image the transforms with the highest masked normalised cross-correlation with the template.

        Args: coarse: (B, S, S), prepared images at S = COARSE_PX.

        Returns: theta (B, C, 2, 3) of C candidates, NUM_CANDIDATES or 1 without rotation, and their correlations (B, C).
        """
        kernels, w, mean_t, var_t, penalty, angles = self._compute_correlation_terms()
        num, radius = len(angles), self.radius
        padded = F.pad(torch.stack([coarse, coarse**2], 1), [radius] * 4)
        sums = F.conv2d(padded[:, :1], kernels)  # (B, 2K, n, n): sums of w t i and w i
        wti, wi = sums.split(num, 1)
        wii = F.conv2d(padded[:, 1:], kernels[num:])  # sums of w i^2
        mean_i = wi / w
        var_i = (wii / w - mean_i**2).clamp_min(self.MIN_VARIANCE)
        zncc = (wti / w - mean_t * mean_i) / (var_t * var_i).sqrt() - penalty
        side = zncc.shape[-1]
        best, best_shift = zncc.flatten(2).max(-1)  # over shifts: (B, K)
        count = 1 if num == 1 else self.NUM_CANDIDATES
        # candidates are local maxima over the circle of angles, or all would be neighbours of the best angle
        if count > 1:
            previous, following = best.roll(1, 1), best.roll(-1, 1)
            is_peak = (best >= previous) & (best >= following)
            top, index = torch.where(is_peak, best, best - 4).topk(count, 1)
        else:
            top, index = best.max(1, keepdim=True)
        best_shift = best_shift.gather(1, index)
        # position x of the padded correlation means a template that is shifted by x - radius pixels in the input frame
        dy = torch.div(best_shift, side, rounding_mode="floor") - radius
        dx = best_shift % side - radius
        shift = torch.stack([dx, dy], -1).float() * (2 / self.COARSE_PX)
        return self._limit_transform(build_rotation_theta(angles.float()[index], shift)), top

    # ---- (b) refinement
    def _differentiate_template(self, template: Tensor) -> Tensor:
        """Computes the derivatives of the template's pixels with respect to all parameters of the refinement.

        Gain and bias are factor and offset of the brightness of an image.

        Args: template: (S, S).

        Returns: (P, d + 2) for P = S * S pixels: derivatives by the d parameters of the transform group, then by gain and bias.
        """
        size = template.shape[-1]
        line = (torch.arange(size, device=template.device, dtype=template.dtype) + 0.5) * (2 / size) - 1
        y, x = torch.meshgrid(line, line, indexing="ij")
        padded = F.pad(template[None, None], [1] * 4, mode="replicate")[0, 0]
        gx = (padded[1:-1, 2:] - padded[1:-1, :-2]) * (size / 4)  # per half width
        gy = (padded[2:, 1:-1] - padded[:-2, 1:-1]) * (size / 4)
        fields = {
            "r": [x * gy - y * gx],
            "s": [x * gx + y * gy],
            "a": [x * gx - y * gy, y * gx + x * gy],
            "t": [gx, gy],
        }
        columns = [field for component in self.components for field in fields[component]]
        return torch.stack([*columns, template, torch.ones_like(template)], dim=-1).flatten(0, 1)

    def _build_small_transform(self, delta: Tensor) -> Tensor:
        """Builds small transforms (B, 2, 3) of the group from parameters (B, d) in the order of `_differentiate_template`."""
        parts = split_parameters_by_component(delta, self.group)
        zero = delta.new_zeros(delta.shape[0])
        angle = parts["r"][:, 0] if "r" in parts else zero
        scale = parts["s"][:, 0].exp() if "s" in parts else zero + 1
        shift = parts["t"] if "t" in parts else delta.new_zeros(delta.shape[0], 2)
        theta = build_theta_from_components(angle, scale, shift)
        if "a" in parts:
            along, across = parts["a"].unbind(dim=1)
            stretch = torch.stack([torch.stack([1 + along, across], -1), torch.stack([across, 1 - along], -1)], -2)
            theta = torch.cat([theta[..., :2] @ stretch, theta[..., 2:]], dim=-1)
        return theta

    def _limit_transform(self, theta: Tensor) -> Tensor:
        """Returns thetas (..., 2, 3) in which rotation, shift and scale are limited to the bounds of the aligner."""
        linear, shift = theta[..., :2], theta[..., 2]
        if self.has_shift:
            low, high = self.shift_centre - self.shift_bound, self.shift_centre + self.shift_bound
            shift = torch.minimum(torch.maximum(shift, low), high)
        if self.has_rotation:
            angle = compute_rotation_angle(theta)
            excess = angle - torch.minimum(torch.maximum(angle, -self.angle_bound), self.angle_bound)
            linear = build_rotation_theta(-excess)[..., :2] @ linear
        limit = math.log(self.max_scale)
        if "a" in self.components:
            rotation = build_rotation_theta(compute_rotation_angle(linear))[..., :2]
            stretch = rotation.transpose(-1, -2) @ linear - torch.eye(2, device=theta.device)
            linear = rotation + rotation @ stretch.clamp(-limit, limit)
        elif "s" in self.components:
            determinant = linear[..., 0, 0] * linear[..., 1, 1] - linear[..., 0, 1] * linear[..., 1, 0]
            scale = determinant.clamp_min(self.EPSILON).sqrt()
            linear = linear * (scale.log().clamp(-limit, limit).exp() / scale)[..., None, None]
        return torch.cat([linear, shift[..., None]], dim=-1)

    def refine_transforms(self, level: Tensor, theta: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """Improves transforms by Gauss-Newton steps at the resolution of `level`. The cost never becomes higher.

        The cost tells how badly an aligned image matches the template: it is about 0..1, plus penalties for small overlap and
        inverted brightness. It is robust: large residuals of single pixels are clipped.

        Args:
            level: (B, S, S), prepared images at any resolution S.
            theta: (B, 2, 3), initial transforms.
            num_steps: number of steps.

        Returns: theta (B, 2, 3), and the cost (B,).
        """
        size = level.shape[-1]
        template = self._downsample_by_averaging(self.template[None], size)[0]
        weight = self._downsample_by_averaging(self.weight[None], size)[0].flatten()
        derivatives = self._differentiate_template(template)
        columns = derivatives.shape[1]
        # outer products of each pixel's derivatives, computed once: a normal matrix is then one product with the weights
        outer = (derivatives[:, :, None] * derivatives[:, None, :]).flatten(1)  # (P, (d + 2)^2)
        gain_bias = derivatives[:, -2:]  # (P, 2), derivatives by gain and bias: the template, and 1
        outer2 = (gain_bias[:, :, None] * gain_bias[:, None, :]).flatten(1)
        ridge2 = self.MIN_STD * torch.eye(2, device=level.device)
        images = level[:, None]
        best, best_cost = theta, torch.full((level.shape[0],), math.inf, device=level.device)
        for step in range(num_steps + 1):
            grid = F.affine_grid(theta, [level.shape[0], 1, size, size], align_corners=False)
            moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)[:, 0].flatten(1)
            inside = ((1 - grid.abs().amax(-1)).flatten(1) * (size / 2) + 0.5).clamp(0, 1) * weight  # soft edge
            # least squares fit of gain and bias of the template for each image, then the robust residual
            total = inside.sum(1, keepdim=True).clamp_min(self.MIN_VARIANCE)
            normal = _multiply_rows_separately(inside, outer2).view(-1, 2, 2) / total[..., None]
            right = _multiply_rows_separately(inside * moved, gain_bias) / total
            fit = _solve_2x2_systems(normal + ridge2, right)
            residual = moved - _multiply_rows_separately(fit, gain_bias.T)
            square = residual.square()
            sigma2 = (inside * square).sum(1, keepdim=True) / total + self.EPSILON
            clip = self.ROBUST_STDS**2 * sigma2
            # cost: clipped squared residual relative to the image's variance, plus penalties for negative gain and small overlap
            variance = (inside * moved.square()).sum(1) / total[:, 0] - ((inside * moved).sum(1) / total[:, 0]).square()
            cost = (inside * torch.minimum(square, clip)).sum(1) / total[:, 0] / variance.clamp_min(self.MIN_VARIANCE)
            missing_overlap = (self.MIN_OVERLAP - total[:, 0] / weight.sum()).clamp_min(0)
            cost = cost + (fit[:, 0] <= 0) + self.OVERLAP_PENALTY * missing_overlap
            is_better = cost < best_cost
            best = torch.where(is_better[:, None, None], theta, best)
            best_cost = torch.where(is_better, cost, best_cost)
            if step == num_steps:
                break
            # damped Gauss-Newton step for all d + 2 parameters, with the weights of a Cauchy distribution
            w = inside / (1 + square / clip)
            normal = _multiply_rows_separately(w, outer).view(-1, columns, columns)
            trace = normal.diagonal(dim1=1, dim2=2)
            normal = normal + torch.diag_embed(self.DAMPING * trace + self.EPSILON)
            right = _multiply_rows_separately(w * residual, derivatives)
            solution = _solve_linear_systems(normal, right)
            delta = solution[:, :-2] / fit[:, :1].clamp_min(self.MIN_GAIN)
            delta = delta * (self.MAX_STEP / delta.abs().amax(1, keepdim=True).clamp_min(self.MAX_STEP))
            # inverse compositional: the increment moves the template, so its inverse moves the image
            theta = self._limit_transform(compose_theta(theta, invert_theta(self._build_small_transform(delta))))
        return best, best_cost

    # ---- inference
    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Computes theta (B, 2, 3), float32, of images (B, 3, H, W); the identity if alignment is disabled."""
        if not bool(self.enabled):
            return build_identity_theta(images)
        return self.estimate_transforms(self.standardise_images(images))[0]

    def estimate_transforms(self, fine: Tensor, use_fine: bool = True) -> tuple[Tensor, Tensor]:
        """Computes theta (B, 2, 3) and cost (B,) of prepared images (B, F, F), also if `enabled` is False.

        Args: use_fine: True: refine at the coarse, middle and fine resolution. False: not at the fine resolution.
        """
        middle = self._downsample_by_averaging(fine, self.MIDDLE_PX)
        coarse = self._downsample_by_averaging(middle, self.COARSE_PX)
        candidates, _ = self.search_transforms(coarse)
        batch, count = candidates.shape[:2]
        theta = candidates[:, 0]
        if count > 1:  # candidates look alike at this resolution: refine each, and take the one with the lowest cost
            repeated = coarse.repeat_interleave(count, 0)
            refined, cost = self.refine_transforms(repeated, candidates.flatten(0, 1), self.COARSE_STEPS)
            pick = cost.view(batch, count).argmin(1)
            theta = refined.view(batch, count, 2, 3)[torch.arange(batch, device=fine.device), pick]
        theta, cost = self.refine_transforms(middle, theta, self.MIDDLE_STEPS)
        if use_fine:
            theta, cost = self.refine_transforms(fine, theta, self.FINE_STEPS)
        return theta, cost

    # ---- training
    def _estimate_transforms_in_batches(self, fine: Tensor, use_fine: bool) -> tuple[Tensor, Tensor]:
        """Computes theta (N, 2, 3) and cost (N,) of prepared images (N, F, F) in batches; see `estimate_transforms`."""
        parts = [self.estimate_transforms(part, use_fine) for part in fine.split(self.ALIGN_BATCH)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _average_aligned_images(self, fine: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the mean of the aligned images. Each image counts only at pixels that come from inside the original image.

        Args:
            fine: (N, F, F), images from `standardise_images`.
            theta: (N, 2, 3), alignment of each image.

        Returns: the mean (F, F), and the share (F, F) of the images that show each pixel. A pixel whose share is at most
            `MIN_SEEN_SHARE` gets the overall mean.
        """
        total, count = torch.zeros_like(self.template), torch.zeros_like(self.template)
        for part, moves in zip(fine.split(self.MEAN_BATCH), theta.split(self.MEAN_BATCH), strict=True):
            valid = compute_valid_mask(moves, self.FINE_PX, self.FINE_PX).to(part.dtype)
            total += (warp_images(part[:, None], moves, "border")[:, 0] * valid).sum(dim=0)
            count += valid.sum(dim=0)
        share = count / len(fine)
        mean = total / count.clamp_min(1)
        # pixels that almost no image shows get the overall mean, the level of the background
        overall_mean = (mean * share).sum() / share.sum().clamp_min(self.MIN_VARIANCE)
        return torch.where(share > self.MIN_SEEN_SHARE, mean, overall_mean), share

    @torch.no_grad()
    def fit(self, prepared: Tensor, seed: int = 0) -> AlignmentReport:
        """Learns the template from normal images, in place, and enables the aligner if alignment helps.

        A fifth of the images (at least two) is held out to measure by how much alignment lowers the pairwise L2 distance, the
        drop. If alignment helps, these images are used in the last rounds. If the drop after the first start is far below
        `min_drop`, the fit stops there. On ten real data sets and two seeds, this first drop differed from the final drop by at
        most 0.06.

        Args:
            prepared: (N, F, F), from `standardise_images`.
            seed: seed of the choice of held-out images and first templates; the same seed gives the same result.

        Raises: ValueError: fewer than four images.
        """
        if len(prepared) < 4:
            raise ValueError(
                f"image alignment needs at least 4 normal images, got {len(prepared)}: add training images, or set "
                "model.image_alignment.group=none"
            )
        self.enabled.fill_(True)
        self.angle_bound.fill_(math.pi)  # all angles, and shifts up to `max_shift`
        self.shift_centre.zero_()
        self.shift_bound.fill_(self.max_shift)
        order = torch.randperm(len(prepared), generator=torch.Generator().manual_seed(seed))
        shuffled = prepared[order.to(prepared.device)]
        num_holdout = max(2, len(shuffled) // 5)
        holdout, remaining = shuffled[:num_holdout], shuffled[num_holdout:]
        # try several images as first template, without the fine resolution, and continue with the best result
        start_images = remaining[: self.START_IMAGES]
        starts: list[tuple[float, Tensor, Tensor]] = []  # mean cost, template, weight
        for start in range(min(self.NUM_RESTARTS, len(start_images))):
            self.set_template(start_images[start], torch.ones_like(self.template))
            for _ in range(self.COARSE_ROUNDS):
                theta, _ = self._estimate_transforms_in_batches(start_images, use_fine=False)
                self.set_template(*self._average_aligned_images(start_images, theta))
            _, cost = self._estimate_transforms_in_batches(start_images, use_fine=False)
            starts.append((cost.mean().item(), self.template.clone(), self.weight.clone()))
            if start == 0:
                theta, _ = self._estimate_transforms_in_batches(holdout, use_fine=False)
                before, after = self._measure_l2_before_and_after(holdout, theta)
                if 1 - after / max(before, self.EPSILON) < self.min_drop - self.GIVE_UP_MARGIN:
                    return self._enable_if_helpful(before, after, starts, [])
        best = min(starts, key=lambda item: item[0])
        self.set_template(best[1], best[2])
        round_costs = [self._run_congealing_round(remaining) for _ in range(self.FINE_ROUNDS)]
        theta, _ = self._estimate_transforms_in_batches(holdout, use_fine=True)
        before, after = self._measure_l2_before_and_after(holdout, theta)
        if 1 - after / max(before, self.EPSILON) >= self.min_drop:
            round_costs += [self._run_congealing_round(shuffled) for _ in range(2)]
            theta, _ = self._estimate_transforms_in_batches(shuffled, use_fine=True)
            self._learn_movement_bounds(theta)
        return self._enable_if_helpful(before, after, starts, round_costs)

    def _enable_if_helpful(
        self, before: float, after: float, starts: list[tuple[float, Tensor, Tensor]], round_costs: list[float]
    ) -> AlignmentReport:
        """Enables the aligner if alignment lowered the pairwise L2 of held-out images enough, and returns the report.

        Otherwise it disables the aligner.

        Args:
            before, after: pairwise L2 of held-out images before and after alignment.
            starts: (mean cost, template, weight) of each start.
            round_costs: see `AlignmentReport`.
        """
        drop = 1 - after / max(before, self.EPSILON)
        self.enabled.fill_(drop >= self.min_drop)
        return AlignmentReport(
            enabled=drop >= self.min_drop,
            drop=drop,
            l2_identity=before,
            l2_aligned=after,
            restart_costs=[item[0] for item in starts],
            round_costs=round_costs,
            angle_bound_deg=math.degrees(float(self.angle_bound)),
            shift_bound=self.shift_bound.tolist(),
        )

    def _run_congealing_round(self, fine: Tensor) -> float:
        """Runs one round of congealing: aligns images (N, F, F), and makes their mean the new template.

        Returns: the mean cost of the images with the old template.
        """
        theta, cost = self._estimate_transforms_in_batches(fine, use_fine=True)
        theta = compose_theta(theta, self._compute_recentring_theta(theta).expand(len(theta), 2, 3))
        self.set_template(*self._average_aligned_images(fine, theta))
        return cost.mean().item()

    def _measure_l2_before_and_after(self, fine: Tensor, theta: Tensor) -> tuple[float, float]:
        """Computes the pairwise L2 distance of images (N, F, F) before and after alignment by theta (N, 2, 3).

        Resampling blurs images, and this alone lowers the L2 of noise by a third. So the value before alignment is the smaller
        of
        two values: the L2 of the original images, and the L2 of images that are each warped by the theta of another image. These
        images have the same blur, but are not aligned. Only pixels that come from inside the original images count.
        """
        other_theta = theta.roll(1, 0)
        valid, mixed_valid = (compute_valid_mask(moves, self.FINE_PX, self.FINE_PX) for moves in (theta, other_theta))
        aligned, mixed = (warp_images(fine[:, None], moves, "border") for moves in (theta, other_theta))
        before = min(measure_pairwise_l2(fine[:, None], valid), measure_pairwise_l2(mixed, mixed_valid))
        return before, measure_pairwise_l2(aligned, valid)

    def _learn_movement_bounds(self, theta: Tensor) -> None:
        """Sets the bounds for later images to the movement in training, plus a margin.

        Args: theta: (N, 2, 3), transforms of the training images.
        """
        if self.has_rotation:
            bound = compute_rotation_angle(theta).abs().max() * self.BOUND_MARGIN + math.radians(self.BOUND_ANGLE_DEG)
            is_free = bound > math.radians(self.FREE_ANGLE_DEG)
            self.angle_bound.copy_(torch.where(is_free, torch.full_like(bound, math.pi), bound))
        if self.has_shift:
            low, high = theta[..., 2].amin(0), theta[..., 2].amax(0)
            self.shift_centre.copy_((low + high) / 2)
            self.shift_bound.copy_((high - low) / 2 * self.BOUND_MARGIN + self.BOUND_SHIFT)
        self._correlation_terms = None

    def _compute_recentring_theta(self, theta: Tensor) -> Tensor:
        """Computes a transform g (1, 2, 3) to compose with all thetas (N, 2, 3), so that the template does not drift.

        With `compose_theta(theta, g)`, the content of the template is central, and the mean rotation is near 0 if the angles
        have a mean direction.
        """
        back = invert_theta(theta)
        g = build_identity_theta(theta[:1])
        if self.has_rotation:
            unit = torch.stack([compute_rotation_angle(theta).cos(), compute_rotation_angle(theta).sin()], -1).mean(0)
            if unit.norm() > self.COMMON_DIRECTION:  # there is a mean direction: rotate it to 0
                g = build_rotation_theta(torch.atan2(-unit[1], unit[0])[None])
        if self.has_shift:  # the mean position of the image centres becomes the centre of the frame
            g = torch.cat([g[..., :2], back[..., 2].mean(0)[None, :, None]], -1)
        return g


def _multiply_rows_separately(rows: Tensor, matrix: Tensor) -> Tensor:
    """Computes rows (B, P) @ matrix (P, D), each row in a product of its own.

    The result for a row then does not depend on the other rows, not even in the last digit.
    """
    width = matrix.shape[1]
    padded = F.pad(matrix, (0, -width % 16))  # with other widths, rounding depends on the position of the row
    return torch.bmm(rows[:, None], padded.expand(rows.shape[0], *padded.shape))[:, 0, :width]


def _solve_linear_systems(matrix: Tensor, right: Tensor) -> Tensor:
    """Solves B linear systems with positive definite matrices: matrix (B, n, n) times x = right (B, n).

    In an exported network, Gauss-Jordan elimination solves them, because the runtimes have no solver.
    """
    if not torch.compiler.is_exporting():
        return torch.linalg.solve(matrix, right)
    rows = torch.cat([matrix, right[..., None]], dim=2)
    for number in range(matrix.shape[1]):
        pivot = rows[:, number : number + 1] / rows[:, number : number + 1, number : number + 1]
        is_pivot_row = torch.arange(matrix.shape[1])[:, None] == number
        rows = torch.where(is_pivot_row, pivot, rows - rows[:, :, number : number + 1] * pivot)
    return rows[:, :, -1]


def _solve_2x2_systems(matrix: Tensor, right: Tensor) -> Tensor:
    """Solves B linear systems in closed form: matrix (B, 2, 2) times x = right (B, 2)."""
    a, b, c, d = matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 1, 0], matrix[:, 1, 1]
    det = a * d - b * c
    return torch.stack([d * right[:, 0] - b * right[:, 1], a * right[:, 1] - c * right[:, 0]], -1) / det[:, None]
