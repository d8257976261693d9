"""Speed and quality of the graph network (no tests): python tests/bench_gnn.py [PART ...]

lastfm     recall@20, NDCG@20 and seconds on the LightGCN authors' LastFM split, by LightGCN itself
           with the hardest of several negatives a triplet. Where to stop is chosen on a tenth of
           the training pairs; then all are trained on for as many steps, and the test pairs are
           looked at once. The authors' code: 0.2754 / 0.2134 at its best, after 595 s.
spmm       one product forward and backward, by each way of doing it, beside a copy of as many bytes
step       one training step beside one with products by torch's COO matrices, as the authors' are
negatives  triplets a second
scaling    seconds and peak memory of a product and its gradient by interactions, a process each"""
from __future__ import annotations

import argparse
import dataclasses
import math
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import gnn  # noqa: E402

LASTFM = Path(__file__).parents[2] / "shared" / "data" / "lastfm"


def best_of(run, repeats: int = 7) -> float:
    """Shortest seconds of several runs, after one to warm up: the least disturbed one."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def random_graph(n_edges: int, n_users: int, n_items: int, seed: int = 0) -> gnn.Graph:
    """Uniform users, items of Zipf-like popularity."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(n_users, size=n_edges), n_items * rng.random(n_edges) ** 2
    return gnn.build_graph(torch.from_numpy(user), torch.from_numpy(item).long(), n_users, n_items)


class LightGCN(gnn.ModalGNN):
    """LightGCN itself: one modality, "id", whose layer 0 is learnt tables of users and items."""

    def __init__(self, n_users: int, n_items: int, cfg: gnn.GNNConfig,
                 generator: Generator | None = None):
        super().__init__(n_users, n_items, {"id": torch.zeros(n_items, 1)}, cfg, generator)
        for tables, n in ((self.user, n_users), (self.item, n_items)):
            tables["id"] = nn.Parameter(0.1 * torch.randn(n, cfg.dim, generator=generator))

    def layer0(self) -> Tensor:
        """x^0 (N, D)."""
        return torch.cat([self.user["id"], self.item["id"]])

    @torch.no_grad()
    def hardest(self, graph: gnn.Graph, user: Tensor, candidates: Tensor) -> Tensor:
        """Of each user's candidates (B, C) the item that scores highest: (B,). Dynamic negative
        sampling (doi 10.1145/2484028.2484126) asks for a better head of the list, which is what
        recall@20 measures."""
        users, items = self(graph)["id"]
        score = torch.einsum("bd,bcd->bc", users[user], items[candidates])
        return candidates.gather(1, score.argmax(dim=1, keepdim=True)).squeeze(1)


def sample_candidates(graph: gnn.Graph, n: int, n_candidates: int,
                      generator: Generator | None = None):
    """As gnn.sample_triplets, but with C other items each: user (n,), pos (n,), neg (n, C)."""
    user, pos, _ = gnn.sample_triplets(graph, n, generator)
    return user, pos, gnn.sample_negatives(graph, user[:, None].expand(n, n_candidates), generator)


def forward_backward(product, x: torch.Tensor) -> None:
    product(x).sum().backward()
    x.grad = None


def coo(graph: gnn.Graph) -> Tensor:
    return graph.csr().to_sparse_coo().coalesce()


def bench_spmm(args) -> None:
    graph = random_graph(args.interactions, args.users, args.items)
    x = torch.randn(args.users + args.items, args.dim, requires_grad=True)
    graph = graph._replace(matrix=graph.csr())
    matrices, fast = {"torch COO": coo(graph), "torch CSR": graph.matrix}, dict(gnn._PRODUCT)
    for name, matrix in matrices.items():
        seconds = best_of(lambda: forward_backward(lambda x: matrix @ x, x), 3)
        print(f"spmm {name:34s} {1e3 * seconds:8.1f} ms")
    for name in ("_index_add_product", "_csr_product", "_bag_product"):
        gnn._PRODUCT["cpu"] = getattr(gnn, name)
        seconds = best_of(lambda: forward_backward(lambda x: gnn.spmm(graph, x), x), 3)
        print(f"spmm {name[1:] + ', symmetric backward':34s} {1e3 * seconds:8.1f} ms")
    gnn._PRODUCT.update(fast)
    source = torch.randn(len(graph.col), args.dim)
    target = torch.empty_like(source)
    seconds = best_of(lambda: target.copy_(source))
    print(f"spmm (a copy of as many rows as two products gather: {2e3 * seconds:.1f} ms)")


def bench_step(args) -> None:
    graph = random_graph(args.interactions, args.users, args.items)
    cfg = gnn.GNNConfig(dim=args.dim, layers=3, batch=2048)
    model = LightGCN(args.users, args.items, cfg)
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.lr, fused=True)

    def step():
        loss = model.loss(graph, *gnn.sample_triplets(graph, cfg.batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    plain = torch.optim.Adam(model.parameters(), lr=cfg.lr)
    matrix, user_table, item_table = coo(graph), model.user["id"], model.item["id"]

    def coo_step():
        user, pos, neg = gnn.sample_triplets(graph, cfg.batch)
        layers = [torch.cat([user_table, item_table])]
        for _ in range(cfg.layers):
            layers.append(torch.sparse.mm(matrix, layers[-1]))
        users, items = torch.stack(layers, dim=1).mean(1).split([args.users, args.items])
        decay = sum(t.square().sum() for t in (user_table[user], item_table[pos], item_table[neg]))
        scores = ((users[user] * items[i]).sum(1) for i in (pos, neg))
        loss = gnn.bpr_loss(*scores) + cfg.l2 / 2 * decay / len(user)
        plain.zero_grad()
        loss.backward()
        plain.step()

    theirs = best_of(coo_step, 3)
    ours = best_of(step)
    print(f"step, 3 layers, batch 2048, {args.interactions:.0e} interactions: {1e3 * ours:.1f} ms; "
          f"with torch COO {1e3 * theirs:.1f} ms, {theirs / ours:.1f} times as long")


def bench_negatives(args) -> None:
    graph, batch = random_graph(args.interactions, args.users, args.items), 1 << 20
    generator = torch.Generator().manual_seed(0)
    seconds = best_of(lambda: gnn.sample_triplets(graph, batch, generator))
    user = torch.randint(args.users, (batch,), generator=generator)
    alone = best_of(lambda: gnn.sample_negatives(graph, user, generator))
    print(f"negatives: {batch / seconds / 1e6:.1f} million triplets a second, "
          f"{batch / alone / 1e6:.1f} million negatives alone")


def bench_scaling(args) -> None:
    """Twice: with nodes in proportion to the interactions, whose embeddings fall out of the cache;
    and with as many nodes always, which do not."""
    sizes = (10**5, 10**6, 5 * 10**6, 10**7)
    for label, grow in (("nodes grow", True), ("nodes fixed", False)):
        seconds = []
        for n_edges in sizes:
            scale = n_edges / 10**6 if grow else 1
            shape = [str(n_edges), str(int(args.users * scale)), str(int(args.items * scale))]
            flags = ["--threads", str(args.threads), "--dim", str(args.dim), "--one", *shape]
            printed = subprocess.check_output([sys.executable, __file__, *flags], text=True)
            t, mb = map(float, printed.split())
            seconds.append(t)
            print(f"scaling, {label}: {n_edges:.0e} interactions {1e3 * t:8.1f} ms, {mb:6.0f} MB")
        first, last = (math.log(seconds[-1] / seconds[n]) / math.log(sizes[-1] / sizes[n])
                       for n in (0, 2))
        print(f"scaling, {label}: log-log slope {first:.2f} over all, {last:.2f} from 5e6 to 1e7")


def one_scaling_run(args) -> None:
    n_edges, n_users, n_items = args.one
    graph = random_graph(n_edges, n_users, n_items)
    x = torch.randn(n_users + n_items, args.dim, requires_grad=True)
    seconds = best_of(lambda: forward_backward(lambda x: gnn.spmm(graph, x), x), 5)
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def read_pairs(path: Path) -> Tensor:
    """(user, item), (2, E)."""
    return torch.from_numpy(np.loadtxt(path, delimiter=",", skiprows=1, dtype=np.int64)).T


def train_lastfm(graph: gnn.Graph, cfg: gnn.GNNConfig, n_candidates: int, seed: int,
                 watch=None) -> LightGCN:
    generator = torch.Generator().manual_seed(seed)
    model = LightGCN(graph.n_users, graph.n_items, cfg, generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.lr, fused=True)
    for step in range(1, cfg.steps + 1):
        user, pos, neg = sample_candidates(graph, cfg.batch, n_candidates, generator)
        loss = model.loss(graph, user, pos, model.hardest(graph, user, neg))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if watch and step % 50 == 0:
            watch(step, model)
    return model


@torch.no_grad()
def mean_metrics(model: LightGCN, graph: gnn.Graph, test: gnn.Graph) -> tuple[float, float]:
    recall, ndcg = gnn.ranking_metrics(model(graph)["id"], graph, test)
    return recall.mean().item(), ndcg.mean().item()


def bench_lastfm(args) -> None:
    if not (args.data / "train.csv").is_file():
        return print(f"lastfm: skipped, {args.data} is absent")
    train, test = read_pairs(args.data / "train.csv"), read_pairs(args.data / "test.csv")
    n_users, n_items = torch.cat([train, test], dim=1).max(dim=1).values.add(1).tolist()
    order = torch.randperm(train.shape[1], generator=torch.Generator().manual_seed(args.seed))
    parts = order[:len(order) // 10], order[len(order) // 10:]
    valid, fit = (gnn.build_graph(*train[:, part], n_users, n_items) for part in parts)
    history, start = [], time.perf_counter()

    def watch(step, model):
        recall, ndcg = mean_metrics(model, fit, valid)
        history.append((recall + ndcg, step, recall, ndcg))
        print(f"lastfm step {step}: validation {recall:.4f} / {ndcg:.4f}", flush=True)

    cfg = gnn.GNNConfig(dim=args.dim, layers=args.layers, lr=args.lr, batch=args.batch,
                        steps=args.steps, l2=2 * args.l2)           # its BPR term counts twice, too
    train_lastfm(fit, cfg, args.candidates, args.seed, watch)
    _, steps, recall, ndcg = max(history)
    chosen = time.perf_counter()
    print(f"lastfm: stop at step {steps} ({recall:.4f} / {ndcg:.4f}), {chosen - start:.1f} s")
    graph, held = (gnn.build_graph(*part, n_users, n_items) for part in (train, test))
    model = train_lastfm(graph, dataclasses.replace(cfg, steps=steps), args.candidates, args.seed)
    recall, ndcg = mean_metrics(model, graph, held)
    end = time.perf_counter()
    print(f"lastfm: all pairs, {steps} steps, {end - chosen:.1f} s ({end - start:.1f} s in all): "
          f"test {recall:.4f} / {ndcg:.4f} (seed {args.seed}, {args.threads} threads)")


PARTS = {"lastfm": bench_lastfm, "spmm": bench_spmm, "step": bench_step,
         "negatives": bench_negatives, "scaling": bench_scaling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(PARTS)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {known}; default all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--interactions", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=30_000)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=64)
    lastfm = parser.add_argument_group("lastfm")
    lastfm.add_argument("--data", type=Path, default=LASTFM)
    lastfm.add_argument("--seed", type=int, default=0)
    lastfm.add_argument("--steps", type=int, default=1000, help="at most")
    lastfm.add_argument("--layers", type=int, default=4)
    lastfm.add_argument("--lr", type=float, default=0.003)
    lastfm.add_argument("--l2", type=float, default=3e-3)
    lastfm.add_argument("--batch", type=int, default=4096)
    lastfm.add_argument("--candidates", type=int, default=16, help="1: uniform negatives, LightGCN")
    parser.add_argument("--one", type=int, nargs=3, help=argparse.SUPPRESS)     # E, U, I
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; known: {known}")
    warnings.filterwarnings("ignore", message=".*[Ss]parse.*")
    torch.set_num_threads(args.threads)
    if args.one:
        return one_scaling_run(args)
    for part in args.parts or PARTS:
        PARTS[part](args)


if __name__ == "__main__":
    main()
