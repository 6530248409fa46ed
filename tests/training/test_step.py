"""A step is the mean over its pairs however it is split; the stored reference stands for a live one; bad rows are refused."""

import copy
import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch

import pipeline.training.objectives.common
import pipeline.training.step
from pipeline.artifacts.schemas import PAIRS
from pipeline.artifacts.tables import write_table
from pipeline.config.training import TrainConfig
from pipeline.errors import DataError
from pipeline.forward.logps import forward_of
from pipeline.forward.routes import Route
from pipeline.forward.trees import Tree
from pipeline.models.load import load_causal_lm
from pipeline.training.checks.gate import measure_gate
from pipeline.training.inputs.batches import micro_batches
from pipeline.training.inputs.pairs import Pairs, load_pairs
from pipeline.training.optimizers import make_optimizer
from pipeline.training.step import NotFinite, evaluate, pair_rewards, train_step


def rows_of(number):
    generator = np.random.default_rng(3)

    def ids(low, high):
        return generator.integers(1, 90, generator.integers(low, high)).tolist()

    return [{"prompt_ids": ids(2, 9), "chosen_ids": ids(1, 12), "rejected_ids": ids(1, 12)} for _ in range(number)]


def write_pairs(path, rows, logps):
    """pairs.parquet from token ids and, for each row, the chosen and rejected logps."""
    filled = []
    for number, (row, (chosen, rejected)) in enumerate(zip(rows, logps, strict=True)):
        filled.append(
            {name: "" for name in PAIRS.names if PAIRS.field(name).type == pa.string()}
            | {"pair_id": f"p{number}", "split": "train", "source_row": number, **row}
            | {"ref_chosen_token_logps": chosen.tolist(), "ref_rejected_token_logps": rejected.tolist()}
            | {
                "ref_chosen_logps": float(chosen.sum(dtype=np.float64)),
                "ref_rejected_logps": float(rejected.sum(dtype=np.float64)),
            }
        )
    write_table(path, pa.Table.from_pylist(filled, schema=PAIRS))
    return path


@pytest.fixture(scope="module")
def reference(tiny_model):
    from pipeline.config.training import PolicyConfig

    return load_causal_lm(tiny_model, PolicyConfig(model=str(tiny_model)), torch.float32).eval()


def score(model, rows):
    with torch.no_grad():
        found = forward_of(model, "separate")(
            [Tree(r["prompt_ids"], (r["chosen_ids"], r["rejected_ids"])) for r in rows]
        )
    return [tuple(side.numpy() for side in tree) for tree in found]


@pytest.fixture
def pairs(tmp_path, reference):
    rows = rows_of(16)
    return load_pairs(write_pairs(tmp_path / "pairs.parquet", rows, score(reference, rows)), "train")


@pytest.mark.parametrize("layout", ["tree", "separate"])
def test_a_step_is_the_same_however_many_forward_passes_the_token_budget_makes_of_it(pairs, reference, layout):
    found, passes = [], set()
    for budget in (None, 60, 30, 1):
        model = copy.deepcopy(reference)
        optimizer = make_optimizer(model, TrainConfig(learning_rate=1e-2))
        train, losses = TrainConfig(tokens_per_batch=budget, beta=0.5), []
        forward = forward_of(model, layout)
        passes.add(len(list(micro_batches(forward, pairs, range(8), train))))
        for step in range(5):
            losses.append(train_step(forward, pairs, [(step * 3 + place) % 16 for place in range(8)], train)["loss"])
            optimizer.step()
            optimizer.zero_grad()
        found.append(losses)
    assert {1, 8} < passes
    assert found[0][0] == pytest.approx(np.log(2), abs=1e-5)
    assert abs(found[0][4] - found[0][0]) > 1e-2
    for losses in found[1:]:
        assert losses == pytest.approx(found[0], abs=1e-5)


def test_the_stored_reference_gives_the_losses_of_a_live_one_over_twenty_steps(pairs, reference):
    model = copy.deepcopy(reference)
    optimizer = make_optimizer(model, TrainConfig(learning_rate=1e-3))
    train = TrainConfig(beta=0.3)
    for step in range(20):
        rows = [(step * 5 + at) % 16 for at in range(4)]
        live = []
        with torch.no_grad():
            for tree, frozen in zip(
                forward_of(model, "separate")([pairs.trees[row] for row in rows]),
                forward_of(reference, "separate")([pairs.trees[row] for row in rows]),
                strict=True,
            ):
                ratios = [
                    float((mine.double() - theirs.double()).sum()) for mine, theirs in zip(tree, frozen, strict=True)
                ]
                live.append(np.log1p(np.exp(-0.3 * (ratios[0] - ratios[1]))))
        found = train_step(forward_of(model, "tree"), pairs, rows, train)
        assert found["loss"] == pytest.approx(float(np.mean(live)), abs=1e-4)
        optimizer.step()
        optimizer.zero_grad()


def test_evaluation_is_the_mean_over_all_pairs_and_leaves_no_gradient(pairs, reference):
    whole = evaluate(forward_of(reference, "tree"), pairs, TrainConfig(per_device_eval_batch_size=16))
    parts = evaluate(forward_of(reference, "tree"), pairs, TrainConfig(per_device_eval_batch_size=3))
    # whether a margin of nothing but rounding is above 0 is chance
    assert {n: v for n, v in parts.items() if "accur" not in n} == pytest.approx(
        {n: v for n, v in whole.items() if "accur" not in n}, abs=1e-4
    )
    assert whole["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_the_gate_passes_on_equal_models_and_closes_on_others(pairs, reference):
    same = measure_gate(forward_of(reference, "tree"), pairs, range(8), "float32", beta=0.1)
    assert same["passed"]
    assert same["max_absolute_difference"] < 1e-4
    other = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    assert not measure_gate(forward_of(other, "tree"), pairs, range(8), "bfloat16", beta=0.1)["passed"]


def test_a_loss_that_is_not_finite_stops_with_the_pairs(pairs, reference):
    broken = copy.deepcopy(reference)
    with torch.no_grad():
        broken.model.norm.weight[3] = float("nan")
    with pytest.raises(NotFinite, match="training stops") as stop:
        train_step(forward_of(broken, "tree"), pairs, [4, 1], TrainConfig())
    assert stop.value.pair_ids == ["p4", "p1"]


@pytest.mark.parametrize("damage", ["short", "nan", "one nan", "empty", "sum"])
def test_scores_that_do_not_fit_their_tokens_are_refused(tmp_path, reference, damage):
    rows = rows_of(3)
    logps = score(reference, rows)
    chosen, rejected = logps[1]
    if damage == "short":
        logps[1] = (chosen[:-1], rejected) if len(chosen) > 1 else (np.append(chosen, -1).astype(np.float32), rejected)
    if damage == "nan":
        logps[1] = (np.full_like(chosen, np.nan), rejected)
    if damage == "one nan":
        logps[1] = (np.append(np.nan, chosen[1:]).astype(np.float32), rejected)
    if damage == "empty":
        rows[1]["chosen_ids"], logps[1] = [], (chosen[:0], rejected)
    path = write_pairs(tmp_path / "pairs.parquet", rows, logps)
    if damage == "sum":
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        at = table.schema.get_field_index("ref_chosen_logps")
        write_table(
            path, table.set_column(at, "ref_chosen_logps", pa.array(np.asarray(table["ref_chosen_logps"]) + 0.01))
        )
    with pytest.raises(DataError, match="pair p0" if damage == "sum" else "pair p1"):
        load_pairs(path, "train")


WAYS = {
    "packed": Route("packed"),
    "packed up to a limit": Route("packed", "positions", 14),
    "padded": Route("padded", "its layers"),
    "alone": Route("alone", "its positions"),
}


@pytest.mark.parametrize("layout", ["tree", "separate"])
@pytest.mark.parametrize("way", WAYS)
def test_a_forward_pass_reads_no_more_than_its_budget_whatever_the_way(pairs, reference, way, layout, monkeypatch):
    """What reaches the embeddings is counted, filling of packs to a rounded width left out."""
    monkeypatch.setattr("pipeline.forward.logps.route_of", lambda model, precision, device: WAYS[way])
    monkeypatch.setattr("pipeline.forward.trees._WIDTH", {})
    model = copy.deepcopy(reference)
    read = []
    embed = model.base_model.embed_tokens.forward
    monkeypatch.setattr(model.base_model.embed_tokens, "forward", lambda ids: read.append(ids.numel()) or embed(ids))
    forward = forward_of(model, layout)
    # pairs of one prompt share their trunk, and a branch that stands twice is read once
    trunk = pairs.trees[0].trunk
    doubled = Pairs(
        [*pairs.pair_ids, "a", "b"],
        [*pairs.trees, Tree(trunk, ([1, 2, 4], [3, 4])), Tree(trunk, ([1, 2, 5], [3, 4]))],
        [*pairs.ref_chosen_token_logps, *(np.zeros(3, np.float32),) * 2],
        [*pairs.ref_rejected_token_logps, *(np.zeros(2, np.float32),) * 2],
    )
    for size, budget in ((3, 10**6), (18, 60), (2, 45), (18, 1)):
        groups = list(micro_batches(forward, doubled, range(18), TrainConfig(tokens_per_batch=budget), size))
        assert sorted(row for group in groups for row in group) == list(range(18))
        for group in groups:
            trees = [doubled.trees[row] for row in group]
            read.clear()
            with torch.no_grad():
                forward(trees)
            assert sum(read) == forward.tokens(trees)
            assert len(group) <= size
            assert len(group) == 1 or sum(read) <= budget


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "aot"},
        {"loss_type": "aot_unpaired"},
        {"loss_type": "sft"},
        {"loss_type": "orpo"},
        {"loss_type": ["aot", "sft"], "loss_weights": [1.0, 0.5], "ld_alpha": 0.3},
    ],
)
def test_losses_that_look_beyond_a_pair_see_the_whole_step(pairs, reference, settings):
    """However a step is split: AOT sorts all its pairs, cross-entropy is the mean over all its tokens."""
    found = []
    for budget in (None, 45, 1):
        model = copy.deepcopy(reference)
        with torch.no_grad():  # so that there is something to sort
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.02)
        train = TrainConfig(**settings, tokens_per_batch=budget, beta=0.5)
        loss = train_step(forward_of(model, "tree"), pairs, range(8), train)["loss"]
        found.append((loss, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-5)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-5, rtol=1e-3)
    assert found[0][1].abs().max() > 1e-3
    everything = evaluate(forward_of(reference, "tree"), pairs, TrainConfig(**settings, per_device_eval_batch_size=16))
    assert evaluate(forward_of(reference, "tree"), pairs, TrainConfig(**settings, per_device_eval_batch_size=3))[
        "loss"
    ] == pytest.approx(everything["loss"], abs=1e-5)


def test_moving_the_stored_reference_moves_the_loss(pairs, reference):
    forward, train = forward_of(reference, "tree"), TrainConfig(beta=0.5)
    before = train_step(forward, pairs, range(4), train)["loss"]
    logps = list(pairs.ref_chosen_token_logps)
    logps[2] = logps[2] - 0.5
    moved = dataclasses.replace(pairs, ref_chosen_token_logps=logps)
    assert abs(train_step(forward, moved, range(4), train)["loss"] - before) > 1e-3


def test_rewards_of_pairs_are_in_their_order(pairs, reference):
    other = copy.deepcopy(reference)
    with torch.no_grad():
        other.model.norm.weight.mul_(1.3)
    train = TrainConfig(beta=0.5, per_device_eval_batch_size=3)
    chosen, rejected = pair_rewards(forward_of(other, "tree"), pairs, train)
    for row in (0, 7, 15):
        one = evaluate(
            forward_of(other, "separate"), Pairs(*(side[row : row + 1] for side in vars(pairs).values())), train
        )
        assert (chosen[row], rejected[row]) == pytest.approx((one["rewards/chosen"], one["rewards/rejected"]), abs=1e-4)


def test_a_step_and_an_evaluation_look_at_every_length_once(pairs, reference, monkeypatch):
    """Means over the whole were taken anew for every forward pass: quadratic in the pairs."""
    taken = []
    mean = pipeline.training.step.mean_chosen_tokens
    for module in (pipeline.training.step, pipeline.training.objectives.common):
        monkeypatch.setattr(
            module, "mean_chosen_tokens", lambda pairs, rows: taken.append(len(rows)) or mean(pairs, rows)
        )
    forward = forward_of(reference, "tree")
    train = TrainConfig(per_device_eval_batch_size=2, tokens_per_batch=30)
    evaluate(forward, pairs, train)
    pair_rewards(forward, pairs, train)
    train_step(forward_of(copy.deepcopy(reference), "tree"), pairs, range(8), train)
    assert taken == [16, 16, 8]
