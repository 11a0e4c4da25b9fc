"""Responses of one or more models to the same prompts, side by side.

    python -m alpaca_rlhf.training_model.step1_supervised_finetuning.prompt_eval \\
        --path output/actor output/final/actor --prompts questions.txt --output answers.md

Prompts: lines of a .txt file, or rows of a .jsonl, .json or .parquet file with `prompt`,
`messages`, `instruction` (and `input`) or `question`; or --prompt TEXT. Models: folders that step 1
or 3 exported, adapters' folders or hub ids. All models sample with the same random numbers, so
equal models give equal responses.
"""

from collections.abc import Sequence

from alpaca_rlhf.evaluation import results
from alpaca_rlhf.utils import arguments, console
from alpaca_rlhf.utils.configs import PromptEvalProgram
from alpaca_rlhf.utils.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, generate."""
    args = arguments.parse(PromptEvalProgram, argv, doc=__doc__)
    results.check_output(args.prompts.output, ".jsonl", ".md")
    if not (args.prompts.prompts or args.prompts.prompt):
        raise UserError("--prompts or --prompt is required: the prompts to respond to")
    # Imported here, so that --help and mistakes in the command line need no torch.
    from alpaca_rlhf.evaluation import side_by_side

    console.quiet_libraries()
    side_by_side.run(args.prompts, sampling=args.sampling, loading=args.loading)


if __name__ == "__main__":
    console.run_main(main)
