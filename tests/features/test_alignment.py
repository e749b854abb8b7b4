"""Tests of transforms and warps (laws, directions, bounds) and of spatial transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from focus_ray.features.alignment.theta import (
    GROUP_COMPONENTS,
    TransformBounds,
    build_theta_from_components,
    compose_theta,
    compute_rotation_angle,
    compute_theta_from_parameters,
    compute_valid_mask,
    count_transform_parameters,
    invert_theta,
    warp_images,
)
from focus_ray.features.alignment.transformer import SpatialTransformer

GROUPS = tuple(GROUP_COMPONENTS)
IDENTITY = torch.eye(2, 3)
SIZE = 64
INSIDE = slice(22, 42)  # central pixels, which two of the transforms below do not move out of the frame
NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-4, 4, width=32)


@st.composite
def thetas(draw: st.DrawFn, group: str = "affine") -> Tensor:
    """Draws (1, 2, 3) with any angle and a moderate shift and scale."""
    numbers = [draw(st.floats(-2, 2, width=32)) for _ in range(count_transform_parameters(group))]
    return compute_theta_from_parameters(torch.tensor([numbers]), group, TransformBounds(math.pi, 0.15, 1.1))


def smooth(phase: float = 0.3) -> Tensor:
    """Makes (1, 2, SIZE, SIZE) of low frequency, for which bilinear resampling has errors below 1e-3."""
    centres = (torch.arange(SIZE) + 0.5) * 2 / SIZE - 1
    x, y = centres[None, :], centres[:, None]
    return torch.stack([torch.cos(2 * x + y + phase) + x * y, torch.sin(x - 2 * y) - 0.5 * x])[None]


def make(angle: float = 0.0, scale: float = 1.0, shift: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    return build_theta_from_components(torch.tensor([angle]), torch.tensor([scale]), torch.tensor([shift]))


# Groups


@pytest.mark.parametrize(("group", "width"), zip(GROUPS, (0, 1, 2, 1, 2, 3, 3, 4, 6), strict=True))
def test_a_group_has_one_parameter_per_degree_of_freedom_and_zeros_give_the_identity(group: str, width: int) -> None:
    assert count_transform_parameters(group) == width
    theta = compute_theta_from_parameters(torch.zeros(3, width), group, TransformBounds())
    assert torch.equal(theta, IDENTITY.expand(3, 2, 3))


@given(group=st.sampled_from(GROUPS), data=st.data())
def test_transforms_never_exceed_the_bounds(group: str, data: st.DataObject) -> None:
    bounds = TransformBounds(math.radians(40), 0.2, 1.3)
    numbers = [data.draw(NUMBERS) for _ in range(count_transform_parameters(group))]
    ((linear_x, linear_y),) = compute_theta_from_parameters(torch.tensor([numbers]), group, bounds).double().tolist()
    determinant = linear_x[0] * linear_y[1] - linear_x[1] * linear_y[0]
    first_axis = math.hypot(linear_x[0], linear_y[0])
    slack = 1 + 1e-5
    assert 1 / (1.3 * slack) <= math.sqrt(determinant) <= 1.3 * slack
    assert abs(math.atan2(linear_y[0], linear_x[0])) <= math.radians(40) * slack
    assert max(abs(linear_x[2]), abs(linear_y[2])) <= 0.2 * slack
    largest_anisotropy = 1.3 if group == "rotation_two_scales" else 1.3**0.5
    assert 1 / (largest_anisotropy * slack) <= first_axis / math.sqrt(determinant) <= largest_anisotropy * slack


@given(group=st.sampled_from(["translation", "rotation", "scale"]), data=st.data())
def test_a_group_does_not_change_components_that_it_does_not_name(group: str, data: st.DataObject) -> None:
    numbers = [data.draw(NUMBERS) for _ in range(count_transform_parameters(group))]
    (theta,) = compute_theta_from_parameters(torch.tensor([numbers]), group, TransformBounds())
    if group == "translation":
        assert torch.equal(theta[:, :2], IDENTITY[:, :2])
    else:
        assert torch.equal(theta[:, 2], torch.zeros(2))
    if group == "rotation":
        torch.testing.assert_close(theta[:, :2] @ theta[:, :2].T, torch.eye(2))
    if group == "scale":
        assert torch.equal(theta[:, :2], theta[0, 0] * torch.eye(2))


# Directions


def test_a_rotation_by_90_degrees_equals_rot90_of_numpy() -> None:
    picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    rotated = warp_images(picture, make(angle=math.pi / 2))
    np.testing.assert_allclose(rotated.numpy(), np.rot90(picture.numpy(), 1, axes=(2, 3)), atol=1e-6)


def test_a_positive_shift_moves_the_picture_left_and_up() -> None:
    picture = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    moved = warp_images(picture, make(shift=(2 / 4, 1 / 4)))  # half widths of 4 px: 2 px in x, 1 px in y
    torch.testing.assert_close(moved[:, :, :7, :6], picture[:, :, 1:, 2:])


def test_a_scale_above_1_zooms_out() -> None:
    picture = torch.zeros(1, 1, 32, 32)
    picture[:, :, 8:24, 8:24] = 1
    assert float(warp_images(picture, make(scale=1.25)).sum()) == pytest.approx(256 / 1.25**2, rel=0.02)


@given(angle=st.floats(-3.1, 3.1), scale=st.floats(0.5, 2.0))
def test_the_rotation_angle_equals_the_angle_of_make_theta(angle: float, scale: float) -> None:
    theta = make(angle, scale, (0.1, -0.2))
    assert float(compute_rotation_angle(theta)) == pytest.approx(angle, abs=1e-5)
    assert float(compute_rotation_angle(invert_theta(theta))) == pytest.approx(-angle, abs=1e-5)


@pytest.mark.parametrize(("padding", "expected"), [("border", 3.0), ("reflection", 2.0), ("zeros", 0.0)])
def test_the_padding_sets_the_values_outside_the_frame(padding: str, expected: float) -> None:
    picture = torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(1, 1, 4, 4)
    beyond = warp_images(
        picture, make(shift=(1.0, 0.0)), padding
    )  # shifted by 2 px: the last column shows the second pixel after the edge
    assert float(beyond[0, 0, 0, 3]) == pytest.approx(expected, abs=1e-5)


# Laws


@given(thetas(), thetas(), thetas())
def test_composing_is_associative_with_the_identity_as_neutral_element(a: Tensor, b: Tensor, c: Tensor) -> None:
    first, second = compose_theta(compose_theta(a, b), c), compose_theta(a, compose_theta(b, c))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    assert torch.equal(compose_theta(a, IDENTITY[None]), a)
    assert torch.equal(compose_theta(IDENTITY[None], a), a)
    torch.testing.assert_close(warp_images(smooth(), IDENTITY[None]), smooth(), rtol=0, atol=1e-5)


@given(thetas())
def test_a_transform_and_its_inverse_compose_to_the_identity(theta: Tensor) -> None:
    inverse = invert_theta(theta)
    torch.testing.assert_close(compose_theta(theta, inverse), IDENTITY[None], rtol=0, atol=1e-5)
    torch.testing.assert_close(compose_theta(inverse, theta), IDENTITY[None], rtol=0, atol=1e-5)


@settings(max_examples=50)
@given(thetas("similarity"), thetas("similarity"))
def test_one_warp_by_the_composition_equals_two_warps(outer: Tensor, inner: Tensor) -> None:
    once = warp_images(smooth(), compose_theta(outer, inner))
    twice = warp_images(warp_images(smooth(), outer), inner)
    torch.testing.assert_close(once[..., INSIDE, INSIDE], twice[..., INSIDE, INSIDE], rtol=0, atol=5e-3)


def test_a_singular_transform_has_no_inverse() -> None:
    with pytest.raises(ValueError, match="singular"):
        invert_theta(torch.stack([IDENTITY, torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0]])]))


# Valid pixels


@given(thetas(), st.integers(1, 7), st.integers(1, 7))
def test_a_pixel_is_valid_if_its_transformed_centre_is_inside_the_frame(theta: Tensor, height: int, width: int) -> None:
    mask = compute_valid_mask(theta, height, width)
    assert (mask.shape, mask.dtype) == ((1, height, width), torch.bool)
    matrix = theta[0].double().numpy()
    for row in range(height):
        for column in range(width):
            centre = matrix @ [(2 * column + 1) / width - 1, (2 * row + 1) / height - 1, 1]
            if abs(np.abs(centre).max() - 1) > 1e-5:  # exactly on the edge, both answers are right
                assert bool(mask[0, row, column]) == (np.abs(centre).max() < 1)


# The localisation network


@pytest.mark.parametrize("group", GROUPS[1:])
@pytest.mark.parametrize("size", [2, 7, 33])
def test_an_untrained_spatial_transformer_predicts_the_identity_and_has_a_gradient(group: str, size: int) -> None:
    net = SpatialTransformer(5, size, group, TransformBounds())
    theta = net(torch.randn(3, 5, size, size, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(theta, IDENTITY.expand(3, 2, 3))
    (theta * torch.arange(1.0, 19).square().view(3, 2, 3)).sum().backward()
    assert float(net.parameters_out.weight.grad.abs().max()) > 0


def make_transformer_that_moves() -> SpatialTransformer:
    torch.manual_seed(0)
    net = SpatialTransformer(5, 7, "rotation_translation", TransformBounds())
    torch.nn.init.normal_(net.parameters_out.weight, std=0.05)
    torch.nn.init.constant_(net.parameters_out.bias, 0.8)  # a movement of all images together
    return net


def test_a_movement_of_all_images_together_is_removed_in_training_and_afterwards() -> None:
    net, features = make_transformer_that_moves(), torch.randn(16, 5, 7, 7, generator=torch.Generator().manual_seed(0))
    net.reset_running_stats()
    for layer in (module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        layer.momentum = 1.0
    net.momentum = None
    theta = net(features)
    assert float(theta.detach().std(dim=0).max()) > 0.001  # images move differently
    assert float(compute_rotation_angle(theta.detach()).mean().abs()) < 0.01
    net.eval()
    # running variances of batch norm are unbiased, so the predictions differ a little
    torch.testing.assert_close(net(features), theta, rtol=0, atol=0.02)


def test_no_image_moves_further_than_the_training_images() -> None:
    net, features = make_transformer_that_moves(), torch.randn(16, 5, 7, 7, generator=torch.Generator().manual_seed(0))
    net.reset_running_stats()
    furthest = net(features)[:, :, 2].abs().amax(dim=0)
    net.eval()
    assert bool((net(30 * features)[:, :, 2].abs().amax(dim=0) <= furthest + 1e-6).all())


def test_a_state_of_an_earlier_version_keeps_its_predictions() -> None:
    net, features = make_transformer_that_moves().eval(), torch.randn(4, 5, 7, 7)
    state = {name: value for name, value in net.state_dict().items() if not name.startswith(("parameter_", "num_"))}
    state = {name: value for name, value in state.items() if name != "num_batches"} | {
        "parameters_out.weight": net.parameters_out.weight.detach(), "parameters_out.bias": net.parameters_out.bias.detach()
    }  # fmt: skip
    other = SpatialTransformer(5, 7, "rotation_translation", TransformBounds()).eval()
    other.load_state_dict(state)
    expected = compute_theta_from_parameters(
        net.parameters_out(net.head(net.features(features).flatten(1))), "rotation_translation", TransformBounds()
    )
    assert torch.equal(other(features), expected)


# Half precision


@pytest.mark.parametrize("group", ["rotation_translation", "affine"])
def test_a_warp_samples_the_same_coordinates_in_half_precision(group: str) -> None:
    generator = torch.Generator().manual_seed(0)
    theta = compute_theta_from_parameters(
        torch.randn(4, count_transform_parameters(group), generator=generator), group, TransformBounds()
    )
    ramp = torch.linspace(-128, 128, 256)  # the value of a pixel is its coordinate
    coordinates = torch.stack([ramp.expand(256, 256), ramp[:, None].expand(256, 256)])[None].expand(4, 2, 256, 256)
    exact = warp_images(coordinates, theta, "border")
    with torch.autocast("cpu", torch.bfloat16):
        assert float((warp_images(coordinates, theta, "border") - exact).abs().max()) < 1e-3
        assert float((compose_theta(theta, invert_theta(theta)) - IDENTITY).abs().max()) < 1e-5
    half = warp_images(coordinates.bfloat16(), theta, "border").float()
    assert float((half - exact).abs().max()) <= 0.51  # the rounding of bfloat16 for values near 128


def test_a_spatial_transformer_computes_theta_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    net = SpatialTransformer(3, 32, "rotation_translation", TransformBounds()).eval()
    torch.nn.init.normal_(net.parameters_out.weight, std=0.05)
    hidden = []
    net.head.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    images = torch.rand(4, 3, 32, 32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        theta = net(images)
    exact = compute_theta_from_parameters(
        net.parameters_out(hidden[0].float()), "rotation_translation", TransformBounds()
    )
    assert theta.dtype == torch.float32
    torch.testing.assert_close(theta, exact)
