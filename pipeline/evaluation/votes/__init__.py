"""Votes of people: what they are asked, what they said, and which automatic judge agrees with them."""

from pipeline.evaluation.votes.order import Ballot, Ballots, ballots
from pipeline.evaluation.votes.record import Given, Votes, voters
from pipeline.evaluation.votes.trust import vote_figures

__all__ = ["Ballot", "Ballots", "Given", "Votes", "ballots", "vote_figures", "voters"]
