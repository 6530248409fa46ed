"""`reward_model:<directory>`: a sequence classifier with one label, trained on preferences (Bradley-Terry).

vLLM computes the rewards, transformers if vLLM is absent or does not know the architecture. The reward is the raw
score of the last token. A model with the tokenizer and template of the samples reads their very tokens; another one reads
the texts under its own chat template.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.judges import JudgeConfig
from pipeline.engines.protocol import engine_version, installed_version
from pipeline.engines.vllm.engine import prepare_environment, sized_engine
from pipeline.errors import ConfigError
from pipeline.hardware import device_kind
from pipeline.judges.encoding import encode_turns
from pipeline.judges.judging import Judge, Reward, Shown, by_reward
from pipeline.judges.memory import Verdict, Verdicts, verdict_key
from pipeline.models.configuration import position_limit, read_config, text_config
from pipeline.models.identity import identify_model
from pipeline.models.load import Named, chat_template_digest, load_tokenizer, vocabulary_digest
from pipeline.models.locate import locate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_WAVE = 512


def open_reward_model(settings: JudgeConfig, verdicts: Verdicts, samples: tuple[str, str] | None) -> Judge:
    """The judge; loads nothing before the first response that `verdicts` does not know.

    `samples`: digests of the vocabulary and of the template that made the samples' token ids.
    """
    spec = Named(settings.argument)
    directory = locate(spec)
    must_reward(directory, f"judge reward_model:{settings.argument}")
    tokenizer = load_tokenizer(directory, spec)
    own = (vocabulary_digest(tokenizer), chat_template_digest(tokenizer))
    same = own == samples
    if not same and not tokenizer.chat_template:
        raise ConfigError(f"judge {settings.shown}: its tokenizer has no chat template, and it is not the samples' own")
    dtype = judge_dtype(settings)
    # a longer sequence has no reward
    identity = f"{identify_model(directory).digest} {position_limit(directory)} {_engine(settings)} {dtype}"

    def reward(items: Sequence[Shown]) -> list[float | None]:
        sequences = [_ids(item, tokenizer, same=same) for item in items]
        # all that the model sees
        keys = [verdict_key(identity, (str(ids),)) for ids in sequences]

        def ask(missing: Mapping[str, list[int]]) -> None:
            # each is kept as it comes, so that a kill loses one wave
            rewards = _rewards(directory, settings, dtype, list(missing.values()))
            for key, value in zip(missing, rewards, strict=True):
                verdicts.add(key, Verdict(value))

        return verdicts.values(keys, sequences, ask)

    typed: Reward = reward
    return by_reward(settings.shown, typed)


def judge_dtype(settings: JudgeConfig) -> str:
    """What `dtype: auto` means on this machine."""
    if settings.dtype != "auto":
        return settings.dtype
    return "float32" if device_kind() == "cpu" else "bfloat16"


def with_vllm(directory: Path, dtype: str, ids: Sequence[Sequence[int]]) -> Iterator[float]:
    """Raw rewards of token sequences, by vLLM, wave by wave."""
    prepare_environment()
    from vllm import PoolingParams, TokensPrompt

    length = max(map(len, ids)) + 1
    with sized_engine(directory, text_config(directory), dtype, length, runner="pooling") as engine:
        for start in range(0, len(ids), _WAVE):
            # without use_activation=False a sigmoid comes back
            outputs = engine.classify(
                [TokensPrompt(prompt_token_ids=list(sequence)) for sequence in ids[start : start + _WAVE]],
                pooling_params=PoolingParams(use_activation=False),
                use_tqdm=False,
            )
            yield from (float(output.outputs.probs[0]) for output in outputs)


def with_transformers(directory: Path, dtype: str, ids: Sequence[Sequence[int]]) -> Iterator[float]:
    """Raw rewards of token sequences, one by one, by transformers."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True
    )
    # a padding token would make it look for the last token that is none, and miss an end-of-turn that pads
    model.config.get_text_config().pad_token_id = None
    model.to(device_kind()).eval()
    for sequence in ids:
        with torch.no_grad():
            yield float(model(torch.tensor([list(sequence)], device=device_kind())).logits[0, 0])


def _rewards(directory: Path, settings: JudgeConfig, dtype: str, ids: list[list[int]]) -> Iterator[float | None]:
    limit = position_limit(directory)
    fits = [limit is None or len(sequence) < limit for sequence in ids]
    if not all(fits):
        log.warning("judge %s: %d responses are longer than it reads", settings.shown, fits.count(False))
    asked = [sequence for sequence, fit in zip(ids, fits, strict=True) if fit]
    computed = iter(_computed(directory, settings, dtype, asked))
    for fit in fits:
        yield next(computed) if fit else None
    # to its end, where the engine is stopped
    deque(computed, maxlen=0)


def _computed(directory: Path, settings: JudgeConfig, dtype: str, ids: list[list[int]]) -> Iterator[float]:
    if ids and not _engine(settings).startswith("transformers"):
        try:
            yield from with_vllm(directory, dtype, ids)
        except ConfigError as error:
            # as it is started: it has said nothing yet
            log.warning("judge %s: %s; transformers computes the rewards instead", settings.shown, error)
        else:
            return
    if ids:
        yield from with_transformers(directory, dtype, ids)


def _engine(settings: JudgeConfig) -> str:
    version = engine_version("vllm")
    if settings.engine == "transformers" or version is None:
        return f"transformers {installed_version('transformers')}"
    return f"vllm {version}"


def _ids(item: Shown, tokenizer: PreTrainedTokenizerBase, *, same: bool) -> list[int]:
    if same and item.prompt.ids and item.response.ids:
        return [*item.prompt.ids, *item.response.ids]
    turns = [{"role": "user", "content": item.prompt.text}, {"role": "assistant", "content": item.response.text}]
    return encode_turns(tokenizer, turns, reply_next=False)


def must_reward(directory: Path, who: str) -> None:
    """Raise ConfigError, which begins with `who`, unless the model gives one score: a sequence classifier with one label."""
    config = read_config(directory)
    kinds = config.get("architectures") or []
    labels = len(config.get("id2label") or {}) or config.get("num_labels", 2)
    if not any("SequenceClassification" in kind for kind in kinds) or labels != 1:
        raise ConfigError(
            f"{who}: expected a sequence classifier with one label, got "
            f"{', '.join(kinds) or 'no architecture'} with {labels} labels"
        )
