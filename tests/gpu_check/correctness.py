"""Log-probabilities and gradients of packs against those that every sequence gives alone; and vLLM's against the trainer's."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config.experiment import ReferenceConfig
from pipeline.engines.protocol import Request, numerics_of
from pipeline.engines.start import start_scorer
from pipeline.forward.compiled import compile_layers
from pipeline.forward.logps import forward_of
from pipeline.forward.routes import route_of
from pipeline.forward.trees import Tree
from pipeline.hardware import device_kind
from pipeline.training.lean import offloaded_activations
from pipeline.training.policies import without_dropout
from tests.gpu_check.cell import FellShort, directory_of, sizes

# largest difference of a logp in nats, and of a gradient as a share of its norm, that another order of float32 makes
LOGP, GRADIENT = 5e-4, 5e-4
# in bfloat16 a pack, or an engine, may be so many times as far from float32 as plain sequences in bfloat16 are
BFLOAT16 = 2.0
# beyond the 8 graphs that torch allows for one function, and the 64 that refscore does
OTHER_PACKS = 70
# scores of an engine in float32 beside the trainer's, mean over tokens, nats. On a GPU vLLM's attention multiplies in TF32: a
# guess until one has run, as are LOGP and GRADIENT there
AGREEMENT = 1e-3
_SHARED: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 2048, "num_hidden_layers": 4,
                           "intermediate_size": 512}  # fmt: skip
# what is tried without a GPU too; the others would take the same way there, and only time
WITHOUT_GPU = (
    "Llama, grouped heads of 64", "Mistral, window of 160", "Gemma 2, soft-caps, window, heads of 256", "gpt-oss, sinks, window",
)  # fmt: skip
_SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama, grouped heads of 64": ("Llama", {"hidden_size": 512, "head_dim": 64}),
    "Llama, grouped heads of 128": ("Llama", {"hidden_size": 1024, "head_dim": 128}),
    "Mistral, window of 160": ("Mistral", {"hidden_size": 512, "head_dim": 64, "sliding_window": 160}),
    "Gemma 2, soft-caps, window, heads of 256": (
        "Gemma2",
        {"hidden_size": 512, "head_dim": 256, "num_attention_heads": 4, "sliding_window": 160},
    ),
    "Qwen 3, heads of 128": ("Qwen3", {"hidden_size": 512, "head_dim": 128}),
    # one expert: among several, bfloat16 would choose others than float32 does
    "gpt-oss, sinks, window": (
        "GptOss",
        {"hidden_size": 512, "head_dim": 64, "sliding_window": 160, "num_local_experts": 1, "num_experts_per_tok": 1},
    ),
}


def packed_against_plain(family: str, arithmetic: str) -> dict[str, Any]:
    """Trees in packs, forward and backward, against every sequence alone with transformers' eager attention in float32.

    `arithmetic`: float32, bfloat16 (autocast), or "bfloat16 compiled": the model in training mode as on a GPU, with compiled layers,
    checkpointing and offloaded activations, and after it many packs of other lengths, each of which must be read. Raises FellShort if
    one of the bounds is missed, or if the family is not packed: another way of reading would give the same numbers and hide that
    the kernels were never run.
    """
    dtype, _, compiled = arithmetic.partition(" ")
    precision: torch.dtype = getattr(torch, dtype)
    model, trees = random_family(family), some_trees()
    expected = _plain(model, trees, torch.float32)
    bounds = LOGP, GRADIENT
    if precision == torch.bfloat16:
        logp, gradient = differences(_plain(model, trees, precision), expected)
        bounds = BFLOAT16 * logp, BFLOAT16 * gradient
    if (route := route_of(model, precision)).kind != "packed":
        raise FellShort(f"it is not packed but read {route.kind}: {route.why}")
    forward = forward_of(model, "tree", precision)
    if compiled:
        without_dropout(model.train())
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if compile_layers(model) == 0:
            raise FellShort("its layers are not found, so none is compiled")
    with offloaded_activations(model) if compiled else nullcontext():
        packed = torch.cat([logps for tree in forward(trees) for logps in tree])
    logp, gradient = differences((packed, _gradients(model, packed)), expected)
    for seed in range(2, 2 + OTHER_PACKS if compiled else 2):
        others = torch.cat([logps for tree in forward(some_trees(seed)) for logps in tree])
        if not all(one.isfinite().all() for one in (others, *_gradients(model, others))):
            raise FellShort(f"other pack {seed - 1} gives numbers that are not finite")
    found = {"largest difference of a logp": f"{logp:.1e}", "of a gradient": f"{gradient:.1e}"}
    found["bounds"] = f"{bounds[0]:.1e}, {bounds[1]:.1e}"
    if not (logp <= bounds[0] and gradient <= bounds[1]):
        raise FellShort(f"logps differ by {logp:.1e} and gradients by {gradient:.1e}, more than {found['bounds']}")
    return found


def engine_against_trainer(engine: str, dtype: str, where: Path) -> dict[str, Any]:
    """Scores of an engine against those that every sequence gives alone by transformers' eager attention in float32.

    Raises FellShort if the mean difference is above AGREEMENT, in bfloat16 above BFLOAT16 times what transformers' bfloat16 gives.
    """
    from transformers import AutoModelForCausalLM

    directory, trees = directory_of(sizes().models[0], where), some_trees()
    sequences = [Request(tree.trunk, branch) for tree in trees for branch in tree.branches]
    reference = ReferenceConfig.model_validate({"model": str(directory), "engine": engine, "dtype": dtype})
    with start_scorer(reference, directory, numerics_of(reference), max(map(len, sequences))) as scorer:
        scores = np.concatenate(scorer.score(sequences))
    torch.set_float32_matmul_precision("highest")

    @torch.no_grad()
    def logps_in(precision: torch.dtype) -> np.ndarray:
        """Each sequence alone, by transformers' own attention: the engine "transformers" is the trainer's forward pass itself."""
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=precision, attn_implementation="eager")
        return _plain_logps(model.to(device_kind()).eval(), trees, torch.float32).cpu().numpy()

    exact = logps_in(torch.float32)
    difference = np.abs(scores - exact)
    bound = AGREEMENT if dtype == "float32" else BFLOAT16 * float(np.abs(logps_in(torch.bfloat16) - exact).mean())
    found = {"mean difference, nats": f"{difference.mean():.1e}", "largest": f"{difference.max():.1e}"}
    if not difference.mean() <= bound:
        raise FellShort(f"scores differ by {difference.mean():.1e} nats per token, more than {bound:.1e}")
    return {**found, "bound of the mean": f"{bound:.1e}"}


def random_family(family: str) -> Any:
    """A random model of the family on this machine's device, float32, in evaluation mode."""
    import transformers

    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    small = {} if device_kind() == "cuda" else _SMALL
    config = getattr(transformers, f"{name}Config")(**{**_SHARED, **settings, **small})
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # wide enough that attention looks at few tokens, and a wrong one counts
            torch.nn.init.normal_(parameter, std=1.2 / config.hidden_size**0.5)
    return model.float().to(device_kind())


def some_trees(seed: int = 1) -> list[Tree]:
    """Trees beyond every window, beside short ones; a pack of them has several blocks of the mask. Of other lengths by `seed`."""
    draw = np.random.default_rng(seed)
    lengths = ((300, (170, 90)), (20, (35,)), (140, (40, 260)), (1, (12, 3)))
    if seed != 1:
        lengths = tuple((trunk + seed, tuple(branch + 3 * seed for branch in of)) for trunk, of in lengths[seed % 3 :])
    return [
        Tree(
            draw.integers(5, 2000, trunk).tolist(),
            tuple(draw.integers(5, 2000, branch).tolist() for branch in branches),
        )
        for trunk, branches in lengths
    ]


def differences(
    found: tuple[torch.Tensor, list[torch.Tensor]], expected: tuple[torch.Tensor, list[torch.Tensor]]
) -> tuple[float, float]:
    """Largest difference of a logp, and of a gradient as a share of its norm; a gradient that is missing counts as 1."""
    logp = (found[0].float() - expected[0]).abs().max().item()
    shares = [
        ((one.float() - other).norm() / other.norm()).item() if other.norm() > 0 else float(one.norm() > 0)
        for one, other in zip(found[1], expected[1], strict=True)
    ]
    return logp, torch.tensor(shares).max().item()  # unlike Python's, NaN if one of them is


def _plain(model: Any, trees: list[Tree], dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    logps = _plain_logps(model, trees, dtype)
    return logps.detach(), _gradients(model, logps)


def _plain_logps(model: Any, trees: list[Tree], dtype: torch.dtype) -> torch.Tensor:
    """Of each sequence alone; `dtype` bfloat16 is autocast's."""
    device = next(model.parameters()).device
    logps = []
    for tree in trees:
        for branch in tree.branches:
            ids = torch.tensor([[*tree.trunk, *branch]], device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = model(input_ids=ids, use_cache=False).logits[0, len(tree.trunk) - 1 : -1]
            logps.append(logits.float().log_softmax(-1).gather(-1, ids[0, len(tree.trunk) :, None])[:, 0])
    return torch.cat(logps)


def _gradients(model: Any, logps: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, len(logps), device=logps.device)
    found = torch.autograd.grad((logps * weights).sum(), list(model.parameters()), materialize_grads=True)
    return [gradient.float() for gradient in found]
