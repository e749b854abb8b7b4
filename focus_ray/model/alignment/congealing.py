"""Image alignment by congealing [ours]: theta is searched against the mean image of the normal ones.

Long, because search, refinement and learning are one state: a template and its bounds.

FYD trains its image transformer by the pairwise distance of the aligned images. The mean over pairs of squared distances
is twice the mean squared distance to the mean image, so the same objective can be descended on the mean image alone:
align every image to the template, take the mean of the aligned images as the next template, repeat (congealing, Miller,
Matsakis, Viola 2000). Unlike gradient descent from the identity this finds rotations over the full circle, because an
image is aligned by (a) an exhaustive masked normalised cross-correlation over all angles and bounded shifts at low
resolution, as one convolution with a bank of turned templates, then (b) Gauss-Newton steps (Lucas and Kanade; Baker and
Matthews 2004, inverse compositional) at rising resolution, with a gain and bias per image, a validity mask, so that
padded borders are never what is matched, and robust weights, so that a defect does not steer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus_ray.model.alignment.theta import (
    GROUPS,
    USES,
    angle_of,
    compose_theta,
    identity_theta,
    invert_theta,
    make_theta,
    shrink,
    turn,
    valid_mask,
    warp,
    wrap_angle,
)
from focus_ray.model.losses import pairwise_l2


@dataclass
class AlignmentReport:
    """What `CongealingAligner.fit` found.

    enabled: whether images are aligned.  drop: the relative fall of the held-out images' pairwise L2 by alignment.
    l2_identity, l2_aligned: that L2 unaligned and aligned.  restart_costs, round_costs: mean cost of each start and round.
    angle_bound_deg, shift_bound: the movement seen in training, and a little more.
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
    """theta(images) against a template learnt from normal images by `fit`; the identity until then.

    Buffers: template (F, F), grey, zero mean; weight (F, F), the share of training images that show each place;
    enabled; angle_bound, shift_centre, shift_bound: the movement seen in training, with a margin: a part that lies
    elsewhere than any good one is an anomaly, not to be put right.
    """

    FINE_PX, MIDDLE_PX, COARSE_PX = 128, 64, 32  # search at coarse, Gauss-Newton at all three
    NUM_ANGLES = 72  # of the search: 5 degrees apart
    NUM_CANDIDATES = 3  # half turns look alike at 32 px: so many are refined before one is chosen
    COARSE_STEPS, MIDDLE_STEPS, FINE_STEPS = 4, 4, 2
    MIN_OVERLAP = 0.6  # of the template's weight that must lie inside the image
    OUT_OF_BOUNDS = 4.0  # taken off the correlation, which is in -1..1, of a movement beyond the learnt bounds
    ROBUST = 3.0  # standard deviations from which a residual is a defect's or a shadow's, not a misfit's
    MAX_STEP = 0.3  # of an increment, in half widths and radians: what Lucas-Kanade's linear model bears
    MIN_GAIN = 0.1  # of the template for an image: an increment is divided by it
    LACK_OF_OVERLAP = 5.0  # added to the cost a missing share of overlap
    DAMPING = 1e-3  # Levenberg-Marquardt's, of the normal matrix's diagonal
    EPSILON = 1e-6  # keeps matrices of a flat image invertible
    MIN_STD, MIN_VARIANCE = 1e-4, 1e-3  # of a picture in units of its own spread: below, it counts as flat
    ALIGN_BATCH, MEAN_BATCH = 32, 64  # images at a time: bounds the memory of a fit
    GIVE_UP = 0.05  # below min_drop, after the first start
    START_IMAGES = 64  # that the restarts are tried on
    SEEN_SHARE = 0.02  # of the images: a place that fewer show takes the background's level
    BOUND_MARGIN = 1.25  # of the movement seen in training, for later images
    BOUND_ANGLE_DEG, BOUND_SHIFT = 5.0, 0.04  # and so much more, shift in half widths
    FREE_ANGLE_DEG = 120.0  # parts that turn further lie anyhow: no bound
    COMMON_DIRECTION = 0.5  # mean resultant length from which a set has a mean direction
    NUM_RESTARTS, COARSE_ROUNDS, FINE_ROUNDS = 4, 3, 4

    def __init__(self, group: str, max_shift: float = 0.4, max_scale: float = 1.15, min_drop: float = 0.25) -> None:
        """
        Args:
            max_shift: bound of the translation, in half widths.  max_scale: zoom in or out, where the group scales.
            min_drop: `fit` turns the aligner off unless the pairwise L2 of held-out normal images falls by this share.
        """
        super().__init__()
        if group not in GROUPS:
            raise ValueError(f"transform group {group!r} is not known: choose one of {', '.join(GROUPS)}")
        self.group, self.uses = group, USES[group]
        self.turns, self.shifts = "r" in self.uses, "t" in self.uses
        self.max_shift, self.max_scale, self.min_drop = max_shift, max_scale, min_drop
        self.radius = math.ceil(max_shift * self.COARSE_PX / 2) if self.shifts else 0  # px of translation searched
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
        self._bank: tuple[Tensor, ...] | None = None

    # ---- images
    def prepare(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, F, F) grey, zero mean and unit deviation each: gain and bias of the light drop out."""
        if images.shape[-1] != images.shape[-2]:
            raise ValueError(f"images are {tuple(images.shape)}, expected square ones")
        grey = images.float().mean(1, keepdim=True)
        if grey.shape[-1] != self.FINE_PX:
            grey = shrink(grey, self.FINE_PX)
        grey = grey[:, 0]
        grey = grey - grey.mean((1, 2), keepdim=True)
        return grey / grey.std((1, 2), keepdim=True).clamp_min(self.MIN_STD)

    @staticmethod
    def _resize(x: Tensor, size: int) -> Tensor:
        """(B, S, S) -> (B, size, size) by averaging."""
        return x if x.shape[-1] == size else F.adaptive_avg_pool2d(x[:, None], size)[:, 0]

    # ---- (a) exhaustive search
    def set_template(self, template: Tensor, weight: Tensor) -> None:
        """template, weight: (F, F)."""
        self.template.copy_(template)
        self.weight.copy_(weight)
        self._bank = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._bank = None

    def _search_bank(self) -> tuple[Tensor, ...]:
        """Turned coarse templates and the sums over the image frame that do not depend on the image."""
        if self._bank is not None and self._bank[0].device == self.template.device:
            return self._bank
        size, radius = self.COARSE_PX, self.radius
        device = self.template.device
        num = self.NUM_ANGLES if self.turns else 1
        angles = torch.arange(num, device=device) * (2 * math.pi / num)
        # template seen in the input frame at shift 0: T(theta^-1 x)
        back = invert_theta(turn(angles.float()))
        both = torch.stack([self._resize(self.template[None], size)[0], self._resize(self.weight[None], size)[0]])
        turned = warp(both.expand(num, -1, -1, -1), back, "zeros")
        weight = turned[:, 1].clamp_min(0)
        template = warp(both[:1].expand(num, 1, -1, -1), back, "border")[:, 0]
        kernels = torch.cat([weight * template, weight, weight * template**2])[:, None]  # (3K, 1, S, S)
        frame = torch.ones(1, 1, size, size, device=device)
        sums = F.conv2d(F.pad(frame, [radius] * 4), kernels)[0]  # correlation with the frame's mask
        wt, w, wtt = sums.split(num)  # each (K, 2r+1, 2r+1)
        w = w.clamp_min(self.MIN_VARIANCE)
        mean_t = wt / w
        var_t = (wtt / w - mean_t**2).clamp_min(self.MIN_STD)
        overlap = w / w.max()
        penalty = (self.MIN_OVERLAP - overlap).clamp_min(0) * 5
        step = math.pi / num
        penalty = (
            penalty + self.OUT_OF_BOUNDS * (wrap_angle(angles.float()).abs() > self.angle_bound + step)[:, None, None]
        )
        if self.shifts:
            px = (torch.arange(2 * radius + 1, device=device) - radius) * (2 / size)
            outside = [(px - c).abs() > b + 1 / size for c, b in zip(self.shift_centre, self.shift_bound, strict=True)]
            penalty = penalty + self.OUT_OF_BOUNDS * (outside[1][:, None] | outside[0][None, :])
        self._bank = (kernels[: 2 * num], w, mean_t, var_t, penalty, angles)
        return self._bank

    def search(self, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """Best `num_candidates` thetas by masked normalised cross-correlation.

        coarse: (B, S, S).  Returns (B, C, 2, 3) and correlations (B, C).
        """
        kernels, w, mean_t, var_t, penalty, angles = self._search_bank()
        num, radius = len(angles), self.radius
        padded = F.pad(torch.stack([coarse, coarse**2], 1), [radius] * 4)
        sums = F.conv2d(padded[:, :1], kernels)  # (B, 2K, n, n)
        wti, wi = sums.split(num, 1)
        wii = F.conv2d(padded[:, 1:], kernels[num:])
        mean_i = wi / w
        var_i = (wii / w - mean_i**2).clamp_min(self.MIN_VARIANCE)
        zncc = (wti / w - mean_t * mean_i) / (var_t * var_i).sqrt() - penalty
        side = zncc.shape[-1]
        best, where = zncc.flatten(2).max(-1)  # over translations: (B, K)
        count = 1 if num == 1 else self.NUM_CANDIDATES
        # candidates are local maxima over the circle of angles
        if count > 1:
            left, right = best.roll(1, 1), best.roll(-1, 1)
            peak = (best >= left) & (best >= right)
            top, index = torch.where(peak, best, best - 4).topk(count, 1)
        else:
            top, index = best.max(1, keepdim=True)
        where = where.gather(1, index)
        # output x of the padded correlation: template moved by (x - radius) px in the input frame
        dy = torch.div(where, side, rounding_mode="floor") - radius
        dx = where % side - radius
        shift = torch.stack([dx, dy], -1).float() * (2 / self.COARSE_PX)
        return self._bound(turn(angles.float()[index], shift)), top

    # ---- (b) refinement
    def _basis(self, template: Tensor) -> Tensor:
        """Steepest-descent images of the group's parameters, then gain and bias: (P, d + 2)."""
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
        columns = [field for use in self.uses for field in fields[use]]
        return torch.stack([*columns, template, torch.ones_like(template)], dim=-1).flatten(0, 1)

    def _increment(self, delta: Tensor) -> Tensor:
        """(B, d), as `_basis` orders them -> (B, 2, 3), a small transform of the group."""
        widths = {"r": 1, "s": 1, "a": 2, "t": 2}
        parts = dict(zip(self.uses, delta.split([widths[use] for use in self.uses], dim=1), strict=True))
        zero = delta.new_zeros(delta.shape[0])
        angle = parts["r"][:, 0] if "r" in parts else zero
        scale = parts["s"][:, 0].exp() if "s" in parts else zero + 1
        shift = parts["t"] if "t" in parts else delta.new_zeros(delta.shape[0], 2)
        theta = make_theta(angle, scale, shift)
        if "a" in parts:
            along, across = parts["a"].unbind(dim=1)
            stretch = torch.stack([torch.stack([1 + along, across], -1), torch.stack([across, 1 - along], -1)], -2)
            theta = torch.cat([theta[..., :2] @ stretch, theta[..., 2:]], dim=-1)
        return theta

    def _bound(self, theta: Tensor) -> Tensor:
        """theta, (..., 2, 3), brought inside the group's bounds."""
        linear, shift = theta[..., :2], theta[..., 2]
        if self.shifts:
            shift = torch.minimum(
                torch.maximum(shift, self.shift_centre - self.shift_bound), self.shift_centre + self.shift_bound
            )
        if self.turns:
            angle = angle_of(theta)
            excess = angle - torch.minimum(torch.maximum(angle, -self.angle_bound), self.angle_bound)
            linear = turn(-excess)[..., :2] @ linear
        limit = math.log(self.max_scale)
        if "a" in self.uses:
            rotation = turn(torch.atan2(linear[..., 1, 0] - linear[..., 0, 1], linear[..., 0, 0] + linear[..., 1, 1]))
            rotation = rotation[..., :2]
            stretch = rotation.transpose(-1, -2) @ linear - torch.eye(2, device=theta.device)
            linear = rotation + rotation @ stretch.clamp(-limit, limit)
        elif "s" in self.uses:
            determinant = linear[..., 0, 0] * linear[..., 1, 1] - linear[..., 0, 1] * linear[..., 1, 0]
            scale = determinant.clamp_min(self.EPSILON).sqrt()
            linear = linear * (scale.log().clamp(-limit, limit).exp() / scale)[..., None, None]
        return torch.cat([linear, shift[..., None]], dim=-1)

    def refine(self, level: Tensor, theta: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """Gauss-Newton against the template at level's resolution; never returns a theta worse than it was given.

        level: (B, S, S).  theta: (B, 2, 3).  Returns theta and its robust cost (B,), in 0..1.
        """
        size = level.shape[-1]
        template = self._resize(self.template[None], size)[0]
        weight = self._resize(self.weight[None], size)[0].flatten()
        basis = self._basis(template)
        columns = basis.shape[1]
        outer = (basis[:, :, None] * basis[:, None, :]).flatten(1)  # (P, d^2)
        gain_bias = basis[:, -2:]
        outer2 = (gain_bias[:, :, None] * gain_bias[:, None, :]).flatten(1)
        ridge2 = self.MIN_STD * torch.eye(2, device=level.device)
        images = level[:, None]
        best, best_cost = theta, torch.full((level.shape[0],), math.inf, device=level.device)
        for step in range(num_steps + 1):
            grid = F.affine_grid(theta, [level.shape[0], 1, size, size], align_corners=False)
            moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)[:, 0].flatten(1)
            inside = ((1 - grid.abs().amax(-1)).flatten(1) * (size / 2) + 0.5).clamp(0, 1) * weight  # soft edge
            # gain and bias of the template for this image, then the robust residual
            total = inside.sum(1, keepdim=True).clamp_min(self.MIN_VARIANCE)
            normal = _each(inside, outer2).view(-1, 2, 2) / total[..., None]
            right = _each(inside * moved, gain_bias) / total
            fit = _solve2(normal + ridge2, right)
            residual = moved - _each(fit, gain_bias.T)
            square = residual.square()
            sigma2 = (inside * square).sum(1, keepdim=True) / total + self.EPSILON
            clip = self.ROBUST**2 * sigma2
            spread = (inside * moved.square()).sum(1) / total[:, 0] - ((inside * moved).sum(1) / total[:, 0]).square()
            cost = (inside * torch.minimum(square, clip)).sum(1) / total[:, 0] / spread.clamp_min(self.MIN_VARIANCE)
            cost = (
                cost
                + (fit[:, 0] <= 0)
                + self.LACK_OF_OVERLAP * (self.MIN_OVERLAP - total[:, 0] / weight.sum()).clamp_min(0)
            )
            better = cost < best_cost
            best = torch.where(better[:, None, None], theta, best)
            best_cost = torch.where(better, cost, best_cost)
            if step == num_steps:
                break
            w = inside / (1 + square / clip)  # Cauchy-like
            normal = _each(w, outer).view(-1, columns, columns)
            trace = normal.diagonal(dim1=1, dim2=2)
            normal = normal + torch.diag_embed(self.DAMPING * trace + self.EPSILON)
            right = _each(w * residual, basis)
            solution = _solve(normal, right)
            delta = solution[:, :-2] / fit[:, :1].clamp_min(self.MIN_GAIN)
            delta = delta * (self.MAX_STEP / delta.abs().amax(1, keepdim=True).clamp_min(self.MAX_STEP))
            theta = self._bound(compose_theta(theta, invert_theta(self._increment(delta))))
        return best, best_cost

    # ---- inference
    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> theta (B, 2, 3), float32."""
        if not bool(self.enabled):
            return identity_theta(images)
        return self.align(self.prepare(images))[0]

    def align(self, fine: Tensor, use_fine: bool = True) -> tuple[Tensor, Tensor]:
        """Prepared (B, F, F) -> theta (B, 2, 3), cost (B,)."""
        middle = self._resize(fine, self.MIDDLE_PX)
        coarse = self._resize(middle, self.COARSE_PX)
        candidates, _ = self.search(coarse)
        batch, count = candidates.shape[:2]
        theta = candidates[:, 0]
        if count > 1:  # near half-turns look alike: refine each, keep the one that fits best
            each, cost = self.refine(coarse.repeat_interleave(count, 0), candidates.flatten(0, 1), self.COARSE_STEPS)
            pick = cost.view(batch, count).argmin(1)
            theta = each.view(batch, count, 2, 3)[torch.arange(batch, device=fine.device), pick]
        theta, cost = self.refine(middle, theta, self.MIDDLE_STEPS)
        if use_fine and self.FINE_STEPS:
            theta, cost = self.refine(fine, theta, self.FINE_STEPS)
        return theta, cost

    # ---- training
    def _align_all(self, fine: Tensor, use_fine: bool) -> tuple[Tensor, Tensor]:
        parts = [self.align(part, use_fine) for part in fine.split(self.ALIGN_BATCH)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _mean_image(self, fine: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Masked mean of the aligned prepared images and the share of images valid at each pixel."""
        total, count = torch.zeros_like(self.template), torch.zeros_like(self.template)
        for part, moves in zip(fine.split(self.MEAN_BATCH), theta.split(self.MEAN_BATCH), strict=True):
            valid = valid_mask(moves, self.FINE_PX, self.FINE_PX).to(part.dtype)
            total += (warp(part[:, None], moves, "border")[:, 0] * valid).sum(dim=0)
            count += valid.sum(dim=0)
        share = count / len(fine)
        mean = total / count.clamp_min(1)
        # places that almost no image shows: background level
        return torch.where(
            share > self.SEEN_SHARE, mean, (mean * share).sum() / share.sum().clamp_min(self.MIN_VARIANCE)
        ), share

    @torch.no_grad()
    def fit(self, prepared: Tensor, seed: int = 0) -> AlignmentReport:
        """Learns the template from normal images, and whether to align at all. Deterministic given the seed.

        A fifth of the images is kept aside to judge the template on; it joins the last rounds. Parts that the first start
        brings closer by far less than is asked for are given up there: over ten real sets and two seeds its drop was within
        0.06 of the final one.

        Args:
            prepared: (N, F, F), from `prepare`.

        Raises: ValueError: fewer than four images.
        """
        if len(prepared) < 4:
            raise ValueError(f"image alignment needs at least 4 normal images, got {len(prepared)}")
        self.enabled.fill_(True)
        self._unbound()
        order = torch.randperm(len(prepared), generator=torch.Generator().manual_seed(seed))
        shuffled = prepared[order.to(prepared.device)]
        num_held = max(2, len(shuffled) // 5)
        held, rest = shuffled[:num_held], shuffled[num_held:]
        some = rest[: self.START_IMAGES]
        tried: list[tuple[float, Tensor, Tensor]] = []
        for start in range(min(self.NUM_RESTARTS, len(some))):
            self.set_template(some[start], torch.ones_like(self.template))
            for _ in range(self.COARSE_ROUNDS):
                theta, _ = self._align_all(some, use_fine=False)
                self.set_template(*self._mean_image(some, theta))
            _, cost = self._align_all(some, use_fine=False)
            tried.append((cost.mean().item(), self.template.clone(), self.weight.clone()))
            if start == 0:
                before, after = self._held_out_l2(held, self._align_all(held, use_fine=False)[0])
                if 1 - after / max(before, self.EPSILON) < self.min_drop - self.GIVE_UP:
                    return self._report(before, after, tried, [])
        best = min(tried, key=lambda item: item[0])
        self.set_template(best[1], best[2])
        round_costs = [self._round(rest) for _ in range(self.FINE_ROUNDS)]
        theta, _ = self._align_all(held, use_fine=True)
        before, after = self._held_out_l2(held, theta)
        if 1 - after / max(before, self.EPSILON) >= self.min_drop:
            round_costs += [self._round(shuffled) for _ in range(2)]
            theta, _ = self._align_all(shuffled, use_fine=True)
            self._learn_bounds(theta)
        return self._report(before, after, tried, round_costs)

    def _report(
        self, before: float, after: float, tried: list[tuple[float, Tensor, Tensor]], round_costs: list[float]
    ) -> AlignmentReport:
        """Whether to align, from the held-out images' pairwise L2 before and after; set, and told."""
        drop = 1 - after / max(before, self.EPSILON)
        self.enabled.fill_(drop >= self.min_drop)
        return AlignmentReport(
            enabled=drop >= self.min_drop,
            drop=drop,
            l2_identity=before,
            l2_aligned=after,
            restart_costs=[item[0] for item in tried],
            round_costs=round_costs,
            angle_bound_deg=math.degrees(float(self.angle_bound)),
            shift_bound=self.shift_bound.tolist(),
        )

    def _round(self, fine: Tensor) -> float:
        """One round of congealing over all images. Returns: their mean cost before it."""
        theta, cost = self._align_all(fine, use_fine=True)
        theta = compose_theta(theta, self._gauge(theta).expand(len(theta), 2, 3))
        self.set_template(*self._mean_image(fine, theta))
        return cost.mean().item()

    def _held_out_l2(self, fine: Tensor, theta: Tensor) -> tuple[float, float]:
        """Pairwise L2 of the images unaligned and aligned, over the aligned frame's valid pixels.

        Resampling blurs, which alone lowers the L2 of noise by a third. So unaligned is the lower of two: the images as
        they are, and each moved by another's theta, which blurs as much and aligns nothing.
        """
        others = theta.roll(1, 0)
        valid, mixed_valid = (valid_mask(moves, self.FINE_PX, self.FINE_PX) for moves in (theta, others))
        aligned, mixed = (warp(fine[:, None], moves, "border") for moves in (theta, others))
        before = min(pairwise_l2(fine[:, None], valid), pairwise_l2(mixed, mixed_valid))
        return before, pairwise_l2(aligned, valid)

    def _unbound(self) -> None:
        self.angle_bound.fill_(math.pi)
        self.shift_centre.zero_()
        self.shift_bound.fill_(self.max_shift)
        self._bank = None

    def _learn_bounds(self, theta: Tensor) -> None:
        """Bounds of later images' movement: what training showed, and a margin."""
        if self.turns:
            bound = angle_of(theta).abs().max() * self.BOUND_MARGIN + math.radians(self.BOUND_ANGLE_DEG)
            self.angle_bound.copy_(
                torch.where(bound > math.radians(self.FREE_ANGLE_DEG), torch.full_like(bound, math.pi), bound)
            )
        if self.shifts:
            low, high = theta[..., 2].amin(0), theta[..., 2].amax(0)
            self.shift_centre.copy_((low + high) / 2)
            self.shift_bound.copy_((high - low) / 2 * self.BOUND_MARGIN + self.BOUND_SHIFT)
        self._bank = None

    def _gauge(self, theta: Tensor) -> Tensor:
        """The one transform g, (1, 2, 3), after which theta o g keeps the template's content central and
        the set's mean turn near zero where it has one."""
        back = invert_theta(theta)
        g = identity_theta(theta[:1])
        if self.turns:
            unit = torch.stack([angle_of(theta).cos(), angle_of(theta).sin()], -1).mean(0)
            if unit.norm() > self.COMMON_DIRECTION:  # the set has a mean direction: keep the frame near it
                g = turn(torch.atan2(-unit[1], unit[0])[None])
        if self.shifts:  # the mean place of the image centres becomes the frame's centre
            g = torch.cat([g[..., :2], back[..., 2].mean(0)[None, :, None]], -1)
        return g


def _each(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows (B, P) @ matrix (P, D), each row by itself: to the last digit, none hangs on its place among the others."""
    width = matrix.shape[1]
    whole = F.pad(matrix, (0, -width % 16))  # products of odd widths do hang on it
    return torch.bmm(rows[:, None], whole.expand(rows.shape[0], *whole.shape))[:, 0, :width]


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """(B, n, n) x = (B, n), positive definite; in an exported graph, whose runtimes have no solver, by Gauss and Jordan."""
    if not torch.compiler.is_exporting():
        return torch.linalg.solve(matrix, right)
    rows = torch.cat([matrix, right[..., None]], dim=2)
    for number in range(matrix.shape[1]):
        pivot = rows[:, number : number + 1] / rows[:, number : number + 1, number : number + 1]
        here = torch.arange(matrix.shape[1])[:, None] == number
        rows = torch.where(here, pivot, rows - rows[:, :, number : number + 1] * pivot)
    return rows[:, :, -1]


def _solve2(matrix: Tensor, right: Tensor) -> Tensor:
    """(B, 2, 2) x = (B, 2), closed form."""
    a, b, c, d = matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 1, 0], matrix[:, 1, 1]
    det = a * d - b * c
    return torch.stack([d * right[:, 0] - b * right[:, 1], a * right[:, 1] - c * right[:, 0]], -1) / det[:, None]
