"""Token ids of tails behind a prompt's are those of the whole texts, whatever the tokenizer; and tails are really what is read."""

import random
from itertools import product

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.config.experiment import DataConfig
from pipeline.pairs.encoding import Encoder
from pipeline.pairs.preferences import Preference
from pipeline.pairs.tokenised.tails import Tails
from tests.conftest import CHAT_TEMPLATE, make_tiny_tokenizer

WORDS = [
    "the cat sat on the mat and the dog ran",
    "how do I cook rice well today",
    "Ünïcode \uff46\uff55\uff4c\uff4c ½",
    "a  b\n\nc\td",
]
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
_BYTES = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}


def byte_level(*, add_prefix_space):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    made.decoder = decoders.ByteLevel()
    return trained(made, trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, **_BYTES))


def metaspace(scheme, *, split=True):
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    return trained(made, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", *SPECIAL]))


def prepending():
    """As Llama's of old: the normaliser puts a space before whatever it sees."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return trained(made, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", *SPECIAL]))


def unigram():
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", *SPECIAL]
    return trained(made, trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>"))


def word_piece():
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return trained(made, trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]", "[CLS]", *SPECIAL]))


def trained(made, trainer):
    made.train_from_iterator(WORDS, trainer)
    return made


MADE = {
    "byte level": lambda: byte_level(add_prefix_space=False),
    "byte level, a space before": lambda: byte_level(add_prefix_space=True),
    "metaspace first": lambda: metaspace("first"),
    "metaspace first, no words": lambda: metaspace("first", split=False),
    "metaspace always": lambda: metaspace("always"),
    "metaspace never": lambda: metaspace("never"),
    "prepending": prepending,
    "unigram": unigram,
    "word piece": word_piece,
}


def fast(name, *, bos=False, added=()):
    made = MADE[name]()
    if bos:
        number = made.token_to_id("<|system|>")
        made.post_processor = processors.TemplateProcessing("<|system|> $A", special_tokens=[("<|system|>", number)])
    for token in added:
        (made.add_special_tokens if token.special else made.add_tokens)([token])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def texts(seed, pieces, number=200):
    """Prompts, each with two texts that mostly begin with it."""
    draw = random.Random(seed)

    def text(longest):
        return "".join(draw.choice(pieces) for _ in range(draw.randrange(longest)))

    rows = []
    for _ in range(number):
        prompt = text(9)
        cut = len(prompt) if draw.random() < 0.8 else draw.randrange(len(prompt) + 1)
        rows.append([prompt, prompt + text(5), prompt[:cut] + text(5)])
    return rows


PIECES = [*SPECIAL, *SPECIAL, " ", "\n", "  ", "the cat", " dog", "rice,", "½", "\uff46", "<", "|end|>", "\u200b", "é"]


def whole(tokenizer, rows):
    return [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in row] for row in rows]


@pytest.mark.parametrize(("name", "bos"), list(product(MADE, [False, True])))
def test_tails_have_the_ids_of_the_whole(name, bos):
    tokenizer = fast(name, bos=bos)
    rows = texts(name, PIECES)
    tails = Tails(tokenizer)
    assert tails.encode(rows) == whole(tokenizer, rows)
    # most rows have a special token in their prompt, and agree up to it
    assert 0 < tails.whole < 110


HOSTILE = {
    "takes white space": [AddedToken(" <t> ", special=True, lstrip=True, rstrip=True, normalized=False)],
    "takes white space behind": [AddedToken("<t>", special=True, rstrip=True, normalized=False)],
    "words alone": [AddedToken("<t>", special=True, single_word=True, normalized=False)],
    "normalised": [AddedToken("<t>", special=True, normalized=True)],
    "not special": [AddedToken("<t>", special=False, normalized=False)],
    "goes on behind another": [AddedToken("<|end|>the", special=True, normalized=False)],
    "begins before another": [AddedToken("cat<|end|>", special=False, normalized=False)],
    "holds another": [AddedToken("cat<|end|>the", special=True, normalized=False)],
    "overlaps another": [AddedToken("cat<|e", special=True, rstrip=True, normalized=False)],
}


@pytest.mark.parametrize(
    ("name", "added"), list(product(["byte level", "metaspace first", "prepending", "unigram"], HOSTILE))
)
def test_tokens_that_look_beyond_themselves_move_nothing(name, added):
    tokenizer = fast(name, added=HOSTILE[added])
    rows = texts(added, [*PIECES, "<t>", " <t> ", "<|end|>the", "cat<|end|>", "cat<|e", "cat", "the"], 400)
    tails = Tails(tokenizer)
    assert tails.encode(rows) == whole(tokenizer, rows)
    assert 0 < tails.whole < 400


def test_only_a_tail_is_read_of_what_follows_a_prompt(monkeypatch):
    tokenizer = make_tiny_tokenizer()
    tails, read = Tails(tokenizer), []
    real = tails._ids
    monkeypatch.setattr(tails, "_ids", lambda texts: read.append(texts) or real(texts))
    prompt = "<|user|>" + "Hi? " * 50 + "<|end|>\n<|assistant|>"
    rows = [[prompt, prompt + "Yes.<|end|>", prompt + "No.<|end|>"], ["no token", "no token at all"]]
    assert tails.encode(rows) == whole(tokenizer, rows)
    assert read[0] == [prompt, "<|assistant|>Yes.<|end|>", "<|assistant|>No.<|end|>", *rows[1]]
    assert tails.whole == 1


def test_a_call_that_does_more_than_the_backend_is_called(monkeypatch):
    """A tokenizer of its own class, or one that cuts, or that reads special tokens as text."""

    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, text, **how):
            return super()._encode_plus([one.replace("cat", "dog") for one in text], **how)

    made = byte_level(add_prefix_space=False)
    row = ["<|user|>the cat<|assistant|>", "<|user|>the cat<|assistant|>the cat"]
    for tokenizer in (
        Own(tokenizer_object=made),
        PreTrainedTokenizerFast(tokenizer_object=made, split_special_tokens=True),
    ):
        tails = Tails(tokenizer)
        assert tails.encode([row]) == [tokenizer(row, add_special_tokens=False)["input_ids"]]
        assert tails.whole == 1
    assert (
        fast("byte level")("the dog", add_special_tokens=False)["input_ids"]
        == Own(tokenizer_object=made)(["the cat"], add_special_tokens=False)["input_ids"][0]
    )


@pytest.mark.parametrize("name", MADE)
def test_a_pair_is_encoded_as_the_template_renders_it(name):
    tokenizer = fast(name)
    prompt = [{"role": "user", "content": "how do I"}, {"role": "assistant", "content": "cook?"}]
    prompt.append({"role": "user", "content": "rice"})
    encoder = Encoder(DataConfig(path="x"), tokenizer)
    # one that names a token goes another way, after which the backend must know its special tokens again
    rows = [Preference("s", 0, prompt, "the cat <|end|>", "mat"), Preference("s", 1, prompt, "the cat", "a mat")]
    _, pair = list(encoder.both(rows))
    (_, second) = [next(encoder.both([row])) for row in rows]
    assert pair == second
    for side, ids in zip(("chosen", "rejected"), pair.responses, strict=True):
        text = tokenizer.apply_chat_template([*prompt, rows[1].response(side)], tokenize=False)
        full = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert pair.prompt_ids + ids == full[: len(pair.prompt_ids) + len(ids)]
    assert encoder.whole == 0
