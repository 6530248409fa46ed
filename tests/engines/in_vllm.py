"""What the tests of `test_in_vllm.py` ask of vLLM, in one process of its own: `python -m tests.engines.in_vllm MODELS OUT`.

vLLM pins the threads of the process it runs in, so it is kept out of the tests' own.
"""

import json
import sys
from pathlib import Path

from pipeline.config.experiment import GenerateConfig
from pipeline.config.judges import JudgeConfig
from pipeline.engines.vllm.generator import generator
from pipeline.judges.judging import Comparison, Prompt, Response, judge_both_orders
from pipeline.judges.open import JudgeContext, open_judge
from pipeline.judges.reward_model import with_transformers, with_vllm
from pipeline.models.load import Named, chat_template_digest, load_tokenizer, vocabulary_digest


def nobody(responses, tokens):
    """Progress that nobody hears of."""


def main(models: Path, out: Path) -> None:
    tiny, adapter, merged, reward = (models / name for name in ("tiny", "adapter", "merged", "reward"))
    tokenizer = load_tokenizer(tiny, Named(str(tiny)))
    prompts = [
        tokenizer(f"how do I cook {word}", add_special_tokens=False)["input_ids"] for word in ("rice", "a cat", "well")
    ]
    settings = GenerateConfig(max_tokens=12, temperature=1.0, samples=2, seed=3, dtype="float32")
    found = {}

    def ids_of(generate, asked):
        return [[one.ids for one in samples] for samples in generate(asked, settings, nobody)]

    many = settings.model_copy(update={"samples": 40})
    with generator(tiny, Named(str(tiny)), 64, settings) as generate:
        # in this order, in the other, and each alone
        found["in_order"] = ids_of(generate, prompts)
        found["reversed"] = ids_of(generate, prompts[::-1])[::-1]
        found["alone"] = [ids_of(generate, [prompt])[0] for prompt in prompts]
        asked = [tokenizer(f"prompt {n}", add_special_tokens=False)["input_ids"] for n in range(40)]
        found["against_itself"] = [[one.text for one in samples] for samples in generate(asked, many, nobody)]
        found["ends"] = {}
        for fixed in (False, True):
            how = many.model_copy(update={"fixed_length": fixed})
            written = [one for samples in generate(prompts, how, nobody) for one in samples]
            found["ends"][str(fixed)] = [(len(one.ids), one.finish_reason) for one in written]
    for name, directory, on_it in (("adapter", tiny, adapter), ("merged", merged, None)):
        with generator(directory, Named(str(directory)), 64, settings, on_it) as generate:
            found[name] = ids_of(generate, prompts)

    ids = [[*prompt, *samples[0]] for prompt, samples in zip(prompts, found["in_order"], strict=True)]
    # one ends with the end of turn, which pads too
    ids[0] = [*ids[0], tokenizer.eos_token_id]
    found["rewards"] = {
        "vllm": list(with_vllm(reward, "float32", ids)),
        "transformers": list(with_transformers(reward, "float32", ids)),
    }

    context = JudgeContext(out.parent / "verdicts", (), (vocabulary_digest(tokenizer), chat_template_digest(tokenizer)))
    items = [
        Comparison(
            Prompt(str(n), f"prompt {n}", "", prompts[n]),
            0,
            "policy",
            "reference",
            Response(f"a {n}", "stop", (5, 6)),
            Response(f"b b {n}", "stop", (7, 8, 9)),
        )
        for n in range(3)
    ]
    for name, how in (
        ("reward_model", {"name": f"reward_model:{reward}"}),
        ("token", {"name": f"llm:{tiny}", "min_mass": 0}),
        ("reasoning", {"name": f"llm:{tiny}", "verdict": "reasoning", "max_tokens": 16, "label": "reasoning"}),
    ):
        judge = open_judge(JudgeConfig(**how), context)
        judged = judge_both_orders(judge, items)
        found[name] = {"scores": [one.score for one in judged], "cost": judge.cost()}
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
