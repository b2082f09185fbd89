"""The network of the paper: its layers, its sizes and the context that it needs."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import (
    conv2d,
    conv3d,
    conv_transpose2d,
    conv_transpose3d,
    max_pool2d,
    max_pool3d,
)

from unet_ray.errors import InputError
from unet_ray.network.unet import StandardisedConv2d, StandardisedConv3d, UNet
from unet_ray.tiling.levels import Level
from unet_ray.tiling.tiles import Context


@pytest.fixture
def double():
    """Float64 by default, so that differences are errors, not rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small(seed=0, **options):
    torch.manual_seed(seed)
    return UNet(**{"base_channels": 3, "depth": 2, **options}).eval()


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def convolutions(network):
    kinds = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d
    return [m for m in network.modules() if isinstance(m, kinds)]


def with_random_norms(network):
    """Sets the norms to random values, as after training."""
    for layer in network.modules():
        if isinstance(layer, StandardisedConv2d | StandardisedConv3d):
            nn.init.normal_(layer.weight, 0.1, 0.3)
            nn.init.normal_(layer.gain, 1.0, 0.3)
            nn.init.normal_(layer.bias)
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.2, 3.0)
            nn.init.normal_(layer.weight, 1.0, 0.3)
            nn.init.normal_(layer.bias)
    return network


# The figure of the paper.


def test_the_network_of_the_paper():
    with torch.device("meta"):  # shapes only, no memory
        network = UNet()
        assert network(torch.empty(1, 1, 572, 572)).shape == (1, 2, 388, 388)
    assert len(convolutions(network)) == 23
    assert sum(p.numel() for p in network.parameters()) == 31_030_658
    widths = [layer.out_channels for layer in convolutions(network.down)]
    assert widths == [64, 64, 128, 128, 256, 256, 512, 512, 1024, 1024]
    assert not any(layer.padding[0] for layer in convolutions(network))


def test_the_context_is_computed_from_the_layers():
    with torch.device("meta"):
        network = UNet()
    assert network.context == Context((0, 92, 92), (0, 96, 96), (1, 16, 16))
    assert network.levels == (Level((1, 3, 3), (1, 2, 2)),) * 4 + (Level((1, 3, 3), (1, 1, 1)),)
    assert small(depth=1).context == Context((0, 8, 8), (0, 12, 12), (1, 2, 2))


def as_in_the_paper(network, x):
    """Figure 1, implemented independently from the weights."""
    weights = {name: p.detach() for name, p in network.named_parameters()}

    def pair(x, name):
        for layer in (0, 2):
            x = conv2d(x, weights[f"{name}.{layer}.weight"], weights[f"{name}.{layer}.bias"]).relu()
        return x

    skips = []
    for level in range(network.depth):
        skips.append(pair(x, f"down.{level}"))
        x = max_pool2d(skips[-1], 2)
    x = pair(x, f"down.{network.depth}")
    for level in reversed(range(network.depth)):
        x = conv_transpose2d(
            x, weights[f"up.{level}.weight"], weights[f"up.{level}.bias"], stride=2
        )
        skip = skips[level]
        y0, x0 = (
            (have - want) // 2 for have, want in zip(skip.shape[2:], x.shape[2:], strict=True)
        )
        skip = skip[:, :, y0 : y0 + x.shape[2], x0 : x0 + x.shape[3]]
        x = pair(torch.cat([skip, x], dim=1), f"join.{level}")
    return conv2d(x, weights["head.weight"], weights["head.bias"])


def test_the_scores_are_those_of_the_papers_figure(double):
    network, image = small(depth=3, in_channels=2, classes=3), noise(1, 2, 100, 116)
    nn.init.normal_(network.head.bias)
    torch.testing.assert_close(network(image), as_in_the_paper(network, image), rtol=0, atol=1e-12)


# In 3-D: Çiçek, Abdulkadir, Lienkamp, Brox, Ronneberger 2016.

CUBIC, ANISOTROPIC = ((3, 2),) * 3, ((1, 1), (3, 1), (3, 2), (1, 1))


def test_the_network_of_the_paper_in_3d():
    with torch.device("meta"):
        network = UNet(3, 3, 32, 3, "none", 0.0, ((3, 2),) * 4, "before")
        assert network(torch.empty(1, 3, 116, 132, 132)).shape == (1, 3, 28, 44, 44)
    assert sum(p.numel() for p in network.parameters()) == 19_069_955  # stated in its section 2
    assert len(convolutions(network)) == 18
    widths = [layer.out_channels for layer in convolutions(network.down)]
    assert widths == [32, 64, 64, 128, 128, 256, 256, 512]
    assert network.context == Context((44,) * 3, (48,) * 3, (8,) * 3)


def in_3d(network, x):
    """The network of any levels along z, implemented independently from the weights."""
    weights = {name: p.detach() for name, p in network.named_parameters()}

    def pair(x, name):
        for layer in (0, 2):
            x = conv3d(x, weights[f"{name}.{layer}.weight"], weights[f"{name}.{layer}.bias"]).relu()
        return x

    def level(x, number):
        x = pair(x, f"down.{number}")
        if number == network.depth:
            return x
        pool = (network.z_levels[number][1], 2, 2)
        up = weights[f"up.{number}.weight"], weights.get(f"up.{number}.bias")
        below = conv_transpose3d(level(max_pool3d(x, pool), number + 1), *up, stride=pool)
        for axis in (2, 3, 4):
            x = x.narrow(axis, (x.shape[axis] - below.shape[axis]) // 2, below.shape[axis])
        return pair(torch.cat([x, below], dim=1), f"join.{number}")

    return conv3d(level(x, 0), weights["head.weight"], weights["head.bias"])


@pytest.mark.parametrize("doubling", ["after", "before"])
@pytest.mark.parametrize(
    ("z_levels", "z"), [(CUBIC, 44), (ANISOTROPIC, 20), (((1, 1), (1, 1), (3, 1)), 6)]
)
def test_the_scores_in_3d_are_those_of_the_layers(double, z_levels, z, doubling):
    depth = len(z_levels) - 1
    network = small(z_levels=z_levels, doubling=doubling, depth=depth, classes=3)
    nn.init.normal_(network.head.bias)
    image = noise(1, 1, z, 44 if depth == 2 else 92, 52 if depth == 2 else 100)
    with torch.inference_mode():
        scores = network(image)
    torch.testing.assert_close(scores, in_3d(network, image), rtol=0, atol=1e-12)
    lost = network.context.halo[0] - (z - scores.shape[2])
    assert 0 <= lost < 4 + network.context.step[0]  # the excess, which tiles drop


def test_a_network_of_width_1_along_z_is_the_one_in_2d():
    assert small(z_levels=((1, 1),) * 3).z_levels is None


@pytest.mark.parametrize("wrong", [((3, 2),), ((3, 2),) * 4, ((2, 2),) * 3, ((3, 3),) * 3])
def test_levels_along_z_that_do_not_exist_are_refused(wrong):
    with pytest.raises(InputError, match="must be 3 pairs of a kernel, 1 or 3"):
        small(z_levels=wrong)


def test_a_size_in_3d_is_checked_along_each_axis():
    network = small(z_levels=CUBIC)
    with pytest.raises(InputError, match=r"size=43 does not fit.*nearest are 48 and 52\."):
        network(noise(1, 1, 43, 44, 44).float())


@pytest.mark.parametrize("norm", ["weight", "batch"])
def test_norms_in_3d_are_folded_into_the_weights(double, norm):
    network = with_random_norms(small(z_levels=ANISOTROPIC, depth=3, norm=norm))
    image = noise(1, 1, 20, 92, 92)
    torch.testing.assert_close(network.folded()(image), network(image), rtol=0, atol=1e-10)


def test_inference_in_3d_equals_training(double):
    network, image = small(z_levels=CUBIC, dropout=0.0), noise(1, 1, 44, 44, 52)
    learned = network.train()(image)
    with torch.inference_mode():
        torch.testing.assert_close(network(image), learned, rtol=0, atol=1e-12)


def test_he_initialisation():
    torch.manual_seed(0)
    network = UNet(in_channels=3, base_channels=16, depth=3)
    for layer in convolutions(network):
        taps = layer.kernel_size[0] ** 2 if isinstance(layer, nn.Conv2d) else 1
        sd, count = math.sqrt(2 / (layer.in_channels * taps)), layer.weight.numel()
        # Five standard errors of a standard deviation and of a mean.
        assert abs(layer.weight.std().item() / sd - 1) < 5 / math.sqrt(2 * count)
        assert abs(layer.weight.mean().item()) < 5 * sd / math.sqrt(count)
        assert not layer.bias.any()


@pytest.mark.parametrize("norm", ["none", "weight"])
def test_signals_have_a_similar_size_at_input_and_output(double, norm):
    # The purpose of He initialisation.
    scores = small(base_channels=16, depth=2, norm=norm)(noise(2, 1, 60, 60))
    assert 0.1 < scores.std() < 10


def test_dropout_is_at_the_end_of_the_contracting_path_and_only_while_training():
    network, seen = small(depth=3, dropout=0.5), []
    network.drop.register_forward_hook(lambda layer, given, out: seen.append(given[0].shape[1]))
    image = noise(1, 1, 92, 92).float()
    assert torch.equal(network(image), network(image))
    assert seen == [12, 24] * 2
    assert not torch.equal(network.train()(image), network(image))


# Sizes.


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_valid_sizes_lose_a_constant_border_and_errors_name_the_nearest_valid_sizes(depth):
    network, step, lost = UNet(base_channels=1, depth=depth), 2**depth, 12 * 2**depth - 8
    halo = lost + 4
    for extent in range(1, halo + 4 * step):
        if extent > lost and (extent - halo) % step == 0:
            assert network.output_extent(extent) == extent - lost
            continue
        with pytest.raises(InputError) as refused:
            network.output_extent(extent)
        steps = max(1, (extent - halo) // step)
        near = f"{halo + step * steps} and {halo + step * (steps + 1)}"
        rule = f"sizes are {halo} + {step}k (k >= 1); nearest are {near}."
        assert str(refused.value) == f"size={extent} does not fit this network: {rule}"


def test_the_papers_sizes_on_real_layers():
    network = UNet(base_channels=1)
    with torch.inference_mode():
        assert network(torch.zeros(1, 1, 204, 572)).shape == (1, 2, 20, 388)
        with pytest.raises(InputError, match=r"size=570 .* 188 .* nearest are 556 and 572"):
            network(torch.zeros(1, 1, 204, 570))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("grad", [True, False])
def test_the_layers_return_the_calculated_sizes(depth, grad):
    network, halo = small(depth=depth, in_channels=2, classes=3), 12 * 2**depth - 4
    for y, x in ((0, 1), (1, 2), (3, 1)):
        image = torch.zeros(2, 2, halo + y * 2**depth, halo + x * 2**depth)
        with torch.set_grad_enabled(grad):
            sizes = network(image).shape
        assert sizes == (2, 3, y * 2**depth + 4, x * 2**depth + 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 1}, "classes=1 must be from 2 to 255; nearest is 2."),
        ({"classes": 256}, "classes=256 must be from 2 to 255; nearest is 255."),
        ({"in_channels": 0}, "in_channels=0 must be from"),
        ({"base_channels": 0}, "base_channels=0 must be from"),
        ({"depth": 0}, "depth=0 must be from 1 to 8; nearest is 1."),
        ({"norm": "group"}, "norm='group' is not a norm"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1."),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(InputError) as error:
        UNet(**options)
    assert message in str(error.value)


# Equivalent computations.


@pytest.mark.parametrize("norm", ["weight", "batch"])
def test_folding_the_norms_changes_nothing(double, norm):
    network, image = with_random_norms(small(norm=norm)), noise(2, 1, 52, 60)
    folded = network.folded()
    layers = nn.BatchNorm2d | StandardisedConv2d
    assert not any(isinstance(m, layers) for m in folded.modules())
    assert not folded.training and folded.norm == "none"
    with torch.inference_mode():
        scores = network(image)
        assert scores.std() > 0.01
        torch.testing.assert_close(folded(image), scores, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["weight", "batch"])
def test_folding_in_single_precision_rounds_once(norm):
    network = with_random_norms(small(norm=norm))
    image = noise(1, 1, 60, 60)
    with torch.inference_mode():
        folded, exact = network.folded().double()(image), network.double()(image)
    torch.testing.assert_close(folded, exact, rtol=1e-5, atol=1e-5)


def test_folding_without_norms_is_a_copy(double):
    network, image = small(), noise(1, 1, 60, 60)
    assert torch.equal(network.folded()(image), network(image))


@pytest.mark.parametrize("norm", ["none", "weight", "batch"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_code_path_of_inference_is_equivalent_to_that_of_training(double, norm, layout):
    network = with_random_norms(small(norm=norm)).to(memory_format=layout)
    image = noise(3, 1, 52, 60).contiguous(memory_format=layout)
    trained = network(image)
    assert trained.requires_grad
    with torch.inference_mode():
        predicted = network(image)
    torch.testing.assert_close(predicted, trained.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["none", "weight", "batch"])
def test_training_and_prediction_compute_the_same_function(double, norm):
    network, image = with_random_norms(small(norm=norm, dropout=0.0)), noise(2, 1, 52, 60)
    before = {name: tensor.clone() for name, tensor in network.named_buffers()}
    trained = network.train()(image).detach()
    torch.testing.assert_close(trained, network.folded()(image), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.named_buffers())


def test_filters_are_standardised_by_the_formula(double):
    network = with_random_norms(small(norm="weight"))
    layer = next(m for m in network.modules() if isinstance(m, StandardisedConv2d))
    for number, weights in enumerate(layer.weight.detach().numpy()):
        plain = math.sqrt(2 / weights.size) * (weights - weights.mean()) / weights.std()
        expected = torch.from_numpy(layer.gain[number].item() * plain)
        standardised = layer.standardised(layer.weight)[number]
        torch.testing.assert_close(standardised, expected, rtol=1e-12, atol=1e-12)


def test_a_network_with_standardised_filters_responds_to_grey_levels(double):
    network, image = small(norm="weight"), noise(1, 1, 52, 60)
    assert (network(image + 1) - network(image)).abs().max() > 0.01


def test_after_calibration_every_channel_has_mean_0_and_variance_1(double):
    network = small(norm="batch", dropout=0.5).train()
    images = torch.cat([scale * noise(1, 1, 92, 92, seed=scale) + scale for scale in (0, 1, 3)])
    network.calibrate(images)
    seen = []
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert not layer.training
            # ReLU works in place.
            layer.register_forward_hook(lambda layer, given, out: seen.append(out.clone()))
    assert network.training
    network.eval()(images)
    assert len(seen) == 10
    for out in seen:
        channels = out.detach().transpose(0, 1).flatten(1)
        # Batch norm adds 1e-5 to the variance, and its running variance is the unbiased one.
        torch.testing.assert_close(channels.mean(1), torch.zeros(len(channels)), rtol=0, atol=1e-2)
        torch.testing.assert_close(channels.var(1), torch.ones(len(channels)), rtol=0, atol=1e-2)


def test_calibrating_with_a_wrong_size_leaves_the_norms_fixed():
    network = small(norm="batch").train()
    with pytest.raises(InputError, match="size=53"):
        network.calibrate(torch.zeros(1, 1, 52, 53))
    assert network.training
    assert not any(m.training for m in network.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("norm", ["none", "weight", "batch"])
def test_folding_stays_on_the_device_of_the_network(norm):
    with torch.device("meta"):  # stands for a GPU
        network = small(norm=norm)
        network.folded()


def test_the_network_does_not_change_its_input(double):
    image = noise(1, 1, 52, 52)
    before = image.clone()
    with torch.inference_mode():
        small()(image)
    assert torch.equal(image, before)


# Receptive field.


def positive_network(depth):
    """A network with positive weights: raising any voxel in the receptive field raises scores."""
    network = small(base_channels=1, depth=depth).double()
    with torch.no_grad():
        for layer in convolutions(network):
            layer.weight.abs_()
    return network


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_context_matches_the_networks_arithmetic(depth, axis):
    network = positive_network(depth)
    before, after, step = (n[-1] for n in dataclasses.astuple(network.context))
    # The core is one step long, inside an image with `step` extra voxels on both sides of its halo.
    # Along the other axis the image has its smallest size.
    first = before + step
    sizes = [before + step + after] * 2
    sizes[axis] += 2 * step
    image = noise(1, 1, *sizes).abs()
    core = slice(step, 2 * step)  # in the output, which starts `before` voxels inside the image

    def changed(position):
        """Which voxels of the core, along `axis`, change with one input voxel."""
        other = image.clone()
        row = other.select(2 + axis, position)
        row += 1e3
        with torch.inference_mode():
            change = (network(other) - network(image)).abs().amax(dim=(0, 1)).amax(dim=1 - axis)
        return change[core] > 0

    # Below: the first voxel of the core depends on the first voxel of the halo and none before it.
    assert changed(first - before)[0]
    assert not changed(first - before - 1).any()
    # Above: sizes have a step, so at depth 1 and 2 the halo has 4 unused voxels.
    unused = 0 if depth >= 3 else 4
    assert changed(first + step + after - unused - 1)[-1]
    assert not changed(first + step + after - unused).any()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_shifting_by_the_step_is_exact_and_by_half_of_it_is_not(double, depth):
    network, step = small(depth=depth), 2**depth
    extent = 12 * step - 4 + 6 * step
    image = noise(1, 1, extent + step, extent + step)

    def scores(offset):
        with torch.inference_mode():
            output = network(image[..., offset : offset + extent, offset : offset + extent])
        common = slice(step - offset, 2 * step - offset)  # the same voxels of the image
        return output[..., common, common]

    torch.testing.assert_close(scores(step), scores(0), rtol=0, atol=1e-12)
    assert (scores(step // 2) - scores(0)).abs().max() > 1e-3
