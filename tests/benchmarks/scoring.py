"""Scoring a reference: TRL's precompute, a plain transformers loop and our engines: `make bench-score`.

Every contestant is a fresh process on the same pairs and the same float32 or bfloat16 weights. `pairs/s` is steady state
(engine ready, a few other sequences scored before), `wall` the whole process from its start, `first shard` from its start to
the first 64 scored sequences. `of torch` and `of oneDNN` are the arithmetic that the tokens read and the response rows need,
per second, as a share of what large multiplications reach with torch.mm (MKL) and with vLLM's packed oneDNN in the same run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DATA = {
    "hh": ROOT.parent / "shared" / "data" / "hh_harmless_400.jsonl",
    "bad_rule": ROOT / "data" / "bad_rule" / "train.jsonl",
}
MODEL = ROOT / "data" / "models" / "smollm2-135m-instruct"
CONTESTANTS = (
    "trl float32",
    "loop float32",
    "vllm float32 unshared",
    "vllm float32 shared",
    "vllm bfloat16 unshared",
    "vllm bfloat16 shared",
    "transformers float32 shared",
    "transformers bfloat16 shared",
)
_BEGUN = time.monotonic()


def main() -> None:
    """Run the contestants one after the other and print a table for each data set; with --one, be one of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", nargs="+", default=[name for name, path in DATA.items() if path.is_file()])
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--model", type=Path, default=MODEL, help="a directory in Hugging Face layout")
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS))
    parser.add_argument("--one")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(BY_NAME[options.one.split()[0]](options)))
        return
    if options.model == MODEL and not MODEL.is_dir():
        from pipeline.config.experiment import ReferenceConfig
        from pipeline.models.locate import locate

        os.chdir(ROOT)
        locate(ReferenceConfig())
    options.model = options.model.resolve()
    peaks = fresh(options, "hh", "peak")
    print("matmul peak, GFLOP/s: " + ", ".join(f"{name} {value:.0f}" for name, value in peaks.items()))
    for data in options.data:
        show(data, options, {name: fresh(options, data, name) for name in options.contestants}, peaks)


def fresh(options: argparse.Namespace, data: str, name: str) -> dict[str, float]:
    """What the contestant measured, in a process and a directory of its own."""
    arguments = ["--one", name, "--data", data, "--pairs", str(options.pairs), "--model", str(options.model)]
    with tempfile.TemporaryDirectory() as where:
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.scoring", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": where},
            cwd=where,
            capture_output=True,
            text=True,
            check=False,
        )
        wall = time.monotonic() - begun
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout}{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found if name == "peak" else found | {"wall": wall}


def show(data: str, options: argparse.Namespace, found: dict[str, dict[str, float]], peaks: dict[str, float]) -> None:
    first = next(iter(found.values()))
    print(
        f"\n{data}, first {options.pairs} pairs: {first['tokens']:.0f} tokens, prompts twice; {os.cpu_count()} processors"
    )
    head = ("pairs/s", "x TRL", "tokens/s", "of torch", "of oneDNN", "wall, s", "first shard, s", "peak GiB")
    print(f"{'':30}" + "".join(f"{title:>15}" for title in head))
    trl = found.get("trl float32", {}).get("seconds")
    for name, one in found.items():
        dtype = "bfloat16" if "bfloat16" in name else "float32"
        cells = (
            f"{options.pairs / one['seconds']:.2f}",
            f"{trl / one['seconds']:.1f}" if trl else "",
            f"{one['tokens'] / one['seconds']:.0f}",
            *(f"{one['flop'] / one['seconds'] / 1e9 / peaks[f'{kind} {dtype}']:.2f}" for kind in ("torch", "oneDNN")),
            f"{one['wall']:.1f}",
            f"{one['first']:.1f}" if "first" in one else "",
            f"{one['gib']:.2f}",
        )
        print(f"{name:30}" + "".join(f"{cell:>15}" for cell in cells), flush=True)
    for name, one in found.items():
        if "start" in one:
            parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in one["start"].items())  # type: ignore[attr-defined]
            print(f"to the first shard of {name}: {parts}")


# --- the contestants; each returns seconds, tokens and what else it knows


def peak(options: argparse.Namespace) -> dict[str, float]:
    """GFLOP/s of large multiplications, with torch.mm and with vLLM's packed oneDNN."""
    from pipeline.engines.vllm.engine import prepare_environment

    prepare_environment()
    import torch
    from vllm import _custom_ops as ops

    def best(multiply: object) -> float:
        multiply()  # type: ignore[operator]
        seconds = []
        for _ in range(12):
            begun = time.perf_counter()
            multiply()  # type: ignore[operator]
            seconds.append(time.perf_counter() - begun)
        return 2 * 2048**3 / min(seconds) / 1e9

    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(2048, 2048, dtype=dtype) for _ in range(2))
        packed = ops.create_onednn_mm(b, 32)
        name = str(dtype).removeprefix("torch.")
        found[f"torch {name}"] = best(lambda a=a, b=b: a @ b)
        found[f"oneDNN {name}"] = best(lambda a=a, packed=packed: ops.onednn_mm(packed, a, None))
    return found


def ours(options: argparse.Namespace) -> dict[str, float]:
    """One of our engines, as stage one starts it."""
    from pipeline.config.experiment import ReferenceConfig
    from pipeline.engines.protocol import numerics_of
    from pipeline.engines.start import start_scorer

    engine, dtype, sharing = options.one.split()
    marks = {"python": time.monotonic() - _BEGUN}

    def mark(name: str) -> None:
        marks[name] = time.monotonic() - _BEGUN - sum(marks.values())

    if engine == "vllm":
        from pipeline.engines.vllm.engine import prepare_environment

        prepare_environment()
    importlib.import_module("vllm.entrypoints.llm" if engine == "vllm" else "transformers")
    mark("imports")
    reference = ReferenceConfig(model=str(options.model), engine=engine, dtype=dtype, share_prompts=sharing == "shared")
    warm, measured = requests_of(options)
    mark("tokens")
    with start_scorer(reference, options.model, numerics_of(reference), max(map(len, warm + measured))) as scorer:
        mark("engine")
        scorer.score(measured[:64])
        mark("first shard")
        if engine == "vllm":
            scorer.engine._llm.reset_prefix_cache()
        begun = time.monotonic()
        scorer.score(measured)
        seconds = time.monotonic() - begun
    found = measured_as(measured, seconds, options, shared=sharing == "shared")
    return found | {"first": sum(marks.values()), "start": marks}  # type: ignore[dict-item]


def loop(options: argparse.Namespace) -> dict[str, float]:
    """What one writes by hand: transformers, sorted by length, eight sequences padded together."""
    import torch
    from transformers import AutoModelForCausalLM

    warm, measured = requests_of(options)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()

    @torch.no_grad()
    def score(requests: list) -> None:
        ordered = sorted(requests, key=len)
        for start in range(0, len(ordered), 8):
            batch = ordered[start : start + 8]
            width = max(map(len, batch))
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, one in enumerate(batch):
                ids[row, : len(one)] = torch.tensor([*one.prompt_ids, *one.response_ids])
                mask[row, : len(one)] = 1
            logps = model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
            logps.gather(-1, ids[:, 1:, None])

    score(warm)
    begun = time.monotonic()
    score(measured)
    return measured_as(measured, time.monotonic() - begun, options, shared=False)


def trl(options: argparse.Namespace) -> dict[str, float]:
    """TRL's DPOTrainer with precompute_ref_log_probs, batch 8; only its precompute is timed."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Timed(DPOTrainer):
        def _precompute_ref_logps(self, *arguments: object, **named: object) -> object:
            begun = time.monotonic()
            scored = super()._precompute_ref_logps(*arguments, **named)
            self.precompute_seconds = time.monotonic() - begun
            return scored

    pairs = pairs_of(options)[: options.pairs]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = [
        {
            "prompt": pair.preference.prompt,
            "chosen": [{"role": "assistant", "content": pair.preference.chosen}],
            "rejected": [{"role": "assistant", "content": pair.preference.rejected}],
        }
        for pair in pairs
    ]
    settings = DPOConfig(
        output_dir="out", precompute_ref_log_probs=True, precompute_ref_batch_size=8, max_length=1024,
        per_device_train_batch_size=8, report_to=[], bf16=False, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    trainer = Timed(model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    _, measured = requests_of(options)
    return measured_as(measured, trainer.precompute_seconds, options, shared=False)


BY_NAME = {"peak": peak, "trl": trl, "loop": loop, "vllm": ours, "transformers": ours}


# --- data and arithmetic


def pairs_of(options: argparse.Namespace) -> list:
    from pipeline.config.experiment import DataConfig, ReferenceConfig
    from pipeline.models.load import load_tokenizer
    from pipeline.pairs.splits import build_pairs

    path = str(DATA[options.data[0]])
    tokenizer = load_tokenizer(options.model, ReferenceConfig(model=str(options.model)))
    return build_pairs(DataConfig(path=path, max_rows=options.pairs + 8, eval_fraction=0.0), tokenizer).pairs


def requests_of(options: argparse.Namespace) -> tuple[list, list]:
    """Four pairs to warm up on, and those that are measured."""
    from pipeline.engines.protocol import Request

    pairs = pairs_of(options)
    requests = [
        Request(pair.prompt_ids, response) for pair in pairs for response in (pair.chosen_ids, pair.rejected_ids)
    ]
    return requests[2 * options.pairs :][:8], requests[: 2 * options.pairs]


def measured_as(requests: list, seconds: float, options: argparse.Namespace, *, shared: bool) -> dict[str, float]:
    """Seconds, and the arithmetic of what had to be read: layers for every token, output layer for responses' tokens."""
    config = json.loads((options.model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    layers = config["num_hidden_layers"] * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    prompts = {tuple(one.prompt_ids) for one in requests} if shared else [one.prompt_ids for one in requests]
    rows = sum(len(one.response_ids) for one in requests)
    read = sum(map(len, prompts)) + rows
    return {
        "seconds": seconds,
        "tokens": sum(map(len, requests)),
        "flop": 2.0 * (layers * read + hidden * config["vocab_size"] * rows),
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


if __name__ == "__main__":
    main()
