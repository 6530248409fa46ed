"""What stage three found: the types of eval.json, and reading it back.

Rates are shares in [0, 1] of prompts, ties half; intervals are 95 %; KL is in nats per response.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.artifacts import durable
from pipeline.errors import DataError, first_line
from pipeline.evaluation.rates.statistics import Interval
from pipeline.evaluation.rates.winrates import WinRate

# of eval.json: raised if a reader of before would misread it
FORMAT = 4
# before it `failed` were prompts of which nothing could be judged
_COUNTS_COMPARISONS = 3
# before it an estimate stood under a name that promised what it does not always keep
_NAMES_ESTIMATES = 4

# estimates of a KL by name, and the position of the token that ends a response
SAMPLED, CONTROL_VARIATE, EXACT = "sampled", "control variate", "exact per position"
END = "end token"


@dataclass(frozen=True)
class OtherRate:
    """A win rate of two models that are not policy and reference; None if nothing could be judged."""

    model: str
    baseline: str
    judge: str
    rate: WinRate | None


@dataclass(frozen=True)
class Baselines:
    """What a judge says of what took no training; None if it is not known. See `pipeline.evaluation.baselines`.

    `shorter`, `longer`: how often it prefers the response with fewer, with more tokens, of the responses that its win rate
    compares. `first_sentence`, `whole_sentences`: the win rate of the reference's responses cut to these against the same
    responses uncut. `shuffled`: its accuracy if the labels of held-out pairs are shuffled, and where 95 of 100 shuffles lie.
    """

    shorter: Interval | None = None
    longer: Interval | None = None
    first_sentence: Interval | None = None
    whole_sentences: Interval | None = None
    shuffled: Interval | None = None


@dataclass(frozen=True)
class Split:
    """A win rate of some of the comparisons, over their prompts."""

    prompts: int
    comparisons: int
    rate: Interval


@dataclass(frozen=True)
class Responses:
    """What a model's responses look like: means over them, shares of them, tokens with an interval over prompts."""

    responses: int
    tokens: Interval
    words: float
    cut_off: float
    repetition: float
    empty: float


@dataclass(frozen=True)
class Estimate:
    """An estimate of a KL in nats per response, over prompts. `variance_ratio`: the sampled estimate's variance over prompts
    by this one's, above 1 if this one needs fewer prompts. None: not known, or nothing varies.
    """

    interval: Interval
    standard_error: float | None = None
    variance_ratio: float | None = None


@dataclass(frozen=True)
class Position:
    """The part of a KL that lies at some positions of responses, in nats per response: parts add up to the whole."""

    where: str
    tokens: int
    sampled: float
    exact: float | None = None


@dataclass(frozen=True)
class Cost:
    """KL(model || reference) on the model's own samples at temperature 1, and the rewards that judges give them.

    The reference's KL is None. `kl` is the sampled estimate; `estimates` are all by name, `positions` where it lies, the token
    that ends a response apart under END: see `pipeline.evaluation.kl.divergence`. `perplexity`: of these samples under the
    reference, whose own show what it finds fluent; None if they were not scored.
    """

    kl: Interval | None = None
    estimates: dict[str, Estimate] = field(default_factory=dict)
    positions: list[Position] = field(default_factory=list)
    per_token: float | None = None
    perplexity: float | None = None
    responses: int = 0
    tokens: int = 0
    reward: dict[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class HeldOut:
    """Means over held-out pairs under the saved policy; rewards as in training."""

    pairs: int
    reward_accuracy: float
    mean_margin: float
    mean_chosen_reward: float
    mean_rejected_reward: float


@dataclass(frozen=True)
class SideBySide:
    """Policy and reference on one prompt. `difference`: mean over judges of texts of score minus one half; `marks`: of the
    marks of rule:complete_and_concise.
    """

    prompt_id: str
    sample: int
    topic: str
    prompt: str
    policy: str
    reference: str
    policy_finish: str
    reference_finish: str
    difference: float
    marks: float


@dataclass(frozen=True)
class People:
    """How much people voted on: `votes` of `voters` on `prompts` of `of_prompts`, and on `comparisons` of `of_comparisons` whose
    responses differ. `elsewhere`: votes on responses that this evaluation does not compare, which count for nothing.
    """

    voters: int
    votes: int
    prompts: int
    of_prompts: int
    comparisons: int
    of_comparisons: int
    elsewhere: int


@dataclass(frozen=True)
class Results:
    """eval.json. `pair_judge`: the judge that made the training pairs, or rewarded the samples, as `learnt_from` says (pairs,
    samples). `shared`: judge -> what its verdicts rest on that those of that judge do too; `judges`: policy against reference, by
    judge; `people`: what the judge of that name, `human`, rests on; `baselines`: by judge; `endings`: judge -> "both ended" or
    "some cut off"; `topics`: judge -> topic -> rate; `ratings`: judge -> model.
    """

    models: dict[str, str] = field(default_factory=dict)
    pair_judge: str | None = None
    learnt_from: str = "pairs"
    shared: dict[str, list[str]] = field(default_factory=dict)
    judges: dict[str, WinRate | None] = field(default_factory=dict)
    people: People | None = None
    baselines: dict[str, Baselines] = field(default_factory=dict)
    endings: dict[str, dict[str, Split]] = field(default_factory=dict)
    others: list[OtherRate] = field(default_factory=list)
    topics: dict[str, dict[str, Interval]] = field(default_factory=dict)
    ratings: dict[str, dict[str, Interval]] = field(default_factory=dict)
    responses: dict[str, Responses] = field(default_factory=dict)
    cost: dict[str, Cost] = field(default_factory=dict)
    judge_costs: dict[str, dict[str, float]] = field(default_factory=dict)
    held_out: HeldOut | None = None
    verdict: str = ""
    worse: list[SideBySide] = field(default_factory=list)
    format: int = FORMAT

    @property
    def judged(self) -> dict[str, WinRate]:
        """The judges of policy against reference that judged anything."""
        return {name: rate for name, rate in self.judges.items() if rate is not None}


def write_results(path: Path, results: Results) -> None:
    """Write eval.json durably."""
    durable.write_json(path, asdict(results))


def read_results(path: Path) -> Results | None:
    """What `write_results` wrote, also in earlier versions; None if there is no file.

    Raises DataError for a file of a newer format, one that cannot be read, or one whose failures were counted otherwise.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        made_in = content.get("format", 1)
        if made_in > FORMAT:
            raise DataError(
                f"{path} has format {made_in}, written by a newer refscore; this one reads up to {FORMAT}: update refscore, or run "
                "'refscore eval' again"
            )
        if made_in < _COUNTS_COMPARISONS and any(
            (rate or {}).get("failed") for rate in content.get("judges", {}).values()
        ):
            raise DataError(
                f"{path} is from before failures of single comparisons were counted: run 'refscore eval' again, which samples and "
                "asks nothing that is stored"
            )
        if made_in < _NAMES_ESTIMATES:
            content["cost"] = {model: _renamed(cost) for model, cost in content.get("cost", {}).items()}
        # the first format had an empty object for no held-out pairs
        return TypeAdapter(Results).validate_python({**content, "held_out": content.get("held_out") or None})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, TypeError, ValidationError) as error:
        raise DataError(f"{path} cannot be read ({first_line(error)}): run 'refscore eval' again") from None


def _renamed(cost: dict[str, Any]) -> dict[str, Any]:
    """A cost of an earlier format, which called the control variate `low_variance`."""
    before = cost.get("low_variance")
    return {**cost, "estimates": {CONTROL_VARIATE: {"interval": before}}} if before else cost
