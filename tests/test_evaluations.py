"""prompt_eval, rw_eval and win_rate: their numbers, their files, and what they refuse."""

import json
import shutil

import numpy as np
import pytest

from alpaca_rlhf.demo import assistant_world
from alpaca_rlhf.evaluation import comparison, reward_quality, saved, side_by_side
from alpaca_rlhf.evaluation.statistics import wilson_interval
from alpaca_rlhf.training_model.step1_supervised_finetuning import prompt_eval
from alpaca_rlhf.training_model.step2_reward_model_finetuning import rw_eval
from alpaca_rlhf.training_model.step3_rlhf_finetuning import win_rate
from alpaca_rlhf.utils.configs import LoadingConfig, PromptEvalConfig, WinRateConfig
from alpaca_rlhf.utils.errors import UserError

PAIRS = [{"prompt": f"What is {i}?", "chosen": f"It is {i}" + "!" * (i % 3),
          "rejected": "No" + "." * (i % 4)} for i in range(40)]


def run(module, *words):
    module.main(list(map(str, words)))


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return path


# --- prompt_eval ---------------------------------------------------------------------------------


def test_responses_stand_side_by_side_and_equal_models_give_equal_ones(small, tmp_path, capsys):
    (tmp_path / "questions.txt").write_text("What is ice?\n\n  Who wrote Faust?  \n")
    twin = tmp_path / "twin" / "actor"
    shutil.copytree(small.actor, twin)
    output = tmp_path / "new" / "answers.jsonl"
    run(prompt_eval, "--path", small.actor, twin, "--prompts", tmp_path / "questions.txt",
        "--prompt", "Hi.", "--max_new_tokens", 6, "--replies", 2, "--reward_model", small.critic,
        "--output", output)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"][0]["content"] for row in rows] == [
        "What is ice?", "Who wrote Faust?", "Hi."]
    for row in rows:
        first, second = row["answers"][:2], row["answers"][2:]
        assert [a["path"] for a in row["answers"]] == [small.actor] * 2 + [str(twin)] * 2
        assert [(a["reply"], a["score"]) for a in first] == [
            (a["reply"], a["score"]) for a in second]
        assert all(a["tokens"] <= 6 for a in first)
    assert len({a["reply"] for row in rows for a in row["answers"]}) > 3
    shown = capsys.readouterr().out
    assert "twin/actor" in shown and "share with eos" in shown


def test_markdown_keeps_every_text_in_its_cell(small, tmp_path):
    prompts = [[{"role": "user", "content": "a | b <i>\nc"}]]
    answers = [[{"model": "m", "reply": "x|y\nz & <b>", "tokens": 3, "ended": False}]]
    text = side_by_side.markdown(prompts, answers)
    assert "| m | x&#124;y<br>z &amp; &lt;b> | 3 (cut) |\n" in text
    assert "> a &#124; b &lt;i>\n" in text


@pytest.mark.parametrize(("row", "expected"), [
    ({"prompt": "Hi"}, ["Hi"]),
    ({"instruction": "Add", "input": "1, 2", "output": "3"}, ["Add\n\n1, 2"]),
    ({"question": "Why?"}, ["Why?"]),
    ({"prompt": "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"}, ["a", "b", "c"]),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
     ["a"]),
    ({"conversations": [{"from": "human", "value": "a"}]}, ["a"]),
])
def test_prompts_are_read_from_many_formats(row, expected):
    assert [m["content"] for m in side_by_side.messages_in(row)] == expected


@pytest.mark.parametrize(("content", "line"), [
    ('{"prompt": "a"}\n{"text": "b"}\n', r"row 2: .*columns text \(text\) fit no known"),
    ('{"prompt": ""}\n', r"row 1: .*columns prompt \(empty\) fit no known"),
    ("", "has no prompt in it"),
])
def test_a_file_without_prompts_is_refused(tmp_path, content, line):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(UserError, match=line):
        side_by_side.read_prompts(PromptEvalConfig(prompts=str(tmp_path / "p.jsonl")))


@pytest.mark.parametrize(("module", "words", "line"), [
    (prompt_eval, ["--path", "x"], "--prompts or --prompt is required"),
    (prompt_eval, ["--path", "x", "--prompt", "y", "--output", "z.txt"], "must end in .jsonl or"),
    (rw_eval, ["--path", "x", "--output", "/dev/null/z.json"], "--output .* cannot be written"),
    (rw_eval, ["--limit", "4"], "--path is required"),
    (rw_eval, ["--path", "x", "--data_split", "1"], "--data_split 1: must be three numbers"),
    (win_rate, ["--path", "x"], "--path and --baseline are required"),
])
def test_mistakes_are_refused_before_anything_is_loaded(module, words, line):
    with pytest.raises(UserError, match=line):
        module.main(words)


# --- rw_eval -------------------------------------------------------------------------------------


def test_the_figures_of_a_reward_model_by_hand():
    results = reward_quality.measure(np.array([  # score and length of each side, longer sequence
        (2.0, 10, 0.0, 5, 30), (0.5, 4, 1.0, 8, 9), (3.0, 6, 1.0, 6, 8), (1.0, 20, -1.0, 3, 40),
    ]), seed=0)
    low, high = wilson_interval(3, 4)
    assert results["accuracy"] == {"share": 0.75, "low": low, "high": high, "pairs": 4}
    which = {k: (v["share"], v["pairs"]) for k, v in results["by_which_is_longer"].items()}
    assert which == {"chosen": (1.0, 2), "rejected": (0.0, 1), "neither": (1.0, 1)}
    assert [(b["from"], b["to"], b["pairs"]) for b in results["by_length"]] == [
        (8, 8, 1), (9, 9, 1), (30, 30, 1), (40, 40, 1)]
    sure, unsure = 1 / (1 + np.exp(-2)), 1 / (1 + np.exp(-0.5))
    expected = (3 * (1 - sure) + unsure) / 4
    assert results["calibration_error"] == pytest.approx(expected)
    lengths, scores = [10, 4, 6, 20, 5, 8, 6, 3], [2, 0.5, 3, 1, 0, 1, 1, -1]
    assert results["length_correlation"]["pearson"] == pytest.approx(
        np.corrcoef(lengths, scores)[0, 1])
    assert results["length_correlation"]["longer_is_chosen"]["share"] == pytest.approx(2 / 3)
    assert "neither is longer" in reward_quality.describe(results)


def test_a_tie_is_wrong_and_is_told():
    results = reward_quality.measure(np.array([(1.0, 2, 1.0, 3, 9)]), seed=0)
    assert (results["accuracy"]["share"], results["ties"]) == (0.0, 1)
    assert "1 ties, counted as wrong" in reward_quality.describe(results)


def test_pairs_are_scored_as_step_2_reads_them(small, pairs, tmp_path):
    output = tmp_path / "rw.json"
    run(rw_eval, "--path", small.critic, "--data_path", pairs, "--part", "all", "--seed", 3,
        "--policy", small.actor, "--best_of", 4, "--best_of_prompts", 5, "--max_new_tokens", 6,
        "--output", output)
    results = json.loads(output.read_text())
    scorer = saved.open_scorer(small.critic, LoadingConfig())
    right = 0
    for row in PAIRS:
        prompt = scorer.chat.prompt_ids([{"role": "user", "content": row["prompt"]}])
        sides = [prompt + scorer.chat.response_ids(row[side]) for side in ("chosen", "rejected")]
        better, worse = scorer.score(sides)
        right += better > worse
    assert results["accuracy"]["share"] == right / 40
    assert 0 < right < 40
    curve = results["best_of_n"]
    assert [point["n"] for point in curve] == [1, 2, 4]
    means = [point["score"] for point in curve]
    assert means == sorted(means) and means[0] < means[-1]
    assert all("gold" not in point for point in curve)
    assert curve[1]["kl"] == pytest.approx(np.log(2) - 0.5)


# --- win_rate ------------------------------------------------------------------------------------


def test_a_policy_against_itself_wins_half(small, tmp_path, capsys):
    output = tmp_path / "wins.json"
    run(win_rate, "--path", small.actor, "--baseline", small.actor, "--reward_model", small.critic,
        "--limit", 12, "--max_new_tokens", 6, "--output", output)
    results = json.loads(output.read_text())
    for judge in ("reward model", "gold"):
        one = results["judges"][judge]
        assert (one["wins"], one["ties"], one["losses"]) == (0, 12, 0)
        assert one["win_rate"] == 0.5 and one["win_rate_interval"] == [0.5, 0.5]
        assert one["length_controlled"] == pytest.approx(0.5)
    for row in results["replies"]:
        assert row["policy"] == row["baseline"]
        assert row["policy"]["gold"] == assistant_world.gold_score(
            row["prompt"], row["policy"]["reply"])
    assert "won / tied / lost" in capsys.readouterr().out


def test_a_python_function_may_judge_and_something_must(small, pairs, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def vowels(prompts, replies):\n"
        "    assert all('What is' in prompt for prompt in prompts)\n"
        "    return [float(sum(c in 'aeiou' for c in reply)) for reply in replies]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    output = tmp_path / "wins.json"
    run(win_rate, "--path", small.actor, "--baseline", small.actor, "--reward_function",
        "my_rewards:vowels", "--data_path", pairs, "--part", "all", "--max_new_tokens", 6,
        "--output", output)
    results = json.loads(output.read_text())
    assert list(results["judges"]) == ["reward function"] and results["prompts"] == 40
    with pytest.raises(UserError, match="no gold rule to judge"):
        run(win_rate, "--path", small.actor, "--baseline", small.actor, "--data_path", pairs)


def test_win_rates_by_hand():
    policy, baseline = (
        [{"gold": score, "tokens": 3, "ended": ended}
         for score, ended in zip(scores, (True, True, False, True), strict=True)]
        for scores in ((1.0, 0.5, 0.2, 0.9), (0.0, 0.5, 0.6, 0.1)))
    results = comparison.compare(policy, baseline, ["gold"], seed=0)
    one = results["judges"]["gold"]
    assert (one["wins"], one["ties"], one["losses"], one["win_rate"]) == (2, 1, 1, 0.625)
    assert one["mean"] == pytest.approx([0.65, 0.3])
    low, high = one["win_rate_interval"]
    assert 0 <= low < 0.625 < high <= 1
    assert one["length_controlled"] == pytest.approx(0.625, abs=1e-4)
    assert (results["tokens"], results["ended"]) == ([3, 3], [0.75, 0.75])


def test_a_whole_run_is_named_by_its_folder():
    models = win_rate.completed(WinRateConfig(run="out", baseline="base"))
    assert (models.path, models.baseline, models.reward_model) == (
        "out/final/actor", "base", "out/critic")
