"""What one process of a training does if another fails, without processes: each is told what the others say."""

import pytest

from pipeline.errors import ConfigError, RefscoreError
from pipeline.training.parallel.world import ALONE, Followed, World


def told(monkeypatch, rank, others):
    """A process among three, to whom the others say `others`, and what it told them."""
    said = []
    monkeypatch.setattr(World, "all_of", lambda _, value: said.append(value) or [value, *others])
    return World(rank, 3), said


def fails(error):
    raise error


def test_what_all_could_do_is_returned(monkeypatch):
    world, said = told(monkeypatch, 1, [None, None])
    assert (world.everywhere(lambda: 7), said) == (7, [None])
    assert ALONE.size == 1


@pytest.mark.parametrize(("rank", "raised"), [(0, RefscoreError), (1, Followed)])
def test_the_first_says_what_another_met_and_the_rest_follow(monkeypatch, rank, raised):
    world, _ = told(monkeypatch, rank, [None, [2, "no space left"]])
    with pytest.raises(RefscoreError) as stopped:
        world.everywhere(lambda: 7)
    assert type(stopped.value) is raised
    assert str(stopped.value) == ("no space left" if rank == 0 else "")


@pytest.mark.parametrize(("rank", "raised"), [(0, ConfigError), (1, Followed)])
def test_who_fails_tells_the_others_first(monkeypatch, rank, raised):
    world, said = told(monkeypatch, rank, [None, None])
    with pytest.raises(raised) as stopped:
        world.everywhere(lambda: fails(ConfigError("full")))
    assert said == [[2, "full"]]
    assert stopped.value.exit_code == 2


def test_a_defect_is_raised_as_it_is_where_it_is(monkeypatch):
    world, said = told(monkeypatch, 1, [None, None])
    with pytest.raises(ZeroDivisionError):
        world.everywhere(lambda: 1 // 0)
    assert said == [[1, ""]]
