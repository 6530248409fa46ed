"""`refscore push`: the trained model, with its card, to the Hugging Face Hub."""

from __future__ import annotations

from pipeline.artifacts.runs import Run
from pipeline.exchange.publish import publish_model
from stages import console


def main(run: Run, to: str, *, private: bool) -> None:
    """Upload and say where it is."""
    console.say(f"model     {publish_model(run, to, private=private)}")
