"""Many processes train what one does: FSDP2 over gloo on processors, every objective, resumed on other numbers of processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.artifacts.schemas import RESPONSE_METRICS, ROLLOUTS
from pipeline.artifacts.tables import read_about, read_table, write_table
from pipeline.config.files import load_config
from pipeline.errors import ConfigError
from pipeline.hardware import processors
from pipeline.training.parallel.sharded import must_be_shardable
from pipeline.training.parallel.world import World
from tests.conftest import experiment, make_tiny_model, preference_rows, refscore, refscore_here, write_rows
from tests.engines.sampling import sample_here
from tests.forked import run
from tests.rollouts.test_training import length_rewards

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = bool(os.environ.get("REFSCORE_DEVICES"))
SIZES = (1, 2, 4) if EVERYTHING else (1, 2)
ONE_PAIR = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
LORA = {"policy": {"lora": {"r": 4, "alpha": 8, "merge": False}}}
CASES = {
    "sigmoid": {},
    "ipo": {"train": {"loss_type": ["ipo"]}},
    "aot": {"train": {"loss_type": ["aot"]}},
    "sft": {"train": {"loss_type": ["sigmoid", "sft"]}},
    "simpo": {"train": {"loss_type": ["simpo"], "beta": 2.0}},
    "reward": {"train": {"objective": "reward"}},
    "lora": LORA,
    "bfloat16": {"train": {"precision": "bfloat16"}},
    # weights of 16 bits, read, gathered and exported as such; the merged adapter likewise
    "narrow": {"policy": {"dtype": "bfloat16"}, "train": {"precision": "bfloat16"}},
    "merged": {"policy": {"lora": {"r": 4, "alpha": 8}, "max_shard_size": "100KB"}},
    "blocks": {"train": {"optimizer": "adamw_8bit"}},
    # embeddings are a group of their own
    "untied": {"policy": {"model": "untied"}, "train": {"loss_type": ["simpo"]}},
    # not read in parts, as each name is another in its files
    "renamed": {"policy": {"model": "renamed"}},
    # 256 numbers in a row: its 8-bit state can be spread, and has as many scales as its code has entries
    "wide": {"policy": {"model": "wide"}, "train": {"optimizer": "adamw_8bit", "loss_type": ["simpo"]}},
    "behind": {"train": {"async_save": True, "save_steps": 2}},
    "recomputed": {"train": {"gradient_checkpointing": True}},
    # fewer prompts in a step than processes: some read nothing that counts
    "few": {"train": ONE_PAIR},
    "few_sorted": {"train": {**ONE_PAIR, "loss_type": ["aot"]}},
    # stored samples: tokens and samples that are clipped, those that were cut off, a training that ends by itself
    "policy": {
        "train": {
            "objective": "policy_gradient",
            "policy_gradient": {"kl_coef": 0.1, "epsilon": 0.001, "epsilon_high": 0.002, "max_kl": None},
            "learning_rate": 1e-5,
        }
    },
    # compared with what all responses of a step make together; some processes read none of them that counts
    "kto": {"train": {"loss_type": ["kto"], "learning_rate": 1e-5}},
    "bco_few": {"train": {**ONE_PAIR, "loss_type": ["bco"], "desirable_weight": 1.5, "learning_rate": 1e-5}},
    "lists": {"train": {"loss_type": ["plackett_luce"]}},
    "policy_few": {
        "train": {
            **ONE_PAIR,
            "objective": "policy_gradient",
            "max_steps": 8,
            "policy_gradient": {
                "variant": "gspo",
                "epsilon": 0.01,
                "epsilon_high": 0.01,
                "mask_truncated_completions": True,
                "max_kl": 0.0015,
            },
            "learning_rate": 1e-5,
        }
    },
}
if not EVERYTHING:
    # the whole takes minutes: make test-devices
    CASES = {name: CASES[name] for name in ("aot", "lora", "few", "few_sorted", "policy_few", "kto")}
FIRST = next(iter(CASES))
OF_RESPONSES = [name for name in CASES if name in ("kto", "bco_few", "lists")]
OF_SAMPLES = [name for name in CASES if name.startswith("policy")]


def launched(where, size, *cases, code=0, **variables):
    """Runs `tests.training.many` in `size` processes; its output."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        # gloo asks the machine's name for an address, which not every machine can resolve
        "GLOO_SOCKET_IFNAME": "lo",
        **variables,
    }
    if size == 1:
        done = run(where, "import sys\nfrom tests.training.many import main\nmain(sys.argv[1:])", *cases, **environment)
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "tests.training.many", *cases],
            check=False, cwd=where, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    """Runs of every case in one, two and four processes, of pairs that were scored once."""
    where = tmp_path_factory.mktemp("devices")
    data = write_rows(where / "d.jsonl", preference_rows(40))
    make_tiny_model(where / "untied", tie_word_embeddings=False)
    make_tiny_model(where / "wide", hidden_size=256, intermediate_size=256, head_dim=128, initializer_range=0.05)
    shutil.copytree(tiny_model, where / "renamed")
    weights = load_file(tiny_model / "model.safetensors")
    bare = {name.removeprefix("model."): weight for name, weight in weights.items()}
    save_file(bare, where / "renamed/model.safetensors", {"format": "pt"})
    for name, sections in CASES.items():
        # small enough a rate that Adam does not blow digits up, and trees of very different length
        train = {
            "max_steps": 6,
            "per_device_train_batch_size": 8,
            "eval_steps": 3,
            "save_steps": 3,
            "save_total_limit": 2,
            "learning_rate": 1e-4,
        }
        whole = {**sections, "train": {**train, "tokens_per_batch": 256, **sections.get("train", {})}}
        rollout = {"generate": {"max_tokens": 12}, "rollout": {"samples": 3}, "judge": ["rule:contains=dog"]}
        whole |= rollout if name in OF_SAMPLES else {}
        experiment(where, tiny_model, data, **whole).rename(where / f"{name}.yaml")
    refscore_here(where, "precompute", "--config", f"{FIRST}.yaml", "--run", "scored")
    with pytest.MonkeyPatch.context() as patch:
        sample_here(patch, [])
        refscore_here(where, "rollout", "--config", f"{OF_SAMPLES[0]}.yaml", "--run", "scored")
    for name in OF_RESPONSES:
        refscore_here(where, "precompute", "--config", f"{name}.yaml", "--run", f"scored-{name}")
    samples = where / "data/runs/scored/rollouts.parquet"
    write_table(samples, length_rewards(read_table(samples, ROLLOUTS)), read_about(samples))
    for size in SIZES:
        for name in CASES:
            directory = where / f"data/runs/{name}-{size}"
            directory.mkdir(parents=True)
            scored = where / f"data/runs/scored-{name}/responses.parquet"
            pairs = scored if name in OF_RESPONSES else samples.with_name("pairs.parquet")
            shutil.copy(samples if name in OF_SAMPLES else pairs, directory)
        launched(where, size, *CASES)
    return where


def read(where, run):
    """What a run's training gave: metrics, weights."""
    directory = where / "data/runs" / run
    kind = "model" if (directory / "model").exists() else "adapter"
    weights = {
        f"{file.name}: {name}": weight
        for file in (directory / kind).glob("*.safetensors")
        for name, weight in load_file(file).items()
    }
    return pl.read_parquet(directory / "metrics.parquet"), weights


def begun_again(place, run, new, *lost):
    """A copy of a run that has not finished its training."""
    directory = place / "data/runs" / new
    shutil.copytree(place / "data/runs" / run, directory)
    for name in ("model", "adapter", *lost):
        shutil.rmtree(directory / name, ignore_errors=True)
    (directory / "provenance.json").unlink()
    return directory


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("case", CASES)
def test_many_processes_train_what_one_does(place, case, size):
    (one, weights), (many, others) = read(place, f"{case}-1"), read(place, f"{case}-{size}")
    rounded = case in ("bfloat16", "narrow", "blocks", "wide")
    within = 2e-2 if rounded else 1e-6
    # Adam does not see by how much all gradients are scaled; their norm does
    norms = (many["grad_norm"] - one["grad_norm"]).abs() / one["grad_norm"].clip(1e-9)
    assert norms.max() <= (0.1 if rounded else 1e-4)
    measured = ("loss", *RESPONSE_METRICS) if case in OF_SAMPLES else ("loss", "eval_loss")
    measured += ("kl", "eval_kl", "rewards/margins") if case == "kto" else ()
    # a critic's, and the KL to a reference that nothing reads
    unread = {name for name in measured if name.startswith("value/") or (name == "kl" and case == "policy_few")}
    assert {name for name in measured if one[name].is_null().all()} == unread
    for name in set(measured) - unread:
        # a ratio has the digits of a token's log-probability, which is far from 0
        # and a divergence of whole responses, or a loss that reads them against a mean of earlier ones, those of their sums
        of_sums = name.startswith("ratio/") or name.endswith("kl") or case == "bco_few"
        digits = max(within, 1e-5) if of_sums else within
        assert ((one[name] - many[name]).abs() / one[name].abs().clip(1)).max() <= digits, name
        assert one[name].is_null().equals(many[name].is_null()), name
    assert one["loss"].n_unique() > 3
    assert weights.keys() == others.keys()
    differences = [(weights[name].float() - others[name].float()).abs().max().item() for name in weights]
    # weights of 16 bits are rounded by chance: two of their last digits
    assert max(differences) <= (2e-2 if case == "narrow" else 1e-3 if rounded else 1e-6)


def test_what_single_pairs_were_given_is_kept_of_all_processes(place):
    one, many = (pl.read_parquet(place / f"data/runs/{FIRST}-{size}/policy_logps.parquet") for size in (1, SIZES[-1]))
    both = one.join(many, on=["pair_id", "split", "step"])
    assert len(one) == len(many) == len(both) > 40
    assert (both["chosen_logps"] - both["chosen_logps_right"]).abs().max() < 1e-3


@pytest.mark.skipif(not EVERYTHING, reason="each starts torchrun anew: make test-devices")
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (2, 2)])
def test_a_training_goes_on_in_another_number_of_processes(place, before, after):
    case, run = ("lora", "lora") if before == 1 else (FIRST, FIRST)
    new = f"{run}-from-{before}-to-{after}"
    begun_again(place, f"{run}-{before}", new, "checkpoints/step_000006")
    said = launched(place, after, f"{case}={new}")
    assert "Traceback" not in said
    assert "resuming after step 3 " in said
    (_, weights), (_, again) = read(place, f"{run}-{before}"), read(place, new)
    if before == after:
        assert all(torch.equal(weights[name], again[name]) for name in weights)
    else:
        assert max((weights[name] - again[name]).abs().max().item() for name in weights) <= 1e-6


EXPORTED = [case for case in ("few", "merged", "narrow", "reward", "untied") if case in CASES]


@pytest.fixture(scope="module")
def finished(place):
    """What is said where trainings that lack only their export go on, by the number of processes: each number started once."""
    begun_again(place, "policy_few-2", "policy_few-ended")
    said = {}
    for size in (1, *SIZES[-1:]):
        for case in EXPORTED:
            begun_again(place, f"{case}-{SIZES[-1]}", f"{case}-by-{size}")
        ended = ["policy_few=policy_few-ended"] if size == SIZES[-1] == 2 else []
        said[size] = launched(place, size, *[f"{case}={case}-by-{size}" for case in EXPORTED], *ended)
    if SIZES[-1] != 2:
        said[2] = launched(place, 2, "policy_few=policy_few-ended")
    return said


def test_many_processes_agree_that_a_training_had_ended_by_itself(place, finished):
    taken = pl.read_parquet(place / "data/runs/policy_few-2/metrics.parquet")["step"].max()
    assert taken < 8
    # one that goes on where another does not would wait for it
    assert f"resuming after step {taken} from data/runs/policy_few-ended/" in finished[2]
    (before, weights), (after, again) = read(place, "policy_few-2"), read(place, "policy_few-ended")
    assert before["step"].equals(after["step"])
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.skipif(not EVERYTHING, reason="each starts torchrun anew: make test-devices")
@pytest.mark.parametrize(
    ("case", "before", "after"), [("wide", 2, 2), ("wide", 1, 2), ("wide", 2, 1), ("blocks", 1, 2), ("blocks", 2, 4)]
)
def test_state_of_eight_bits_goes_on_where_its_blocks_can_be_shared(place, case, before, after):
    run = f"{case}-of-{before}-in-{after}"
    begun_again(place, f"{case}-{before}", run, "checkpoints/step_000006")
    said = launched(place, after, f"{case}={run}", code=0 if case == "wide" else 1)
    assert ("cannot share" in said) == (case == "blocks")
    if case == "wide":
        assert "resuming after step 3 " in said
        (_, weights), (_, again) = read(place, f"{case}-{before}"), read(place, run)
        most = max((weights[name] - again[name]).abs().max().item() for name in weights)
        assert most == 0 if before == after else most <= 1e-3


@pytest.mark.parametrize("case", EXPORTED)
def test_what_many_processes_export_is_byte_for_byte_what_one_does(place, finished, case):
    # from the checkpoint after the last step: the same weights
    exported = {}
    for size in {1, SIZES[-1]}:
        directory = place / f"data/runs/{case}-by-{size}"
        assert f"resuming after step 6 from data/runs/{directory.name}/" in finished[size]
        exported[size] = {
            str(path.relative_to(directory)): path.read_bytes()
            for kind in ("model", "adapter")
            for path in (directory / kind).glob("*")
            if path.name != "README.md"
        }
    one, many = exported[1], exported[SIZES[-1]]
    assert one.keys() == many.keys()
    assert [name for name in one if one[name] != many[name]] == []
    if case != "reward":
        dtype = AutoModelForCausalLM.from_pretrained(directory / "model").dtype
        assert dtype == (torch.bfloat16 if case == "narrow" else torch.float32)


# in the first process: what is written is not what was trained
SPOILS = """
import os
if os.environ.get("RANK") == "0":
    from pipeline.training import weights_files
    save = weights_files.save_file
    def spoiled(tensors, *others, **named):
        name = os.environ["SPOILS"]
        if name in tensors:
            tensors = {**tensors, name: tensors[name] * 1.5} if os.environ["HOW"] == "changed" else {k: v for k, v in tensors.items() if k != name}
        save(tensors, *others, **named)
    weights_files.save_file = spoiled
"""


@pytest.mark.skipif(not EVERYTHING, reason="each starts torchrun anew: make test-devices")
@pytest.mark.parametrize(
    ("name", "how", "says"),
    [
        ("model.layers.1.mlp.down_proj.weight", "changed", "what was exported is not what was trained"),
        ("model.embed_tokens.weight", "changed", "what was exported is not what was trained"),
        ("model.layers.1.mlp.down_proj.weight", "left out", "cannot be read"),
    ],
)
def test_an_export_of_many_that_is_not_what_was_trained_fails_and_replaces_nothing(place, name, how, says):
    (place / "spoils").mkdir(exist_ok=True)
    (place / "spoils/sitecustomize.py").write_text(SPOILS)
    directory = begun_again(place, f"{FIRST}-2", f"spoiled-{name}-{how.replace(' ', '-')}")
    path = os.pathsep.join([str(place / "spoils"), str(ROOT)])
    said = launched(place, 2, f"{FIRST}={directory.name}", code=1, PYTHONPATH=path, SPOILS=name, HOW=how)
    assert says in said
    assert not (directory / "model").exists()
    assert not list(directory.glob(".tmp*"))


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"train": {"optimizer": "adafactor"}}, "its state spans whole weights; set adamw or adamw_8bit"),
        ({"train": {"optimizer_in_backward": True, "max_grad_norm": None}}, "gradients are summed over devices first"),
        ({"train": {"activation_offloading": True}}, "it would move gathered weights"),
        ({"policy": {"load_in_4bit": True, "lora": {"r": 4}}}, "cannot be cut into shards"),
    ],
)
def test_settings_that_many_devices_do_not_know_are_refused(tmp_path, tiny_model, sections, says):
    config = load_config(experiment(tmp_path, tiny_model, tmp_path / "d.jsonl", **sections))
    with pytest.raises(ConfigError, match=says):
        must_be_shardable(config, World(0, 2))
    plain = load_config(experiment(tmp_path, tiny_model, tmp_path / "d.jsonl"))
    must_be_shardable(plain, World(0, 2))


def test_more_devices_than_there_are_are_refused(place):
    said = refscore_here(place, "train", "--config", f"{FIRST}.yaml", "--devices", "5000", code=2)
    assert f"--devices 5000: this machine has {len(processors())} processors" in said or "GPUs" in said


@pytest.mark.usefixtures("all_processors")
def test_what_is_refused_is_said_once_before_anything_is_loaded(place):
    content = yaml.safe_load((place / f"{FIRST}.yaml").read_text())
    content["train"]["optimizer"] = "adafactor"
    (place / "adafactor.yaml").write_text(yaml.safe_dump(content))
    command = ["train", "--config", "adafactor.yaml", "--devices", "2"]
    said = refscore(place, *command, code=2, GLOO_SOCKET_IFNAME="lo")
    assert said.count("error:") == 1
    assert "does not know train.optimizer=adafactor" in said
