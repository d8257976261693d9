"""Studies: runs that differ in one thing and share the stages before it, side by side.

    python tests/study.py pareto RUN ...    weights of personalization and agreement in the reward
    python tests/study.py bits RUN ...      sizes of the codebooks, and a trained embedding per user instead

RUN: a finished run of train.py. Rows are written to RUN/STUDY/ROW and kept: a study that was stopped goes on
where it was. Leaves RUN/STUDY/study.json and prints a table.
"""
from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import train  # noqa: E402
from dppmg import Config, Dataset, pick_device, read_checkpoint  # noqa: E402

RATIOS = ((0.0, 1.0), (0.25, 1.0), (0.5, 1.0), (1.0, 1.0), (2.0, 1.0), (1.0, 0.0))  # lambda_p : lambda_c
BITS = ((1, 32), (2, 32), (3, 32), (4, 32), (4, 64))  # levels, codes
STAGES = {"pareto": ["reward"], "bits": ["codebook", "text", "image"]}  # what each row trains anew
SHOWN = ("utility_image", "utility_text", "taste_image", "taste_text", "variety_image", "variety_text",
         "consistency", "consistency_repaired", "judge_consistency", "judge_swap_image", "judge_swap_text")


def open_row(base: Path, out: Path, **changes) -> train.Run:
    """A run on the data of the run in `base`, with some of its settings changed, not yet trained."""
    config = train.read_config(base)
    parts = {name: part(**config["settings"][name]) for name, part in train.PARTS.items()}
    settings, cfg = parts.pop("train"), Config(**parts)
    cfg = replace(cfg, **{group: replace(getattr(cfg, group), **new) for group, new in changes.items()})
    world = None if config["data"] else train.sticker_world(settings, cfg.method.seed)
    data = Dataset.load(config["data"] or base / "stickers", cfg.image.size, cfg.method.seed,
                        settings.min_rating or None, settings.drop_incomplete)
    out.mkdir(parents=True, exist_ok=True)
    return train.Run(cfg, settings, data, world, out, pick_device(None))


def take_over(run: train.Run, base: Path, stages: list[str]):
    """Every tensor that fits of the run in `base`, and all of its stages but those that are trained anew."""
    state = read_checkpoint(base / "checkpoint.pt")
    theirs = state["modules"]
    mine = run.modules.state_dict()
    fits = {k: theirs[k] if k in theirs and theirs[k].shape == v.shape else v for k, v in mine.items()}
    run.modules.load_state_dict(fits)
    for m, table in state["tables"].items():  # as they were before the reward
        weight = getattr(run.model, m).preference.weight
        if weight.shape == table.shape:
            weight.data.copy_(table)
    run.metrics = {"stage1": state["metrics"]["stage1"]}
    run.done = [stage for stage in train.STAGES if stage not in (*stages, "reward", "evaluation")]


@torch.no_grad()
def use_trained_embeddings(run: train.Run):
    """Instead of codes: each user is one token of their own, whose embedding starts as the unquantized
    preference and is trained with the generators. (So it is no preference vector, but a trained embedding.)"""
    for m, taste in run.model.modality.items():
        weight = getattr(run.model, m).preference.weight
        taste.tokens.copy_(torch.arange(len(taste.tokens))[:, None])
        turn = torch.empty(weight.shape[1], taste.preference.shape[1])
        nn.init.orthogonal_(turn, generator=run.generator("seed tables"))
        scale = weight.square().mean().sqrt() * weight.shape[1] ** 0.5
        weight.copy_(F.normalize(taste.preference, dim=1) @ turn.T * scale)


def rows_of(study: str, base: Path) -> list[tuple[str, dict, bool]]:
    """(label, changed settings, whether each user gets a trained embedding) of each row."""
    settings = train.read_config(base)["settings"]
    if study == "pareto":
        total = settings["reward"]["lambda_p"] + settings["reward"]["lambda_c"]
        weights = [(p * total / (p + c), c * total / (p + c)) for p, c in RATIOS]  # as strong against the KL
        rows = [(f"{p:g} to {c:g}", {"reward": dict(lambda_p=a, lambda_c=b)}, False)
                for (p, c), (a, b) in zip(RATIOS, weights)]
        return [("no reward", {"reward": dict(rounds=0)}, False), *rows]
    n_users = len(read_checkpoint(base / "checkpoint.pt")["catalogue"]["user_ids"])
    rows = [(f"{n} x {math.log2(k):g} bits", {"vq": dict(levels=n, codes=k)}, False) for n, k in BITS]
    return [*rows, ("trained embedding per user", {"vq": dict(levels=1, codes=n_users)}, True)]


def measure_row(study: str, base: Path, label: str, changes: dict, embeddings: bool) -> dict:
    """Train a row, or what is missing of it, and measure it on the test part."""
    out = base / study / label.replace(" ", "-")
    if (out / "row.json").exists():
        return json.loads((out / "row.json").read_text())
    run, stages = open_row(base, out, **changes), list(STAGES[study])
    if (out / "checkpoint.pt").exists():
        run.restore()
    else:
        take_over(run, base, stages)
        if embeddings:
            use_trained_embeddings(run)
    if embeddings:
        stages.remove("codebook")
    train.train_all(run, [] if label == "no reward" else stages)
    found = train.evaluate_variant(run, "after_reward")
    found.pop("frechet_image")
    row = {"row": label, "stage1": run.metrics["stage1"]}
    row |= {name: train.summarize(name, *pair) for name, pair in found.items()}
    train.write_json(out / "row.json", row)
    return row


def main(argv: list[str] | None = None):
    """Run one study on several finished runs."""
    study, *runs = sys.argv[1:] if argv is None else argv
    if study not in STAGES or not runs:
        sys.exit(__doc__)
    for base in map(Path, runs):
        rows = [measure_row(study, base, *row) for row in rows_of(study, base)]
        train.write_json(base / study / "study.json", {"study": study, "rows": rows})
        names = [name for name in SHOWN if name in rows[0]]
        print(f"{base}\n{'':28}" + " ".join(f"{name[-18:]:>18}" for name in names))
        for row in rows:
            print(f"{row['row']:28}" + " ".join(f"{row[name]['mean']:18.3f}" for name in names))


def linear_probe(
        x: Tensor, label: Tensor, n_labels: int, folds: int = 5, ridge: float = 1e-2) -> float:
    """How much of a label a linear map finds in x: its share of right answers for users that it was
    not fitted to. Ridge regression to one-hot labels; user n is in fold n mod folds, and each fold
    is answered by the fit to the others.

    x (U, F) any scale, standardized here over all users; label (U,) int64 in [0, n_labels)."""
    x = x.double()
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-9)
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)  # (U, F + 1)
    target = F.one_hot(label, n_labels).double()  # (U, n_labels)
    fold = torch.arange(len(x), device=x.device) % folds
    right = 0
    for k in range(folds):
        fit, held_out = fold != k, fold == k
        penalty = ridge * fit.sum() * torch.eye(x.shape[1]).to(x)
        gram = x[fit].T @ x[fit] + penalty  # (F + 1, F + 1)
        weight = torch.linalg.solve(gram, x[fit].T @ target[fit])
        answer = (x[held_out] @ weight).argmax(1)
        right += int((answer == label[held_out]).sum())
    return right / len(x)


if __name__ == "__main__":
    main()
