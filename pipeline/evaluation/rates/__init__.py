"""From judgements to figures that say how sure they are: win rates, ratings, intervals, tests."""
