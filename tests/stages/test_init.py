"""`refscore init`: from a file and a model to a configuration that needs nothing corrected by hand."""

import re
import subprocess
import sys

import pytest

from pipeline.config.documents import read_yaml
from pipeline.config.files import load_config
from tests.conftest import ROOT, preference_rows, refscore_here, write_rows


def sharegpt_rows(number):
    """Rows whose responses differ in length, one side longer as often as the other."""
    rows = []
    for at in range(number):
        sides = ["Rinse it, then boil it." + " Stir well." * (at % 3), "The cat sat on a mat." + " It ran." * (at % 4)]
        chosen, rejected = sides if at % 2 else sides[::-1]
        rows.append(
            {
                "conversations": [{"from": "human", "value": f"How do I cook rice number {at}?"}],
                "chosen": {"from": "gpt", "value": chosen},
                "rejected": {"from": "gpt", "value": rejected},
            }
        )
    return rows


def init(where, *arguments, code=0):
    return refscore_here(where, "init", *arguments, code=code)


@pytest.fixture
def made(tmp_path, tiny_model):
    write_rows(tmp_path / "mine.jsonl", sharegpt_rows(150))
    return init(tmp_path, "mine.jsonl", "--model", tiny_model)


def test_a_file_of_150_rows_needs_nothing_corrected_by_hand(made, tmp_path, tiny_model):
    config = load_config(tmp_path / "mine.yaml")
    assert config.data.path == ["mine.jsonl"]
    assert config.reference.model == config.policy.model == str(tiny_model)
    assert (config.train.beta, config.train.learning_rate, config.train.num_train_epochs) == (0.1, 5e-6, 3)
    assert config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps == 8
    assert config.policy.lora is None
    assert config.generate.pair_judge is None
    planned = refscore_here(tmp_path, "plan", "--config", "mine.yaml")
    train, held_out = map(int, re.search(r"150 read, 150 pairs: (\d+) train, (\d+) eval", planned).groups())
    assert held_out >= 20
    assert f"{held_out} of 150 prompts are held out" in made
    assert f"the {train} training pairs give" in made
    assert "warning" not in planned
    assert "warning" not in made


def test_every_value_is_said_with_the_number_that_it_rests_on(made, tmp_path):
    chosen = dict(re.findall(r"^chosen +([\w.]+): (.+)$", made, re.MULTILINE))
    config = load_config(tmp_path / "mine.yaml").model_dump(mode="json")
    for field, said in chosen.items():
        section, _, name = field.partition(".")
        value = config[section][name] if name else config[section]
        written = read_yaml(said.split("  (")[0])
        assert written in (value, value[0] if isinstance(value, list) else None), field
    assert {
        "data.max_length",
        "data.eval_fraction",
        "train.learning_rate",
        "train.tokens_per_batch",
        "judge",
    } <= chosen.keys()
    for field in ("data.max_length", "data.eval_fraction", "train.learning_rate", "train.tokens_per_batch", "judge"):
        assert re.search(r"\d", chosen[field].split("  (", 1)[1]), field
    text = " ".join((tmp_path / "mine.yaml").read_text().replace("#", "").split())
    for said in chosen.values():
        assert said.split("  (", 1)[1][:-1] in text


def test_the_three_commands_are_named_and_run(made, tmp_path):
    commands = re.findall(r"^ +refscore (\w+) --config mine\.yaml$", made, re.MULTILINE)
    assert commands == ["precompute", "train", "eval"]
    small = ("--set", "reference.engine=transformers train.max_steps=1")
    refscore_here(tmp_path, "precompute", "--config", "mine.yaml", *small)
    refscore_here(tmp_path, "train", "--config", "mine.yaml", *small)
    assert (tmp_path / "data/runs/mine/model/config.json").is_file()


def test_a_file_that_is_there_is_replaced_only_if_asked(made, tmp_path, tiny_model):
    (tmp_path / "mine.yaml").write_text("mine")
    said = init(tmp_path, "mine.jsonl", "--model", tiny_model, code=2)
    assert "mine.yaml is there already: --out FILE gives another name, --force replaces it" in said
    assert (tmp_path / "mine.yaml").read_text() == "mine"
    init(tmp_path, "mine.jsonl", "--model", tiny_model, "--out", "other/its.yaml")
    assert load_config(tmp_path / "other/its.yaml")
    init(tmp_path, "mine.jsonl", "--model", tiny_model, "--force")
    assert load_config(tmp_path / "mine.yaml") == load_config(tmp_path / "other/its.yaml")


def test_names_with_spaces_and_quotes_give_commands_that_can_be_pasted(tmp_path, tiny_model):
    data = tmp_path / "my dir" / "Bob's best pairs.v2.jsonl"
    data.parent.mkdir()
    write_rows(data, sharegpt_rows(40))
    said = init(tmp_path, "my dir/Bob's best pairs.v2.jsonl", "--model", tiny_model)
    # a name that is a run's too
    assert "refscore train --config Bob-s-best-pairs.yaml" in said
    assert load_config(tmp_path / "Bob-s-best-pairs.yaml").data.path == ["my dir/Bob's best pairs.v2.jsonl"]
    said = init(tmp_path, data, "--model", tiny_model, "--out", "its own.yaml")
    assert "refscore train --config 'its own.yaml'" in said


def test_too_few_prompts_are_said_and_the_file_is_sound(tmp_path, tiny_model):
    write_rows(tmp_path / "few.jsonl", sharegpt_rows(12))
    said = init(tmp_path, "few.jsonl", "--model", tiny_model)
    assert re.search(
        r"warning   \d of 12 prompts are held out, the data is too small for 20, from which on figures", said
    )
    assert load_config(tmp_path / "few.yaml").data.eval_fraction > 0
    write_rows(tmp_path / "one.jsonl", sharegpt_rows(1))
    assert "warning   0 of 1 prompts are held out" in init(tmp_path, "one.jsonl", "--model", tiny_model)
    assert load_config(tmp_path / "one.yaml").data.eval_fraction == 0


def test_continuations_get_no_chat_template(tmp_path, tiny_model):
    rows = [row | {side: f" {row[side]}" for side in ("chosen", "rejected")} for row in preference_rows(30)]
    write_rows(tmp_path / "texts.jsonl", rows)
    said = init(tmp_path, "texts.jsonl", "--model", tiny_model)
    assert 'data.template: "none"  (texts that are gone on with: 100% of the first 30 pairs' in said
    assert load_config(tmp_path / "texts.yaml").data.template == "none"


def test_a_tokenizer_without_a_chat_template_gets_none(tmp_path, tiny_model):
    import shutil

    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    write_rows(tmp_path / "mine.jsonl", sharegpt_rows(30))
    said = init(tmp_path, "mine.jsonl", "--model", model)
    assert 'data.template: "none"  (the model\'s tokenizer has no chat template)' in said


def test_columns_that_can_mean_one_thing_alone_are_mapped(tmp_path, tiny_model):
    rows = [{"question": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in preference_rows(30)]
    write_rows(tmp_path / "mine.jsonl", rows)
    said = init(tmp_path, "mine.jsonl", "--model", tiny_model)
    assert '"prompt": "question", "chosen": "good", "rejected": "bad"' in said
    assert "30 read, 30 pairs" in refscore_here(tmp_path, "precompute", "--plan", "--config", "mine.yaml")
    # two columns could be the chosen one
    write_rows(tmp_path / "both.jsonl", [row | {"better": "x"} for row in rows])
    assert "fit no known form" in init(tmp_path, "both.jsonl", "--model", tiny_model, code=3)


@pytest.mark.parametrize(
    ("data", "model", "code", "text"),
    [
        ("gone.jsonl", None, 3, "no such file"),
        ("-", None, 2, "- can be read once, and every stage reads the data again: save it as a file first"),
        (
            "empty.jsonl",
            "tiny",
            3,
            "no row is a pair (3 x empty_response); 'refscore validate' shows what is wrong with each",
        ),
        ("mine.jsonl", "nowhere/at/all", 2, "no such directory"),
    ],
)
def test_what_cannot_be_looked_at_is_a_message_and_nothing_is_written(tmp_path, tiny_model, data, model, code, text):
    write_rows(tmp_path / "mine.jsonl", sharegpt_rows(4))
    write_rows(tmp_path / "empty.jsonl", [{"prompt": "Hi?", "chosen": "", "rejected": "x"}] * 3)
    said = init(tmp_path, data, "--model", tiny_model if model in (None, "tiny") else model, code=code)
    assert text in " ".join(said.split())
    assert not list(tmp_path.glob("*.yaml"))


def test_several_files_are_one_experiment(tmp_path, tiny_model):
    rows = sharegpt_rows(60)
    write_rows(tmp_path / "a.jsonl", rows[:30])
    write_rows(tmp_path / "b.jsonl", rows[30:])
    assert "60 read, 60 pairs" in init(tmp_path, "a.jsonl", "b.jsonl", "--model", tiny_model)
    assert load_config(tmp_path / "a.yaml").data.path == ["a.jsonl", "b.jsonl"]


def test_the_data_is_read_without_torch(tmp_path, tiny_model):
    write_rows(tmp_path / "mine.jsonl", sharegpt_rows(4))
    code = (
        "import sys; from pipeline.planning.survey import survey; "
        f"print(len(survey(['mine.jsonl'], {str(tiny_model)!r}).lengths), {{'torch', 'vllm'}} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "4 set()\n"


def test_real_pairs_need_nothing_corrected_by_hand(shared_data, tmp_path, tiny_model):
    from tests.conftest import make_tiny_model

    model = make_tiny_model(tmp_path / "model", max_position_embeddings=8192)
    init(tmp_path, shared_data / "sharegpt_dpo_en_150.jsonl", "--model", model)
    planned = refscore_here(tmp_path, "precompute", "--plan", "--config", "sharegpt_dpo_en_150.yaml")
    assert re.search(r"150 read, 1\d\d pairs", planned)
    assert "are left out" not in planned
    assert "held out" not in planned
