"""The tables of the pocket world: complete, unambiguous, and agreeing with two other sources."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import forgetless.data.pocket
from forgetless.data.pocket.knowledge import RELATIONS, Fact, facts

POCKET = Path(forgetless.data.pocket.__file__).parent
CONTINENTS = {"Africa", "Asia", "Europe", "North America", "South America", "Oceania"}
CATEGORIES = {
    "alkali metal",
    "alkaline earth metal",
    "transition metal",
    "post-transition metal",
    "metalloid",
    "reactive nonmetal",
    "halogen",
    "noble gas",
    "lanthanide",
    "actinide",
}
OBSERVERS = {"Palestine", "Vatican City"}


def countries() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((POCKET / "countries.json").read_text("utf-8"))
    return rows


def elements() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((POCKET / "elements.json").read_text("utf-8"))
    return rows


def plain(text: str) -> str:
    """Lower case without accents, tags and entities."""
    bare = unicodedata.normalize("NFKD", html.unescape(re.sub("<[^>]+>", " ", text)))
    return bare.translate({ord("ł"): "l", ord("đ"): "d"}).encode("ascii", "ignore").decode().lower()


def letters(text: str) -> str:
    return re.sub("[^a-z ]", "", plain(text))


def test_there_are_195_countries_with_different_names_and_118_elements() -> None:
    assert len({row["name"] for row in countries()}) == len(countries()) == 195
    assert len({row["name"] for row in elements()}) == len(elements()) == 118


def test_every_country_has_every_relation_and_no_answer_twice() -> None:
    for row in countries():
        for relation in ("capital", "continent", "currency", "language"):
            answers = row[relation]
            assert answers, (row["name"], relation)
            assert all(answers), (row["name"], relation)
            assert len(set(answers)) == len(answers), (row["name"], relation)
        assert set(row["continent"]) <= CONTINENTS | {"Australia"}, row["name"]
        assert row["continent"][0] in CONTINENTS, row["name"]


def test_capitals_belong_to_one_country_each() -> None:
    taken = Counter(row["capital"][0] for row in countries())
    assert [name for name, count in taken.items() if count > 1] == []


def test_continents_have_the_number_of_countries_they_should() -> None:
    counts = Counter(row["continent"][0] for row in countries())
    # The United Nations' regions give 54, 47 (with Palestine), 44 (with Vatican City), 14; Cyprus
    # is counted in Europe here, as a member of the European Union.
    assert counts == {
        "Africa": 54,
        "Asia": 47,
        "Europe": 45,
        "North America": 23,
        "South America": 12,
        "Oceania": 14,
    }


def test_elements_are_numbered_from_1_to_118_with_a_symbol_each() -> None:
    assert [row["number"] for row in elements()] == list(range(1, 119))
    symbols = [row["symbol"] for row in elements()]
    assert len(set(symbols)) == 118
    assert all(re.fullmatch("[A-Z][a-z]?", symbol) for symbol in symbols)


def test_categories_follow_from_the_place_in_the_periodic_table() -> None:
    by_number = {row["number"]: row["category"][0] for row in elements()}
    assert set(by_number.values()) == CATEGORIES
    assert [n for n, c in by_number.items() if c == "noble gas"] == [2, 10, 18, 36, 54, 86, 118]
    assert [n for n, c in by_number.items() if c == "halogen"] == [9, 17, 35, 53, 85, 117]
    assert [n for n, c in by_number.items() if c == "alkali metal"] == [3, 11, 19, 37, 55, 87]
    assert [n for n, c in by_number.items() if c == "alkaline earth metal"] == [
        4, 12, 20, 38, 56, 88,
    ]  # fmt: skip
    assert [n for n, c in by_number.items() if c == "lanthanide"] == list(range(57, 72))
    assert [n for n, c in by_number.items() if c == "actinide"] == list(range(89, 104))
    groups_3_to_12 = [*range(21, 31), *range(39, 49), *range(72, 81), *range(104, 113)]
    assert [n for n, c in by_number.items() if c == "transition metal"] == groups_3_to_12


@pytest.mark.parametrize(
    ("name", "symbol", "number"),
    [
        ("hydrogen", "H", 1),
        ("sodium", "Na", 11),
        ("iron", "Fe", 26),
        ("tin", "Sn", 50),
        ("tungsten", "W", 74),
        ("mercury", "Hg", 80),
        ("uranium", "U", 92),
        ("nobelium", "No", 102),
        ("oganesson", "Og", 118),
    ],
)
def test_well_known_elements(name: str, symbol: str, number: int) -> None:
    row = next(row for row in elements() if row["name"] == name)
    assert (row["symbol"], row["number"]) == (symbol, number)


def test_facts_cover_both_tables_and_answers_hold_no_full_stop() -> None:
    counts = Counter(fact.relation for fact in facts())
    assert counts == {r: 195 if i < 4 else 118 for i, r in enumerate(RELATIONS)}
    # Generation stops at a full stop or a new line.
    assert [fact for fact in facts() if re.search(r"[.\n]", fact.answer)] == []
    assert facts()[0] == Fact("Afghanistan", "capital", "Kabul"), (
        "the order of the facts is that of the tables"
    )


# Where the ODbL table of countries (used here as a check only) says something else, and why ours
# stays. Everything not listed has to agree.
EXPLAINED_COUNTRIES = {
    ("capital", "Eswatini"): "Mbabane is the administrative, Lobamba the royal capital",
    ("capital", "Sri Lanka"): "Kotte is the official, Colombo the commercial capital",
    ("capital", "Mongolia"): "Ulan Bator is the older spelling of Ulaanbaatar",
    ("capital", "Grenada"): "Saint George's written out",
    ("capital", "San Marino"): "the city is called San Marino or City of San Marino",
    ("capital", "United States"): "Washington with or without the district",
    ("currency", "Bulgaria"): "euro since January 2026",
    ("currency", "Zimbabwe"): "Zimbabwe Gold since April 2024",
    ("currency", "Micronesia"): "the source leaves it empty",
    ("currency", "Venezuela"): "the source adds the name of a former series, soberano",
    ("language", "Austria"): "the source names the dialect",
    ("language", "Moldova"): "Moldavian is Romanian under its constitution's former name",
    ("language", "Switzerland"): "the source lists Swiss German",
    ("language", "Botswana"): "Setswana is Tswana",
    ("language", "Lesotho"): "Sesotho is Sotho",
    ("language", "Malawi"): "Chichewa is Chewa",
    ("language", "Maldives"): "Dhivehi is Maldivian",
    ("language", "Nauru"): "Nauruan is the language Nauru",
    ("language", "Norway"): "the source lists the two written forms",
    ("language", "Iran"): "Persian (Farsi)",
    ("language", "Burkina Faso"): "French is no longer official since 2024",
    ("language", "Mali"): "French is no longer official since 2023",
    ("language", "Niger"): "Hausa is the national language since 2025",
}


SOURCE_NAMES = {
    "democratic republic of the congo": "dr congo",
    "republic of the congo": "congo",
    "turkey": "turkiye",
}


def test_countries_agree_with_a_second_table(shared_data: Path) -> None:
    source = json.loads((shared_data / "countries" / "countries.json").read_text("utf-8"))
    by_name: dict[str, dict[str, Any]] = {}
    for entry in source:
        for name in (entry["name"]["common"], entry["name"]["official"], *entry["altSpellings"]):
            by_name.setdefault(letters(name), entry)
    found, different = [], set()
    for row in countries():
        name = letters(row["name"])
        entry = by_name[SOURCE_NAMES.get(name, name)]
        found.append(entry["cca3"])
        assert entry["unMember"] or row["name"] in OBSERVERS
        for relation in ("capital", "currency", "language"):
            if letters(row[relation][0]) not in _accepted(entry, relation):
                different.add((relation, row["name"]))
        region = entry["region"]
        if region == "Americas":
            south = entry["subregion"] == "South America"
            region = "South America" if south else "North America"
        assert region == row["continent"][0], row["name"]
    assert len(set(found)) == 195
    assert different == set(EXPLAINED_COUNTRIES)


def _accepted(entry: dict[str, Any], relation: str) -> set[str]:
    if relation == "capital":
        return {letters(name) for name in entry["capital"]}
    if relation == "language":
        return {letters(name) for name in entry["languages"].values()}
    currencies = dict(entry["currencies"]).values()
    names = {letters(currency["name"]) for currency in currencies}
    return names | {name.split()[-1] for name in names} | {_short_currency(n) for n in names}


def _short_currency(name: str) -> str:
    """Official long names of currencies as the table writes them."""
    name = name.replace("united states", "us").replace("united arab emirates", "uae")
    if name == "british pound":
        return "pound sterling"
    return " ".join(name.split()[-2:])


EXPLAINED_FACTBOOK = {
    ("capital", "Kiribati"): "Tarawa is the atoll, South Tarawa the part with the government",
    ("capital", "Myanmar"): "the Factbook keeps Rangoon and names Nay Pyi Taw as administrative",
    ("capital", "Sri Lanka"): "another spelling of Sri Jayawardenepura Kotte",
    ("capital", "Vanuatu"): "Port-Vila with a hyphen",
    ("currency", "Bosnia and Herzegovina"): "the local name of the convertible mark",
    ("currency", "Bulgaria"): "euro since January 2026",
    ("currency", "Cape Verde"): "Cabo Verdean escudo",
    ("currency", "Eswatini"): "emalangeni is the plural of lilangeni",
    ("currency", "Moldova"): "lei is the plural of leu",
    ("currency", "Romania"): "lei is the plural of leu",
    ("currency", "Qatar"): "rial for riyal",
    ("currency", "Kyrgyzstan"): "som without the country",
    ("currency", "Uzbekistan"): "soum for som",
    ("currency", "United Arab Emirates"): "Emirati dirham",
    ("currency", "United Kingdom"): "British pound",
    ("language", "Burkina Faso"): "Mossi for Mooré",
    ("language", "Central African Republic"): "Sangho for Sango",
    ("language", "Eswatini"): "siSwati for Swazi",
    ("language", "Fiji"): "iTaukei for Fijian",
    ("language", "Malawi"): "Chewa for Chichewa",
    ("language", "Mauritius"): "Creole for Mauritian Creole",
    ("language", "Timor-Leste"): "Tetun for Tetum",
}
FACTBOOK_NAMES = {
    "democratic republic of the congo": "drc",
    "ivory coast": "cote d'ivoire",
    "cape verde": "cabo verde",
    "myanmar": "burma",
    "micronesia": "federated states of micronesia",
    "vatican city": "holy see",
}


def test_countries_agree_with_the_factbook(shared_data: Path) -> None:
    pages = _factbook(shared_data / "factbook")
    different = set()
    for row in countries():
        if row["name"] == "Palestine":  # the Factbook has pages for its two parts only
            continue
        name = plain(row["name"])
        page = pages[FACTBOOK_NAMES.get(name, name)]
        capital, currency, language = (
            plain(json.dumps(page[part].get(heading, {}), ensure_ascii=False))
            for part, heading in (
                ("Government", "Capital"),
                ("Economy", "Exchange rates"),
                ("People and Society", "Languages"),
            )
        )
        currency = currency.replace("communaute financiere africaine", "west african cfa")
        currency = re.sub(
            "cooperation financiere en afrique cent\\w+", "central african cfa", currency
        )
        if plain(row["capital"][0]) not in capital:
            different.add(("capital", row["name"]))
        # Plurals change the ends of words, seldom the first four letters.
        if not all(word[:4] in currency for word in plain(row["currency"][0]).split()):
            different.add(("currency", row["name"]))
        if plain(row["language"][0]) not in language:
            different.add(("language", row["name"]))
    assert different == set(EXPLAINED_FACTBOOK)


def _factbook(folder: Path) -> dict[str, dict[str, Any]]:
    pages: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*__*.json")):
        page = json.loads(path.read_text("utf-8"))
        names = page.get("Government", {}).get("Country name", {})
        for form in ("conventional short form", "conventional long form"):
            name = re.sub(r"\s*\(.*?\)", "", plain(names.get(form, {}).get("text", "")))
            pages.setdefault(name.removeprefix("the ").strip(), page)
            pages.setdefault(plain(names.get(form, {}).get("text", "")), page)
    return pages
