"""One step of the optimiser: its loss, rate, gradient and dropout, and the average after it."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helper import recipe
from unet_ray.training.patches import Sample
from unet_ray.training.trainer import Average, Learner, World, optimiser_for


def samples(chosen, seed):
    """A batch of random patches with random weights."""
    rng = np.random.default_rng(seed)
    return [
        Sample(
            rng.normal(size=(1, *chosen.patch)).astype(np.float32),
            rng.integers(0, 2, chosen.output).astype(np.uint8),
            rng.uniform(0, 5, chosen.output).astype(np.float32),
        )
        for _ in range(chosen.batch)
    ]


def network_of(chosen):
    torch.manual_seed(0)
    return chosen.network(1, 2)


def learner_of(chosen, network, rank=0):
    world = World(rank, 1, torch.device("cpu"), 1)
    return Learner(chosen, network, optimiser_for(chosen, network), world, "float32", 0.0)


def energies(network, batch):
    """The weight and the cross-entropy of each voxel of a batch, float32 tensors."""
    image, targets, weights = (
        torch.from_numpy(np.stack([getattr(sample, name) for sample in batch]))
        for name in ("image", "targets", "weights")
    )
    logs = network(image).log_softmax(1)
    return weights, -logs.gather(1, targets[:, None].long())[:, 0]


def test_the_loss_is_the_mean_over_voxels_of_weight_times_cross_entropy():
    chosen = recipe(batch=2)
    network, batch = network_of(chosen), samples(chosen, seed=0)
    with torch.no_grad():
        weights, entropies = energies(network, batch)
    loss = float(learner_of(chosen, deepcopy(network)).step(batch, 0, 0.0))
    assert loss == pytest.approx(float((weights * entropies).mean()), rel=1e-5)
    assert float(weights.mean()) > 2  # a division by the sum of the weights gives another loss


@pytest.mark.parametrize("name", ["default", "paper"])
def test_steps_equal_those_of_a_plain_loop(name):
    chosen = recipe(name, batch=2, dropout=0.0, norm="none")
    network = network_of(chosen)
    plain, learner = deepcopy(network), learner_of(chosen, network)
    make = {"default": torch.optim.AdamW, "paper": torch.optim.SGD}[name]
    optimiser = make(plain.parameters(), **({"momentum": 0.99} if name == "paper" else {}))
    for number, progress in enumerate((0.0, 0.3, 0.6)):
        batch = samples(chosen, number)
        learner.step(batch, number, progress)
        optimiser.param_groups[0]["lr"] = 0.02 * (1 - progress) ** (0.9 if name == "default" else 0)
        weights, entropies = energies(plain, batch)
        optimiser.zero_grad()
        (weights * entropies).mean().backward()
        if name == "default":
            norm = torch.cat([p.grad.ravel() for p in plain.parameters()]).norm()
            for parameter in plain.parameters():
                parameter.grad *= min(1.0, 5 / float(norm))
        optimiser.step()
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_dropout_depends_on_seed_step_and_rank_only():
    chosen = recipe(dropout=0.5)
    network, batch = network_of(chosen), samples(chosen, 0)

    def loss(number, rank, seed=0):
        learner = learner_of(recipe(dropout=0.5, seed=seed), deepcopy(network), rank)
        return float(learner.step(batch, number, 0.0))

    losses = [loss(3, 0), loss(4, 0), loss(3, 1), loss(3, 0, seed=1)]
    assert len(set(losses)) == 4
    assert loss(3, 1) == losses[2]


class Reads(TorchDispatchMode):
    """Counts the numbers that are read from tensors; on a GPU, each read waits for all its work."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_reads_are_counted():
    with Reads() as reads:
        float(torch.ones(()))
        bool(torch.ones(1) > 0)
    assert reads.count == 2


@pytest.mark.parametrize("norm", ["none", "weight", "batch"])
def test_a_step_and_its_average_read_no_number(norm):
    # AdamW reads its own count of steps, which stays on the CPU.
    chosen = recipe("paper", clip=1e-3, norm=norm)
    network, batch = network_of(chosen), samples(chosen, 0)
    learner, average = learner_of(chosen, network), Average(network, 500)
    with Reads() as reads:
        losses = []
        for number in range(3):
            losses.append(learner.step(batch, number, 0.0))
            average.add(network)
    assert reads.count == 0
    assert len({float(loss) for loss in losses}) == 3


@pytest.mark.parametrize("done", [0, 1, 600])
def test_the_average_equals_that_of_torch_in_every_bit(done):
    def share(averaged, current, count):
        torch._foreach_lerp_(averaged, current, max(1 / 500, 9 / (10 + int(count))))

    chosen = recipe("paper")
    network = network_of(chosen)
    ours, theirs = Average(network, 500, done), AveragedModel(network, multi_avg_fn=share)
    theirs.n_averaged.fill_(done)
    with torch.no_grad():
        for _ in range(5):
            for weights in network.parameters():
                weights.add_(torch.randn_like(weights))
            network.head.bias.fill_(-0.0)  # the sign of a zero is a bit too
            ours.add(network)
            theirs.update_parameters(network)
    for a, b in zip(ours.network.parameters(), theirs.module.parameters(), strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))
