"""Token sequences on which sharing a prompt could go wrong, and a plain forward pass that knows the truth."""

import numpy as np

from pipeline.engines.protocol import Request

VOCABULARY = 256
LIMIT = 512


def edge_cases(block: int) -> dict[str, list[Request]]:
    """Groups of siblings by what is special about them; `block` is the cache's block size in tokens."""
    random = np.random.default_rng(7)

    def ids(length):
        return random.integers(10, VOCABULARY, length).tolist()

    cases = {}
    for length in (block - 1, block, block + 1, 2 * block, 2 * block + 1):
        prompt = ids(length)
        cases[f"prompt of {length} tokens"] = [Request(prompt, ids(40)), Request(prompt, ids(55))]
    for same in (1, block - 1, block, block + 8, 2 * block):
        for prompt in (ids(2 * block), ids(block + 5)):
            start = ids(same)
            cases[f"{len(prompt)} tokens, then {same} response tokens alike"] = [
                Request(prompt, [*start, 1, *ids(20)]),
                Request(prompt, [*start, 2, *ids(33)]),
            ]
    prompt, long = ids(40), ids(90)
    for name, first, second in (("after", long, long[:60]), ("before", long[:60], long)):
        cases[f"a prefix of the other, {name} it"] = [Request(prompt, first), Request(prompt, second)]
    prompt, response = ids(70), ids(45)
    cases["duplicates"] = [Request(prompt, response)] * 3
    cases["only the last token differs"] = [Request(prompt, [*response, 3]), Request(prompt, [*response, 4])]
    prompt = ids(64)
    cases["responses of one token"] = [Request(prompt, [5]), Request(prompt, [6]), Request(prompt, [5, 6])]
    cases["a prompt of one token"] = [Request([9], ids(50)), Request([9], ids(64)), Request([9], [11])]
    prompt = ids(LIMIT - 30)
    cases["exactly at the limit"] = [Request(prompt, ids(30)), Request(prompt, ids(29))]
    prompt, response = ids(33), ids(64)
    cases["a prompt that holds another's response"] = [
        Request(prompt, response),
        Request([*prompt, *response[:31]], response[31:]),
        Request([*prompt, *response[:31]], [*response[31:], *ids(9)]),
    ]
    prompt, stem = ids(50), ids(70)
    cases["twenty-five samples of one prompt"] = [
        Request(prompt, [*stem[: 7 * (at % 9)], at, *ids(5 + at)]) for at in range(25)
    ]
    return cases


def plain_logps(model, request: Request) -> np.ndarray:
    """The oracle: one sequence, a plain forward, cross-entropy."""
    import torch

    ids = torch.tensor([[*request.prompt_ids, *request.response_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1]
    return -torch.nn.functional.cross_entropy(logits, ids[0, len(request.prompt_ids) :], reduction="none").numpy()
