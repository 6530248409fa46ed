"""The saved model of a run in transformers and in vLLM against the trainer's own: `python -m tests.stages.saved_model RUN COUNT`.

In a process of its own, as vLLM pins the threads of the process it runs in.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.config.experiment import ReferenceConfig
from pipeline.engines.protocol import Request, numerics_of
from pipeline.engines.start import start_scorer
from pipeline.forward.logps import forward_of
from pipeline.training.inputs.pairs import load_pairs


def main(run: Path, count: int) -> None:
    """Print, for the first `count` pairs, how far the log-probabilities of either lie from the trainer's at most."""
    pairs = load_pairs(run / "pairs.parquet", "train")
    trees = pairs.trees[:count]
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    # the trainer's last weights, from its checkpoint, in the trainer's own forward pass
    (last,) = sorted((run / "checkpoints").glob("step_*"))[-1:]
    weights = load_file(last / "model.safetensors")
    own = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            parameter.copy_(weights[name])
        ours = [logps for tree in forward_of(own, "tree")(trees) for logps in tree]
        plain = []
        for tree in trees:
            for branch in tree.branches:
                ids = torch.tensor([[*tree.trunk, *branch]])
                logits = model(ids).logits[0, len(tree.trunk) - 1 : -1]
                plain.append(-torch.nn.functional.cross_entropy(logits, torch.tensor(branch), reduction="none"))
    spec = ReferenceConfig(model=str(run / "model"), engine="vllm", dtype="float32")
    requests = [Request(tree.trunk, branch) for tree in trees for branch in tree.branches]
    with start_scorer(spec, run / "model", numerics_of(spec), max(map(len, requests))) as scorer:
        vllm = scorer.score(requests)
    found = {
        "sequences": len(ours),
        "transformers": max(float((a - b).abs().max()) for a, b in zip(ours, plain, strict=True)),
        "vllm": max(float((a - torch.tensor(b)).abs().max()) for a, b in zip(ours, vllm, strict=True)),
    }
    print("RESULT", json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
