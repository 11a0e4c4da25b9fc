"""Difference between the log-probabilities of decoding and of a whole forward pass, in fp32.

    PYTHONPATH=. python benchmarks/logprobs.py output/smollm2-135m 32   # model, tokens per response

For comparison, also the difference between a whole pass over a batch and one over each row alone.
"""

import sys

import torch
from rollout import NEVER, PAD, build, say, some_prompts
from torch import Tensor

from alpaca_rlhf.training_model.step3_rlhf_finetuning.hybrid_engine import HybridEngine
from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.configs import HybridEngineConfig, SamplingConfig
from alpaca_rlhf.utils.data.batches import Rollout
from alpaca_rlhf.utils.losses import chosen_logprobs
from alpaca_rlhf.utils.model.causal_lm import at_labels


@torch.no_grad()
def main() -> None:
    """Sample eight responses with the compiled step on one thread, and compare."""
    torch.set_num_threads(1)
    distributed.initialize(0)
    engine, chat = build(sys.argv[1], 0, 0)
    prompts, tokens = some_prompts(chat, 8), int(sys.argv[2])
    config = HybridEngineConfig(enable_hybrid_engine=True)
    rollout = HybridEngine(engine, config, slots=8).generate(
        prompts, SamplingConfig(tokens), NEVER, PAD, torch.Generator().manual_seed(0)
    )
    model = engine.module.eval()

    def whole(some: Rollout) -> Tensor:
        return some.spread(at_labels(model, *some.aligned(), chosen_logprobs)[:, 0])

    together = whole(rollout)
    alone = torch.cat([whole(rollout.rows([row])) for row in range(len(rollout))])
    say(f"decoding and a whole pass: {(rollout.decoded_logprobs - together).abs().max():.1e}; "
        f"a whole pass batched and alone: {(together - alone).abs().max():.1e}")


if __name__ == "__main__":
    main()
