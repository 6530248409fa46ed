"""Small policies and a few steps of them, for the tests of this package."""

import torch

from pipeline.config.files import load_overrides
from pipeline.models.load import load_tokenizer
from pipeline.training.optimizers import update
from pipeline.training.policies import load_policy
from pipeline.training.step import train_step


def config_of(model, *settings):
    base = ["train.precision=float32", "train.learning_rate=0.01", "train.beta=0.5"]
    return load_overrides({"data": {"path": "x"}, "policy": {"model": str(model)}}, [*base, *settings])


def policy_of(model, config, ends=frozenset({0})):
    torch.manual_seed(0)
    return load_policy(model, config, load_tokenizer(model, config.policy), set(ends))


def steps(policy, optimizer, pairs, config, numbers):
    losses = []
    for _ in numbers:
        losses.append(train_step(policy.forward, pairs, range(8), config.train)["loss"])
        update(policy.model, optimizer, config.train.learning_rate, config.train.max_grad_norm)
    return losses
