"""Which files are loaded, and the digests of their tensors, on safetensors files written by hand."""

import hashlib
import json
import time

import pytest

from pipeline.artifacts import digests
from pipeline.errors import ConfigError
from pipeline.models import weights
from pipeline.models.weights import digests_of_files, loaded_files, tensor_digests, unloaded_files, unread_bytes

INDEX = "model.safetensors.index.json"


def written(path, tensors, *, gap=0, **about):
    """A safetensors file of {name: (dtype, shape, bytes)}; `about` overwrites what the header says of the last one."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(content)]}
        at += len(content)
    header[name] |= about
    text = json.dumps(header).encode() + b" " * gap
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(content for *_, content in tensors.values()))
    return path


def settle():
    time.sleep(2 * digests._TICK / 1e9)


def digest(dtype, shape, content):
    return hashlib.sha256(json.dumps([dtype, shape]).encode() + content).hexdigest()


ONE, TWO, THREE = ("F32", [2], b"abcdefgh"), ("BF16", [2, 2], b"ABCDEFGH"), ("U8", [3], b"xyz")


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    written(tmp_path / "model.safetensors", {"b": ONE, "a": TWO, "empty": ("F32", [0], b"")})
    settle()
    return tmp_path


def test_a_digest_is_of_dtype_shape_and_bytes_in_the_order_of_names(model, monkeypatch):
    monkeypatch.setattr(weights, "_BLOCK", 3)
    heard = []
    found = tensor_digests(model, heard.append)
    assert list(found.items()) == [("a", digest(*TWO)), ("b", digest(*ONE)), ("empty", digest("F32", [0], b""))]
    assert heard == [3, 3, 2, 3, 3, 2]


def test_the_header_and_the_order_in_the_file_are_in_no_digest(model):
    before = tensor_digests(model)
    written(model / "model.safetensors", {"empty": ("F32", [0], b""), "a": TWO, "b": ONE}, gap=64)
    assert tensor_digests(model) == before


def test_many_files_are_one_set_and_no_tensor_stands_in_two(model):
    whole = tensor_digests(model)
    parts = [written(model / "x.safetensors", {"b": ONE}), written(model / "w.safetensors", {"a": TWO})]
    del whole["empty"]
    assert list(digests_of_files(parts).items()) == list(whole.items())
    with pytest.raises(ConfigError, match=r"model\.safetensors holds b, which another file beside it holds too"):
        digests_of_files([*parts[:1], model / "model.safetensors"])


def test_what_was_read_is_not_read_again_until_the_file_changes(model):
    size = (model / "model.safetensors").stat().st_size
    assert unread_bytes(model) == size
    before = tensor_digests(model)
    heard = []
    assert tensor_digests(model, heard.append) == before
    assert (heard, unread_bytes(model)) == ([], 0)
    # what is remembered belongs to the file: another one is read
    written(model / "model.safetensors", {"b": TWO})
    settle()
    assert tensor_digests(model) == {"b": digest(*TWO)} != before
    assert len(list(weights.MEMORY.iterdir())) == 2
    names = {path.stem for path in weights.MEMORY.iterdir()}
    stamp = digests.file_stamp(model / "model.safetensors")
    assert hashlib.sha256(stamp.encode()).hexdigest()[:40] in names


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"stamp": "another", "tensors": {}}', '{"tensors": {"b": "0"}}', "STAMP"]
)
def test_a_memory_that_is_damaged_costs_time_only(model, content):
    before = tensor_digests(model)
    (kept,) = weights.MEMORY.iterdir()
    stamp = json.loads(kept.read_text())["stamp"]
    kept.write_text(content.replace("STAMP", json.dumps({"stamp": stamp, "tensors": [1]})))
    assert unread_bytes(model) > 0
    assert tensor_digests(model) == before
    assert unread_bytes(model) == 0


def test_a_memory_that_cannot_be_written_costs_time_only(model):
    weights.MEMORY.parent.mkdir(parents=True)
    weights.MEMORY.write_text("a file")
    assert tensor_digests(model)["b"] == digest(*ONE)
    assert unread_bytes(model) > 0


def test_a_file_that_changes_while_it_is_read_is_not_remembered(model, monkeypatch):
    file = model / "model.safetensors"
    monkeypatch.setattr(weights, "_BLOCK", 1)
    tensor_digests(model, lambda _: file.touch())
    assert not weights.MEMORY.exists()


@pytest.mark.parametrize("head", ["lm_head.weight", "transformer.embed_out.weight"])
def test_a_head_that_is_the_embeddings_counts_once_if_they_are_tied(model, head):
    file = written(model / "model.safetensors", {"embed.weight": ONE, head: ONE, "same.weight": TWO, "too.weight": TWO})
    settle()
    assert tensor_digests(model).keys() == {"embed.weight", "same.weight", "too.weight"}
    assert digests_of_files([file]).keys() == {"embed.weight", head, "same.weight", "too.weight"}
    (model / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    assert head in tensor_digests(model)
    # nor if it is another, whatever the configuration says
    (model / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    written(file, {"embed.weight": ONE, head: TWO})
    settle()
    assert tensor_digests(model).keys() == {"embed.weight", head}


def test_files_that_are_loaded(model):
    whole, other = model / "model.safetensors", written(model / "a.safetensors", {"a": TWO})
    assert (loaded_files(model), unloaded_files(model)) == ([whole], [other])
    second = written(model / "b.safetensors", {"b": ONE})
    whole.unlink()
    # without an index or a file of the usual name: all of them
    assert (loaded_files(model), unloaded_files(model)) == ([other, second], [])
    index = model / INDEX
    index.write_text(json.dumps({"weight_map": {"b": "b.safetensors", "c": "b.safetensors"}}))
    assert (loaded_files(model), unloaded_files(model)) == ([second], [other])
    index.write_text(json.dumps({"weight_map": {"b": "b.safetensors", "a": "a.safetensors"}}))
    assert loaded_files(model) == [other, second]
    second.rename(whole)
    index.write_text(json.dumps({"weight_map": {"b": "model.safetensors"}}))
    assert loaded_files(model) == [whole]
    for named in ({"a": "a.safetensors"}, {"a": "a.safetensors", "b": "model.safetensors"}):
        index.write_text(json.dumps({"weight_map": named}))
        with pytest.raises(ConfigError, match="two sets of weights"):
            loaded_files(model)


@pytest.mark.parametrize("named", ["gone.safetensors", "../model.safetensors", "sub/model.safetensors"])
def test_an_index_names_files_beside_it(model, named):
    (model / "sub").mkdir()
    written(model / "sub" / "model.safetensors", {"a": TWO})
    inside = model / "inside"
    inside.mkdir()
    written(inside / "a.safetensors", {"a": TWO})
    (inside / "sub").mkdir()
    written(inside / "sub" / "model.safetensors", {"a": TWO})
    (inside / INDEX).write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": named}}))
    with pytest.raises(ConfigError, match=rf"names {named}, which .*inside does not hold"):
        loaded_files(inside)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": {}}}', "\xff"])
def test_an_index_that_is_none_is_a_message(model, text):
    (model / INDEX).write_text(text)
    with pytest.raises(ConfigError, match="is no index of weights"):
        loaded_files(model)


@pytest.mark.parametrize(
    "about",
    [
        {"dtype": 3},
        {"shape": None},
        {"data_offsets": [8, 4]},
        {"data_offsets": [-1, 4]},
        {"data_offsets": [1]},
        {"data_offsets": None},
    ],
)
def test_a_header_that_says_nonsense_is_a_message(tmp_path, about):
    file = written(tmp_path / "m.safetensors", {"a": TWO, "b": ONE}, **about)
    with pytest.raises(ConfigError, match="is no safetensors file"):
        digests_of_files([file])


@pytest.mark.parametrize("length", [0, 10**6, 2**63, None])
def test_a_header_of_no_possible_length_is_a_message(tmp_path, length, monkeypatch):
    file = written(tmp_path / "m.safetensors", {"a": TWO})
    content = file.read_bytes()
    if length is None:
        # exactly the longest that safetensors reads, and one byte less than that
        monkeypatch.setattr(weights, "_LONGEST_HEADER", int.from_bytes(content[:8], "little"))
        assert digests_of_files([file]) == {"a": digest(*TWO)}
        monkeypatch.setattr(weights, "_LONGEST_HEADER", int.from_bytes(content[:8], "little") - 1)
    else:
        file.write_bytes(length.to_bytes(8, "little") + content[8:])
    with pytest.raises(ConfigError, match="is no safetensors file"):
        digests_of_files([file])


def test_a_header_that_fills_the_file_and_one_that_is_no_object(tmp_path):
    file = tmp_path / "m.safetensors"
    file.write_bytes((2).to_bytes(8, "little") + b"{}")
    assert digests_of_files([file]) == {}
    for text in (b"[]", b'{"a": 1}', b'"a"'):
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(ConfigError, match="is no safetensors file"):
            digests_of_files([file])


def test_a_file_that_ends_within_a_tensor_names_it(tmp_path):
    file = written(tmp_path / "m.safetensors", {"a": TWO, "b": ONE})
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"m\.safetensors ends within b: fetch it again"):
        digests_of_files([file])
