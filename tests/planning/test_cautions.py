"""What a plan warns of: each with its number and what to set, and nothing where there is nothing to say."""

import re
import shutil

import pytest

from tests.conftest import experiment, preference_rows, refscore_here, write_rows


def row(at, chosen="Boil it well.", rejected="A cat sat here."):
    longer, shorter = f"{chosen} {at} Then stir it.", f"{rejected} {at}"
    if "cat cat" in chosen + rejected or "<|" in chosen + rejected or at % 2:
        longer, shorter = f"{chosen} {at}", f"{rejected} {at} Then it ran away."
    return {"prompt": f"How do I cook rice number {at}?", "chosen": longer, "rejected": shorter}


def warnings(tmp_path, model, rows, *settings, command=("precompute", "--plan")):
    config = experiment(tmp_path, model, write_rows(tmp_path / "d.jsonl", rows))
    settings = ["data.eval_fraction=0.5", *settings]
    said = refscore_here(tmp_path, *command, "--config", config, *(part for one in settings for part in ("--set", one)))
    return re.findall(r"warning +(.+)", said)


SOUND = [row(at) for at in range(60)]


def test_sound_data_gives_no_warning(tmp_path, tiny_model):
    assert warnings(tmp_path, tiny_model, SOUND) == []


@pytest.mark.parametrize("command", [("precompute", "--plan"), ("precompute", "--run", "r"), ("plan",)], ids=" ".join)
def test_every_way_to_the_plan_warns_before_anything_is_trained(tmp_path, tiny_model, command):
    said = warnings(tmp_path, tiny_model, SOUND, "data.eval_fraction=0", command=command)
    (said,) = said
    assert said.startswith(
        "no pair is held out, so the training shows no held-out figures, and 'refscore eval' will have"
    )
    assert said.endswith("data.eval_fraction=0.42 would hold about 25 out, or give data.eval_path")


def test_an_experiment_without_a_reference_is_warned_too(tmp_path, tiny_model):
    simpo = ("train.loss_type=simpo", "train.beta=2", "data.eval_fraction=0")
    assert "no pair is held out" in warnings(tmp_path, tiny_model, SOUND, *simpo)[0]


def test_few_held_out_pairs(tmp_path, tiny_model):
    (said,) = warnings(tmp_path, tiny_model, SOUND, "data.eval_fraction=0.1")
    assert re.match(
        r"only \d pairs are held out, so intervals will be wide: data.eval_fraction=0.42 would hold about 25", said
    )
    (said,) = warnings(tmp_path, tiny_model, SOUND[:30], "data.eval_fraction=0.1")
    assert said.endswith("; 30 pairs are too few to hold 20 out")


def test_the_length_that_would_keep_nearly_all_is_named_and_keeps_them(tmp_path, tiny_model):
    rows = [*SOUND, *(row(at, chosen="cat " * (3 * at - 150)) for at in range(60, 80))]
    (said,) = warnings(tmp_path, tiny_model, rows, "data.max_length=80")
    found = re.fullmatch(
        r"(\d+) of 80 rows \((\d+)%\) are left out, most as too_long: data.max_length=(\d+) would keep 95%", said
    )
    assert found
    assert 8 < int(found[1]) <= 20
    config = tmp_path / "experiment.yaml"
    kept = refscore_here(tmp_path, "precompute", "--plan", "--config", config, "--set", f"data.max_length={found[3]}")
    pairs = int(re.search(r"80 read, (\d+) pairs", kept)[1])
    assert 76 <= pairs < 80


def test_lengths_that_the_model_does_not_read(tmp_path, tiny_model):
    rows = [*SOUND, *(row(at, chosen="cat " * 600) for at in range(60, 80))]
    (said,) = warnings(tmp_path, tiny_model, rows)
    assert re.search(
        r"95% would need \d+ tokens, and the model reads 512: take another model, or data.too_long=truncate", said
    )


def test_rows_left_out_for_another_reason(tmp_path, tiny_model):
    rows = [*SOUND, *({"prompt": "Hi?", "chosen": "", "rejected": "x"} for _ in range(10))]
    (said,) = warnings(tmp_path, tiny_model, rows)
    assert said.startswith("10 of 70 rows (14%) are left out, most as empty_response: 'refscore validate' shows them")
    assert warnings(tmp_path, tiny_model, rows[:66]) == []


def test_duplicates_and_pairs_that_contradict_one_another(tmp_path, tiny_model):
    opposite = {"prompt": SOUND[7]["prompt"], "chosen": SOUND[7]["rejected"], "rejected": SOUND[7]["chosen"]}
    duplicate, contradiction = warnings(tmp_path, tiny_model, [*SOUND, SOUND[3], SOUND[4], opposite])
    assert duplicate == "2 of 63 rows (3%) say what another row says, and are read once"
    assert contradiction.startswith(
        "2 pairs contradict one another: the same two responses, the other one chosen (rows 7, 62)"
    )


@pytest.mark.parametrize(("side", "habit", "not_in"), [("chosen", "long", 5), ("rejected", "short", 4)])
def test_one_sided_lengths(tmp_path, tiny_model, side, habit, not_in):
    rows = [row(at, **({side: "cat " * 30} if at % 10 != not_in else {})) for at in range(60)]
    (said,) = warnings(tmp_path, tiny_model, rows)
    assert re.match(rf"{side} is longer than \w+ in (9\d)% of the pairs \(on average \d+ and \d+ tokens\)", said)
    assert f"to write {habit} responses; train.ld_alpha=0.5" in said
    mixed = [row(at, **({side: "cat " * 30} if at % 4 != not_in % 4 else {})) for at in range(60)]
    assert warnings(tmp_path, tiny_model, mixed) == []


@pytest.mark.parametrize(
    ("setting", "what"), [("text", "encoded as the text they are"), ("parse", "they act, so a text")]
)
def test_control_tokens_in_texts(tmp_path, tiny_model, setting, what):
    text = "Say <|end|> now"
    rows = [*SOUND, row(61, chosen=text), row(62, rejected=text), {**row(63), "prompt": "What is <|assistant|>?"}]
    (said,) = warnings(tmp_path, tiny_model, rows, f"data.special_tokens={setting}")
    assert said.startswith("rows name control tokens of the model in their text (<|end|> in 2, <|assistant|> in 1)")
    assert what in said


def test_columns_that_nothing_reads_are_named_once(tmp_path, tiny_model):
    rows = [one | {"annotator": "x"} for one in SOUND]
    config = experiment(tmp_path, tiny_model, write_rows(tmp_path / "d.jsonl", rows))
    said = refscore_here(tmp_path, "plan", "--config", config)
    assert said.count("annotator") == 1
    assert "nothing reads the column annotator" in " ".join(said.split())


def test_the_tests_own_rows_are_warned_of(tmp_path, tiny_model):
    assert warnings(tmp_path, tiny_model, preference_rows(2), "data.eval_fraction=0.01")


def test_prompts_that_are_read_alone(tmp_path, tiny_model):
    on_samples = "train.objective=policy_gradient"
    labelled = [
        {"prompt": one["prompt"], "response": one[side], "label": side == "chosen"}
        for one in SOUND
        for side in ("chosen", "rejected")
    ]
    # the second response to a prompt is no fault
    assert warnings(tmp_path, tiny_model, labelled, on_samples) == []
    broken = [*({"prompt": one["prompt"]} for one in SOUND), *({"prompt": " "} for _ in range(12))]
    (said,) = warnings(tmp_path, tiny_model, broken, on_samples)
    assert said.startswith("12 of 72 rows (17%) are left out, most as empty_prompt")
    long = [{"prompt": one["prompt"] * (10 if at < 12 else 1)} for at, one in enumerate(SOUND)]
    said, *_ = warnings(tmp_path, tiny_model, long, on_samples, "data.max_length=40")
    assert re.search(r"most as prompt_too_long: data.max_length=\d+ would keep 95%", said)
    (said,) = warnings(tmp_path, tiny_model, broken[:60], on_samples, "data.eval_fraction=0")
    assert said.startswith("no prompt is held out")


def test_a_template_that_writes_the_day_is_warned_of(tmp_path, tiny_model):
    model = tmp_path / "dated"
    shutil.copytree(tiny_model, model)
    template = model / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') if messages else '' }}" + template.read_text())
    (said,) = warnings(tmp_path, model, SOUND)
    assert said.startswith(
        "the chat template writes the day into prompts (strftime_now), so what is scored today is not found"
    )
    plain = ("data.template=none",)
    assert not any("the day" in warning for warning in warnings(tmp_path, model, SOUND, *plain))
