"""A cache of the Hub as huggingface_hub keeps one, with three revisions of the model tests/tiny."""

import json
import shutil

FIRST, SECOND, CODED = "a" * 40, "b" * 40, "c" * 40


def make_hub(hub, model, other):
    """`model` as FIRST, which is main, `other` as SECOND, and `model` with code of its own as CODED."""
    in_hub_cache(hub, FIRST, model)
    in_hub_cache(hub, SECOND, other)
    with_code(in_hub_cache(hub, CODED, model))


def in_hub_cache(hub, revision, model):
    """The model as huggingface_hub keeps one, under `main` if it is the first."""
    (hub / "models--tests--tiny" / "refs").mkdir(parents=True, exist_ok=True)
    if revision == FIRST:
        (hub / "models--tests--tiny" / "refs" / "main").write_text(revision)
    return shutil.copytree(model, hub / "models--tests--tiny" / "snapshots" / revision)


def with_code(directory):
    """Code that comes with the model, and computes other numbers."""
    (directory / "coded.py").write_text(
        "from transformers import LlamaForCausalLM\n"
        "class Coded(LlamaForCausalLM):\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.model.norm.register_forward_hook(lambda module, given, found: found * 0.5)\n"
    )
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModelForCausalLM": "coded.Coded"}}))
