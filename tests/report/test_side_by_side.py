"""Two responses side by side: what differs is marked, and nothing hides."""

from pipeline.report.side_by_side import marked, visible


def test_words_of_one_side_alone_are_marked():
    policy, reference = marked("Boil the rice for ten minutes.", "Boil the rice for <b> hours.")
    assert "<mark>ten minutes</mark>." in policy
    assert "Boil the rice for " in reference
    assert "<b>" not in reference
    # nothing in common: marking everything would say nothing
    assert "<mark>" not in marked("one two three", "9 8 7 6 5 4 ; : , .")[0]
    assert visible("a\u200bb") == "a[U+200B]b"
