"""One row of preference data, and the pairs that rows become."""

from pipeline.config.experiment import DataConfig
from pipeline.pairs.splits import build_pairs
from tests.conftest import write_rows


def build(tmp_path, tokenizer, rows, **data):
    return build_pairs(DataConfig(path=str(write_rows(tmp_path / "d.jsonl", rows)), **data), tokenizer)


def row(prompt="Hi?", chosen="Hello.", rejected="Go away.", **others):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **others}
