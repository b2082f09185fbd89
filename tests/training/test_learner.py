"""One step of the optimiser: its loss, its rate, its gradient and its dropout."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from tests.helper import recipe
from unet_ray.training.patches import Sample
from unet_ray.training.trainer import Learner, World, optimiser_for


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
    loss = learner_of(chosen, deepcopy(network)).step(batch, 0, 0.0)
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
        return learner.step(batch, number, 0.0)

    losses = [loss(3, 0), loss(4, 0), loss(3, 1), loss(3, 0, seed=1)]
    assert len(set(losses)) == 4
    assert loss(3, 1) == losses[2]
