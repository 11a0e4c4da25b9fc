"""Is this reward model good? On any preference pairs, and on the responses of a policy.

    python -m alpaca_rlhf.training_model.step2_reward_model_finetuning.rw_eval \\
        --path output/critic --policy output/actor --output reward_model.json

Accuracy with its interval, overall and by length; calibration of its probabilities; correlation of
score and length; and with --policy what is gained by choosing the best of n responses. Without
--data_path it uses the pairs that the run held out. docs/evaluation.md defines every figure.
"""

from collections.abc import Sequence

from alpaca_rlhf.evaluation import results
from alpaca_rlhf.utils import arguments, console
from alpaca_rlhf.utils.configs import RewardEvalProgram


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, measure."""
    args = arguments.parse(RewardEvalProgram, argv, doc=__doc__)
    results.check_output(args.scoring.output, ".json")
    # Imported here, so that --help and mistakes in the command line need no torch.
    from alpaca_rlhf.evaluation import reward_quality

    console.quiet_libraries()
    reward_quality.run(
        args.scoring, data=args.data, sampling=args.sampling, loading=args.loading)


if __name__ == "__main__":
    console.run_main(main)
