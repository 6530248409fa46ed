"""What a real step of two processes holds, for a comparison: `-m tests.planning.held MODEL SETTING...` under torchrun."""

import json
import sys
from pathlib import Path

from pipeline.planning.training import held_by
from pipeline.training.optimizers import make_optimizer, update
from pipeline.training.parallel.sharded import Shards, mesh_of
from pipeline.training.parallel.world import world
from pipeline.training.policies import precision_of
from pipeline.training.step import accumulate
from tests.planning.test_planning import short_pairs
from tests.training.policy import config_of, policy_of


def main(model: Path, settings: list[str]) -> None:
    """Print the peak of the first process's second step, bytes by kind."""
    with world() as here:
        config = config_of(model, *settings)
        policy, pairs = policy_of(model, config), short_pairs()
        policy.model.train()
        shards = Shards(policy.model, policy.forward, here, mesh_of(here), precision_of(config))
        optimizer = make_optimizer(shards.module(), config.train)

        def step() -> None:
            means = accumulate(shards.forward, pairs, range(4), config.train, world=here)
            update(shards.module(), optimizer, 1e-6, 1.0, means, shards.clip)

        step()
        with held_by(shards.root, optimizer) as peak:
            step()
        if here.first:
            print(json.dumps(vars(peak[0])))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
