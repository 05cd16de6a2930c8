"""Filters are checked before LanceDB sees them: what is allowed works, the rest is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from indexes import make_database, make_embeddings

from modeling_llm2clip.search.filters import MOST_WORDS, check_filter
from modeling_llm2clip.search.index_about import COLUMNS
from modeling_llm2clip.search.index_database import IndexDatabase


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> IndexDatabase:
    """Twenty images, whose widths are 0 to 19 and whose names are those numbers."""
    return make_database(tmp_path_factory.mktemp("filters") / "index", make_embeddings(20))


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("width > 3", 16),
        ("3 < WIDTH", 16),
        ("width<=3\n\tAND\r\nnot width=1", 3),
        ("width == 3 or width <> 3", 20),
        ("width BETWEEN 1 AND 4 AND height = 9", 4),
        ("width NOT BETWEEN height AND bytes", 19),
        ("width IN (1, 2, -3) OR path NOT IN ('it''s', '000000.png')", 19),
        ("path LIKE '00000_.png' AND NOT (path ILIKE '%3.PNG' OR width != 3)", 0),
        ("path NOT LIKE '%1%'", 9),
        ("taken IS NULL AND path IS NOT NULL", 20),
        ("modified >= date '2024-01-31' AND timestamp '2024-01-31 18:00:00' < modified", 20),
        ("path = 'a\\' OR width > 3 OR path='b'", 16),  # a backslash escapes nothing
        ("path = '); DROP TABLE images --'", 0),
        ("(" * 20 + "width = 1" + ")" * 20, 1),
        ("NOT " * 20 + "width = 1", 1),
        (" OR ".join(["width = 1"] * (MOST_WORDS // 4)), 1),
        (f"width IN ({', '.join(['1'] * 3000)})", 1),
        ("width IN (0.5, 1.0 , 2)", 2),
        ("width > 2.5 AND 17.5 >= width", 15),
        ("width = 3.0 OR path = '2.5'", 1),
        ("width BETWEEN 1e0 AND .3e1", 3),
        ("width < 2147483648 AND -99999999999 < height", 20),
        ("bytes IN (9, 9223372036854775808) AND width < 99999999999999999999999", 20),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_what_a_filter_may_use_finds_what_sql_would(
    database: IndexDatabase, where: str, count: int
) -> None:
    assert database.count(where) == count
    assert len(database.search(make_embeddings(1)[0], top_k=20, where=where)) == count


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        ("", "it has 0 words"),
        (" ", "it has 0 words"),
        ("color = 'red'", "\"color = 'red'\" at character 1 is not allowed"),
        ("width > 100 LIMIT 1", "'LIMIT 1' at character 13 is not"),
        ("width > 1; DROP TABLE images", "at character 10 is not"),
        ("width > 1 -- all", "'-- all' at character 11 is not"),
        ("width > 1 /* all */", "is not allowed"),
        ("width > 1 + 1", "'\\+ 1' at character 11 is not"),
        ("width > " + "1+" * 3000 + "1", "is not allowed"),
        ("repeat('a', 1000000000) = path", "at character 1 is not"),
        ("path = lpad('a', 2000000000)", "at character 8 is not"),
        ("lower(path) = 'a'", "is not allowed"),
        ("(SELECT 1) = 1", "is not allowed"),
        ('"width" > 3', "is not allowed"),
        ("width > 1_000", "at character 9 is not"),
        ("path = 'a", "at character 8 is not"),
        ("path = X'00'", "is not allowed"),
        ("width\xa0> 3", "is not allowed"),
        ("(" * 4900 + "1=1" + ")" * 4900, "it has 9803 words"),
        ("NOT " * 2400 + "1=1", "it has 2403 words"),
        (" OR ".join(["width=1"] * 900), "it has 3599 words"),
        ("width > 1" + " -1" * MOST_WORDS, "it has 203 words"),
        (f"path = '{'a' * 10_000}'", "10,009 characters"),
        ("(width > 3", "1 open parentheses"),
        ("width > 3) AND (width < 5", "'\\) AND \\(width < 5' at character 10 is not"),
        # The database refuses these itself.
        ("width", "does not return a boolean"),
        ("width >", "parser error"),
        ("width > 100 width", "parser error"),
        ("path = 'a' 'b'", "parser error"),
        ("path(1) = 2", "Invalid function"),
        ("width IN ()", "parser error"),
        ("width = date 3", "error"),
        ("width = 'a'", "literal"),
        ("(" * 90 + "1=1" + ")" * 90, "pars"),
        ("date (" * 60 + "1" + ")" * 60, "pars"),
    ],
    ids=lambda value: value[:30],
)
def test_anything_else_is_refused_with_the_place_and_what_is_allowed(
    database: IndexDatabase, where: str, problem: str
) -> None:
    wanted = rf"where=.* cannot be used: .*{problem}.*The columns are path, sha256.*BETWEEN"
    with pytest.raises(ValueError, match=wanted) as caught:
        database.count(where)
    assert len(str(caught.value)) < 900
    with pytest.raises(ValueError):  # the search does not rely on the count
        database.search(make_embeddings(1)[0], top_k=1, where=where)


def test_the_filters_of_the_documents_are_allowed() -> None:
    document = Path(__file__).parents[2] / "docs" / "encode-and-search.md"
    lines = document.read_text(encoding="utf-8").splitlines()
    filters = [line.split("--where ")[1].strip('"') for line in lines if "--where " in line]
    filters = [where for where in filters if "`" not in where]
    assert len(filters) == 2
    for where in filters:
        check_filter(where, COLUMNS)
