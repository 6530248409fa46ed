"""Rewrites what the pages take from the code: `python docs/generate.py`; with --check nothing is written.

A page holds regions between `<!-- generated: NAME -->` and `<!-- end -->`. Each is made here from the configuration's
fields, the tables' columns, the rules and the names of the library, so that none of them can be wrong for long.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pyarrow as pa
from pydantic import BaseModel

import pipeline
from pipeline.artifacts import schemas
from pipeline.config.losses import LOSS_FACTS
from pipeline.config.reference import fields_of, sections
from pipeline.config.rollouts import VARIANTS
from pipeline.config.rules import RULES
from pipeline.training.objectives.losses import LOSSES
from pipeline.training.objectives.ranked import plackett_luce_loss
from pipeline.training.objectives.unpaired import bco_loss, kto_loss
from tests.benchmarks.scale import tables as scale_tables

PAGES = Path(__file__).parent
_REGION = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_TABLES = {
    "pairs": schemas.PAIRS,
    "dropped": schemas.DROPPED,
    "metrics": schemas.METRICS,
    "policy_logps": schemas.POLICY_LOGPS,
    "samples": schemas.SAMPLES,
    "kl": schemas.KL,
    "judgements": schemas.JUDGEMENTS,
    "scores": schemas.SCORES,
    "scored": schemas.TOP_SCORED,
    "responses": schemas.RESPONSES,
    "rollouts": schemas.ROLLOUTS,
}
# what a column means, in one table if it is named with it; a column without a meaning is an error
_MEANING = {
    "pair_id": "digest of the pair's token ids",
    "split": "`train` or `eval`",
    "source": "file, folder or data set the row came from",
    "source_row": "number of the row in its source, from 0",
    "topic": "the row's topic, if it names one",
    "prompt": "the prompt as text",
    "chosen": "the preferred response as text",
    "rejected": "the other response as text",
    "prompt_ids": "token ids of the prompt, template included",
    "chosen_ids": "token ids of the chosen response, its end of turn included",
    "rejected_ids": "token ids of the rejected response",
    "ref_chosen_token_logps": "log-probability of every token of `chosen_ids` under the reference, in nats; null if only "
    "the sum was imported",
    "ref_rejected_token_logps": "the same of `rejected_ids`",
    "ref_chosen_logps": "sum of `ref_chosen_token_logps`, in float64",
    "ref_rejected_logps": "sum of `ref_rejected_token_logps`",
    "reason": "why the row was left out",
    "detail": "the same in words",
    "step": "optimizer steps taken, from 1; 0 is before training",
    "policy_logps.step": "updates that the policy had had when this was computed: 0 is before training",
    "chosen_logps": "log-probability of the chosen response under the policy, summed over tokens, in nats",
    "rejected_logps": "the same of the rejected response",
    "margin": "how much better the data says `chosen` is than `rejected`; null if it does not say",
    "group_id": "digest of the tokens of a group: a prompt's list, or a response and the mismatched one beside it",
    "kind": "`response`; `mismatched`: a response to another prompt, by which KTO's baseline is measured; `prompt`: a prompt "
    "alone, without response and scores",
    "label": "whether the response was called good; null in a ranked list",
    "responses.score": "what the data says of the response: a rating, or the negative of its rank; null if unpaired",
    "ref_response_token_logps": "log-probability of every token of `response_ids` under the reference, in nats",
    "ref_response_logps": "sum of `ref_response_token_logps`, in float64",
    "reward": "the judge's reward of the sample, as it gave it; null if it failed",
    "metrics.reward": "mean reward of the step's samples, as the judge gave it",
    "reward_std": "mean standard deviation of the rewards of a prompt's samples",
    "ratio/mean": "mean over tokens of the policy's probability by that of the model that wrote the samples",
    "ratio/max": "the largest such ratio of a token",
    "clip_ratio/low_mean": "share of tokens whose ratio was clipped from below",
    "clip_ratio/high_mean": "share of tokens whose ratio was clipped from above",
    "clip_ratio/region_mean": "share of tokens whose ratio was clipped",
    "metrics.kl": "KL to the reference: of policy_gradient the k3 estimate per token; of kto the baseline, per response",
    "kl/behaviour": "k3 estimate of the KL to the model that wrote the samples, per token",
    "value/mean": "mean over tokens of a critic's values",
    "value/explained_variance": "of a critic: 1 less its squared error by the variance of the returns in the step",
    "values": "a critic's value of the state before every token of the response; null without `rollout.critic`",
    "loss": "mean loss of the step's pairs",
    "rewards/chosen": "mean implicit reward of the chosen responses",
    "rewards/rejected": "the same of the rejected responses",
    "rewards/margins": "mean difference of the two",
    "rewards/accuracies": "share of pairs whose chosen response has the higher reward",
    "logps/chosen": "mean log-probability of the chosen responses under the policy, summed over tokens",
    "logps/rejected": "the same of the rejected responses",
    "grad_norm": "norm of the gradient before it is clipped",
    "learning_rate": "learning rate of the step",
    "step_seconds": "seconds per step since the last logged one",
    "tokens_per_second": "tokens of trees per second since the last logged step",
    "peak_memory_gib": "most memory so far: of the GPU, else of the process",
    "prompt_id": "digest of the prompt's token ids",
    "sample": "number of the response to this prompt, from 0",
    "model": "`policy`, `reference`, or a name of `generate.models`",
    "response": "the response as text",
    "response_ids": "token ids of the response",
    "finish_reason": "`stop`, or `length` if it was cut off",
    "tokens": "number of `response_ids`",
    "logps": "log-probability of every token of the response under its own model, in nats",
    "ref_logps": "the same under the reference",
    "logp": "sum of `logps`, in float64",
    "ref_logp": "sum of `ref_logps`",
    "exact_kl": "KL to the reference of the distribution that every token was drawn from, in nats",
    "judge": "name or label of the judge",
    "baseline": "the model compared with",
    "order": "which response stood first; `pair` for the implicit judge",
    "winner": "name of the model that won, `tie` or `failed`",
    "score": "1 the model won, 0 it lost, 0.5 a tie; null if the judge failed",
    "words": "what a judge that writes wrote, or why it wrote nothing; null for other judges and in files of before",
    "key": "sha256 of reference_id, prompt ids and response ids",
    "prompt_tokens": "tokens of the prompt",
    "response_tokens": "tokens of the response",
    "problem": "why there is no score; null if there is one",
    "top_ids": "with `--top-k`: ids of the likeliest tokens where each token of the response stands, the likeliest first",
    "top_logps": "with `--top-k`: their log-probabilities, in nats",
}


def regions() -> dict[str, str]:
    """Every region's text by its name."""
    made = {f"columns-{name}": _columns(name, schema) for name, schema in _TABLES.items()}
    for name, section in sections().items():
        made[f"options-{name.replace('.', '-')}"] = _options(section)
    return made | {
        "rules": _table(
            ["rule", "argument", "what it rewards"],
            [[f"`rule:{name}`", rule.argument or "-", rule.says] for name, rule in RULES.items()],
        ),
        "losses": _losses(),
        "variants": _variants(),
        "api": _api(),
        "scale": scale_tables(),
    }


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _options(section: type[BaseModel]) -> str:
    rows = [
        [f"`{fact.name}`", f"`{fact.default}`" if fact.default else "", fact.meaning] for fact in fields_of(section)
    ]
    return _table(["field", "default", "meaning and limits"], rows)


def _columns(table: str, schema: pa.Schema) -> str:
    rows = []
    for field in schema:
        name = field.name.removeprefix("eval_")
        meaning = _MEANING.get(f"{table}.{name}") or _MEANING[name]
        rows.append(
            [f"`{field.name}`", str(field.type), f"held-out: {meaning}" if field.name.startswith("eval_") else meaning]
        )
    return _table(["column", "type", "meaning"], rows)


def _losses() -> str:
    formulas = {**LOSSES, "kto": kto_loss, "bco": bco_loss, "plackett_luce": plackett_luce_loss}
    rows = []
    for name, facts in LOSS_FACTS.items():
        reads = ["label_smoothing"] if facts.smoothed else []
        reads += ["f_divergence_type"] if facts.f_divergence and facts.compares else []
        reads += [facts.setting] if facts.setting else []
        reads += ["desirable_weight", "undesirable_weight"] if facts.data == "responses" else []
        doc = " ".join((inspect.getdoc(formulas[name]) or "").split())
        # what the formula is, and where from; the rest is for who reads the code
        rows.append(
            [
                f"`{name}`",
                facts.data + (" with margins" if facts.margins else ""),
                "yes" if facts.compares else "no",
                ", ".join(f"`{one}`" for one in reads) or "-",
                doc,
            ]
        )
    return _table(["loss", "learns from", "needs the reference", "reads too", "formula and source"], rows)


def _variants() -> str:
    averaged = {
        "tokens": "all tokens of the step",
        "sample_means": "samples, each by its tokens",
        "sample_sums": "samples",
        "constant": "samples times `generate.max_tokens`",
    }
    rows = []
    for name, facts in VARIANTS.items():
        clip = "-" if facts.clip is None else f"{facts.clip[0]:g} / {facts.clip[1]:g}"
        learns = f"`{facts.advantage}`" if facts.advantage else "the reward itself"
        level = {"token": "token", "sample": "sample", "sample_mean": "sample's mean token"}[facts.level]
        rows.append([f"`{name}`", learns, level, clip, averaged[facts.aggregation], facts.kl, facts.paper])
    return _table(
        ["variant", "advantage", "ratio of a", "clip below / above", "averaged over", "KL in the", "paper (arXiv)"],
        rows,
    )


def _api() -> str:
    rows = []
    for name in pipeline.__all__:
        if name == "__version__":
            continue
        doc = (inspect.getdoc(getattr(pipeline, name)) or "").split("\n\n")[0]
        home = pipeline.HOMES[name]
        rows.append([f"`{name}`", f"`{home}`", " ".join(doc.split())])
    return _table(["name", "module", "what it is"], rows)


def main(*, check: bool) -> int:
    """Rewrite every page, or with `check` count those that would change."""
    made, used, stale = regions(), set(), []
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        used |= {match[2] for match in _REGION.finditer(text)}
        new = _REGION.sub(lambda match: f"{match[1]}\n{made[match[2]]}\n\n{match[3]}", text)
        if new != text:
            stale.append(page.name)
            if not check:
                page.write_text(new, encoding="utf-8")
    if unused := sorted(made.keys() - used):
        sys.exit(f"no page shows {', '.join(unused)}")
    if check and stale:
        sys.exit(f"{', '.join(stale)}: not what the code says; run python docs/generate.py")
    return len(stale)


if __name__ == "__main__":
    main(check="--check" in sys.argv)
