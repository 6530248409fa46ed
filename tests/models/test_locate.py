"""Models that cannot be fetched: a message with the way out, whatever the network or the Hub's client answers."""

import huggingface_hub
import pytest

from pipeline.config.experiment import ReferenceConfig
from pipeline.errors import ConfigError
from pipeline.models.locate import locate


class FromBelow(Exception):
    """An error that is none of huggingface_hub's, as its HTTP library raises them."""


@pytest.mark.parametrize("error", [FromBelow("timed out"), ConnectionError("timed out")])
def test_a_model_out_of_reach_is_a_message(monkeypatch, error):
    def fetch(*_, local_files_only=False, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("none") if local_files_only else error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(ConfigError, match=r"cannot be fetched \(timed out\).*local directory"):
        locate(ReferenceConfig(model="lab/model"))


def test_a_name_that_the_hub_knows_none_of_is_a_message():
    with pytest.raises(ConfigError, match="cannot be fetched"):
        locate(ReferenceConfig(model="lab/a..b"))
