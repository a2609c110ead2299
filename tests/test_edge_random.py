"""Random numbers: the stages draw what the model draws, in its order."""

from __future__ import annotations

import os
import random
import secrets

import numpy
import pytest
import torch
from edge import Case, Family, check, linear, t
from torch import initial_seed, nn
from torch import manual_seed as seed
from torch.nn import functional as F

from stagecut import pipe_split

case = Family()
NUMPYS, PYTHONS = numpy.random.default_rng(0), random.Random(0)
X = t(4, 4)


@case(X, stages=3, modes=(True, False), switch=True, has={"a": linear, "drop": nn.Dropout})
def dropout_in_every_stage(self, x):
    x = self.drop(self.a(x))
    pipe_split()
    x = self.drop(self.a(x))
    pipe_split()
    return self.drop(x)


@case(X, stages=2, modes=(True, False), switch=True)
def functional_dropout_that_follows_the_mode(self, x):
    x = F.dropout(x, 0.3, self.training) * 2
    pipe_split()
    return F.dropout(x, 0.3, self.training) + 1


@case(X, stages=2, modes=(True, False), switch=True)
def functional_dropout_that_is_always_on(self, x):
    x = F.dropout(x, 0.3) * 2
    pipe_split()
    return F.dropout(x, 0.3, True) + 1


@case(X, stages=2, modes=(True, False))
def functional_dropout_that_is_never_on(self, x):
    x = F.dropout(x, 0.3, False) * 2
    pipe_split()
    return x + 1


@case(
    t(2, 4, 4),
    stages=2,
    modes=(True, False),
    switch=True,
    has={"a": nn.Dropout1d, "b": nn.AlphaDropout, "c": nn.FeatureAlphaDropout},
)
def other_dropouts(self, x):
    x = self.b(self.a(x))
    pipe_split()
    return self.c(x) + self.a(x)


@case(X, stages=2, modes=(True, False), switch=True, has={"r": nn.RReLU})
def randomised_relu(self, x):
    x = self.r(x * 2)
    pipe_split()
    return self.r(x - 1)


@case(X, stages=2)
def noise_in_both_stages(self, x):
    x = x + torch.randn(4, 4, dtype=x.dtype)
    pipe_split()
    return x * torch.rand_like(x)


@case(X, stages=2)
def noise_used_only_in_the_next_stage(self, x):
    noise = torch.randn(4, dtype=torch.float64)
    x = x * torch.rand(4, dtype=torch.float64)
    pipe_split()
    return x + noise


@case(X, stages=2)
def noise_used_in_two_stages(self, x):
    noise = torch.randn(4, dtype=torch.float64)
    x = x * noise
    pipe_split()
    return x + noise


@case(X, stages=2)
def noise_that_nobody_uses(self, x):
    torch.randn(3)
    x = x * torch.rand(4, dtype=torch.float64)
    pipe_split()
    torch.rand(2)
    return x + torch.randn(4, dtype=torch.float64)


@case(X, stages=2)
def unused_dropout(self, x):
    F.dropout(x)
    y = x * 2
    pipe_split()
    return y * torch.rand(4, dtype=torch.float64)


@case(X, stages=2)
def in_place_draws(self, x):
    noise = torch.empty(4, dtype=torch.float64).normal_()
    x = x + noise
    pipe_split()
    return x * noise.uniform_(0, 1)


@case(X.abs() / 2, stages=2, grad=False)
def draws_from_distributions(self, x):
    a = torch.bernoulli(x.clamp(0, 1)) + torch.poisson(x)
    pipe_split()
    return a + torch.multinomial(x + 0.1, 4).double() + torch.normal(x, 1.0)


@case(X, stages=2)
def permutation(self, x):
    order = torch.randperm(4)
    x = x[order]
    pipe_split()
    return x + torch.randint(0, 5, (4,)) + order


@case(X, stages=2, has={"m": lambda: nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True).double()}, modes=(True, False))
def attention_with_dropout(self, x):
    y, _ = self.m(x[None], x[None], x[None])
    pipe_split()
    return y * torch.rand(4, dtype=torch.float64)


@case(t(1, 2, 4, 4), stages=2)
def scaled_dot_product_with_dropout(self, x):
    y = F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
    pipe_split()
    return F.scaled_dot_product_attention(y, y, y, dropout_p=0.5)


@case(t(3, 2, 4), stages=2, modes=(True, False), has={"m": lambda: nn.GRU(4, 4, 2, dropout=0.5).double()})
def recurrent_dropout(self, x):
    x, _ = self.m(x)
    pipe_split()
    return x * torch.rand(4, dtype=torch.float64)


@case(
    X,
    stages=2,
    modes=(True, False),
    has={"a": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double()},
)
def transformer_layer_with_dropout(self, x):
    x = self.a(x[None])
    pipe_split()
    return self.a(x)


@case(X, has={"g": lambda: torch.Generator().manual_seed(3)}, refused="Generator")
def explicit_generator(self, x):
    x = x + torch.randn(4, generator=self.g, dtype=torch.float64)
    pipe_split()
    return x * torch.rand(4, generator=self.g, dtype=torch.float64)


@case(X, refused="seed|random")
def seeding_inside_the_model(self, x):
    torch.manual_seed(5)
    x = x + torch.rand(4, dtype=torch.float64)
    pipe_split()
    return x * 2


@case(X, refused="seed")
def seeding_by_another_name(self, x):
    seed(5)
    x = x + torch.rand(4, dtype=torch.float64)
    pipe_split()
    return x * 2


@case(X, refused="fork_rng")
def fork_of_the_generator(self, x):
    with torch.random.fork_rng():
        noise = torch.rand(4, dtype=torch.float64)
    pipe_split()
    return x + noise


class Forks(nn.Module):
    """Draws in a fork."""

    def forward(self, x):
        with torch.random.fork_rng():
            return x + torch.rand(4, dtype=x.dtype)


@case(X, stages=2, has={"m": Forks})
def fork_in_a_submodule(self, x):
    x = self.m(x * torch.rand(4, dtype=torch.float64))
    pipe_split()
    return x + torch.rand(4, dtype=torch.float64)


@case(X, refused="initial_seed")
def seed_read_in_the_model(self, x):
    x = x * (initial_seed() % 7)
    pipe_split()
    return x * 2


@case(X, refused="get_rng_state")
def state_of_the_generator_returned(self, x):
    x = x * 2
    pipe_split()
    return x, torch.get_rng_state()


@case(X, refused="get_rng_state")
def state_of_the_generator_of_a_gpu(self, x):
    x = x * torch.cuda.get_rng_state().sum()
    pipe_split()
    return x * 2


@case(X, refused="Python's random")
def python_random(self, x):
    x = x * random.random()
    pipe_split()
    return x * 2


@case(X, stages=2, modes=(False,), has={"a": linear})
def number_that_only_training_reads(self, x):
    chance = random.uniform(0, 1)
    x = x * 2 if self.training and chance < 0.9 else self.a(x)
    pipe_split()
    return x * 2


@case(X, refused=r"Python's random.*\n.*chance = random.uniform", has={"a": linear})
def layers_that_training_leaves_out(self, x):
    chance = random.uniform(0, 1)
    x = x * 2 if self.training and chance < 0.01 else self.a(x)
    pipe_split()
    return x * 2


@case(X, stages=2)
def numbers_that_nobody_reads(self, x):
    random.shuffle([random.random() < 2, random.randint(0, 5), random.gauss(0, 1), random.normalvariate(0, 1)])
    numpy.random.rand(3), numpy.random.normal(size=3), numpy.random.permutation(4), PYTHONS.betavariate(1, 2)
    x = x * 3
    pipe_split()
    return x * 2


@case(X, refused="numpy")
def numpy_random(self, x):
    x = x * float(numpy.random.rand())
    pipe_split()
    return x * 2


@case(X, refused="numpy.*Generator")
def generator_of_numpys(self, x):
    x = x * NUMPYS.random()
    pipe_split()
    return x * 2


@case(X, refused="numpy.*Generator", has={"draws": lambda: [numpy.random.default_rng(0)]})
def generator_of_numpys_in_an_attribute(self, x):
    x = x * self.draws[0].random()
    pipe_split()
    return x * 2


@case(X, refused="random.Random")
def generator_of_pythons(self, x):
    x = x * PYTHONS.gauss(0, 1)
    pipe_split()
    return x * 2


@case(X, stages=2)
def generator_that_is_made_with_a_seed(self, x):
    x = x * numpy.random.default_rng(3).random() * random.Random(3).random()
    pipe_split()
    return x * 2


@case(X, refused="urandom")
def generator_that_is_made_without_a_seed(self, x):
    x = x * numpy.random.default_rng().random()
    pipe_split()
    return x * 2


@case(X, refused="urandom")
def random_bytes(self, x):
    x = x * os.urandom(1)[0]
    pipe_split()
    return x * 2


@case(X, refused="urandom")
def secret_number(self, x):
    x = x * secrets.randbelow(9)
    pipe_split()
    return x * 2


@case(X, stages=2, has={"p": lambda: 0.25})
def python_number_as_rate(self, x):
    x = F.dropout(x, self.p)
    pipe_split()
    return F.dropout(x, self.p)


@pytest.mark.parametrize("one", case.params())
def test_random(one: Case) -> None:
    """The same seed gives the same results and leaves the generator in the same state."""
    check(one)
