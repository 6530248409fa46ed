"""Generation and judges that run in vLLM: order of the batch, adapters, raw rewards, letters' probabilities."""

import json
import math

import pytest
import torch

from pipeline.config.judges import JudgeConfig
from pipeline.evaluation.rates.winrates import win_rate
from pipeline.judges.asking.prompts import question
from pipeline.judges.judging import Comparison, Duel, Prompt, Response, judge_both_orders
from pipeline.judges.local import letter_ids
from pipeline.judges.open import JudgeContext, open_judge
from pipeline.models.load import Named, load_tokenizer
from pipeline.models.locate import merge_adapter
from tests.conftest import ROOT, make_tiny_model, make_tiny_tokenizer
from tests.forked import MODULE, run

pytestmark = pytest.mark.engine


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A tiny model, an adapter on it, both merged, and a reward model of the same tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    where = tmp_path_factory.mktemp("vllm")
    # room for a judge's question
    make_tiny_model(where / "tiny", max_position_embeddings=2048)
    torch.manual_seed(1)
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(where / "tiny"),
        LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(where / "adapter")
    merged = merge_adapter(where / "tiny", Named("tiny"), where / "adapter").absolute()
    (where / "merged").symlink_to(merged)
    config = LlamaConfig.from_pretrained(where / "tiny", num_labels=1)
    torch.manual_seed(2)
    LlamaForSequenceClassification(config).save_pretrained(where / "reward")
    make_tiny_tokenizer().save_pretrained(where / "reward")
    return where


@pytest.fixture(scope="session")
def found(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("found") / "found.json"
    done = run(ROOT, MODULE, "tests.engines.in_vllm", models, out)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_a_sample_does_not_depend_on_the_order_of_the_batch(found):
    assert found["in_order"] == found["reversed"] == found["alone"]
    first, second = found["in_order"][0]
    assert first != second


def test_at_a_fixed_length_no_response_ends_before_it(found):
    assert {tuple(one) for one in found["ends"]["True"]} == {(12, "length")}
    assert any(reason == "stop" and length < 12 for length, reason in found["ends"]["False"])


def test_an_adapter_samples_like_the_merged_model_and_unlike_its_base(found):
    assert found["adapter"] == found["merged"]
    assert found["adapter"] != found["in_order"]


def test_a_model_against_itself_is_even(found, tmp_path):
    """20 evaluations of 40 prompts, both sides written by the same model: no more than 3 intervals miss one half."""
    judge = open_judge(JudgeConfig(name="rule:contains=e"), JudgeContext(tmp_path))
    missed = decided = 0
    for seed in range(20):
        items = [
            Comparison(
                Prompt(str(n), f"prompt {n}"),
                0,
                "policy",
                "reference",
                *(Response(texts[2 * seed + side], "stop") for side in (0, 1)),
            )
            for n, texts in enumerate(found["against_itself"])
        ]
        rate = win_rate(judge_both_orders(judge, items))
        missed += not rate.rate.low <= 0.5 <= rate.rate.high
        decided += rate.wins + rate.losses
    assert missed <= 3
    assert decided > 100


def test_rewards_are_raw_and_those_of_the_last_token_in_both_engines(found):
    assert found["rewards"]["vllm"] == pytest.approx(found["rewards"]["transformers"], abs=1e-4)
    # a sigmoid would stay between 0 and 1
    assert not all(0 < value < 1 for value in found["rewards"]["vllm"])


def test_a_reward_model_is_of_one_opinion_in_both_orders(found):
    scores = found["reward_model"]["scores"]
    assert scores[::2] == scores[1::2]
    assert set(scores) <= {0.0, 1.0}


def test_the_score_is_the_share_of_a_in_the_letters_probability(found, models):
    """Against a plain forward pass of transformers."""
    from transformers import LlamaForCausalLM

    tokenizer = load_tokenizer(models / "tiny", Named("tiny"))
    model = LlamaForCausalLM.from_pretrained(models / "tiny", dtype=torch.float32).eval()
    duel = Duel(Prompt("0", "prompt 0"), Response("a 0", "stop"), Response("b b 0", "stop"))
    turn = [{"role": "user", "content": question(duel, "token")}]
    ids = tokenizer(
        tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True), add_special_tokens=False
    )
    with torch.no_grad():
        chances = model(torch.tensor([ids["input_ids"]])).logits[0, -1].softmax(-1)
    mass = {letter: sum(chances[token].item() for token in tokens) for letter, tokens in letter_ids(tokenizer).items()}
    assert found["token"]["scores"][0] == pytest.approx(mass["A"] / (mass["A"] + mass["B"]), abs=1e-3)
    assert found["token"]["cost"]["requests"] == 6
    assert not math.isclose(found["token"]["scores"][0], 0.5)


def test_a_reply_without_a_verdict_fails_and_is_counted(found):
    assert found["reasoning"]["scores"] == [None] * 6
    assert found["reasoning"]["cost"]["tokens_out"] > 6
