"""The report of a run: its numbers, its file, and what its script does in a real browser."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anomem.cli import main
from anomem.cli.main import _parse
from anomem.data import DataConfig
from anomem.evaluate.metrics import auroc
from anomem.report import alpha_at, bootstrap_interval, confusion, report_run, start_threshold
from anomem.report.page import command_of
from anomem.scoring import Calibration
from anomem.train import FitConfig, RunConfig, preset
from anomem.train.fitting import load_fitted_run
from tests.train.test_fitting import parts, write

pytest.importorskip("jinja2", reason="needs the extra report")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ODD = "<img src=x onerror=alert(1)>&\"'.png"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fitted run with masks, mistakes and a name that looks like markup."""
    root = tmp_path_factory.mktemp("photos") / "parts"
    write(root / "train" / "good", parts(20))
    write(root / "test" / "good", parts(9, 1))  # 00.png is replaced
    write(root / "test" / "good", parts(1, 3, defect=True))  # a normal one that scores high: a false alarm
    write(root / "test" / "spot", parts(8, 2, defect=True))
    write(root / "test" / "none", parts(4, 5))  # anomalies that nothing shows: missed
    (root / "test" / "spot" / "07.png").rename(root / "test" / "spot" / ODD)
    spots, missed = [*(f"{i:02d}" for i in range(7)), ODD.removesuffix(".png")], [f"{i:02d}" for i in range(4)]
    for kind, names in (("spot", spots), ("none", missed)):
        mask = np.zeros((64, 64), np.uint8)
        mask[8:24, 40:56] = 255
        (root / "ground_truth" / kind).mkdir(parents=True)
        for name in names:
            Image.fromarray(mask).save(root / "ground_truth" / kind / f"{name}.png")
    path = root.parent / "run"
    options = ["--encoder=efficientnet_lite0", "--weights=none", "--data.image-size=64", "--run.device=cpu",
               "--alpha=0.1", "--scales", "block3", "--fill.prototypes", "32"]  # fmt: skip
    assert main(["fit", str(root), *options, "--run.directory", str(path), "--quiet"]) == 0
    return path


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return report_run(run, with_baselines=False)


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_one_file_without_network(page: Path) -> None:
    text = page.read_text()
    assert len(text) < 5_000_000
    links = re.findall(r"""(?:src|href)=["']?([^"'\s>]+)""", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))
    assert all(link.startswith(("#", "data:image/")) for link in links), links
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    assert "<img src=x" not in text, "a file name became markup"


def test_it_holds_what_the_run_says(run: Path, page: Path) -> None:
    data = data_of(page)
    _, _, task, detector = load_fitted_run(run)
    said = detector.over(task.test)
    scores = said.scores[detector.lead].double()
    assert [score for score, _ in data["scores"]] == scores.tolist()
    labels = task.test_is_anomaly
    at_start = confusion(scores, labels, data["threshold"])
    assert said.verdicts is not None
    assert at_start.tp + at_start.fp == int(said.verdicts.sum()), "the first threshold is the verdict's"
    assert data["calibration"] == detector.calibration.scores[detector.lead].tolist()
    assert data["curves"][0]["auroc"] == auroc(scores, labels)
    assert len(data["gallery"]) == 21
    assert {item["name"].rsplit("/", 1)[-1] for item in data["gallery"]} >= {ODD}
    assert sum("mask" in item for item in data["gallery"]) == 12
    assert len(data["drift"]["points"]) == int((~labels).sum())


def test_numbers_by_hand() -> None:
    scores = torch.tensor([0.1, 0.4, 0.35, 0.8])
    labels = torch.tensor([False, False, True, True])
    assert confusion(scores, labels, 0.4) == (1, 1, 1, 1)
    assert confusion(scores, labels, 0.9) == (0, 0, 2, 2)
    assert alpha_at(torch.tensor([1.0, 2.0, 3.0]), 2.0) == 3 / 4
    low, high = bootstrap_interval(auroc, torch.arange(60.0), torch.arange(60) >= 30)
    assert (low, high) == (1.0, 1.0)
    low, high = bootstrap_interval(auroc, torch.rand(400), torch.arange(400) % 2 == 0)
    assert low < 0.5 < high
    assert 0.05 < high - low < 0.2
    calibration = Calibration({"s": torch.arange(1.0, 20.0)})  # 19: alpha = 0.1 lets two in twenty exceed
    threshold = start_threshold(scores, labels, calibration, "s", 0.1)
    for value in (17.5, 18.0, 18.5, 19.0, 20.0):
        verdict = bool(calibration.anomalous("s", torch.tensor([value]), 0.1))
        assert (value >= threshold) == verdict, value


def test_the_command_is_the_settings() -> None:
    assert command_of(preset("digits"), Path("runs/x")) == "anomem train --preset digits --run.directory runs/x"


@pytest.mark.parametrize("aligned", [True, False, None])
def test_the_command_gives_the_settings(aligned: bool | None) -> None:
    """Flags, their opposites, values that may be None, and lists."""
    data = DataConfig("folder", normal="", root="photos", letterbox=True, grey=True, aligned=aligned, levels=(0, 4095))
    run = RunConfig(directory="runs/x", threads=2)
    for config in (
        FitConfig(data=data, run=run, scales=("block3", "block5")),
        replace(preset("folder"), data=data, run=replace(run, cuda_graph=False, tensorboard=True)),
        replace(preset("digits"), run=run, loss=replace(preset("digits").loss, symmetric=False)),
    ):
        command: Any = _parse(shlex.split(command_of(config, Path("runs/x")))[1:])
        settings = command.settings
        if isinstance(settings, FitConfig):  # its folder is an argument
            settings = replace(settings, data=replace(settings.data, root=str(command.folder)))
        assert settings == config


def test_a_trained_run_and_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"data.normal": 3, "optimizer.steps": 4, "optimizer.batch-size": 32, "optimizer.warmup": 1,
              "loss.max-positions": 2, "score.copies": 0, "run.device": "cpu", "run.log-every": 2}  # fmt: skip
    path = tmp_path / "run"
    tiny = [*(f"--{name}={value}" for name, value in values.items()), "--model.prototypes", "8"]
    assert main(["train", *tiny, "--run.directory", str(path), "--quiet"]) == 0
    capsys.readouterr()
    output = tmp_path / "mine.html"
    output.write_text("<p>mine</p>")
    assert main(["report", str(path), "--output", str(output), "--no-baselines"]) == 2
    assert "was not written by anomem" in capsys.readouterr().err
    assert output.read_text() == "<p>mine</p>"
    for _ in range(2):  # the second time it is ours
        assert main(["report", str(path), "--no-baselines"]) == 0
    data = data_of(path / "report.html")
    assert data["training"] is not None
    assert data["calibration"] is None
    assert data["drift"] is None
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "holds no run" in capsys.readouterr().err


DRIVER = """
<script>
window.errors = [];
window.addEventListener("error", (event) => errors.push(String(event.message)));
for (const level of ["error", "warn"]) console[level] = (...words) => errors.push(words.join(" "));
</script>
"""
STEPS = """
<script>
const text = (id) => document.getElementById(id).textContent;
const set = (id, value, type) => {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event(type));
};
const cards = () => [...document.querySelectorAll("#gallery .card")];
const key = (name, target) => target.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
const result = { steps: [], filters: {} };
const slider = document.getElementById("threshold");
for (let i = 0; i <= +slider.max; i += 1) {
  set("threshold", i, "input");
  const step = { threshold };
  for (const name of ["tp", "fp", "tn", "fn", "alpha", "fpr"]) step[name] = text(name);
  result.steps.push(step);
}
const chart = document.getElementById("histogram");
const clientX = chart.getBoundingClientRect().right - 9;
chart.dispatchEvent(new PointerEvent("pointermove", { buttons: 1, clientX }));
result.dragged = threshold;
set("threshold", candidates.indexOf(data.threshold), "input");
for (const outcome of ["all", "mistakes", "fp", "fn", "tp", "tn"]) {
  set("outcome", outcome, "change");
  result.filters[outcome] = cards().map((card) => card.dataset.name);
}
set("outcome", "all", "change");
result.order = cards().map((card) => card.classList.contains("wrong"));
set("kind", "spot", "change");
result.spot = cards().length;
set("kind", "", "change");
set("search", "ONERROR", "input");
result.search = cards().map((card) => card.dataset.name);
set("search", "", "input");
set("sort", "high", "change");
result.high = cards().map((card) => data.gallery.find((item) => item.name === card.dataset.name).score);
cards()[0].focus();
key("ArrowRight", document.activeElement);
result.moved = cards().indexOf(document.activeElement);
const heat = () => document.getElementById("gallery").classList.contains("heat");
result.heat = [heat()];
key("h", document.body);
result.heat.push(heat());
cards()[0].click();
result.dialog = document.getElementById("large").open;
result.unnamed = [...document.querySelectorAll("input, select, button, svg")].filter((e) =>
  !e.labels?.length && !e.textContent.trim() && !e.getAttribute("aria-label")).length;
const wide = () => chart.viewBox.baseVal.width;
result.print = [wide()];
window.dispatchEvent(new Event("beforeprint"));
result.print.push(wide(), document.querySelector("#roc").viewBox.baseVal.width);
window.dispatchEvent(new Event("afterprint"));
result.print.push(wide());
const lines = [...document.querySelectorAll("#roc polyline")];
result.widths = lines.map((line) => +line.getAttribute("stroke-width"));
const strips = [...document.querySelectorAll(".strip")];
result.overflowing = strips.filter((strip) => strip.scrollWidth > strip.clientWidth).length;
result.alarm = document.getElementById("martingale").textContent.includes("alarm");
result.errors = errors;
const out = document.createElement("pre");
out.id = "result";
out.textContent = JSON.stringify(result);
document.body.append(out);
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_in_a_browser(run: Path, page: Path, tmp_path: Path) -> None:
    """The slider shows what Python computes; filters, keys and dialog work; the console has no error."""
    driven = tmp_path / "driven.html"
    text = page.read_text()
    driven.write_text(text.replace("<body", DRIVER + "<body", 1).replace("</body>", STEPS + "</body>"))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000",
               f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", driven.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-2000:]
    result: dict[str, Any] = json.loads(html.unescape(found[1]))
    assert result["errors"] == []

    data = data_of(page)
    scores = torch.tensor([score for score, _ in data["scores"]], dtype=torch.float64)
    labels = torch.tensor([bool(label) for _, label in data["scores"]])
    calibration = torch.tensor(data["calibration"], dtype=torch.float64)
    assert len(result["steps"]) > 20
    for step in result["steps"]:
        expected = confusion(scores, labels, step["threshold"])
        assert tuple(int(step[name]) for name in expected._fields) == expected
        assert step["alpha"] == f"{100 * alpha_at(calibration, step['threshold']):.2f}%"
        assert step["fpr"].startswith(f"{100 * expected.fp / (expected.fp + expected.tn):.1f}%")
    assert result["dragged"] > data["threshold"]

    names = {item["name"]: item for item in data["gallery"]}

    def outcome(name: str) -> str:
        called, anomalous = names[name]["score"] >= data["threshold"], names[name]["anomalous"]
        return ("tp" if anomalous else "fp") if called else ("fn" if anomalous else "tn")

    for wanted in ("fp", "fn", "tp", "tn"):
        assert set(result["filters"][wanted]) == {name for name in names if outcome(name) == wanted}
    mistakes = result["filters"]["fp"] + result["filters"]["fn"]
    assert set(result["filters"]["mistakes"]) == set(mistakes)
    assert len(mistakes) >= 2
    assert result["order"] == sorted(result["order"], reverse=True), "mistakes come first"
    assert result["spot"] == 8
    assert [name.rsplit("/", 1)[-1] for name in result["search"]] == [ODD]
    assert result["high"] == sorted(result["high"], reverse=True)
    assert (result["moved"], result["heat"], result["dialog"], result["unnamed"]) == (1, [True, False], True, 0)
    screen, sheet, half, again = result["print"]
    assert (sheet, half, again) == (700, 340, screen), "charts fit a sheet of paper while it is printed"
    assert result["widths"] == sorted(result["widths"]), "the leading curve is drawn above the others"
    assert (result["overflowing"], result["alarm"]) == (0, True)
