"""`refscore store ...` on the command line; what the commands do stands in stages/store.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stages import console, manner
from stages.options import DEMO, ConfigOption, JsonOption, SetOption

if TYPE_CHECKING:
    from pipeline.config.experiment import Config

store_app = typer.Typer(cls=manner.Commands, help="The store of reference scores.", no_args_is_help=True)
StoreOption = Annotated[str, typer.Option("--store", help="The store: a directory or a URL (s3://...).")]
OwnStoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        help="The store here; default: the first place of the configuration's reference.store, else data/store.",
    ),
]
PartOption = Annotated[
    Path | None, typer.Option("--config", help="Only what this configuration's data needs; default: everything.")
]


@store_app.command(name="ls")
def store_ls(store: StoreOption = "data/store", json: JsonOption = False) -> None:
    """References in the store: sequences, tokens, bytes, and which runs use them."""
    console.answer_alone(json)
    from stages import store as stage

    stage.ls(store)


@store_app.command(name="verify")
def store_verify(store: StoreOption = "data/store") -> None:
    """Check every shard's bytes, schema and values; damaged ones are set aside."""
    from stages import store as stage

    stage.verify(store)


@store_app.command(name="gc")
def store_gc(
    store: StoreOption = "data/store",
    apply: Annotated[bool, typer.Option("--apply", help="Do it: remove what is named, merge small shards.")] = False,
    unreferenced: Annotated[
        bool,
        typer.Option("--unreferenced", help="References that no run in data/runs, nor any that is registered, uses."),
    ] = False,
    keep_within: Annotated[
        str | None,
        typer.Option("--keep-within", metavar="TIME", help="References that were not used for so long: 12h, 30d, 8w."),
    ] = None,
    quota: Annotated[
        str | None,
        typer.Option(
            "--quota",
            metavar="SIZE",
            help="What was used least recently, until the store has so many bytes: 500GB, 2TiB.",
        ),
    ] = None,
    even_used: Annotated[
        bool, typer.Option("--even-used", help="With --quota: what runs use too, within --keep-within or at all.")
    ] = False,
) -> None:
    """Leftovers, damaged shards that were set aside, what is unused or too old or too much; changes nothing without --apply."""
    from pipeline.errors import ConfigError
    from pipeline.store.tidying.retention import Rules, bytes_in, seconds_in
    from stages import store as stage

    if even_used and not quota:
        raise ConfigError("--even-used says what a quota may take: name one with --quota")
    rules = Rules(
        unreferenced=unreferenced,
        within=seconds_in(keep_within) if keep_within else None,
        quota=bytes_in(quota) if quota else None,
        even_used=even_used,
    )
    stage.gc(store, rules, apply=apply)


@store_app.command(name="compact")
def store_compact(store: StoreOption = "data/store") -> None:
    """Merge small shards; run it in several processes at once to share the work."""
    from stages import store as stage

    stage.compact(store)


@store_app.command(name="push")
def store_push(
    to: Annotated[str, typer.Argument(help="Store to copy to: a directory or a URL (s3://..., hf://datasets/...).")],
    store: OwnStoreOption = None,
    config: PartOption = None,
    set_: SetOption = None,
) -> None:
    """Publish scores: copy a store, or the part that a data set needs, to a bucket, a Hub data set or a directory."""
    from stages import store as stage

    stage.push(store, to, _some_config(config, set_))


@store_app.command(name="pull")
def store_pull(
    source: Annotated[str, typer.Argument(metavar="FROM", help="Store to copy from: a directory or a URL.")],
    store: OwnStoreOption = None,
    config: PartOption = None,
    set_: SetOption = None,
) -> None:
    """Fetch scores that others published, or the part of them that a data set needs."""
    from stages import store as stage

    stage.pull(source, store, _some_config(config, set_))


@store_app.command(name="adopt")
def store_adopt(
    reference: Annotated[
        str, typer.Argument(metavar="OLD_ID", help="Id of the earlier reference, or how it begins: see store ls.")
    ],
    config: ConfigOption = DEMO,
    set_: SetOption = None,
    sample: Annotated[int, typer.Option("--sample", min=1, help="Pairs, or responses, to score again.")] = 64,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            min=0.0,
            help="Mean absolute difference allowed, nats per token; with its sign the mean may be a fifth of it, a single token "
            "twenty times it. Default: what the reference's dtype may differ by, 0.002 in float32, 0.1 in bfloat16.",
        ),
    ] = None,
    revoke: Annotated[
        bool, typer.Option("--revoke", help="Take an adoption back, and what was taken over by it.")
    ] = False,
) -> None:
    """Use an earlier engine's scores of the same weights, if a sample, scored again by today's engine, agrees."""
    from pipeline.config.files import load_config
    from stages import adopt as stage

    resolved = load_config(config, set_ or [])
    if revoke:
        stage.take_back(resolved, reference)
    else:
        stage.main(resolved, reference, sample, tolerance)


@store_app.command(name="explain")
def store_explain(
    config: ConfigOption = DEMO,
    set_: SetOption = None,
    row: Annotated[int | None, typer.Option("--row", min=0, help="Only the pair from this row of its source.")] = None,
) -> None:
    """Hit or miss for a configuration or a row, and on a miss what differs from the nearest that is stored."""
    from pipeline.config.files import load_config
    from stages import store as stage

    stage.explain(load_config(config, set_ or []), row)


def _some_config(config: Path | None, overrides: list[str] | None) -> Config | None:
    from pipeline.config.files import load_config
    from pipeline.errors import ConfigError

    if config is None and overrides:
        raise ConfigError("--set changes a configuration: name it with --config")
    return load_config(config, overrides or []) if config else None
