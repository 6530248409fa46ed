"""The README.md beside exported pairs: what scored them, how many there are, how the other trainer is told to read them.

It also marks the directory as an export: what has no such mark is not written into.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.artifacts import durable
from pipeline.artifacts.markdown import name_for_others
from pipeline.artifacts.schemas import COMPUTED_BY, IMPORTED_BY
from pipeline.errors import ConfigError, first_line
from pipeline.exchange.scored_pairs import SPLITS, Exported

_MARK = re.compile(r"^<!-- refscore export: (\w+) -->$", re.MULTILINE)
# all that the writers of pairs may write beside README.md
_WRITTEN = re.compile(r"(train|test)(\.parquet|\.jsonl|_reference_logprobs(_average)?\.pt)|stored_reference\.py")
_USE = {
    "trl": """`datasets.load_dataset` reads this directory. TRL's own DPOTrainer would compute the reference again;
`stored_reference.py`, which lies here, uses what is stored:

```python
from datasets import load_dataset
from stored_reference import StoredReferenceTrainer
from trl import DPOConfig

data = load_dataset("{directory}")
args = DPOConfig(precompute_ref_log_probs=True, max_length=None)
StoredReferenceTrainer("{policy}", args=args, train_dataset=data["train"], eval_dataset=data.get("test")).train()
```

`{directory}` is this directory, under whatever path it lies. Before it trains it compares a few pairs of each split with the
policy, which must start as the reference. The longest sequence has {longest} tokens: a smaller `max_length` is refused.
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
sums (`ref_*_logps`), in nats; null per token if only the sum is known.
""",
}


def write_card(to: Path, format_name: str, exported: Exported, about: dict[str, Any], model: str, policy: str) -> Path:
    """README.md in `to`. `about`: what pairs.parquet says of itself. `model`, `policy`: how the configuration names them; of what
    lies here the card, which may be published, keeps the last part of the path alone.
    """
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
    reference = name_for_others(model)
    use = _USE[format_name].format(
        directory=to.absolute().name, policy=name_for_others(policy), longest=exported.longest
    )
    by = about.get(IMPORTED_BY)
    maker = f"{by}, as refscore was told and did not verify" if by else "refscore"
    maker += "".join(
        f"; {count} sequences by another version of the engine, reference `{reference}`"
        for reference, count in about.get(COMPUTED_BY, {}).items()
    )
    text = f"""---
{head}---

<!-- refscore export: {format_name} -->

# Preference pairs with the log-probabilities of their reference model

{counts}
{left_out}
Reference: `{reference}`, scored in {about.get("dtype", "unknown")} arithmetic by {maker}. Its id, a digest of weights and
numerics, is `{about.get("reference_id", "unknown")}`; that of the tokenizer's vocabulary is `{about.get("vocabulary", "unknown")}`.
Log-probabilities are natural, of the response given the prompt, end of turn included.

## How to use it

{use}"""
    durable.write_text(to / "README.md", text)
    return to / "README.md"


def must_take(to: Path, format_name: str, *, with_card: bool = True) -> None:
    """Raise ConfigError if the files of an export may not go to `to`: it holds an export in another format or, for one with a
    card, files that no export put there.
    """
    if to.exists() and not to.is_dir():
        raise ConfigError(f"--to {to} is no directory: name another")
    card = to / "README.md"
    try:
        mark = _MARK.search(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
        others = (
            [file.name for file in to.iterdir() if not file.name.startswith(durable.TEMPORARY)] if to.exists() else []
        )
    except OSError as error:
        raise ConfigError(f"--to {to} cannot be read ({first_line(error)}): name another directory") from None
    if mark and mark[1] != format_name:
        raise ConfigError(f"--to {to} holds an export for {mark[1]}: name another directory for {format_name}")
    if with_card and others and not mark:
        raise ConfigError(
            f"--to {to} holds {min(others)} and no README.md that marks it as an export, so nothing is written there: "
            "name a new or empty directory, or remove what is in this one"
        )


def remove_stale(to: Path, exported: Exported) -> list[Path]:
    """Remove what an earlier export put into `to` and this one did not write anew; returns what is gone."""
    stale = [file for file in sorted(to.iterdir()) if _WRITTEN.fullmatch(file.name) and file not in exported.files]
    for file in stale:
        file.unlink(missing_ok=True)
    return stale
