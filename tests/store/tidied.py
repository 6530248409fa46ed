"""Stores that are listed, checked, tidied and merged: at a directory, in a bucket and in memory."""

import dataclasses

from pipeline.store import registrations
from pipeline.store.registrations import DAY
from pipeline.store.tidying.inventory import shard_entries
from pipeline.store.tidying.retention import Rules, parts_of, removals_by
from tests.store.test_store import REFERENCE, keys

OTHER = dataclasses.replace(REFERENCE, numerics=dataclasses.replace(REFERENCE.numerics, dtype="bfloat16"))
NOW = registrations.time.time()


def names(store):
    return [entry.name for entry in store.places[0].entries()]


def shards(store):
    return [entry.name for entry in shard_entries(store.places[0].entries())]


def damage(store, name):
    """Another byte in the middle."""
    content = bytearray(store.places[0].read(name))
    content[100] ^= 1
    store.places[0].write(name, bytes(content))


def days_pass(monkeypatch, days):
    monkeypatch.setattr(registrations.time, "time", lambda: NOW + days * DAY)


def goes(where, rules=None, used=None, last=None):
    """Names of the files that go, by reference."""
    removals, _ = removals_by(rules or Rules(), parts_of(where, used or {}, last or {}))
    return {removal.part.reference_id: [entry.name for entry in removal.entries] for removal in removals}


def values(store, row):
    """What a reader gets."""
    found = store.lookup(keys(row)).found()
    return found["logps"][0].to_numpy().tolist() if len(found) else None


def refused(monkeypatch, store, method):
    def refuse(*_, **__):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(store.places[0]._files, method, refuse)
