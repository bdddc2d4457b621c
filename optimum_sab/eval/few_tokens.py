"""How an expert of few tokens is solved best: `python -m optimum_sab.eval.few_tokens FOLDER`, of a language model.

Tokens at a projection of a layer are told apart by k-means, as a router does. For every cluster and number of its
tokens the projection is solved on mixtures of the cluster's Hessian and that of all tokens, and judged by other tokens
of the cluster: relative output error, over that on the mixture that is best for so many tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from optimum_sab.core.hessian import InputMoments, InputStatistics
from optimum_sab.core.mixture import mixed_by
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import solve
from optimum_sab.data.passages import passages
from optimum_sab.ops.columns import column_loops

SHARES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0)
COUNTS = (4, 16, 64, 256, 1024)
ROWS = 256  # of the projection that are solved
TESTED = 256  # tokens of a cluster that judge
LENGTH = 512


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m optimum_sab.eval.few_tokens", description=__doc__)
    parser.add_argument("model", help="folder or name of a Llama-like model")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--linear", default="gate_proj", choices=["gate_proj", "down_proj"])
    parser.add_argument("--clusters", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args(arguments)
    inputs, weight = projection_inputs(given.model, given.layer, given.linear)
    table: dict[int, list[list[float]]] = {count: [] for count in COUNTS}
    for seed in range(given.seeds):
        for count, errors in cluster_errors(inputs, weight[:ROWS], given.clusters, seed):
            table[count].append(errors)
    say(f"{len(inputs)} tokens of width {inputs.shape[1]}; error over the best share's; mean ± deviation over clusters")
    say("tokens  clusters  " + "  ".join(f"   w={share:4.2f}   " for share in SHARES))
    for count, measured in table.items():
        if measured:
            found = torch.tensor(measured)
            relative = found / found.mean(0).min()
            mean, apart = relative.mean(0), (relative / relative.mean(1, keepdim=True)).std(0)
            say(f"{count:6d}  {len(measured):8d}  " + "  ".join(f"{m:6.3f}±{s:5.3f}" for m, s in zip(mean, apart)))
    return 0


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@torch.no_grad()
def projection_inputs(model: str, layer: int, name: str) -> tuple[Tensor, Tensor]:
    """Inputs [tokens, in] of a layer's projection on the package's passages, and its weight."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).model
    tokens = [token for text in passages() for token in tokenizer(text).input_ids]
    linear = getattr(network.layers[layer].mlp, name)
    del network.layers[layer + 1 :]
    found: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda module, given: found.append(given[0].flatten(0, 1)))
    for start in range(0, len(tokens) - LENGTH, LENGTH):
        network(torch.tensor([tokens[start : start + LENGTH]]), use_cache=False)
    hook.remove()
    return torch.cat(found), linear.weight.float()


def cluster_errors(inputs: Tensor, weight: Tensor, clusters: int, seed: int) -> list[tuple[int, list[float]]]:
    """Held-out error of every share of `SHARES`, for clusters and numbers of tokens."""
    generator = torch.Generator().manual_seed(seed)
    label = nearest_centres(inputs, clusters, generator)
    shared = statistics_of(inputs)
    results = []
    for cluster in range(clusters):
        own = inputs[label == cluster]
        own = own[torch.randperm(len(own), generator=generator)]
        tested, rest = own[:TESTED], own[TESTED:]
        for count in COUNTS:
            if len(tested) < TESTED or len(rest) < count:
                continue
            statistics = statistics_of(rest[:count])
            errors = []
            for share in SHARES:
                mixed = mixed_by(statistics, shared, share)
                found = solve(weight, mixed, LayerSettings(), loops=column_loops(weight.device))
                wanted = tested @ weight.T
                errors.append(float((wanted - tested @ found.planes.dequantize().T).norm() / wanted.norm()) ** 2)
            results.append((count, errors))
    return results


def nearest_centres(inputs: Tensor, clusters: int, generator: torch.Generator, rounds: int = 20) -> Tensor:
    """Which of k-means' centres each token is nearest to, by direction."""
    x = torch.nn.functional.normalize(inputs - inputs.mean(0), dim=1)
    centres = x[torch.randperm(len(x), generator=generator)[:clusters]]
    for _ in range(rounds):
        label = (x @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, label, x)
        centres = torch.nn.functional.normalize(sums, dim=1)
    return (x @ centres.T).argmax(1)


def statistics_of(inputs: Tensor) -> InputStatistics:
    moments = InputMoments(inputs.shape[1], inputs.device, False, "few tokens")
    moments.add("text", inputs)
    return moments.statistics()


if __name__ == "__main__":
    sys.exit(main())
