"""The report in a real browser: it works, it can be read by everyone, and it asks nothing of the network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import axe_playwright_python
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from diffmia_exp.report.__main__ import report
from tests import command
from tests.report import building

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")
EVIL = "<img src=x onerror=document.title='broken'>\"'</script><script>document.title='broken'</script>&amp;"
WIDE, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    outputs = building.sweep(tmp_path_factory.mktemp("outputs"))
    building.write(
        outputs / "runs", building.config(EVIL, dataset__name=EVIL, name="evil"), **building.controls(False) | {"unsound": [EVIL]}
    )
    status = {"status": "failed", "overrides": EVIL, "error": EVIL}
    (outputs / "sweeps" / "grid-1" / "99").mkdir()
    (outputs / "sweeps" / "grid-1" / "99" / "status.json").write_text(json.dumps(status))
    report([outputs], "html", outputs / "report.html")
    return (outputs / "report.html").as_uri()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    runs = tmp_path_factory.mktemp("small")
    for attack, sound in {"pia": True, "loss": False, "sima": True}.items():
        building.write(runs, building.config(attack, dataset__name=attack), **building.controls(sound))
    building.write(runs, building.config("knn", dataset__name="sima"))
    (runs / ".x.0123abcd.tmp").mkdir()
    report([runs], "html", runs / "report.html")
    return (runs / "report.html").as_uri()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of a grid of 32 cells that ran: eight attacks, two threat models, two seeds; half of gsa1's are not applicable."""
    outputs = tmp_path_factory.mktemp("real")
    grid = "attack=loss,multi_loss,secmi,pia,pian,sima,noise_aggregation,gsa1 threat_model=gray_box,white_box seed=0,1"
    small = "debug=quick split.pool=48 split.n_models=2 training.steps=60 training.batch_size=24 evaluation=default"
    done = command.run("-m", *grid.split(), *small.split(), "attack.rehearsals=1", f"output_dir={outputs}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "30 runs" in report([outputs], "html", outputs / "report.html")
    return outputs


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None, "needs Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])


@pytest.fixture
def said() -> list[str]:
    """What the console, failed scripts and requests beyond the page itself say; nothing, in a test that passes."""
    return []


@pytest.fixture
def blank(browser: Browser, said: list[str]) -> Iterator[Page]:
    page = browser.new_page(viewport=WIDE)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else said.append(request.url))
    yield page
    page.close()
    assert said == []


@pytest.fixture
def page(blank: Page, address: str) -> Page:
    blank.goto(address)
    return blank


def lines(page: Page) -> list[list[str]]:
    """The visible lines of the leaderboard."""
    return page.eval_on_selector_all(
        "#board tbody tr", "rows => rows.filter(r => r.checkVisibility()).map(r => [...r.cells].map(c => c.innerText))"
    )


def auc(line: list[str]) -> float:
    return float(line[1].split()[0])


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["laptop", "phone"])
def test_every_figure_and_picture_is_drawn_within_the_page(page: Page, size: Any) -> None:
    page.set_viewport_size(size)
    assert page.locator("figure").count() >= 15
    all_is_drawn(page, size)


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["laptop", "phone"])
def test_a_sweep_that_ran_is_shown_whole(blank: Page, real: Path, size: Any) -> None:
    blank.set_viewport_size(size)
    blank.goto((real / "report.html").as_uri())
    results = [json.loads(file.read_text()) for file in real.glob("runs/*/metrics.json")]
    done = [r for r in results if r["status"] == "done"]
    assert len(done) == 30
    all_is_drawn(blank, size)
    shown = lines(blank)
    assert {(line[0].split("\n")[0], line[5]) for line in shown} == {(r["attack"], r["threat_model"]) for r in done}
    for line in shown:  # two seeds: the mean
        of = [r["auc"] for r in done if (r["attack"], r["threat_model"]) == (line[0].split("\n")[0], line[5])]
        assert len(of) == 2
        assert auc(line) == pytest.approx(sum(of) / 2, abs=6e-4)
    blank.locator("#board th", has_text="AUC").locator("button").click()
    assert [auc(line) for line in lines(blank)] == sorted(map(auc, shown), reverse=True)
    blank.locator("select[name=threat]").select_option("white_box")
    assert {line[5] for line in lines(blank)} == {"white_box"}
    assert len(lines(blank)) == 8
    assert "needs white_box access" in blank.locator("#notes tbody").inner_text()
    assert objections(blank, "rules: {}") == []


def all_is_drawn(page: Page, size: Any) -> None:
    for figure in page.locator("figure").all():
        box = figure.locator("svg").bounding_box()
        assert box is not None
        assert box["width"] > 100
        assert box["height"] > 50
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= size["width"]
        assert figure.locator("svg path, svg line").count() > 3
        assert figure.locator("svg").get_attribute("aria-label")
        assert figure.locator("details tbody tr").count() > 0
    assert page.eval_on_selector_all("img", "images => images.filter(i => i.naturalWidth === 0).length") == 0
    assert page.locator("img").count() > 20
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]


def test_marks_say_what_they_stand_for(page: Page) -> None:
    page.locator("figure.forest [data-tip]").first.hover(force=True)
    assert "AUC" in page.locator("#tip").inner_text()
    assert page.locator("figure.roc [data-tip]").count() > 0
    page.mouse.move(5, 5)
    assert page.locator("#tip").is_hidden()


def test_headings_sort_with_mouse_and_keyboard(page: Page) -> None:
    heading = page.locator("#board th", has_text="AUC")
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    shown = [auc(line) for line in lines(page)]
    assert shown == sorted(shown, reverse=True)
    assert len(set(shown)) > 10
    heading.locator("button").press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    assert [auc(line) for line in lines(page)] == shown[::-1] or [auc(line) for line in lines(page)] == sorted(shown)
    other = page.locator("#board th", has_text="Threat model")
    other.locator("button").press("Space")
    assert other.get_attribute("aria-sort") == "ascending"
    assert heading.get_attribute("aria-sort") is None
    names = [line[5] for line in lines(page)]
    assert names == sorted(names)


def test_filters_narrow_leaderboard_groups_and_runs(page: Page) -> None:
    everything = lines(page)
    page.locator("select[name=threat]").select_option("white_box")
    assert {line[5] for line in lines(page)} == {"white_box"}
    page.locator("select[name=attack]").select_option("gsa2")
    assert {line[0].split("\n")[0] for line in lines(page)} == {"gsa2"}
    assert page.locator("output").inner_text() == f"1 of {len(everything)} lines"
    assert page.locator("section.group:visible").count() == 1
    assert page.locator("#runs tbody tr:visible").count() == 2
    page.locator("select[name=seed]").select_option("2")
    assert lines(page) == []
    page.get_by_role("button", name="Show all").click()
    page.wait_for_function("document.querySelectorAll('#board tbody tr[hidden]').length === 0")
    assert lines(page) == everything
    page.locator("select[name=dataset]").select_option("cifar10")
    assert [line[6].split()[-1] for line in lines(page)] == ["cifar10"]
    page.get_by_role("button", name="Show all").click()
    page.locator("select[name=trained]").select_option("snapshots")
    assert all("at step" in line[0] for line in lines(page))


def test_names_with_html_are_text(page: Page) -> None:
    assert page.title() == "Membership inference report"
    assert page.locator("script").count() == 1
    for place in ("#board tbody", "#notes tbody", "header", "#runs tbody"):
        assert EVIL in page.locator(place).text_content()  # type: ignore[operator]
    labels = page.eval_on_selector_all("svg[aria-label]", "all => all.map(e => e.getAttribute('aria-label'))")
    assert any(EVIL in label for label in labels)
    assert page.locator("img[src='x']").count() == 0


def test_controls_and_what_is_missing_are_told(page: Page) -> None:
    assert page.locator(".card .badge.unsound").count() >= 2
    assert "the split is unsound" in page.locator(".card .alarm").first.inner_text()
    missing = page.locator("#notes tbody").inner_text()
    for kind in ("failed", "unfinished", "not applicable", "split.n_models=1: must be at least 3", "needs white_box access"):
        assert kind in missing
    assert page.locator("#groups tbody tr").count() > 0


def objections(page: Page, rules: str) -> list[tuple[str, list[str]]]:
    """What axe-core objects to, with everything unfolded; within figures, which are pictures with a name, it has nothing to see."""
    page.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
    page.evaluate(AXE.read_text())
    found = page.evaluate(f"axe.run({{exclude: [['svg > g']]}}, {{{rules}}})")
    assert found["passes"]
    return [(v["id"], [node["html"][:150] for node in v["nodes"]][:3]) for v in found["violations"]]


def test_axe_finds_nothing_to_object_to(page: Page, small: str) -> None:
    structure = "rules: {'color-contrast': {enabled: false}}"
    assert objections(page, structure) == []
    page.set_viewport_size(PHONE)
    page.goto(small)
    assert objections(page, structure) == []


@pytest.mark.parametrize(("scheme", "background"), [("light", "rgb(246, 247, 249)"), ("dark", "rgb(17, 22, 28)")])
def test_contrast_is_enough_in_light_and_dark(page: Page, small: str, scheme: Any, background: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.goto(small)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == background
    assert objections(page, "runOnly: ['color-contrast']") == []
    colours = page.evaluate(
        "['ink', 'muted', 's0', 's1', 's2', 's3', 's4', 's5'].map(n => getComputedStyle(document.body).getPropertyValue('--' + n))"
    )
    surface = page.evaluate("getComputedStyle(document.body).getPropertyValue('--surface')")
    assert min(contrast(colour, surface) for colour in colours) > 4.5  # lines and marks need 3, text in figures 4.5


def contrast(a: str, b: str) -> float:
    """Of two colours #rrggbb, by WCAG 2."""

    def luminance(colour: str) -> float:
        values = [int(colour.strip()[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)
