"""The pages as a browser shows them: Chromium by its driver, wide and narrow, light and dark."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import datasets
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

import run_pipeline
from eval import __main__ as evaluation
from eval import compare
from eval.report import add_evaluation
from eval.report_page import page_of, warnings
from eval.svg import Axis, Point, Series, axis, lines
from eval.task_files import task_yaml

DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
# where CI runs, .ci/run installs them: there their absence is a failure
in_a_browser = pytest.mark.skipif(
    not (DRIVER and BROWSER) and "CI" not in os.environ,
    reason="needs chromium and chromedriver (Debian: chromium chromium-driver)",
)
RECIPES = ("auto", "svd-llm")


@pytest.fixture(scope="module")
def outputs(models, text, tmp_path_factory) -> list[Path]:
    """Two evaluated compressions of one tiny model."""
    root, found = tmp_path_factory.mktemp("pages"), []
    tasks = root / "cache" / "tasks"
    tasks.mkdir(parents=True)
    documents = [{"goal": "ab", "sol1": "cd", "sol2": f"e{n}", "label": n % 2} for n in range(8)]
    (tasks / "piqa.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tasks / "piqa.yaml").write_text(task_yaml(tasks / "piqa.jsonl", "piqa"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAYERPRESS_CACHE", str(root / "cache"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(root / "datasets"))
        for recipe in RECIPES:
            output = root / f"out-{recipe}"
            given = [
                "--model",
                str(models("llama")),
                "--recipe",
                recipe,
                "--target-ratio",
                "0.7",
                "--ratio-scope",
                "decoder",
            ]
            given += ["--calibration", str(text), "--calibration-tokens", "1024", "--sequence-length", "64"]
            assert run_pipeline.main([*given, "--evaluate", "none", "--output", str(output)]) == 0
            given = [
                "--model",
                str(output),
                "--compare-with",
                str(models("llama")),
                "--evaluate",
                "piqa",
                "--text",
                str(text),
            ]
            given += ["--windows", "3", "--trust-remote-code", "--verbose", "--output", str(output / "evaluation.json")]
            assert evaluation.main([*given, "--lm-eval-output", str(output / "lm_eval")]) == 0
            add_evaluation(output, "a table")
            found.append(output)
    return found


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def show(browser, page: Path, width: int, scheme: str) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())


def contrast(browser, selector: str) -> float:
    """WCAG's contrast of an element's colour with the page's surface."""
    script = """
      const read = (c) => c.match(/[0-9.]+/g).slice(0, 3).map(Number);
      const light = (c) => c.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
      const found = document.querySelector(arguments[0]), style = getComputedStyle(found);
      const ink = light(read(found.namespaceURI.endsWith('svg') ? style.fill : style.color));
      const ground = light(read(getComputedStyle(document.body).backgroundColor));
      return (Math.max(ink, ground) + .05) / (Math.min(ink, ground) + .05);"""
    return browser.execute_script(script, selector)


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("which", ["report", "comparison"])
def test_a_page_is_readable_and_its_plots_have_data(browser, outputs, tmp_path, which, width, scheme):
    page = outputs[0] / "report.html"
    if which == "comparison":
        compare.write_comparison(tmp_path, outputs)
        page = tmp_path / "comparison.html"
    show(browser, page, width, scheme)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width, (
        "the page itself does not scroll sideways"
    )
    plots = browser.find_elements(By.TAG_NAME, "svg")
    assert len(plots) >= 3
    for plot in plots:
        marks = plot.find_elements(By.CSS_SELECTOR, "circle, rect.cell, polyline[points*=' ']")
        assert marks, plot.get_attribute("aria-label")
        assert all(mark.size["width"] > 0 for mark in marks)
        drawn = browser.execute_script("return arguments[0].querySelector('text').getBoundingClientRect().height", plot)
        assert drawn >= 9, "labels can be read"
    assert contrast(browser, "body") > 7 and contrast(browser, "svg text") > 4.5 and contrast(browser, "th") > 4.5


@in_a_browser
def test_nothing_is_fetched(browser, outputs):
    show(browser, outputs[0] / "report.html", 800, "light")
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []


def test_warnings_come_first_and_say_what_fell_short(outputs):
    report = json.loads((outputs[0] / "report.json").read_text())
    assert any("few documents" in line for line in warnings(report))
    stage = report["stages"][0] | {"peak_bytes": 10**12}
    dear = report | {"stages": [stage], "run": report["run"] | {"peak_memory_bytes": 10**12}, "evaluation": None}
    told = " ".join(warnings(dear | {"left_dense": [{"name": "experts", "reason": "three dimensions"}]}))
    assert "above the plan" in told and "not evaluated" in told and "experts (three dimensions)" in told
    mended = {"mended": {"moments damped": 5, "eigenvalues below zero": 3}}
    assert [line for line in warnings(report | mended) if "mended" in line] == ["mended: 3 eigenvalues below zero"]
    page = page_of(outputs[0])
    assert page.index("Before you read on") < page.index("Quality")


def test_what_a_model_says_of_itself_is_no_markup(outputs, tmp_path):
    copy = Path(shutil.copytree(outputs[0], tmp_path / "copy"))
    report = json.loads((copy / "report.json").read_text())
    report["model"] = report["run"]["command"] = "</pre><script>alert(1)</script>"
    (copy / "report.json").write_text(json.dumps(report))
    assert "<script" not in page_of(copy)


def test_a_comparison_knows_what_is_not_beaten(outputs):
    auto, other = compare.read_outputs(outputs)
    assert {auto.recipe, other.recipe} == set(RECIPES)
    text = next(iter(auto.texts))
    found = compare.unbeaten([auto, other], text)
    best = min((auto, other), key=lambda output: output.texts[text]["kl_nats_per_token"])
    assert best in found
    assert auto.operations == 2 * sum(
        int(line.split(",")[10])
        for line in (auto.directory / "matrices.csv").read_text().splitlines()[1:]
        if line.split(",")[0]
    )


def test_outputs_of_different_models_are_refused(outputs, tmp_path, capsys):
    copy = Path(shutil.copytree(outputs[0], tmp_path / "copy"))
    report = json.loads((copy / "report.json").read_text())
    report["fingerprint"]["weights_sha256"] = "0"
    (copy / "report.json").write_text(json.dumps(report))
    for given in ([str(outputs[0]), str(copy)], [str(tmp_path)]):
        assert compare.main([*given, "--output", str(tmp_path / "c")]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_an_axis_holds_its_values_and_has_round_ticks():
    linear = axis("x", [0.0, 7.3], 0, 100)
    assert linear.at(linear.low) == 0 and linear.at(linear.high) == 100 and linear.ticks() == [0, 2, 4, 6]
    log = axis("y", [3e-5, 0.5, 0.0], 100, 0, log=True)
    assert log.ticks()[0] == pytest.approx(1e-5) and log.at(0.0) == 100 and log.at(1e-3) == pytest.approx(60)
    assert Axis("layer", 0, 3, 0, 100, whole=True).ticks() == [0, 1, 2, 3]
    alone = lines([Series("one", [Point(1.0, 1.0)], "red")], "x", "y")
    assert "nan" not in alone and "<circle" in alone
