"""The page of the house and the lists in CONTRIBUTING say what the code does."""

from __future__ import annotations

import ast
import re

import pytest
from repo import REPO

ROOT = REPO
HOUSE = (ROOT / "docs" / "the-house.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def rooms() -> dict[str, str]:
    """The table that the imports are held to, as the test of the architecture has it."""
    tree = ast.parse(
        (ROOT / "tests" / "house" / "test_architecture.py").read_text(encoding="utf-8")
    )
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROOMS"
    )
    found: dict[str, str] = ast.literal_eval(table)
    return found


def section(title: str) -> str:
    """What stands below a heading of CONTRIBUTING."""
    return CONTRIBUTING.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_page_shows_the_rooms_and_arrows_of_the_table():
    lines = HOUSE.partition("room        may import\n")[2].partition("```")[0].splitlines()
    shown = {room: tuple(allowed) for room, *allowed in map(str.split, lines)}
    assert shown == {room: tuple(may.split()) or ("-",) for room, may in rooms().items()}
    told = re.findall(r"^\| `(\w+)` \|", HOUSE, re.M)
    assert sorted(told) == sorted(rooms())


@pytest.mark.parametrize("text", [HOUSE, CONTRIBUTING], ids=["the-house", "contributing"])
def test_what_the_pages_name_is_there(text):
    named = re.findall(r"`((?:edgeprune|tests|targets|profiles)/[\w./-]*)`", text)
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_a_format_is_named_by_the_files_that_the_list_says():
    own = ROOT / "edgeprune" / "formats" / "executorch"
    name = re.compile("[\"']executorch[\"']")
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "edgeprune").rglob("*.py")
        if own not in path.parents and name.search(path.read_text(encoding="utf-8"))
    }
    listed = section("Add a format")
    assert found == set(re.findall(r"`(edgeprune/[\w/]+\.py)`", listed))
    assert f"{len(found)} more files" in " ".join(listed.split())


def test_the_flag_of_the_example_is_in_the_files_that_the_list_says():
    listed = re.findall(r"`(edgeprune/[\w/]+\.py)`", section("Add a flag"))
    for path in listed[:-1]:  # the last one is for flags that a file may state
        assert re.search(r"\bscope\b", (ROOT / path).read_text(encoding="utf-8")), path


def test_an_importance_stands_in_the_two_files_that_the_list_says():
    listed = re.findall(r"`(edgeprune/[\w/]+\.py)`", section("Add an importance"))
    naming = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "edgeprune").rglob("*.py")
        if "fpgm" in path.read_text(encoding="utf-8")
    }
    assert naming >= set(listed)
