"""No silent no-op: changing any field of `train.policy_gradient` changes a metric of the training, or how a critic is trained."""

import shutil

import polars as pl
import pyarrow as pa
import pytest

import stages.iterate
from pipeline.artifacts.schemas import ROLLOUTS
from pipeline.artifacts.tables import read_about, read_table, write_table
from pipeline.config.rollouts import PolicyGradientConfig
from tests.conftest import experiment, preference_rows, refscore_here, write_rows
from tests.rollouts.conftest import SETTINGS, Place

# field: the change, and what must be set beside it (in both runs) for the field to have a meaning
CHANGES = {
    "variant": ("grpo", {}),
    "advantage": ("batch", {}),
    "epsilon": (0.01, {}),
    "epsilon_high": (0.01, {}),
    "delta": (1.01, {}),
    "kl_coef": (0.5, {}),
    "kl_in": ("reward", {"kl_coef": 0.5}),
    "value_temperature": (5.0, {"variant": "a2po"}),
    "mask_truncated_completions": (True, {}),
    "max_kl": (1e-9, {}),
    "gae_lambda": (0.2, {"variant": "ppo"}),
    "gae_gamma": (0.5, {"variant": "ppo"}),
    "critic_learning_rate": (0.5, {"variant": "ppo"}),
}


def test_every_field_is_walked():
    assert PolicyGradientConfig.model_fields.keys() == CHANGES.keys()


@pytest.fixture(scope="module")
def ground(tmp_path_factory, tiny_model):
    """A run with samples, rewards that differ, and a critic's values; and a memory of what trainings without a change gave."""
    where = tmp_path_factory.mktemp("options")
    data = write_rows(where / "preferences.jsonl", preference_rows(14))
    config = experiment(
        where, tiny_model, data, rollout=SETTINGS, generate={"max_tokens": 12}, judge=["rule:contains=dog"]
    )
    with pytest.MonkeyPatch.context() as patch:
        place = Place(where, config, patch)
        place.rollout()
        copied(place, "critic")
        train(place, "critic", "train.objective=value", "train.learning_rate=0.01")
        place.rollout("rollout.critic=run:critic")
    path = place.run() / "rollouts.parquet"
    about, table = read_about(path), read_table(path, ROLLOUTS)
    at = table.schema.get_field_index("reward")
    lengths = pa.array([float(len(ids)) for ids in table["response_ids"].to_pylist()])
    write_table(path, table.set_column(at, "reward", lengths), about)
    return place, {}


@pytest.mark.parametrize("field", CHANGES)
def test_changing_it_changes_something(ground, field, monkeypatch):
    place, known = ground
    value, beside = CHANGES[field]
    name = repr(beside)
    if name not in known:
        known[name] = outcome(place, f"base{len(known)}", beside, monkeypatch)
    assert outcome(place, field, {**beside, field: value}, monkeypatch) != known[name]


def test_without_a_change_nothing_changes(ground, monkeypatch):
    """Else the walk would pass for any field."""
    place, known = ground
    known.setdefault("{}", outcome(place, "first", {}, monkeypatch))
    assert outcome(place, "second", {}, monkeypatch) == known["{}"]


def copied(place, name):
    place.run(name).mkdir(parents=True)
    shutil.copy(place.run() / "rollouts.parquet", place.run(name))


def train(place, run, *settings):
    common = ("train.max_steps=4", "train.save_steps=0", "train.report_to=[]", "train.precision=float32")
    sets = [part for setting in (*common, *settings) for part in ("--set", setting)]
    refscore_here(place.where, "train", "--config", place.config, "--run", run, *sets)


def outcome(place, run, fields, monkeypatch):
    """Metrics without times, and what `refscore iterate` asks of its stages."""
    settings = [
        "train.objective=policy_gradient", "train.learning_rate=0.01", "rollout.critic=run:critic",
        *(f"train.policy_gradient.{name}={value}" for name, value in fields.items()),
    ]  # fmt: skip
    # else no training lasts
    settings += ["train.policy_gradient.max_kl=null"] * ("max_kl" not in fields)
    copied(place, run)
    train(place, run, *settings)
    rows = pl.read_parquet(place.run(run) / "metrics.parquet").drop(
        "step_seconds", "tokens_per_second", "peak_memory_gib"
    )
    rates = []
    monkeypatch.setattr(
        stages.iterate,
        "step",
        lambda stage, _, name, given: rates.extend(
            one for one in given if "learning_rate=" in one and name.endswith("-critic")
        ),
    )
    sets = [part for setting in settings for part in ("--set", setting)]
    refscore_here(place.where, "iterate", "--config", place.config, "--run", "it", "--rounds", "1", *sets)
    return rows.to_dicts(), rates
