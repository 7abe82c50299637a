"""The bibliography at the end of notebook 07: whatever a notebook cites is in it, and what is in it is cited."""

import json
import re
from collections import Counter

from report.stored import ROOT

NAME = r"[A-Z][\w’-]*"
CITED = re.compile(rf"({NAME})(?:(?:, {NAME})* and {NAME}| et al\.)?(?:, | \()((?:19\d|20[0-2])\d)\b(?![,–-]\d)")
LISTED = re.compile(r"^- ([A-Z][\w’-]*), .*?\((\d{4})\)\. \*.+?\*\. .+", re.MULTILINE)
NAMED = re.compile(r"^- (\*\d{3}\*|`[\w-]+/[\w.-]+`)", re.MULTILINE)  # reports by number, repositories by owner/name


def cells() -> tuple[str, str]:
    """All text and code of the notebooks but the last section of the last, and that section."""
    notebooks = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    every = ["".join(cell["source"]) for path in notebooks for cell in json.loads(path.read_text("utf-8"))["cells"]]
    assert every[-1].startswith("## Sources\n"), "the last section of the last notebook"
    return "\n".join(every[:-1]), every[-1]


def test_a_citation_is_found_in_each_form():
    text = "so (Dao, 2023), as Ding et al. (2023) say (Rabe and Staats, 2021; Liu, Zaharia and Abbeel, 2023); N (1024)"
    assert CITED.findall(text) == [("Dao", "2023"), ("Ding", "2023"), ("Rabe", "2021"), ("Liu", "2023")]
    assert CITED.findall("31 May, 1,024 rows, May 2025, in March (2048)") == []


def test_every_citation_is_in_the_sources_and_every_source_is_cited():
    text, sources = cells()
    listed = Counter(LISTED.findall(sources))
    papers = [line for line in sources.split("\n\nThe five reports")[0].splitlines() if line.startswith("- ")]
    assert len(papers) == listed.total() == len(listed), "each paper once: authors, year, title, where"
    assert {*CITED.findall(text)} == {*listed}


def test_reports_and_repositories_that_are_listed_are_named_in_the_text():
    text, sources = cells()
    named = NAMED.findall(sources)
    assert {f"*00{number}*" for number in range(5)} < {*named}
    assert [one for one in named if one.strip("`") not in text] == []
