"""Decoding of dimensions: exact for groups and joins, refused where two rules fit, and widths that keep that rare."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import FormatError
from edgeprune.formats.shared.widths import (
    Links,
    Place,
    WidthDecoder,
    WidthRule,
    distinct_widths,
    slots,
)

FULL = {"a": 16, "b": 24, "c": 40}
CHANGED = {"a": 10, "b": 18, "c": 31}
GROUPS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(12, 96), min_size=2, max_size=8)


def decoder() -> WidthDecoder:
    return WidthDecoder(FULL, CHANGED)


def test_a_dimension_of_a_group_follows_it() -> None:
    rule = decoder().rule(24, 18, where="here")
    assert rule.at({"b": 7}, FULL) == 7
    assert rule.at({"a": 7}, FULL) == 24


def test_an_equal_dimension_follows_nothing() -> None:
    rule = decoder().rule(24, 24, where="here")
    assert rule.groups() == ()
    assert rule.at({"b": 7}, FULL) == 24


@pytest.mark.parametrize(
    ("pair", "expected"), [((16 * 49, 10 * 49), 6 * 49), ((8, 5), 3), ((4 * 40, 4 * 31), 160)]
)
def test_a_dimension_may_be_a_whole_multiple_or_fraction_of_a_group(pair, expected) -> None:
    assert decoder().rule(*pair, where="here").at({"a": 6}, FULL) == expected


def test_a_fraction_that_is_not_whole_is_refused_at_that_width() -> None:
    rule = decoder().rule(8, 5, where="here")
    with pytest.raises(FormatError, match="a dimension would be 7/2"):
        rule.at({"a": 7}, FULL)


def test_what_fits_no_group_is_refused_with_its_place() -> None:
    with pytest.raises(FormatError, match="there: the dimension 24 -> 17 fits no channel group"):
        decoder().rule(24, 17, where="there")


class Graph:
    """Dimensions by name, to be linked as the operators of a file would link them."""

    def __init__(self, known: WidthDecoder, **sizes: tuple[int, int]) -> None:
        self.places = {name: Place("tensor", 0, name) for name in sizes}
        self.links = Links(known, {self.places[name]: [pair] for name, pair in sizes.items()})

    def dim(self, name: str) -> tuple[Place, int]:
        return self.places[name], 0

    def join(self, whole: str, *parts: str) -> None:
        self.links.join(self.dim(whole), [self.dim(p) for p in parts], where="concat")

    def shift(self, before: str, after: str) -> None:
        self.links.shift(self.places[before], self.places[after], where="pad")

    def solve(self) -> dict[str, str]:
        found = self.links.solve()
        return {name: str(found[place][0]) for name, place in self.places.items()}


def test_sums_are_unknown_until_a_join_stands_in_the_graph() -> None:
    with pytest.raises(FormatError, match="tensor ab: the dimension 40 -> 28 fits no channel"):
        Graph(decoder(), ab=(40, 28)).solve()
    graph = Graph(decoder(), ab=(40, 28), a=(16, 10), b=(24, 18), flat=(120, 84))
    graph.join("ab", "a", "b")
    assert graph.solve() == {"ab": "a + b", "a": "a", "b": "b", "flat": "3 * a + 3 * b"}


def test_frozen_channels_add_a_constant_to_a_sum() -> None:
    graph = Graph(decoder(), whole=(62, 50), a=(16, 10), frozen=(30, 30), flat=(62 * 9, 50 * 9))
    graph.join("whole", "a", "frozen", "a")
    assert graph.solve()["whole"] == "2 * a + 30"
    assert graph.solve()["flat"] == "18 * a + 270"


def test_channels_that_are_added_or_cut_shift_a_group() -> None:
    graph = Graph(decoder(), a=(16, 10), padded=(21, 15), cut=(18, 12), b=(24, 18), half=(12, 9))
    graph.shift("a", "padded")
    graph.shift("padded", "cut")
    graph.shift("b", "half")  # no shift: half of the channels
    found = graph.solve()
    assert (found["padded"], found["cut"], found["half"]) == ("a + 5", "a + 2", "1/2 * b")


def test_one_sum_written_in_two_orders_is_one_rule() -> None:
    graph = Graph(decoder(), ab=(40, 28), ba=(40, 28), a=(16, 10), b=(24, 18), far=(40, 28))
    graph.join("ab", "a", "b")
    graph.join("ba", "b", "a")
    assert graph.solve()["far"] == "a + b"


def coincidence() -> Graph:
    """``a + b`` is 48 -> 36, and so is twice the group ``c``, and the group ``d``."""
    full, changed = {"a": 16, "b": 32, "c": 24, "d": 48}, {"a": 8, "b": 28, "c": 18, "d": 36}
    graph = Graph(
        WidthDecoder(full, changed),
        a=(16, 8),
        b=(32, 28),
        joined=(48, 36),
        reader=(48, 36),
        writer=(48, 36),
    )
    graph.join("joined", "a", "b")
    return graph


def test_a_coincidence_that_no_operator_decides_is_refused_and_names_the_rules() -> None:
    with pytest.raises(
        FormatError, match=r"reader: .* 48 -> 36 could follow 2 \* c or d or a \+ b"
    ):
        coincidence().solve()


def small_coincidence() -> Graph:
    """``a + 6`` is 20 -> 16, and so is the group ``b``."""
    graph = Graph(
        WidthDecoder({"a": 14, "b": 20}, {"a": 10, "b": 16}),
        a=(14, 10),
        six=(6, 6),
        joined=(20, 16),
        reader=(20, 16),
        written=(20, 16),
        flat=(180, 144),
        piece=(9, 5),
    )
    graph.join("joined", "a", "six")
    graph.links.same(graph.dim("reader"), graph.dim("joined"))
    graph.links.written(graph.dim("written"))
    return graph


def solved(graph: Graph) -> dict[str, str]:
    graph.links.join(graph.dim("piece"), [graph.dim("a")], plus=-5, where="slice")
    return graph.solve()


def test_what_reads_a_join_follows_it_and_what_a_layer_writes_follows_a_group() -> None:
    graph = small_coincidence()
    graph.links.view(graph.places["reader"], graph.places["flat"])
    expected = {"joined": "a + 6", "reader": "a + 6", "written": "b", "flat": "9 * a + 54"}
    assert solved(graph) == {"a": "a", "six": "6", "piece": "a + -5", **expected}


def test_a_flattened_coincidence_follows_what_was_flattened() -> None:
    graph = small_coincidence()
    graph.links.view(graph.places["written"], graph.places["flat"])
    assert solved(graph)["flat"] == "9 * b"


def test_a_layer_whose_output_is_added_to_a_join_follows_the_join() -> None:
    graph = small_coincidence()
    graph.links.view(graph.places["reader"], graph.places["flat"])
    graph.links.same(graph.dim("written"), graph.dim("joined"))
    assert solved(graph)["written"] == "a + 6"


def test_a_written_coincidence_that_is_cut_afterwards_is_refused() -> None:
    graph = small_coincidence()
    graph.links.view(graph.places["reader"], graph.places["flat"])
    graph.shift("written", "piece")  # one layer may write several groups that are cut apart
    with pytest.raises(FormatError, match=r"could follow b or a \+ 6"):
        graph.solve()


def test_two_joins_that_contradict_each_other_are_refused() -> None:
    graph = small_coincidence()
    graph.links.view(graph.places["reader"], graph.places["flat"])
    graph.links.join(graph.dim("joined"), [graph.dim("written")], where="split")
    with pytest.raises(FormatError, match="could follow"):
        solved(graph)


def test_equal_ratios_are_told_apart_by_size_and_refused_where_they_cannot_be() -> None:
    d = WidthDecoder({"a": 16, "b": 24}, {"a": 8, "b": 12})
    assert d.rule(16, 8, where="here").groups() == ("a",)
    assert d.rule(24 * 5, 12 * 5, where="here").groups() == ("b",)
    with pytest.raises(FormatError, match=r"could follow 3 \* a or 2 \* b"):
        d.rule(48, 24, where="here")


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"a": 8, "b": 8}, "a and b have the same widths 16 -> 8"), ({"a": 16, "b": 8}, "group a")],
)
def test_groups_that_cannot_be_told_apart_are_refused_at_once(changed, message) -> None:
    with pytest.raises(FormatError, match=message):
        WidthDecoder({"a": 16, "b": 16}, changed)


def test_parts_that_do_not_add_up_are_refused() -> None:
    graph = Graph(decoder(), ab=(40, 30), a=(16, 10), b=(24, 18))
    with pytest.raises(FormatError, match="do not add up"):
        graph.join("ab", "a", "b")


def test_dimension_text_numbers_the_groups_in_order_of_appearance() -> None:
    d = decoder()
    variables: list[str] = []
    rules = (d.rule(24, 18, where=""), d.rule(16, 10, where="").plus(WidthRule(5)), WidthRule(3))
    assert slots(rules, variables) == "1*v0,1*v1+5,3"
    assert variables == ["b", "a"]


@given(GROUPS)
def test_distinct_widths_tell_all_groups_and_sums_of_two_apart(full: dict[str, int]) -> None:
    widths = distinct_widths(full, dict.fromkeys(full, 1))
    assert all(0 < widths[g] < full[g] for g in full)
    d = WidthDecoder(full, widths)
    for group in full:
        assert d.rule(full[group], widths[group], where="here").groups() == (group,)
    for a, b in itertools.combinations(full, 2):
        rules = [d.rule(full[g], widths[g], where="here") for g in (a, b)]
        d.learn((full[a] + full[b], widths[a] + widths[b]), rules[0].plus(rules[1]))
    for group in full:
        assert d.rule(full[group], widths[group], where="here").groups() == (group,)


def test_distinct_widths_keep_their_steps_and_their_order_does_not_matter() -> None:
    full = {"a": 64, "b": 64, "c": 64, "d": 32}
    steps = {"a": 8, "b": 8, "c": 1, "d": 4}
    widths = distinct_widths(full, steps)
    assert all(widths[g] % steps[g] == 0 for g in full)
    assert len({(full[g], widths[g]) for g in full}) == len(full)
    assert distinct_widths(dict(reversed(full.items())), steps) == widths


def test_many_groups_of_one_width_all_get_widths_of_their_own() -> None:
    full = {f"g{i}": 64 for i in range(40)}
    widths = distinct_widths(full, dict.fromkeys(full, 1))
    assert len(set(widths.values())) == 40


def test_too_many_groups_of_one_width_are_refused() -> None:
    full = {f"g{i}": 8 for i in range(8)}
    with pytest.raises(FormatError, match=r"\(8 channels\) has no width left of its own"):
        distinct_widths(full, dict.fromkeys(full, 1))
