"""How many directions attention and features use, with and without each branch of the modulator.

    python python_examples/rank_analysis.py                             # on made-up data, minutes
    python python_examples/rank_analysis.py ml-100k.inter --seeds 3     # a log of yours

The paper (its Figure 9) says that linear attention alone gives features of low rank, and that rank
augmentation and gate raise it. This trains four variants with several seeds and measures, for each
layer and over users, two ranks of

    attention map   [L, L] of every head, averaged over heads; causal, so the triangle alone lifts
                    it above the head's width
    attention       [L, hidden_size], what linear attention returns, before the other two branches
    output          [L, hidden_size], what the modulator returns, with the branches it has

    above 1e-3      singular values above a thousandth of the largest
    entropy rank    exp of the entropy of the singular values divided by their sum (Roy, Vetterli)

NDCG@10 stands beside them: a higher rank is no better ranking by itself. Trained models and what
was measured are kept in --out, so that a run goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from recgrela_ext import Interactions, RecGRELA, Sequences, Targets, evaluate, fit
from recgrela_ext.data.synthetic import make_synthetic
from recgrela_ext.ops import reference
from recgrela_ext.training import TrainConfig

VIEWS = ("seen_included", "seen_excluded")
VARIANTS: dict[str, dict[str, bool]] = {
    "RecGRELA": {},
    "no gate": {"gate": False},
    "no rank augmentation": {"rank_augmentation": False},
    "attention alone": {"gate": False, "rank_augmentation": False},
}
MATRICES = ("attention map", "attention", "output")
ASKED = ("log", "order", "epochs", "layers", "users", "length")  # what a kept result depends on
RANKS = ("above 1e-3", "entropy rank")


def ranks(matrices: Tensor) -> Tensor:
    """Both ranks [..., 2] of matrices [..., m, n]."""
    values = torch.linalg.svdvals(matrices)
    share = values / values.sum(-1, keepdim=True)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    count = (values > 1e-3 * values[..., :1]).sum(-1)
    return torch.stack([count.to(entropy.dtype), entropy.exp()], -1)


def attention_map(q: Tensor, k: Tensor, inv_freq: Tensor, eps: float) -> Tensor:
    """[H, L, L] of rows q, k [1, L, H, D]: row t weighs the values up to t (specification)."""
    length = q.shape[1]
    place = torch.arange(length)[None]
    q, k = reference.feature_map(q), reference.feature_map(k)
    plain = torch.einsum("blhd,bmhd->bhlm", q, k)[0].tril()
    turned = [reference.rotate(x, place, inv_freq) for x in (q, k)]
    weights = torch.einsum("blhd,bmhd->bhlm", *turned)[0].tril()
    return weights / (plain.sum(-1) + eps * torch.arange(1, length + 1))[..., None]


def long_histories(train: Sequences, users: int, length: int) -> list[np.ndarray]:
    """The last `length` items of the first `users` histories that have as many."""
    found = np.flatnonzero(train.lengths >= length)[:users]
    return [train.history(int(user))[-length:] for user in found]


@torch.no_grad()
def measure(model: RecGRELA, histories: list[np.ndarray]) -> Tensor:
    """[users, layers, matrices, 2], in float64."""
    model = model.double().eval()
    kept: list[list[Tensor]] = []

    def keep(_: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        q, k, v = (x.view(1, *x.shape[-3:]) for x in inputs[:3])
        attention = inputs[4]
        weights = attention_map(q, k, attention.inv_freq, attention.eps)
        values = torch.einsum("hlm,bmhd->lhd", weights, v).flatten(1)
        features = torch.stack([values, output[0].reshape(values.shape)])
        kept[-1].append(torch.stack([ranks(weights).mean(0), *ranks(features)]))

    layers: list[Any] = list(model.encoder.layers)
    hooks = [layer.modulator.register_forward_hook(keep) for layer in layers]
    for history in tqdm(histories, desc="users", leave=False, disable=None):
        kept.append([])
        model.encode(torch.from_numpy(history)[None])
    for hook in hooks:
        hook.remove()
    model.float()
    return torch.stack([torch.stack(one) for one in kept])


def run(variant: str, seed: int, data: tuple[Sequences, Targets, Targets], histories: Any,
        options: argparse.Namespace) -> dict[str, Any]:  # fmt: skip
    """One model, trained unless it was before, and its figures."""
    place = options.out / f"{variant.replace(' ', '-')}-{seed}"
    known = place / "ranks.json"
    asked = {name: getattr(options, name) for name in ASKED}
    if known.exists():
        found: dict[str, Any] = json.loads(known.read_text())
        kept = found.get("asked", {})
        if kept != asked:
            told = ", ".join(f"{name} {value}" for name, value in kept.items()) or "none told"
            raise SystemExit(f"rank_analysis: --out must be of the same options, got {told}")
        return found
    train, valid, test = data
    torch.manual_seed(seed)
    parts = {"repeat_bias": False, **VARIANTS[variant]}  # which is none of the paper's
    model = RecGRELA.for_data(train, num_layers=options.layers, **parts)
    fit(model, train, valid, epochs=options.epochs, config=TrainConfig(seed=seed),
        checkpoint_dir=place / "run")  # fmt: skip
    quality = evaluate(model, test, baselines={})["mean"]
    values = measure(model, histories)
    found = {
        "asked": asked, "variant": variant, "seed": seed, "users": len(histories),
        "ndcg@10": {view: quality[f"{view}/ndcg@10"] for view in VIEWS},
        "mean": values.mean(0).tolist(), "deviation": values.std(0).tolist(),
    }  # fmt: skip
    known.write_text(json.dumps(found))
    return found


def variants(results: list[dict[str, Any]]) -> list[str]:
    """Which there are, in their order."""
    return list(dict.fromkeys(r["variant"] for r in results))


def table(results: list[dict[str, Any]]) -> str:
    """A line per variant and layer; means over seeds of the means over users, and deviations."""
    head = "| variant | seeds | NDCG@10 | unseen | layer |" + "".join(
        f" {m}, {r} |" for m in MATRICES for r in RANKS
    )
    lines = [head, "|---" * (5 + len(MATRICES) * len(RANKS)) + "|"]
    for variant in variants(results):
        mine = [r for r in results if r["variant"] == variant]
        mean, spread = (np.mean([r[name] for r in mine], 0) for name in ("mean", "deviation"))
        ndcg = " | ".join(f"{np.mean([r['ndcg@10'][v] for r in mine]):.4f}" for v in VIEWS)
        for layer, (values, widths) in enumerate(zip(mean, spread, strict=True), start=1):
            pairs = zip(values.reshape(-1), widths.reshape(-1), strict=True)
            cells = "".join(f" {value:.1f} ± {width:.1f} |" for value, width in pairs)
            lines.append(f"| {variant} | {len(mine)} | {ndcg} | {layer} |{cells}")
    return "\n".join(lines)


def picture(results: list[dict[str, Any]], path: Path) -> None:
    """Entropy rank over layers; bars are deviations over users."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(MATRICES), figsize=(13, 4))
    for m, axis in enumerate(axes):
        for n, variant in enumerate(variants(results)):
            mine = [r for r in results if r["variant"] == variant]
            mean, spread = (np.mean([r[k] for r in mine], 0) for k in ("mean", "deviation"))
            layers = np.arange(1, len(mean) + 1) + 0.05 * (n - 1.5)
            axis.errorbar(layers, mean[:, m, 1], spread[:, m, 1], marker="o", label=variant)
        axis.set(title=MATRICES[m], xlabel="layer", ylabel="entropy rank", ylim=(0, None))
        axis.set_xticks(range(1, len(mean) + 1))
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    description, _, more = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", nargs="?", help="a file of events; without one, made-up data")
    parser.add_argument("--order", default="hash", help="what decides between events of one time")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--users", type=int, default=500, help="at most")
    parser.add_argument("--length", type=int, default=100, help="of every history: its last items")
    parser.add_argument("--out", type=Path, default=Path("rank-analysis"))
    options = parser.parse_args()
    log = (
        Interactions.from_file(options.log, order=options.order)
        if options.log
        else make_synthetic(num_users=300, num_items=240, mean_length=120)[0]
    )
    data = log.leave_one_out()
    long = long_histories(data[0], options.users, options.length)
    if not long:
        parser.error(f"--length: a user must have {options.length} items, got none")
    runs = [(variant, seed) for seed in range(options.seeds) for variant in VARIANTS]
    results = [run(*one, data, long, options) for one in runs]
    options.out.mkdir(parents=True, exist_ok=True)
    facts = {"data": log.name, "runs": results}
    (options.out / "ranks.json").write_text(json.dumps(facts))
    picture(results, options.out / "ranks.png")
    print(table(results))


if __name__ == "__main__":
    main()
