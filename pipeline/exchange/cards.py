"""The README.md beside exported pairs: what scored them, how many there are, how the other trainer is told to read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pipeline.artifacts import durable
from pipeline.exchange.scored_pairs import SPLITS, Exported

_USE = {
    "trl": """`datasets.load_dataset` reads this directory. TRL's own DPOTrainer would compute the reference again;
`stored_reference.py`, which lies here, uses what is stored:

```python
from datasets import load_dataset
from stored_reference import StoredReferenceTrainer
from trl import DPOConfig

data = load_dataset("{directory}")
args = DPOConfig(precompute_ref_log_probs=True, max_length=None)
StoredReferenceTrainer("{policy}", args=args, train_dataset=data["train"]).train()
```

Before it trains it compares a few pairs with the policy, which must start as the reference. The longest sequence has {longest}
tokens: a smaller `max_length` is refused.
""",
    "open_instruct": """Rows are tokenised, under open-instruct's names and in the order of the caches. Name `train.parquet`
in `mixer_list` with the amount "1.0" and no `transform_fn`, start once, and copy the cache to the path that it logs as
"Reference logprobs cache path": `train_reference_logprobs.pt` for the losses `dpo` and `wpo`,
`train_reference_logprobs_average.pt` for `dpo_norm`. Written after the loader's source; not run with it.
""",
    "fairseq2": """Texts with `reference_score_chosen` and `reference_score_rejected`, for fairseq2's preference recipe with
`reference_model: null`. It tokenises the texts itself: its tokenizer must be that of the model that was scored. Written after
the loader's source; not run with it.
""",
    "jsonl": """One object per pair: texts, token ids, log-probabilities of every response token (`ref_*_token_logps`) and their
sums (`ref_*_logps`), in nats.
""",
}


def write_card(to: Path, format_name: str, exported: Exported, about: dict[str, Any], model: str, policy: str) -> Path:
    """README.md in `to`. `about`: what pairs.parquet says of itself. `model`, `policy`: how the configuration names them."""
    # other names of the Hub's data sets would be taken for splits too
    files = [
        {
            "split": SPLITS[split],
            "path": f"{SPLITS[split]}.{'parquet' if format_name in ('trl', 'open_instruct') else 'jsonl'}",
        }
        for split in exported.pairs
    ]
    head = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": files}]}, sort_keys=False)
    counts = "\n".join(f"* {count} pairs in `{SPLITS[split]}`" for split, count in exported.pairs.items())
    left_out = "".join(f"* left out: {count} {reason}\n" for reason, count in exported.left_out.items())
    use = _USE[format_name].format(directory=to, policy=policy, longest=exported.longest)
    text = f"""---
{head}---

# Preference pairs with the log-probabilities of their reference model

{counts}
{left_out}
Reference: `{model}`, scored in {about.get("dtype", "unknown")} arithmetic by refscore. Its id, a digest of weights and numerics,
is `{about.get("reference_id", "unknown")}`; that of the tokenizer's vocabulary is `{about.get("vocabulary", "unknown")}`.
Log-probabilities are natural, of the response given the prompt, end of turn included.

## How to use it

{use}"""
    durable.write_text(to / "README.md", text)
    return to / "README.md"
