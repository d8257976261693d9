"""study.py: planted answers, and slow obvious versions."""
import pytest
import torch
from study import linear_probe


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_labels(n: int, n_labels: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(n_labels, (n,), generator=torch.Generator().manual_seed(seed))


# ---- linear_probe

def slow_probe(x, label, n_labels: int, folds: int, ridge: float) -> float:
    """User by user: least squares on the users of the other folds, one equation more per weight."""
    x = (x - x.mean(0)) / x.std(0)
    right = 0
    for user in range(len(x)):
        others = [n for n in range(len(x)) if n % folds != user % folds]
        rows = [torch.cat([x[n], torch.ones(1).double()]) for n in others]
        rows += list((ridge * len(others)) ** 0.5 * torch.eye(x.shape[1] + 1).double())
        wanted = torch.zeros(len(rows), n_labels).double()
        for i, n in enumerate(others):
            wanted[i, label[n]] = 1
        weight = torch.linalg.lstsq(torch.stack(rows), wanted).solution
        score = torch.cat([x[user], torch.ones(1).double()]) @ weight
        right += score.argmax().item() == label[user].item()
    return right / len(x)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("folds, ridge", [(2, 1e-2), (5, 1e-2), (5, 0.5), (7, 3.0)])
def test_linear_probe_equals_a_slow_one(folds, ridge, seed):
    x, label = normal(41, 6, seed=seed) + 2, random_labels(41, 4, seed)
    assert linear_probe(x, label, 4, folds, ridge) == slow_probe(x, label, 4, folds, ridge)


def test_linear_probe_has_five_folds_and_a_weak_ridge():
    for seed in range(8):
        x, label = normal(31, 12, seed=seed), random_labels(31, 3, seed)
        assert linear_probe(x, label, 3) == slow_probe(x, label, 3, folds=5, ridge=1e-2)


def test_linear_probe_reads_a_label_that_is_a_linear_function():
    label = torch.arange(200) % 4
    x = torch.eye(4).double()[label] @ normal(4, 8) + 0.01 * normal(200, 8, seed=1)
    assert linear_probe(x, label, 4) == 1
    assert linear_probe(x.float(), label, 4) == 1
    assert linear_probe(x, label, 6) == 1, "labels that nobody has"


def test_linear_probe_finds_nothing_where_nothing_is():
    label = random_labels(2000, 4)
    share = linear_probe(normal(2000, 8), label, 4)
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5, share


def test_linear_probe_is_not_fitted_to_those_it_is_asked_about():
    """With as many features as users a linear map fits any labels; for others it is no use."""
    x, label = normal(400, 400), random_labels(400, 2)
    fit = torch.linalg.lstsq(x, torch.eye(2).double()[label]).solution
    assert torch.equal((x @ fit).argmax(1), label)
    share = linear_probe(x, label, 2)
    assert abs(share - 0.5) < 5 * (0.25 / 400) ** 0.5, share


def test_linear_probe_without_features_always_says_the_commonest_label_of_the_others():
    x = torch.zeros(40, 1)
    commonest = torch.tensor([1, 1, 1, 2]).repeat(10)
    assert linear_probe(x, commonest, 3) == 0.75
    own_is_rarest = torch.arange(40) % 2  # leaving any user out leaves fewer of its label
    assert linear_probe(x, own_is_rarest, 2, folds=40) == 0


def test_linear_probe_does_not_see_the_unit_of_a_feature():
    x, label = normal(60, 5), random_labels(60, 3)
    unit = torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6]).double()
    shares = [linear_probe(x, label, 3), linear_probe(x * unit - 7 * unit, label, 3)]
    assert shares[0] == shares[1]
