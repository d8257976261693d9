"""Studies: what the run of train.py leaves out, measured from its parts."""
import torch
import torch.nn.functional as F
from torch import Tensor


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
