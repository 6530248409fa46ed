"""A configuration for data and a model that were looked at: every value with the number that it rests on.

The values are DPO's usual ones where nothing was found that speaks against them.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np

from pipeline.config.judges import IMPLICIT
from pipeline.hardware import device_kind
from pipeline.judges.judging import Prompt, Response, Shown
from pipeline.judges.rules import open_rule
from pipeline.planning.cautions import ENOUGH_HELD_OUT
from pipeline.planning.forecast import memory_here, parameters_in
from pipeline.planning.shape import Shape, shaped
from pipeline.planning.survey import Survey

# share of the prompts, and number of them, that are held out where there are enough
_HELD_OUT, _MOST_HELD_OUT, _LARGEST_PERCENT = 0.1, 500, 34
_SMALL_MODEL = 1e9
# a rule judges if it tells such a share of the pairs apart, and at least so many, and prefers the chosen response so often
_TELLS_APART, _SOME_PAIRS, _AGREES = 0.1, 20, 0.55
_RULES = ("complete_and_concise", "json_valid", "no_repetition")
_FLUENCY = "no_repetition"
_UNREADABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


@dataclass(frozen=True)
class Choice:
    """A field of the configuration, its value, and why."""

    field: str
    value: Any
    because: str

    @property
    def shown(self) -> str:
        """The value as YAML on one line."""
        if isinstance(self.value, float) and 0 < self.value < 1e-3:
            return f"{self.value:.1e}"
        return json.dumps(self.value, ensure_ascii=False)


@dataclass
class Proposal:
    """Choices in the order of the file, and what a reader should know beside them."""

    choices: list[Choice] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(self, name: str, value: Any, because: str) -> None:
        """Choose a value for a field."""
        self.choices.append(Choice(name, value, because))

    def content(self) -> dict[str, Any]:
        """Plain values, as a configuration's file holds them."""
        content: dict[str, Any] = {}
        for choice in self.choices:
            section, _, name = choice.field.partition(".")
            if name:
                content.setdefault(section, {})[name] = choice.value
            else:
                content[section] = choice.value
        return content

    def text(self, title: str) -> str:
        """The file: each value below the reason for it."""
        lines = [f"# {' '.join(title.split())}", "# Every field, its meaning and its limits: docs/configuration.md."]
        section = ""
        for choice in self.choices:
            of, _, name = choice.field.partition(".")
            if of != section:
                lines += ["", f"{of}:"] if name else [""]
                section = of
            start = f"{'  ' if name else ''}# "
            lines += textwrap.wrap(" ".join(choice.because.split()), 98, initial_indent=start, subsequent_indent=start)
            lines.append(f"{'  ' if name else ''}{name or of}: {choice.shown}")
        # names of files may hold what YAML reads as another sign, or not at all
        return _UNREADABLE.sub(lambda sign: f"\\u{ord(sign[0]):04x}", "\n".join([*lines, ""]))


def propose(found: Survey) -> Proposal:
    """What to write for the data and the model that were found, on this machine."""
    kind = device_kind()
    shape = shaped(found, kind, memory_here())
    proposal = Proposal()
    _about_data(proposal, found, shape)
    _about_models(proposal, found, shape)
    _about_training(proposal, found, shape)
    _about_evaluation(proposal, found)
    if not shape.fits:
        advice = "take a smaller model, or ask 'refscore plan --gpu-memory 80' for the machine that trains"
        proposal.remarks.append(f"{shape.memory}: {advice}")
    return proposal


# --- section by section


def _about_data(proposal: Proposal, found: Survey, shape: Shape) -> None:
    path = found.data[0] if len(found.data) == 1 else found.data
    proposal.add("data.path", path, "; ".join(f"{name}: {form}" for name, form in found.formats.items()))
    if found.columns:
        proposal.add("data.columns", found.columns, "the names of the columns can mean nothing else")
    proposal.add("data.template", found.template, _why_this_template(found))
    lengths = found.lengths
    too_long = found.drops["too_long"].count if "too_long" in found.drops else 0
    reads = f"the model reads {found.positions:,}" if found.positions else "nothing limits what the model reads"
    kept = int(shape.kept.sum())
    proposal.add(
        "data.max_length",
        shape.length,
        f"tokens of prompt and response: {kept} of {len(lengths) + too_long} pairs are within it (median "
        f"{int(np.median(lengths)):,}, 99% up to {int(np.quantile(lengths, 0.99, method='higher')):,}, longest "
        f"{int(lengths.max()):,}); {reads}",
    )
    share, held_out, prompts = _held_out(found.places[shape.kept])
    because = f"{held_out} of {prompts} prompts are held out"
    if held_out < ENOUGH_HELD_OUT:
        because += f", the data is too small for {ENOUGH_HELD_OUT}"
        advice = "add pairs of other prompts, or name a file of held-out pairs in data.eval_path"
        proposal.remarks.append(f"{because}, from which on figures say something: {advice}")
    proposal.add("data.eval_fraction", share, because)


def _why_this_template(found: Survey) -> str:
    if not found.has_template:
        return "the model's tokenizer has no chat template"
    continuing = (
        f"{found.continues:.0%} of the first {len(found.looked_at)} pairs have responses that begin with white space"
    )
    if found.template == "none":
        return f"texts that are gone on with: {continuing}"
    return f"the tokenizer has a chat template, and the texts are questions and answers: {continuing}"


def _held_out(places: np.ndarray) -> tuple[float, int, int]:
    """The share to hold out, how many prompts it holds out, and how many there are."""
    prompts = np.unique(places)
    target = min(_MOST_HELD_OUT, max(ENOUGH_HELD_OUT, _HELD_OUT * len(prompts)))
    counts = [(percent / 100, int((prompts < percent / 100).sum())) for percent in range(1, 100)]
    enough = [(share, count) for share, count in counts[:_LARGEST_PERCENT] if count >= target]
    # of too few as many as may be, and at least one to train on and one to look at
    allowed = [pair for pair in reversed(counts[:_LARGEST_PERCENT]) if 0 < pair[1] < len(prompts)]
    any_share = [pair for pair in counts if 0 < pair[1] < len(prompts)]
    share, held_out = [*enough, *allowed, *any_share, (0.0, 0)][0]
    return share, held_out, len(prompts)


def _about_models(proposal: Proposal, found: Survey, shape: Shape) -> None:
    engine, here = ("vllm", "is") if find_spec("vllm") else ("transformers", "is not")
    proposal.add("reference.model", found.model, "the frozen model that the policy starts from and is compared with")
    proposal.add("reference.engine", engine, f"vLLM {here} installed here")
    proposal.add("reference.store", "data/store", "keeps the scores for all experiments")
    proposal.add("policy.model", found.model, "the model that is trained: the reference's")
    if shape.lora:
        proposal.add("policy.lora", {"r": 16}, f"adapters, as training all weights takes more memory; {shape.memory}")


def _about_training(proposal: Proposal, found: Survey, shape: Shape) -> None:
    parameters = parameters_in(found.base)
    share = next(choice.value for choice in proposal.choices if choice.field == "data.eval_fraction")
    pairs = int((found.places[shape.kept] >= share).sum())
    epochs = 1 if pairs >= 5000 else 2 if pairs >= 1000 else 3
    steps = math.ceil(pairs * epochs / shape.batch)
    rate, size = (5e-6 if parameters < _SMALL_MODEL else 1e-6), f"a model of {_millions(parameters)} million parameters"
    usual = f"usual for DPO of all weights of {size}"
    if shape.lora:
        rate, usual = 10 * rate, f"ten times what is {usual}: adapters start from nothing"
    proposal.add("train.beta", 0.1, "DPO's usual one")
    proposal.add("train.learning_rate", rate, usual)
    an_epoch = math.ceil(pairs / shape.batch)
    because = f"pairs of one optimizer step: the {pairs} training pairs give {an_epoch} steps per epoch"
    proposal.add("train.per_device_train_batch_size", shape.batch, because)
    proposal.add("train.gradient_accumulation_steps", 1, "tokens_per_batch cuts a step up as memory needs it")
    proposal.add("train.tokens_per_batch", shape.tokens_per_batch, f"tokens of one forward pass; {shape.memory}")
    if shape.checkpointing:
        proposal.add("train.gradient_checkpointing", True, "without it a step takes more memory than there is")
    proposal.add("train.num_train_epochs", epochs, f"{steps} steps; few pairs are read more often")
    proposal.add("train.eval_steps", max(5, math.ceil(steps / 5)), "about five looks at the held-out pairs")


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.0f}" if parameters >= 1e7 else f"{parameters / 1e6:.2g}"


def _about_evaluation(proposal: Proposal, found: Survey) -> None:
    longest = int(np.quantile(found.responses[:, 0], 0.9, method="higher"))
    tokens = min(512, 32 * math.ceil(longest / 32))
    room = found.positions - int(found.prompts.max()) - 1 if found.positions else tokens
    because = f"nine of ten chosen responses have at most {longest:,} tokens; more than 512 take long to sample"
    proposal.add("generate.max_tokens", max(1, min(tokens, room)), because)
    judges, because = _judges(found)
    proposal.add("judge", judges, because)


def _judges(found: Survey) -> tuple[list[str], str]:
    """Rules that tell the pairs' responses apart and mostly prefer the chosen one, best first; one of fluency; the pairs."""
    agreeing: dict[str, float] = {}
    said = []
    for rule in _RULES:
        _, apart, agrees = _on_pairs(rule, found)
        if apart >= max(_TELLS_APART, _SOME_PAIRS / len(found.looked_at)) and agrees >= _AGREES:
            agreeing[rule] = agrees
            said.append(
                f"rule:{rule} tells {apart:.0%} of the pairs apart and prefers the chosen one in {agrees:.0%} of them"
            )
    judges = sorted(agreeing, key=lambda rule: -agreeing[rule])
    if _FLUENCY not in judges and _on_pairs(_FLUENCY, found)[0] >= 1 - _TELLS_APART:
        judges.append(_FLUENCY)
        said.append(f"rule:{_FLUENCY} watches over fluency")
    said.append(f"{IMPLICIT}: does the policy prefer the chosen responses of held-out pairs")
    because = f"{'; '.join(said)}. docs/evaluation.md lists judges that ask a model"
    return [*(f"rule:{rule}" for rule in judges), IMPLICIT], because


def _on_pairs(rule: str, found: Survey) -> tuple[float, float, float]:
    """Of the pairs that were looked at: the share that a rule can read, that it tells apart, and of these that it agrees with."""
    judge = open_rule(rule, rule)
    shown = [Shown(Prompt("", prompt), Response(text, "stop")) for prompt, *sides in found.texts() for text in sides]
    rewards = judge.reward(shown) if judge.reward else []
    pairs = list(zip(rewards[::2], rewards[1::2], strict=True))
    read = [(chosen, rejected) for chosen, rejected in pairs if chosen is not None and rejected is not None]
    apart = [chosen > rejected for chosen, rejected in read if abs(chosen - rejected) > 0.05]
    return len(read) / len(pairs), len(apart) / len(pairs), sum(apart) / len(apart) if apart else 0.0
