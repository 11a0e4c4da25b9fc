"""report.html: what it holds, that nothing in it is trusted, and that a browser shows all of it.

The folders are written here, as the steps write them; that the steps do is test_entry_points'.
"""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest

from alpaca_rlhf.evaluation.report import page, plots, summary
from alpaca_rlhf.evaluation.report.__main__ import main
from alpaca_rlhf.evaluation.report.runs import groups, read_run
from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.errors import UserError

EVIL = "<script>window.stolen = 1</script><img src=x onerror='window.stolen = 2'>"
VERSIONS = {"started": "2026-01-02 03:04:05", "device": "no accelerator; 2 cores", "ranks": 1,
            "versions": {"Python": "3.11.7", "torch": "2.13.0"}}


def write(folder: Path, name: str, content) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        (folder / name).write_text(json.dumps(content))


def write_sft(folder: Path, seed: int) -> None:
    write(folder, "metrics.jsonl", [
        {"step": i, "loss": 2 / i + seed / 100, "grad_norm": 1.0, "lr": 1e-4 / i, "weight": 200,
         "memory_gb": 0.5, "time/elapsed": 0.5 * i} for i in range(1, 41)])
    write(folder, "results.json", {"step": 1, "before": {"perplexity": 1.5, "loss": 0.41},
                                   "after": {"perplexity": 1.25, "loss": 0.22}})
    write(folder, "training_arguments.json", {"seed": seed, "learning_rate": 1e-4})
    write(folder, "run.json", VERSIONS)


def write_reward_model(folder: Path, seed: int) -> None:
    write(folder, "metrics.jsonl", [
        {"step": i, "loss": 0.7 - i / 100, "accuracy": 0.5 + i / 100, "grad_norm": 1.0,
         "weight": 8, "memory_gb": 0.5, "time/elapsed": 0.5 * i} for i in range(1, 41)])
    write(folder, "results.json", {
        "step": 2, "before": {"accuracy": 0.5}, "after": {
            "accuracy": 0.9, "accuracy_low": 0.85, "accuracy_high": 0.93, "score_mean": 1.0,
            "score_std": 2.0, "rejected_mean": -1.0, "pairs": 40}})
    write(folder, "pair_scores.jsonl", [
        {"chosen": math.sin(i) + 1, "rejected": math.sin(2 * i), "chosen_tokens": 10.0 + i % 7,
         "rejected_tokens": 12.0 + i % 3} for i in range(40)])
    write(folder, "training_arguments.json", {"seed": seed, "num_train_epochs": 3})
    write(folder, "run.json", VERSIONS)


def sample(step: int) -> dict:
    numbers = {name: [0.5, -0.25] for name in ("logprob", "kl", "value", "advantage", "reward")}
    return {"step": step, "prompt": "Human: Hi", "reply": "Ho.", "score": 1.0, "eos": True,
            "padding": 3, "tokens": {"text": ["Human", ": Hi", EVIL, ""], "mask": [0, 0, 1, 1],
                                     **numbers}}


def reply(text: str, score: float, gold: float) -> dict:
    return {"prompt": "p", "reply": text, "score": score, "k1": 1.0, "k3": 1.0, "length": 9,
            "eos": True, "gold": gold}


def write_policy(folder: Path, seed: int, kl_coef: float = 0.05) -> None:
    names = [name for curve in plots.CURVES[3] for name in curve.series]
    write(folder, "metrics.jsonl", [
        {"step": i, **{name: i / 40 + seed / 10 for name in names}, "throughput/tokens": 100,
         "memory/peak_gb": 0.75, "time/elapsed": 2.0 * i} for i in range(1, 41)])
    mean = {"score": 1.0, "gold": 0.5, "length": 9.0, "eos": 1.0, "k3": 0.0, "score_std": 2.0}
    write(folder, "results.json", {
        "step": 3, "before": mean, "after": {**mean, "score": 3.0 + seed, "gold": 0.8, "k3": 3.0},
        "dialogues": [{"prompt": "Human: Hi\n\nAssistant:", "before": reply("Ho.", i / 9, 0.5),
                       "after": reply(EVIL, i / 9 + 1, 0.75)} for i in range(30)]})
    write(folder, "events.jsonl", [
        {"step": 20, "kind": "checkpoint", "message": "", "alarm": False},
        {"step": 30, "kind": "kl", "message": f"KL is off {EVIL}", "alarm": True}])
    write(folder, "samples.jsonl", [sample(step) for step in (1, 1, 1, 21, 40)])
    write(folder, "training_arguments.json", {"seed": seed, "kl_coef": kl_coef})
    write(folder, "run.json", VERSIONS)


def write_pipeline(folder: Path, seed: int = 1, **changes) -> Path:
    write_sft(folder / "actor", seed)
    write_reward_model(folder / "critic", seed)
    write_policy(folder / "final", seed, **changes)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A finished pipeline, with its report."""
    folder = write_pipeline(tmp_path_factory.mktemp("report") / "tiny")
    page.write([read_run(folder)], folder / "report.html")
    return folder


@pytest.fixture(scope="module")
def html(pipeline) -> str:
    return (pipeline / "report.html").read_text()


# --- what it holds -------------------------------------------------------------------------------


def captions(html: str) -> list[str]:
    return re.findall(r"<figcaption>(.*?)</figcaption>", html)


def test_every_curve_and_distribution_is_drawn(html):
    curves = [curve.title for number in (1, 2, 3) for curve in plots.CURVES[number]]
    more = ["held-out scores", "calibration", "accuracy by length",
            "accuracy by which response is longer", "reward against KL", "score, before and after",
            "reply length in tokens, before and after"]
    assert sorted(captions(html)) == sorted(curves + more)
    assert html.count("<svg") == len(curves + more)


def test_no_two_elements_share_an_id(html):
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', html))
    assert used <= set(ids)


def test_nothing_is_loaded_from_elsewhere_and_it_is_light(html):
    assert re.findall(r'(?:src|href)="(?!#)', html) == []
    assert "@import" not in html
    assert len(html) < 1_000_000


def test_arguments_versions_and_cost_are_there(html):
    for text in ("kl_coef", "2.13.0", "no accelerator; 2 cores", "0 min 20 s", "0.75 GB",
                 "8,000 tokens trained on", "4,000 tokens generated", "50 a second"):
        assert text in html, text


def test_the_summary_and_the_verdict_are_there(html):
    assert "<td>1.500</td><td>1.250</td>" in html
    assert "Score up by 1.50 standard deviations, gold by +0.300: as it should be" in html


def test_what_models_wrote_is_text(html):
    assert "<script>window" not in html
    assert "<img" not in html
    assert html.count("&lt;script&gt;window.stolen") >= page.DIALOGUES + 1


def test_tokens_have_their_numbers(html):
    cells = re.findall(r'<span class="t"[^>]*title="([^"]*)"', html)
    assert len(cells) == 3 * 4  # two of the first round, one of the last
    assert cells[:4] == [
        "mask 0", "mask 0",
        "mask 1, logprob 0.5, kl 0.5, value 0.5, advantage 0.5, reward 0.5",
        "mask 1, logprob -0.25, kl -0.25, value -0.25, advantage -0.25, reward -0.25"]


def test_an_alarm_is_told_and_its_absence_too(html, tmp_path):
    assert "KL is off" in html and "No alarm went off" not in html
    write_sft(tmp_path / "actor", 1)
    target = page.write([read_run(tmp_path)], tmp_path / "r.html")
    assert "No alarm went off" in target.read_text()


def test_what_is_very_long_is_cut_and_says_so(tmp_path):
    write_policy(tmp_path / "final", 1)
    long = sample(1)
    numbers = {name: [0.5] * 5000 for name in page.CHANNELS[1:]}
    long["tokens"] = {"text": ["x"] * 5000, "mask": [1] * 5000, **numbers}
    write(tmp_path / "final", "samples.jsonl", [long])
    results = json.loads((tmp_path / "final" / "results.json").read_text())
    results["dialogues"][0]["after"]["reply"] = "word " * 100_000
    write(tmp_path / "final", "results.json", results)
    html = page.write([read_run(tmp_path)], tmp_path / "report.html").read_text()
    assert "… 4600 more tokens" in html
    assert "word..." in html
    assert len(html) < 1_000_000


# --- of what is there ----------------------------------------------------------------------------


def test_a_run_that_is_not_finished_has_a_report_of_what_it_has(tmp_path):
    write(tmp_path / "final.partial", "metrics.jsonl", [
        {"step": 1, "kl/k1": 0.0, "reward/score_mean": 1.0, "time/elapsed": 1.0}])
    with (tmp_path / "final.partial" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "kl/')
    run = read_run(tmp_path / "final.partial")
    html = page.write([run], tmp_path / "report.html").read_text()
    assert "not finished: step 1" in html
    assert captions(html) == ["reward-model score", "KL to SFT, nats a reply", "reward against KL"]
    assert "not finished: step 1" in summary.as_text(run)


def test_numbers_that_are_not_finite_are_drawn_around(tmp_path):
    write_pipeline(tmp_path)
    rows = [{"step": i, "kl/k1": math.nan, "reward/score_mean": math.inf, "policy/loss": 1.0}
            for i in range(1, 40)]
    write(tmp_path / "final", "metrics.jsonl", rows)
    html = page.write([read_run(tmp_path)], tmp_path / "report.html").read_text()
    assert "reward against KL" in captions(html)


def test_a_finished_step_is_shown_in_place_of_one_in_the_making(tmp_path):
    write_sft(tmp_path / "actor", 1)
    write(tmp_path / "actor.partial", "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    assert read_run(tmp_path).steps[1].folder.name == "actor"


def test_a_folder_without_a_run_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="no run is there"):
            read_run(folder)


def test_a_report_that_fails_costs_a_line_and_not_the_training(pipeline, monkeypatch, capsys):
    def fail(runs, target):
        raise OSError("no space left")

    monkeypatch.setattr(page, "write", fail)
    page.write_beside(pipeline / "final")
    assert capsys.readouterr().out == (
        "warning: no report.html was written (OSError: no space left)\n")


def test_only_rank_0_writes_it(pipeline, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "actor"
    write_sft(folder, 1)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    page.write_beside(folder)
    assert not (folder / "report.html").exists()
    monkeypatch.undo()
    page.write_beside(folder)
    assert capsys.readouterr().out == f"report: {folder}/report.html\n"


# --- several runs --------------------------------------------------------------------------------


def test_runs_of_one_setting_are_a_group_and_a_setting_is_named_by_what_differs(tmp_path):
    runs = [read_run(write_pipeline(tmp_path / name, seed, kl_coef=coef))
            for name, seed, coef in (("a", 1, 0.05), ("b", 2, 0.05), ("c", 1, 0.2))]
    found = groups(runs)
    assert {label: [run.name for run in members] for label, members in found.items()} == {
        "kl_coef 0.05": ["a", "b"], "kl_coef 0.2": ["c"]}
    assert list(groups(runs[:2])) == [""]
    assert read_run(tmp_path / "a" / "final").name == "a/final"
    html = page.write(runs, tmp_path / "report.html").read_text()
    assert re.findall(r'<span class="swatch" style="background: (#\w+)"></span>([^<]*)', html) == [
        (plots.COLOURS[0], "kl_coef 0.05"), (plots.COLOURS[1], "kl_coef 0.2")]


def test_a_comparison_has_a_column_a_run_their_mean_and_a_band(tmp_path, capsys, monkeypatch):
    folders = [str(write_pipeline(tmp_path / f"seed{seed}", seed)) for seed in (1, 2, 3)]
    monkeypatch.setattr(sys, "argv", ["report", *folders, "--plot", str(tmp_path / "c.png")])
    main()
    html = (tmp_path / "report.html").read_text()
    assert "<th>seed1</th><th>seed2</th><th>seed3</th><th>after, mean ± deviation</th>" in html
    assert ("<td>1.000 → 4.000</td><td>1.000 → 5.000</td><td>1.000 → 6.000</td>"
            "<td>5.000 ± 1.000</td>") in html
    assert sorted(captions(html)) == sorted(
        curve.title for number in (1, 2, 3) for curve in plots.CURVES[number])
    assert html.count("FillBetween") == html.count("<svg")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert f"report: {tmp_path}/report.html" in capsys.readouterr().out


def test_one_run_gets_its_report_in_its_folder_and_a_table_on_the_console(
    pipeline, capsys, monkeypatch
):
    (pipeline / "report.html").rename(pipeline / "kept.html")
    monkeypatch.setattr(sys, "argv", ["report", str(pipeline)])
    main()
    (pipeline / "kept.html").rename(pipeline / "report.html")
    said = capsys.readouterr().out
    assert "reward model: held-out accuracy  0.500   0.900  95 % interval 0.850 to 0.930" in said
    assert said.endswith(f"report: {pipeline}/report.html\n")


# --- in a browser --------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser, pipeline, request):
    """The report in a window of some width, and what the console said of it."""
    said: list[str] = []
    view = browser.new_page(viewport={"width": request.param, "height": 844})
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("request", lambda sent: sent.url.startswith("file:") or said.append(sent.url))
    view.goto((pipeline / "report.html").as_uri())
    yield view, said
    view.close()


WIDTHS = pytest.mark.parametrize("opened", [1280, 390], indirect=True)


@needs_chromium
@WIDTHS
def test_every_plot_is_seen_and_the_page_does_not_scroll_sideways(opened, html):
    view, said = opened
    boxes = view.eval_on_selector_all(
        "figure.plot svg", "all => all.map(e => e.getBoundingClientRect().toJSON())")
    width = view.viewport_size["width"]
    assert len(boxes) == len(captions(html))
    for box in boxes:
        assert box["width"] > 250 and box["height"] > 150
        assert box["left"] >= 0 and box["right"] <= width
    assert view.evaluate("document.documentElement.scrollWidth") == width
    drawn = view.eval_on_selector_all(
        "figure.plot svg", "all => all.map(e => e.querySelectorAll('path, use').length)")
    assert min(drawn) > 5
    assert said == []


@needs_chromium
@WIDTHS
def test_tokens_are_coloured_by_what_is_chosen_and_say_their_numbers(opened):
    view, said = opened
    first = view.locator(".sample").first
    token = first.locator(".t").nth(3)

    def colours():
        return first.locator(".t").evaluate_all("all => all.map(e => e.style.background)")

    by_advantage = colours()
    assert by_advantage[:2] == ["", ""]  # the prompt's have none
    assert by_advantage[2] != by_advantage[3] != ""
    view.select_option("#channel", "mask")
    assert "" not in colours()
    token.click()
    assert first.locator(".numbers").inner_text() == token.get_attribute("title")
    assert said == []


@needs_chromium
@WIDTHS
def test_no_script_of_a_model_runs(opened):
    view, _ = opened
    assert view.evaluate("window.stolen") is None
    with view.expect_console_message(lambda message: "Content Security Policy" in message.text):
        view.evaluate("document.querySelector('main').insertAdjacentHTML('beforeend', "
                      "`<p onclick='window.stolen = 3' id=evil>x</p>`)")
        view.locator("#evil").click()
    assert view.evaluate("window.stolen") is None  # the page's policy refuses it


@needs_chromium
@WIDTHS
def test_details_open_and_show_the_arguments(opened):
    view, said = opened
    view.locator("summary", has_text="PPO").click()
    assert view.get_by_text("kl_coef").is_visible()
    assert said == []
