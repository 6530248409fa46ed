"""Are stored scores true? A sample of a run's pairs or responses, compared with what transformers gives in float32.

Differences are score minus float32, in nats per token. A mean that is not 0 grows with a response's length and so favours
short or long ones; what scatters around 0 is noise of the margin. Both are given in the units of the reward as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.artifacts.schemas import PAIRS, RESPONSES
from pipeline.artifacts.tables import read_about, read_table
from pipeline.config.experiment import Config
from pipeline.engines.protocol import Request, numerics_of
from pipeline.errors import DataError
from pipeline.models.load import chat_template_digest, load_tokenizer
from pipeline.models.locate import locate, locate_reference
from pipeline.precompute.agreement import LARGEST, TOLERANCES, agreement, agreement_of_sums
from pipeline.store.identity import UNKNOWN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# what reduced precision differs by on average; another model, other token ids or another template differ by more
_LOW_PRECISION = 0.15


@dataclass(frozen=True)
class Sample:
    """Sequences of some pairs, chosen and rejected in turn, or of some responses (`sides` 1), and the scores that the run has for
    them: values per token, or sums alone if scores were imported of which some are no more.
    """

    requests: list[Request]
    stored: list[np.ndarray]
    sums: list[float]
    sides: int = 2

    @property
    def rows(self) -> int:
        """Pairs, or responses."""
        return len(self.requests) // self.sides

    @property
    def unit(self) -> str:
        """What a row is called."""
        return "pairs" if self.sides == 2 else "responses"

    def against(self, truth: list[np.ndarray], beta: float) -> dict[str, float]:
        """How far the stored scores are from `truth`, values per token; see `pipeline.precompute.agreement`."""
        if not self.sums:
            return agreement(self.stored, truth, beta, of_pairs=self.sides == 2)
        true_sums = [float(values.sum(dtype=np.float64)) for values in truth]
        return agreement_of_sums(
            self.sums, true_sums, [len(values) for values in truth], beta, of_pairs=self.sides == 2
        )


def draw_sample(path: Path, rows: int) -> Sample:
    """`rows` rows of pairs.parquet or responses.parquet, drawn always alike. Raises DataError if it holds no scores."""
    if not read_about(path).get("scored", True):
        raise DataError(f"{path} holds no reference scores: the run's loss compares nothing with the reference")
    of_pairs = read_about(path).get("data", "pairs") == "pairs"
    sides = ("chosen", "rejected") if of_pairs else ("response",)
    columns = [
        "prompt_ids",
        *(name for side in sides for name in (f"{side}_ids", f"ref_{side}_token_logps", f"ref_{side}_logps")),
    ]
    table = read_table(path, PAIRS if of_pairs else RESPONSES, columns)
    chosen = sorted(np.random.default_rng(0).choice(len(table), min(rows, len(table)), replace=False).tolist())
    found = table.take(chosen).to_pylist()
    stored = [row[f"ref_{side}_token_logps"] for row in found for side in sides]
    by_sum = any(values is None for values in stored)
    return Sample(
        [Request(row["prompt_ids"], row[f"{side}_ids"]) for row in found for side in sides],
        [] if by_sum else [np.asarray(values, np.float32) for values in stored],
        [row[f"ref_{side}_logps"] for row in found for side in sides] if by_sum else [],
        len(sides),
    )


def judge(figures: dict[str, float], dtype: str, *, by_sum: bool = False) -> dict[str, Any]:
    """Whether `figures` are what arithmetic in `dtype` may differ by, the limits, and the verdict in a sentence.

    A dtype that is not known may be the coarsest. `by_sum`: sums were compared, as `agreement_of_sums` does.
    """
    kind = "float32" if dtype == "float32" else "bfloat16"
    signed, absolute = TOLERANCES[kind]
    mean, mean_signed = figures["mean_absolute_difference"], figures["mean_signed_difference"]
    largest, limit = figures["max_absolute_difference"], LARGEST[kind]
    passed = abs(mean_signed) <= signed and mean <= absolute and largest <= limit
    if passed:
        gives = f"what {dtype} gives" if dtype != UNKNOWN else "what the reference gives, in a dtype that is not known"
        verdict = f"the scores are {gives}: {mean:.2g} nats per token on average, {largest:.2g} at most"
    else:
        verdict = (
            f"the scores differ by {mean:.4f} nats per token from what the reference gives in float32 ({mean_signed:+.4f} "
            f"with their sign, {largest:.4f} at most; allowed are {absolute}, {signed} and {limit}): "
            f"{_cause(mean, dtype, absolute)}"
        )
    if by_sum:
        verdict += (
            "; sums were compared, as there are no values per token: a difference per token is the mean of a response, the most "
            "is its sum over the root of its tokens"
        )
    return {
        "passed": bool(passed),
        "verdict": verdict,
        "tolerance_mean_signed": signed,
        "tolerance_mean_absolute": absolute,
        "tolerance_max_absolute": limit,
    }


def problems(config: Config, path: Path) -> list[str]:
    """What does not fit between a run's pairs and its configuration now, before any number is compared: dtype, template."""
    about = read_about(path)
    sentences = []
    dtype = numerics_of(config.reference).dtype
    if about.get("dtype") != dtype:
        sentences.append(f"the scores were made in {about.get('dtype')}, the run's configuration asks for {dtype}")
    if config.data.template != "chat":
        return sentences
    reference = load_tokenizer(locate_reference(config.reference).merged, config.reference)
    if chat_template_digest(reference) != about.get("template"):
        sentences.append(
            "the reference's chat template was changed since the pairs were made: run 'refscore precompute' again"
        )
    policy = load_tokenizer(locate(config.policy), config.policy)
    if not _same_conversation(reference, policy):
        sentences.append(
            "policy.model writes a conversation in other tokens than reference.model, whose chat template made the pairs: "
            "use one chat template for both"
        )
    return sentences


def _cause(mean: float, dtype: str, absolute: float) -> str:
    if mean <= absolute:
        return "single values are wrong, as from a faulty engine"
    if dtype == "float32" and mean < _LOW_PRECISION:
        return "so much reduced precision differs by: they were not computed in float32 (dtype, quantisation?)"
    return "they belong to another model, other token ids (chat template?) or a faulty engine"


def _same_conversation(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    if chat_template_digest(a) == chat_template_digest(b):
        return True
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    texts = [
        str(one.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)) if one.chat_template else ""
        for one in (a, b)
    ]
    return texts[0] == texts[1]
