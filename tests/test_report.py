"""report.html: its content, that nothing in it is trusted, and that a browser shows all of it.

The folders are written here in the form in which the steps write them; test_entry_points has that.
"""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from alpaca_rlhf.evaluation.report import page, plots, summary
from alpaca_rlhf.evaluation.report.__main__ import main
from alpaca_rlhf.evaluation.report.runs import groups, read_run
from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.errors import UserError

EVIL = "<script>window.stolen = 1</script><img src=x onerror='window.stolen = 2'>"
START = {"started": "2026-01-02 03:04:05", "device": "no accelerator; 2 cores", "ranks": 1,
         "versions": {"Python": "3.11.7", "torch": "2.13.0"}}


def write(folder: Path, **files) -> None:
    """Write files by their names without ending: rows as .jsonl, an object as .json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        rows = content if isinstance(content, list) else [content]
        ending = "jsonl" if rows is content else "json"
        (folder / f"{name}.{ending}").write_text("".join(json.dumps(row) + "\n" for row in rows))


def sample(step: int, tokens: int = 2) -> dict:
    numbers = {name: [0.5, -0.25] * (tokens // 2) for name in page.CHANNELS}
    return {"step": step, "score": 1.0, "eos": True, "padding": 3, "tokens": {
        "text": ["Human", ": Hi"] + [EVIL, ""] * (tokens // 2), "mask": [0, 0] + [1] * tokens,
        **numbers}}


def dialogue(text: str, score: float = 0.0) -> dict:
    before = {"reply": "Ho.", "score": score, "length": 9, "eos": True, "gold": 0.5}
    return {"prompt": "Human: Hi\n\nAssistant:", "before": before,
            "after": {**before, "reply": text, "score": score + 1, "gold": 0.75}}


MEAN = {"score": 1.0, "gold": 0.5, "length": 9.0, "eos": 1.0, "k3": 0.0, "score_std": 2.0}
FILES = {  # of a step, besides metrics and arguments
    1: {"results": {"step": 1, "before": {"perplexity": 1.5}, "after": {"perplexity": 1.25}}},
    2: {"results": {"step": 2, "before": {"accuracy": 0.5}, "after": {
            "accuracy": 0.9, "accuracy_low": 0.85, "accuracy_high": 0.93}},
        "pair_scores": [{"chosen": math.sin(i), "rejected": math.sin(2 * i),
                         "chosen_tokens": 10.0 + i % 7, "rejected_tokens": 12.0 + i % 3}
                        for i in range(40)]},
    3: {"results": {"step": 3, "before": MEAN, "after": {**MEAN, "score": 4.0, "gold": 0.8},
                    "dialogues": [dialogue(EVIL, i / 9) for i in range(30)]},
        "events": [{"step": 20, "kind": "checkpoint", "message": "", "alarm": False},
                   {"step": 30, "kind": "kl", "message": f"KL is off {EVIL}", "alarm": True}],
        "samples": [sample(step) for step in (1, 1, 1, 21, 40)]},
}


def write_step(folder: Path, number: int, seed: int = 1, kl_coef: float = 0.05, **changes) -> None:
    """Write a finished step of 40 optimizer steps or PPO iterations."""
    metrics = [metric for labels in plots.CURVES[number].values() for metric in labels]
    rows = [{"step": i, **dict.fromkeys(metrics, i / 40 + seed / 10), "weight": 200,
             "memory_gb": 0.5, "throughput/tokens": 100, "memory/peak_gb": 0.75,
             "time/elapsed": 0.5 * i} for i in range(1, 41)]
    arguments = {"seed": seed, "kl_coef": kl_coef}
    write(folder, **{"run": START, "metrics": rows, "training_arguments": arguments,
                     **FILES[number], **changes})


def write_pipeline(folder: Path, seed: int = 1, kl_coef: float = 0.05, **changes) -> Path:
    for number, name in enumerate(("actor", "critic", "final"), 1):
        write_step(folder / name, number, seed, kl_coef, **changes if number == 3 else {})
    return folder


def render(*folders: Path) -> str:
    """The report of runs, written above the first."""
    runs = [read_run(folder) for folder in folders]
    return page.write(runs, folders[0].parent / "rendered.html").read_text()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A finished pipeline, with its report."""
    folder = write_pipeline(tmp_path_factory.mktemp("report") / "tiny")
    page.write([read_run(folder)], folder / "report.html")
    return folder


@pytest.fixture(scope="module")
def html(pipeline) -> str:
    return (pipeline / "report.html").read_text()


# --- content -------------------------------------------------------------------------------------

CURVES = [title for number in (1, 2, 3) for title in plots.CURVES[number]]


def captions(html: str) -> list[str]:
    return re.findall(r"<figcaption>(.*?)</figcaption>", html)


def test_every_curve_and_distribution_is_drawn(html):
    more = ["held-out scores", "calibration", "accuracy by length",
            "accuracy by which response is longer", "score against KL",
            "score, before and after", "response length in tokens, before and after"]
    assert sorted(captions(html)) == sorted(CURVES + more)
    assert html.count("<svg") == len(CURVES + more)


def drawn(runs: list[list[float]], metric: str = "reward/score_mean"):
    """Axes with a line of these values of each run, the first at step 1."""
    axis = Figure().subplots()
    points = [np.array(list(enumerate(values, 1)), dtype=float) for values in runs]
    plots.draw_curves(axis, [(metric, points)], {})
    return axis


def test_a_line_is_the_mean_of_its_runs_in_their_range_up_to_the_end_of_the_shortest():
    axis = drawn([[1, 2, 6], [3, 6, 9, 12]])
    assert axis.lines[0].get_xydata().tolist() == [[1, 2], [2, 4], [3, 7.5]]
    corners = axis.collections[0].get_paths()[0].vertices.tolist()
    assert {(1, 1), (1, 3), (2, 2), (2, 6), (3, 6), (3, 9)} <= set(map(tuple, corners))


def test_a_long_noisy_line_is_smoothed_and_a_held_out_one_is_not():
    values = [float(i % 2) for i in range(40)]
    raw, smooth = drawn([values]).lines
    assert raw.get_ydata().tolist() == values
    assert smooth.get_ydata()[20] == 0.4  # of 0 1 0 1 0 around it
    (line,) = drawn([values], "eval/loss").lines
    assert line.get_ydata().tolist() == values
    assert len(drawn([values * 30]).lines[0].get_xdata()) == plots.POINTS


def test_accuracy_is_grouped_by_the_longer_sequence_and_by_the_longer_response(html):
    found = dict(re.findall(r"<figcaption>(accuracy by .*?)</figcaption>(.*?)</figure>", html,
                            re.DOTALL))
    assert re.findall(r">([\d–]+)</text>.*?>n=(\d+)<", found["accuracy by length"], re.DOTALL) == [
        ("12–13", "16"), ("14", "14"), ("15–16", "10")]
    groups = r">(chosen|rejected|neither)</text>.*?>n=(\d+)<"
    assert re.findall(groups, found["accuracy by which response is longer"], re.DOTALL) == [
        ("chosen", "16"), ("rejected", "18"), ("neither", "6")]


def test_no_two_elements_share_an_id(html):
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', html)) <= set(ids)


def test_nothing_is_loaded_from_elsewhere_and_it_is_light(html):
    assert re.findall(r'(?:src|href)="(?!#)', html) == []
    assert "@import" not in html
    assert len(html) < 1_000_000


@pytest.mark.parametrize("text", [
    "kl_coef", "2.13.0", "no accelerator; 2 cores", "0:00:20", "0.75 GB",
    "8,000 tokens trained on", "8,000 pairs", "4,000 tokens generated", "200 per second",
    "<td>1.500</td><td>1.250</td>", "KL is off",
    "Score up by 1.50 standard deviations, gold by +0.300: target met",
])
def test_summary_alarms_arguments_environment_and_cost_are_there(html, text):
    assert text in html


def test_what_models_wrote_is_text(html):
    assert "<script>window" not in html and "<img" not in html
    assert html.count("&lt;script&gt;window.stolen") >= page.LIMITS["dialogues"] + 1


def test_tokens_have_their_numbers(html):
    cells = re.findall(r'<span class="t" tabindex="0" ([^>]*)>', html)
    assert re.findall(r"PPO iteration (\d+) <small>score", html) == ["1", "1", "40"]
    assert len(cells) == 3 * 4
    assert cells[:3] == [
        'data-mask="0"', 'data-mask="0"', 'data-mask="1" data-logprob="0.5" data-kl="0.5" '
        'data-value="0.5" data-advantage="0.5" data-reward="0.5"']


def test_a_run_without_alarms_says_so(html, tmp_path):
    write_step(tmp_path, 1)
    assert "No alarm went off" in render(tmp_path)
    assert "No alarm went off" not in html


def test_what_is_very_long_is_cut_and_says_so(tmp_path):
    write_step(tmp_path, 3, samples=[sample(1, tokens=5000)],
               results={"step": 3, "dialogues": [dialogue("word " * 100_000)]})
    html = render(tmp_path)
    assert "… 4602 more tokens" in html and "word..." in html
    assert len(html) < 1_000_000


def test_a_run_that_is_not_finished_has_a_report_of_what_it_has(tmp_path):
    folder = tmp_path / "final.partial"
    write(folder, metrics=[{"step": 1, "kl/k1": 0.0, "reward/score_mean": 1.0}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "kl/')
    html = render(folder)
    assert "not finished: step 1" in html
    assert captions(html) == ["reward-model score", "KL to SFT, nats per response",
                              "score against KL"]
    assert "not finished: step 1" in summary.as_text(read_run(folder))


def test_numbers_that_are_not_finite_do_not_stop_the_report(tmp_path):
    write_step(tmp_path, 3, metrics=[
        {"step": i, "kl/k1": math.nan, "reward/score_mean": math.inf, "policy/loss": 1.0}
        for i in range(1, 40)])
    assert "score against KL" in captions(render(tmp_path))


@pytest.mark.parametrize(("score", "gold", "verdict"), [
    (4.0, 0.8, "up by 1.50 standard deviations, gold by +0.300: target met"),
    (4.0, 0.65, "up by 1.50 standard deviations, gold by +0.150: below target"),
    (2.5, 0.8, "up by 0.75 standard deviations, gold by +0.300: below target"),
    (4.0, 0.55, "reward hacking: score up by 1.50 standard deviations, but gold by +0.050 only"),
    (4.0, None, "score up by 1.50 standard deviations; no gold rule for this data"),
])
def test_the_verdict_on_ppo_needs_a_higher_score_and_higher_gold(tmp_path, score, gold, verdict):
    before, after = {"score": 1.0, "score_std": 2.0}, {"score": score}
    if gold is not None:
        before["gold"], after["gold"] = 0.5, gold
    write_step(tmp_path, 3, results={"step": 3, "before": before, "after": after})
    assert verdict in summary.verdict(read_run(tmp_path))


# --- folders -------------------------------------------------------------------------------------


def test_a_finished_step_is_shown_in_place_of_one_in_the_making(tmp_path):
    write_step(tmp_path / "actor", 1)
    write(tmp_path / "actor.partial", metrics=[{"step": 1, "loss": 1.0}])
    assert read_run(tmp_path).steps[1].folder.name == "actor"


@pytest.mark.parametrize("name", [".", "missing"])
def test_a_folder_without_a_run_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="no run found"):
        read_run(tmp_path / name)


def test_a_report_that_fails_costs_a_line_and_not_the_training(pipeline, monkeypatch, capsys):
    def fail(runs, target):
        raise OSError("no space left")

    monkeypatch.setattr(page, "write", fail)
    page.write_beside(pipeline / "final")
    assert capsys.readouterr().out == (
        "warning: no report.html was written (OSError: no space left)\n")


def test_only_rank_0_writes_it(tmp_path, monkeypatch, capsys):
    write_step(tmp_path, 1)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    page.write_beside(tmp_path)
    assert not (tmp_path / "report.html").exists()
    monkeypatch.undo()
    page.write_beside(tmp_path)
    assert capsys.readouterr().out == f"report: {tmp_path}/report.html\n"


# --- several runs --------------------------------------------------------------------------------


def test_runs_of_one_setting_are_a_group_and_a_setting_is_named_by_what_differs(tmp_path):
    folders = [write_pipeline(tmp_path / name, seed, kl_coef)
               for name, seed, kl_coef in (("a", 1, 0.05), ("b", 2, 0.05), ("c", 1, 0.2))]
    runs = [read_run(folder) for folder in folders]
    assert {setting: [run.name for run in members] for setting, members in groups(runs).items()
            } == {"kl_coef 0.05": ["a", "b"], "kl_coef 0.2": ["c"]}
    assert list(groups(runs[:2])) == [""] and read_run(folders[0] / "final").name == "a/final"
    swatch = r'<span class="swatch" style="background: (#\w+)"></span>([^<]*)'
    assert re.findall(swatch, render(*folders)) == [
        (plots.COLOURS[0], "kl_coef 0.05"), (plots.COLOURS[1], "kl_coef 0.2")]


def test_a_comparison_has_a_column_per_run_and_their_mean(tmp_path, capsys, monkeypatch):
    folders = []
    for seed in (1, 2, 3):
        after = {**MEAN, "score": 3.0 + seed}
        results = {"step": 3, "before": MEAN, "after": after}
        folders.append(str(write_pipeline(tmp_path / f"seed{seed}", seed, results=results)))
    monkeypatch.setattr(sys, "argv", ["report", *folders, "--plot", str(tmp_path / "c.png")])
    main()
    html = (tmp_path / "report.html").read_text()
    assert "<th>seed1</th><th>seed2</th><th>seed3</th><th>after, mean ± std</th>" in html
    assert ("<td>1.000 → 4.000</td><td>1.000 → 5.000</td><td>1.000 → 6.000</td>"
            "<td>5.000 ± 1.000</td>") in html
    assert sorted(captions(html)) == sorted(CURVES)
    assert html.count("FillBetween") == html.count("<svg")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert f"report: {tmp_path}/report.html" in capsys.readouterr().out


def test_one_run_gets_its_report_in_its_folder_and_a_table_on_the_console(
    tmp_path, capsys, monkeypatch
):
    write_pipeline(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    main()
    assert (tmp_path / "report.html").exists()
    out = capsys.readouterr().out
    assert "reward model: held-out accuracy  0.500   0.900  95 % interval 0.850 to 0.930" in out
    assert "  SFT (score 0.00, gold 0.50)                   RLHF (score 1.00, gold 0.75)" in out
    assert out.endswith(f"report: {tmp_path}/report.html\n")


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
    """The report in a window of some width, and the lines of the browser's console."""
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
def test_tokens_are_coloured_by_the_chosen_channel_and_show_their_numbers(opened):
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
    assert first.locator(".numbers").inner_text() == (
        "mask 1, logprob -0.25, kl -0.25, value -0.25, advantage -0.25, reward -0.25")
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
