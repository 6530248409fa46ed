"""Asks the judge at a URL about many duels, slowly: `python -m tests.judges.ask_judge URL DIRECTORY NUMBER`. To be killed."""

import sys
from pathlib import Path

from pipeline.config.judges import JudgeConfig
from pipeline.judges.judging import Comparison, Judgement, Prompt, Response, judge_both_orders
from pipeline.judges.open import JudgeContext, open_judge


def ask(url: str, directory: Path, number: int) -> list[Judgement]:
    items = [
        Comparison(
            Prompt(str(n), f"prompt {n}"),
            0,
            "policy",
            "reference",
            Response(f"rice {n}", "stop"),
            Response("a cat", "stop"),
        )
        for n in range(number)
    ]
    judge = open_judge(JudgeConfig(name=f"llm:{url}", concurrency=2, requests_per_minute=900), JudgeContext(directory))
    return judge_both_orders(judge, items)


if __name__ == "__main__":
    ask(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
