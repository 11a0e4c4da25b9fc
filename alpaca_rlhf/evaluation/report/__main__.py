"""Report of runs: a table and dialogues on the console, and report.html for a browser.

    python -m alpaca_rlhf.evaluation.report output/tiny
    python -m alpaca_rlhf.evaluation.report output/seed1 output/seed2 output/seed3 --plot curves.png

A run is the --output_dir of a step or of run_pipeline.sh, also one that still runs or failed
(OUTPUT_DIR.partial). One run gets its report.html in its own folder; of several, those of one
setting are drawn as a mean and a range. Reads what the steps have written; trains nothing.
"""

import argparse
import os
from pathlib import Path

from alpaca_rlhf.evaluation.report import page, plots, summary
from alpaca_rlhf.evaluation.report.runs import read_run
from alpaca_rlhf.utils import console
from alpaca_rlhf.utils.run.run_folder import REPORT_FILE


def main() -> None:
    """Print the table of each run; write the report of all of them."""
    parser = argparse.ArgumentParser(
        prog="python -m alpaca_rlhf.evaluation.report",
        description="Table and report.html of runs.",
    )
    parser.add_argument("runs", nargs="+", help="output folders of steps or of run_pipeline.sh")
    parser.add_argument("--output", help="the HTML file (default: report.html in the run's folder; "
                        "of several runs, in the folder above them)")
    parser.add_argument("--plot", help="draw the PPO curves of the runs into this PNG too")
    args = parser.parse_args()
    runs = [read_run(Path(folder)) for folder in args.runs]
    for run in runs:
        console.say(summary.as_text(run))
    folders = [run.folder for run in runs] if len(runs) == 1 else [r.folder.parent for r in runs]
    target = Path(args.output or Path(os.path.commonpath(folders)) / REPORT_FILE)
    page.write(runs, target)
    console.say(f"\nreport: {target}")
    if args.plot:
        plots.curves_png(runs, Path(args.plot))
        console.say(f"curves of {len(runs)} runs: {args.plot}")


if __name__ == "__main__":
    console.run_main(main)
