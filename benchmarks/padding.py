"""Share of padding among the tokens of an epoch, for several orders of its rows.

    python benchmarks/padding.py PAIRS.jsonl.gz [--batch_size 8] [--tokenizer FOLDER] [--step 1]

Batches are grouped by length (as in steps 1 and 2), shuffled, or shuffled with every row padded to
`--max_seq_len`. The last column is for batches of one row. Pairs are padded in groups of sequences
of similar length, as step 2 computes them.
"""

import argparse
import tempfile

from alpaca_rlhf.demo import tiny_llama
from alpaca_rlhf.training_model.step2_reward_model_finetuning.main import LENGTH_GROUPS
from alpaca_rlhf.utils.configs import DataConfig, SFTConfig
from alpaca_rlhf.utils.data import batches, prepare, tokenizer


def main() -> None:
    """Prepare the rows, print a table."""
    args = parse()
    print("| step | rows | tokens | grouped by length | shuffled | padded to the maximum "
          "| one by one |\n| --- | --- | --- | --- | --- | --- | --- |")
    for step in args.step:
        rows = sequences(args, step)
        lengths = [max(row) for row in rows]
        orders = [
            batches.length_grouped(lengths, args.batch_size, args.seed, epoch=0),
            batches.shuffled(len(rows), args.seed, epoch=0),
        ]
        shares = [padding(rows, order, args.batch_size, None) for order in orders]
        shares.append(padding(rows, orders[1], args.batch_size, args.max_seq_len))
        shares.append(padding(rows, orders[1], 1, None))
        shown = " | ".join(f"{share:.1%}" for share in shares)
        print(f"| {step} | {len(rows):,} | {sum(map(sum, rows)):,} | {shown} |", flush=True)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data_path", nargs="+")
    parser.add_argument("--step", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_seq_len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--tokenizer", help="folder (default: the embedded tiny LLaMA's)")
    return parser.parse_args()


def sequences(args: argparse.Namespace, step: int) -> list[list[int]]:
    """Return the token counts of each row's sequences: one, or the two of a pair."""
    path = args.tokenizer or str(tiny_llama.ensure_tiny_llama(prepare.cache_home(None)))
    chat = tokenizer.ChatFormat(tokenizer.load_tokenizer(path))
    options = {"seed": args.seed, "max_seq_len": args.max_seq_len, "chat": chat}
    with tempfile.TemporaryDirectory() as cache:
        shares = "1,0,0" if step == 1 else "0,1,0"
        data = DataConfig(data_path=args.data_path, data_split=shares, data_output_path=cache)
        prepared = (prepare.prepare_sft(data, SFTConfig(), **options) if step == 1
                    else prepare.prepare_pairs(data, **options))
        columns = ["input_ids"] if step == 1 else ["chosen_ids", "rejected_ids"]
        return [[len(row[column]) for column in columns] for row in prepared.train]


def padding(rows: list[list[int]], order: list[int], size: int, longest: int | None) -> float:
    """Return the share of padding of an epoch; `longest` pads every row to that length."""
    real = total = 0
    for batch in batches.rank_batches(order, size, rank=0, world_size=1):
        lengths = [length for row in batch for length in rows[row]]
        real += sum(lengths)
        groups = LENGTH_GROUPS if len(rows[batch[0]]) == 2 and len(batch) > 1 else 1
        for group in batches.length_groups(lengths, groups):
            total += len(group) * (longest or lengths[group[-1]])
    return 1 - real / total


if __name__ == "__main__":
    main()
