"""The page's part on repairs, the dial and spectra, from made-up and from real files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from forgetless.reports import report
from forgetless.reports.aftercare import (
    heat_maps,
    layers_chart,
    regained,
    settings,
    spectra_of,
    spectra_rows,
)
from forgetless.reports.findings import find
from forgetless.reports.payload import payload
from forgetless.studies.folder import RunFolder, run_folders
from forgetless.studies.study import study
from tests.tiny import recipe_of

from .test_page import facts, make_study, two_sheets, write_json

pytest_plugins = ["tests.tiny_fixtures"]

SETTINGS = {"repair-0.1": 0.5, "repair-1": 0.25, "dial-0.5": 0.75, "dare-0.5-seed-0": 0.6}
"""Label -> the share of what was lost that is still lost."""

OF_ALL = ["dial-0.5", "trained", "repair-0.1", "repair-1", "dare-0.5-seed-0"]
IN_WORDS = [
    "times 0.5", "as trained", "repaired with 0.1", "repaired with 1", "DARE, 50 % dropped",
]  # fmt: skip


def with_aftercare(folder: Path, taken: str | None = "repair-0.1") -> Path:
    """Every run of a made-up study with settings at which some lost items are right again."""
    for run in run_folders(folder):
        points = {"trained": point(0.0, 1.0, 1.0)}
        for label, share in SETTINGS.items():
            kind, number = label.split("-")[:2]
            strength, scale = (float(number), 1.0) if kind == "repair" else (0.0, float(number))
            points[label] = point(strength, scale, share)
            if kind == "dare":
                del points[label]["strength"], points[label]["scale"]
                points[label] |= {"words": IN_WORDS[-1], "lost_at_rank": 0.25}
            copy_scores(run, label, share)
        content = {"key": "k", "points": points, "scored": list(SETTINGS), "repaired": taken}
        write_json(run.aftercare, content)
        write_json(run.spectra, spectra())
    return folder


def point(strength: float, scale: float, share: float) -> dict[str, Any]:
    shares = {"drift": share, "given_up": (1 - share) / 10}
    return {"strength": strength, "scale": scale, "kl": 0.2 * share, "loss": 1.0, **shares}


def copy_scores(run: RunFolder, label: str, share: float) -> None:
    """The final scores, with so many of the items that were wrong at the end right again."""
    to = run.point(label)
    for file in (run.path / "scores" / "final").glob("*.json"):
        task = file.stem
        score, base = (json.loads(f.read_text()) for f in (file, run.scores("base", task)))
        value = score["value"] * share + base["value"] * (1 - share)
        if run.items("final", task).is_file():
            before, final = (
                [json.loads(line) for line in run.items(phase, task).read_text().splitlines()]
                for phase in ("base", "final")
            )
            lost = [i for i, item in enumerate(final) if item["score"] < before[i]["score"]]
            for i in lost[: round(len(lost) * (1 - share))]:
                final[i] = before[i]
            target = to.items("final", task)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("".join(json.dumps(item) + "\n" for item in final))
            value = sum(item["score"] for item in final) / len(final)
        write_json(to.scores("final", task), {**score, "value": value})


def spectra() -> dict[str, Any]:
    layers = [
        {
            "layer": f"layers.{block}.{module}",
            "module": module,
            "block": block,
            "relative_update": 0.1 + block,
            "update": {"effective": 3.0, "stable": 2.0, "at_90": 4 + block},
            "rotation": 0.5,
            "intruders": [0, 3],
            "output_change": None,
            "weight": {"effective": 20.0},
            "activations": {"effective": 5.0 + block},
            "shared_energy": None,
        }
        for block in range(3)
        for module in ("q_proj", "up_proj")
    ]
    means = {"relative_update": 1.1, "rotation": 0.5, "weight_rank_effective": 20.0, "layers": 3}
    return {"overall": means, "modules": {"q_proj": means, "up_proj": means}, "layers": layers}


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    sheets = two_sheets({"lora": 0.8, "pissa": 0.5}, {"lora": 0.5, "pissa": 0.4}, num_items=40)
    sheets[1] = type(sheets[1])(**{**vars(sheets[1]), "questions": facts(40)})
    return with_aftercare(make_study(tmp_path / "s", sheets, ["lora", "pissa"], seeds=(0, 1)))


def test_every_arm_and_setting_has_its_row_over_the_seeds(made_up: Path) -> None:
    found = find(made_up)
    used = settings(found.arms, found.evidence.tasks)
    lora = [each for each in used if each.arm == found.arms[0].label]
    assert [each.setting for each in lora] == OF_ALL
    assert [each.words for each in lora] == IN_WORDS
    assert [each.taken for each in lora] == [0, 0, 2, 0, 0]
    assert [each.lost_at_rank for each in lora] == [None] * 4 + [0.25]
    assert lora[2].values == {"kl": 0.1, "drift": 0.5, "given_up": 0.05}
    recall = {each.setting: each.scores["recall"] for each in lora}
    assert all(each.seeds == 2 for each in recall.values())
    order = ["trained", "dial-0.5", "repair-0.1", "repair-1"]
    values = [recall[label].value for label in order]
    assert values == sorted(values)
    assert values[0] < values[-1]


def test_what_the_taken_repair_regained_is_named(made_up: Path) -> None:
    found = find(made_up)
    rows = regained(found.arms, found.evidence.tasks)
    assert [(row.arm, row.task) for row in rows] == [(arm.label, "recall") for arm in found.arms]
    for row in rows:
        assert row.gained > row.lost == 0
        assert 0 < len(row.named) <= 4
        assert all("capital" in question for question in row.named)


def test_nothing_taken_nothing_regained(tmp_path: Path) -> None:
    sheets = two_sheets({"lora": 0.8}, {"lora": 0.5}, num_items=20)
    folder = with_aftercare(make_study(tmp_path / "s", sheets, ["lora"]), taken=None)
    found = find(folder)
    assert regained(found.arms, found.evidence.tasks) == []
    assert settings(found.arms, found.evidence.tasks)


def test_settings_do_not_make_another_arm(made_up: Path) -> None:
    import yaml

    from forgetless.core.files import load_yaml

    before = len(find(made_up).arms)
    for number, run in enumerate(run_folders(made_up)):
        recipe = load_yaml(run.recipe)
        recipe |= {"repair": {"strength": [float(number)]}, "dial": None, "spectra": number > 1}
        run.recipe.write_text(yaml.safe_dump(recipe))
    assert len(find(made_up).arms) == before


def test_spectra_by_module_and_by_block(made_up: Path) -> None:
    found = find(made_up)
    known = spectra_of(found.arms)
    table = spectra_rows(known)
    assert table is not None
    heads, rows = table
    assert len(rows) == 2 * 3
    assert [row[1] for row in rows[:3]] == ["q_proj", "up_proj", "all"]
    assert {len(row) for row in rows} == {len(heads)}
    assert "eff. rank W" in dict(heads)
    assert "eff. rank X" not in dict(heads)  # was not measured
    chart = layers_chart(known, {arm.label: i for i, arm in enumerate(found.arms)})
    assert chart is not None
    assert list(chart["titles"]) == [
        "relative_update",
        "update_rank_at_90",
        "rotation",
        "intruders",
        "narrowness",
    ]
    assert {row["values"]["narrowness"] for row in chart["rows"]} == {0.25, 0.3, 0.35}
    assert [row["values"]["update_rank_at_90"] for row in chart["rows"][:2]] == [4, 4]
    assert {row["values"]["intruders"] for row in chart["rows"]} == {2}


def test_maps_have_a_row_a_block_and_a_column_a_kind_of_module(made_up: Path) -> None:
    found = find(made_up)
    labels = [arm.label for arm in found.arms]
    chart = layers_chart(spectra_of(found.arms), {label: i for i, label in enumerate(labels)})
    assert chart is not None
    chart["rows"][0]["values"]["rotation"] = None  # of the first arm's q_proj in block 0
    chart["rows"].append(
        {**chart["rows"][1], "values": {**chart["rows"][1]["values"], "rotation": 1}}
    )
    maps = heat_maps(chart, labels)
    assert list(maps) == labels
    rotation, rank, narrow = maps[labels[0]]
    assert rotation.modules == ["q_proj", "up_proj"]
    assert rotation.rows == [(0, [None, 0.75]), (1, [0.5, 0.5]), (2, [0.5, 0.5])]
    assert rank.rows == [(0, [4, 4]), (1, [5, 5]), (2, [6, 6])]
    assert (rotation.most, rank.most, narrow.most) == (1, 6, 0.35)
    assert heat_maps({"rows": ()}, labels) == {}


def test_the_chart_leads_from_less_of_the_update_to_stronger_repairs(made_up: Path) -> None:
    chart = payload(find(made_up))["aftercare"]
    lora = [p for p in chart["points"] if p["arm"] == 0]
    assert [dict(p["rows"])["setting"] for p in lora] == IN_WORDS
    assert [p["named"] for p in lora] == [False, True, False, False, False]
    assert [p["apart"] for p in lora] == [False] * 4 + [True]
    assert chart["bases"][0]["kept"]["recall"]["value"] == pytest.approx(0.9)


def sections(page: str) -> dict[str, str]:
    return dict(re.findall(r'<section id="(\w+)"(.*?)</section>', page, flags=re.DOTALL))


def test_a_page_has_these_parts_only_where_there_is_something(
    made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    found = sections(report(made_up).read_text())
    assert "repaired with 0.1" in found["aftercare"]
    assert "Regained by the repair" in found["aftercare"]
    assert "DARE, 50 % dropped" in found["aftercare"]
    assert "25.0\N{NO-BREAK SPACE}% of it lost" in found["aftercare"]
    assert "up_proj" in found["inside"]
    bare = make_study(tmp_path / "bare", two_sheets({"lora": 0.8}, {"lora": 0.5}), ["lora"])
    without = sections(report(bare).read_text())
    assert not {"aftercare", "inside"} & without.keys()


def test_figures_of_the_aftercare_are_drawn(made_up: Path) -> None:
    report(made_up)
    assert (made_up / "report" / "figures" / "aftercare.png").is_file()


def test_a_real_study_shows_what_it_measured(
    tiny_base: Path, tiny_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    changes: dict[str, Any] = {
        "repair": {"strength": [0.1, 1]},
        "dial": {"scales": [0.5]},
        "residual": True,
        "spectra": True,
        "comparators": [{"kind": "oplora", "directions": 2}, {"kind": "intruders"}],
    }
    recipe = recipe_of(tiny_base, tiny_files, **changes)
    axes = {"adapter.method": ["lora", "pissa"]}
    done = study({"name": "both", "recipe": recipe, "axes": axes}, tmp_path)
    found = sections(report(done.folder).read_text())
    for words in (
        "as trained",
        "times 0.5",
        "repaired with 1",
        "base without the start",
        "oplora, directions 2",
        "intruders, keep 0.25",
    ):
        assert found["aftercare"].count(words) == 2, words
    assert "eff. rank X" in found["inside"]
    # What the claims of the papers are read off: by kind of module, and by block.
    for words in ("rank of W", "eff. rank X", "turned", "in the head", "rank of dW", "shared"):
        assert f'class="sort">{words}<' in found["inside"], words
    assert found["inside"].count('class="heat"') == 2 * 4
    values = re.findall(r'<td style="--share: (\d+)%">([\d.]+)</td>', found["inside"])
    assert len(values) == 2 * 4 * 2 * 7
    assert all(int(share) <= 50 for share, _ in values)
