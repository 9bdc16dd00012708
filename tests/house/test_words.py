"""One word for one thing: in the code, and on the page that says what the words mean."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

from repo import REPO

ROOT = REPO
PACKAGE = ROOT / "edgeprune"
PAGE = ROOT / "docs" / "words.md"


def sources() -> list[Path]:
    """Modules of the package; the sample programs inside bundles stand for themselves."""
    samples = PACKAGE / "bundle" / "samples"
    return sorted(p for p in PACKAGE.rglob("*.py") if samples not in p.parents)


def test_no_class_name_exists_twice():
    homes = defaultdict(list)
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(path.relative_to(PACKAGE).as_posix())
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_a_comment_stands_above_what_it_is_about_and_not_behind_its_closing_bracket():
    closing = re.compile(r"^\s*[)\]}]+:?  # (?!type:|noqa|fmt:)")
    lone = re.compile(r" = \(\n\s+[^\n]*  # [^\n]*\n\s*\)\n")
    for path in sources():
        text = path.read_text(encoding="utf-8")
        found = [line for line in text.splitlines() if closing.match(line)]
        assert [*found, *lone.findall(text)] == [], path


def test_a_function_that_only_checks_says_when_it_raises():
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                told = ast.get_docstring(node) or ""
                assert not told.startswith(("Nothing, ", "Nothing when", "Nothing unless")), (
                    node.name
                )


def test_the_page_of_words_has_each_once_and_in_two_lines_or_so():
    entries = PAGE.read_text(encoding="utf-8").split("\n- ")[1:]
    words = [re.match(r"\*\*([a-z-]+(?: [a-z]+)?)\*\*: ", entry)[1] for entry in entries]
    assert len(set(words)) == len(words) >= 20
    assert max(len(entry.splitlines()) for entry in entries) <= 3


def test_each_word_is_one_that_the_product_uses():
    said = "\n".join(path.read_text(encoding="utf-8").lower() for path in sources())
    for word in re.findall(r"^- \*\*(.*?)\*\*", PAGE.read_text(encoding="utf-8"), re.M):
        assert re.search(rf"\b{word.replace(' ', '[ -]')}", said), word
