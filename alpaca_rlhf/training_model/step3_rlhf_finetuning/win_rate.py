"""Win rate: the share of prompts on which a policy responds better than its baseline.

    python -m alpaca_rlhf.training_model.step3_rlhf_finetuning.win_rate \\
        --path output/final/actor --baseline output/actor --reward_model output/critic

Both respond to the prompts that the run held out, with the same random numbers. Judges are the
reward model, a Python function (--reward_function), and for the embedded data its gold rule,
whichever there are. Ties count half; intervals are over prompts. `--run OUT` stands for the three
folders of a run of scripts/run_pipeline.sh.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from alpaca_rlhf.evaluation import results
from alpaca_rlhf.utils import arguments, console
from alpaca_rlhf.utils.configs import WinRateConfig, WinRateProgram
from alpaca_rlhf.utils.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, compare."""
    args = arguments.parse(WinRateProgram, argv, doc=__doc__)
    models = completed(args.models)
    results.check_output(models.output, ".json")
    # Imported here, so that --help and mistakes in the command line need no torch.
    from alpaca_rlhf.evaluation import comparison

    console.quiet_libraries()
    comparison.run(models, data=args.data, sampling=args.sampling, loading=args.loading)


def completed(models: WinRateConfig) -> WinRateConfig:
    """Fill in the folders that `--run` stands for.

    Raises:
        UserError: one of the two policies is not given.
    """
    if models.run is not None:
        run = Path(models.run)
        models = replace(
            models, path=models.path or str(run / "final" / "actor"),
            baseline=models.baseline or str(run / "actor"),
            reward_model=models.reward_model or str(run / "critic"),
        )
    if not (models.path and models.baseline):
        raise UserError("--path and --baseline are required (or --run): the policies to compare")
    return models


if __name__ == "__main__":
    console.run_main(main)
