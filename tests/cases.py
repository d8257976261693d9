"""Small cases of the coursework: each runs in a second or less.

    python cases.py watch NAME      a "find the bug" exercise: numbers, each with what it should be
    python cases.py predict NAME    a "predict, then run" exercise: the answer, after you have given yours
    python cases.py race NAME       a "make it faster" exercise: milliseconds of your version

The teacher grades predictions by running these cases on the reference, and asks of a bug which number betrays it."""
import itertools
import sys
import time

import torch
import torch.nn.functional as F
from torch import Generator, nn


def seeded(seed=0):
    return Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def random_graph(users, items, each, seed=0):
    """A graph in which every user likes `each` random items."""
    import gnn
    item = torch.rand(users, items, generator=seeded(seed)).topk(each).indices.flatten()
    return gnn.build_graph(torch.arange(users).repeat_interleave(each), item, users, items)


def direction(new, old, least=0.01):
    """Whether a number went up or down by more than a hundredth, or stayed the same."""
    new, old = (float(torch.as_tensor(x).detach()) for x in (new, old))
    change = (new - old) / max(abs(old), 1e-9)
    return "same" if abs(change) < least else "up" if change > 0 else "down"


# ---- find the bug: what a run shows

def watch_bug_user_embedding():
    """Forty steps of the graph network on 40 users who like 6 of 60 items each."""
    import gnn
    graph, cfg = random_graph(40, 60, 6), gnn.GNNConfig(dim=8, lr=0.02)
    features = {"image": normal(60, 6).float(), "text": normal(60, 6, seed=1).float()}
    net = gnn.ModalGNN(40, 60, features, cfg, seeded())
    optimizer = torch.optim.Adam(net.parameters(), cfg.lr)
    first = None
    for step in range(40):
        loss = net.loss(graph, *gnn.sample_triplets(graph, 256, seeded(step)))
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x0 = net.layer0().detach()
    return {"BPR at the start (3 ln 2 = 2.08)": first,
            "length of the users' rows of layer 0 at the end (0 at the start, then learnt)": x0[:40].norm().item(),
            "numbers in an item's row of layer 0 (2 modalities of 8)": len(x0[40])}


def watch_bug_seen_items():
    """Twenty recommendations of 60 items for 50 users, with scores around -20."""
    import gnn
    graph = random_graph(50, 60, 6)
    user, item = F.pad(normal(50, 4), (0, 1), value=1.0), F.pad(normal(60, 4, seed=1), (0, 1), value=-20.0)
    top = gnn.top_items(user, item, 20, graph.pairs(0, 50))
    has = torch.zeros(50, 61).index_put((graph.pairs(0, 50)), torch.ones(()))
    return {"recommendations per user (20)": top.shape[1],
            "different items recommended to a user, on average (20)": sum(len(set(x)) for x in top.tolist()) / 50,
            "share of recommendations that the user has already (0)": has.gather(1, top).mean().item()}


def watch_bug_ideal_dcg():
    """Users with five test items of 40; rankings by chance, by truth, and with one hit on top."""
    import gnn
    test = random_graph(200, 40, 5)
    user, item = test.pairs(0, 200)
    none = gnn.build_graph(*torch.empty(2, 0, dtype=torch.int64), 200, 40)
    truth = torch.zeros(200, 40).index_put((user, item), torch.ones(()))
    first = F.one_hot(item.reshape(200, 5)[:, 0], 40).float()
    scores = {"chance": torch.rand(200, 40, generator=seeded(1)), "truth": truth,
              "one": first - truth * (first == 0)}
    found = {k: [x.mean().item() for x in gnn.ranking_metrics((s, torch.eye(40)), none, test, 20)]
             for k, s in scores.items()}
    return {"recall@20 of a ranking by chance (20 / 40)": found["chance"][0],
            "NDCG@20 of the perfect ranking (1)": found["truth"][1],
            "NDCG@20 where one of five is first and the others are last (1 / 2.95 = 0.34)": found["one"][1]}


def watch_bug_commitment():
    """The loss of a fresh quantizer at two weights of the commitment."""
    import vq
    p, size, loss = normal(100, 6), [], 0.0
    for beta in (0.0, 1.0):
        torch.manual_seed(0)
        net = vq.ResidualVQVAE(6, vq.VQConfig(levels=1, codes=8, dim=6, hidden=8, beta=beta)).double().eval()
        net.initialize(p, seeded())
        found = net(p)
        size.append(torch.autograd.grad(found.loss, net.encoder.linear.weight)[0])
        loss = found.reconstruction_loss.item()
    return {"reconstruction loss after k-means (below 1)": loss,
            "commitment (above 0)": found.quantized.commit.item(),
            "length of the commitment's gradient in the encoder (above 0)": (size[1] - size[0]).norm().item()}


def watch_bug_dead_codes():
    """A hundred updates of a codebook of 32 codes that start far from all rows."""
    import vq
    book = vq.EMACodebook(vq.VQConfig(codes=32, dim=2, revive_below=0.1)).double()
    book.codebook.copy_(5 + normal(32, 2, seed=2) / 100)
    book.total.copy_(book.codebook / 32)
    generator, jumps = seeded(1), 0
    for _ in range(100):
        x, before = torch.randn(256, 2, generator=generator, dtype=torch.float64), book.codebook.clone()
        book.update(x, vq.nearest_code(x, book.codebook), 0.95, generator)
        jumps += ((book.codebook - before).norm(dim=1) > 0.5).sum().item()
    codes = vq.nearest_code(normal(2000, 2), book.codebook)
    return {"share of the codes that are in use at the end (1)": len(codes.unique()) / 32,
            "sum of the counts (about 1)": book.count.sum().item(),
            "jumps of codes, by more than 0.5 (about 32: each once)": jumps}


def watch_bug_last_noise():
    """A fresh denoiser, which says v = 0, from one starting noise."""
    import generators
    net = generators.Denoiser(generators.ImageConfig(size=16, latent=2, width=8, heads=2), 5, 2, 3).double()
    z, words = normal(50, 2, 4, 4), torch.ones(50, 1, dtype=torch.int64)
    draw = lambda times, seed: generators.denoise(net, z, times, words, words.expand(50, 2), seeded(seed))
    return {"spread of two draws of a first step, 0.98 to 0.7 (above 0.5)": (draw([0.98, 0.7], 1)
                                                                           - draw([0.98, 0.7], 2)).std().item(),
            "spread of two draws of the last step, 0.25 to 0 (0)": (draw([0.25, 0], 1)
                                                                    - draw([0.25, 0], 2)).std().item(),
            "deviation of the starting noise (1)": z.std().item()}


def watch_bug_averaged_log_prob():
    """All texts of at most two tokens, of a vocabulary of two words and the end."""
    import generators
    texts = torch.tensor([[2, 0], *itertools.product((3, 4), (2, 3, 4))])
    start, later = normal(5), normal(5, 5, seed=1)
    logits = torch.stack([start.expand(len(texts), 5), later[texts[:, 0]]], dim=1)
    found = generators.text_log_prob(logits, None, texts, generators.TextConfig(guidance=1.0, top_p=1.0)).exp()
    return {"number of texts (7)": len(found),
            "probability of the empty text (below 1)": found[0].item(),
            "probabilities of all texts together (1)": found.sum().item()}


def watch_bug_dropped_tokens():
    """4,000 users' four tokens, dropped at the rate 0.3."""
    import generators
    null = generators.drop_preferences(torch.ones(4000, 4, dtype=torch.int64), 0.3, seeded()) == -1
    return {"share of tokens that are null (0.3)": null.double().mean().item(),
            "share of first tokens that are null (0.3)": null[:, 0].double().mean().item(),
            "share of users all of whose tokens are null (0.3)": null.all(1).double().mean().item()}


def watch_bug_advantage_gradient():
    """A policy over four actions, penalized by its log-probability: its optimum is softmax(gain / penalty)."""
    import reward
    gain, logits, penalty = torch.tensor([1.0, 0, 2, 1]), torch.zeros(4, requires_grad=True), 1.5
    for _ in range(300):
        log_p = logits.log_softmax(0)
        value = gain - penalty * log_p
        value = value - (log_p.exp() * value).sum().detach()
        loss = sum(log_p[a].detach().exp() * reward.reinforce_loss(log_p[a:a + 1], value[a:a + 1]) for a in range(4))
        logits.data -= torch.autograd.grad(loss, logits)[0]
    return {"probabilities together (1)": logits.softmax(0).sum().item(),
            "distance of the policy from its optimum (0)": (logits.softmax(0)
                                                            - (gain / penalty).softmax(0)).norm().item(),
            "least probability of an action (above 0)": float((logits.softmax(0) > 0).all())}


def watch_bug_frozen_rows():
    """Twenty rounds in which only the first two of four rows are used."""
    import reward
    table = nn.Parameter(normal(4, 3))
    start = table.detach().clone()
    optimizer = reward.token_optimizer({"image": table}, reward.RewardConfig(lr_image=0.05))
    for _ in range(20):
        optimizer.zero_grad()
        table[:2].sum().backward()
        optimizer.step()
    moved = (table - start).norm(dim=1)
    return {"learning rate (0.05)": optimizer.param_groups[0]["lr"],
            "rows that moved among those used (2)": (moved[:2] > 0).sum().item(),
            "way of the rows that were never used (0)": moved[2:].sum().item()}


def watch_bug_token_mean():
    """Means over the tokens of texts, alone and in company."""
    import reward
    x, keep = normal(2, 6, 3), torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]]).bool()
    same, mixed = (reward._masked_mean(x, k) for k in (keep[:1].expand(2, 6), keep))
    return {"length of the mean of a text among its like": same[0].norm().item(),
            "width of a mean (3)": mixed.shape[1],
            "change of a short text's mean when a long text joins it (0)":
                (mixed[1] - reward._masked_mean(x[1:], keep[1:])[0]).norm().item()}


def watch_bug_own_taste():
    """300 users who like 5 of 500 items at random: there is nothing to know about them."""
    import reward
    e, user = normal(500, 16), torch.arange(300).repeat_interleave(5)
    item = torch.rand(300, 500, generator=seeded(1)).topk(5).indices.flatten()
    other = torch.randint(500, item.shape, generator=seeded(2))
    won = lambda taste: (F.cosine_similarity(e[item], taste) > F.cosine_similarity(e[other], taste)).double().mean()
    stranger, own = (reward.taste_without(e, user, item, user, judged) for judged in (other, item))
    return {"comparisons (1500)": len(item),
            "share of users with a taste (1)": (stranger.norm(dim=1) > 0).double().mean().item(),
            "share of comparisons that the own item wins (0.5)": won(own).item()}


# ---- predict, then run

def predict_bpr_at_the_start():
    import gnn
    graph = random_graph(20, 30, 4)
    features = {"image": normal(30, 5).float(), "text": normal(30, 5, seed=1).float()}
    net = gnn.ModalGNN(20, 30, features, gnn.GNNConfig(l2=0.0), seeded())
    return net.loss(graph, *gnn.sample_triplets(graph, 2000, seeded())).item()


def predict_guidance_1():
    import generators
    null = normal(50, 20)
    cond = null + 0.7 * normal(50, 20, seed=1)
    entropy = [-(p.exp() * p.clamp(min=-99)).sum(1).mean() for p in (
        generators.sampling_logits(cond, null, generators.TextConfig(guidance=w, top_p=1.0)) for w in (1.0, 3.0))]
    return direction(*entropy)


def quantizer(levels, p):
    """Residual k-means of p with 8 codes a level."""
    import vq
    torch.manual_seed(0)
    net = vq.ResidualVQVAE(p.shape[1], vq.VQConfig(levels=levels, codes=8, dim=p.shape[1], hidden=8)).double().eval()
    net.initialize(p, seeded())
    return net


def predict_one_code_level():
    p = normal(500, 6)
    return len(quantizer(1, p).encode(p).unique(dim=0))


def predict_one_level_explains():
    import vq
    p = normal(500, 6)
    one, four = (vq.explained(p, quantizer(levels, p)(p).reconstruction.detach()) for levels in (1, 4))
    return direction(one, four)


def policy_entropy(weight):
    """Entropy of a policy over five actions after exact REINFORCE with `weight` times the KL to its start."""
    import reward
    gain, start = torch.tensor([0.0, 1, 0.5, 0.2, 0.9]), torch.zeros(5).log_softmax(0)
    logits = torch.zeros(5, requires_grad=True)
    for _ in range(100):
        log_p = logits.log_softmax(0)
        each = [log_p[a].detach().exp() * reward.reinforce_loss(log_p[a:a + 1], gain[a:a + 1]) for a in range(5)]
        drift = reward.categorical_kl(log_p[None, None], start[None, None], torch.ones(1, 1).bool())
        logits.data -= torch.autograd.grad(sum(each) + weight * drift.sum(), logits)[0]
    return torch.special.entr(logits.softmax(0)).sum()


def predict_no_kl():
    return direction(policy_entropy(0.0), policy_entropy(2.0))


def predict_group_of_two():
    import reward
    return reward.leave_one_out(torch.tensor([[1.0, 4.0]]))[0, 1].item()


def predict_group_offset():
    import reward
    r = normal(10, 4)
    return direction(*(reward.leave_one_out(x).square().sum() for x in (r + 10, r)))


def predict_lambda_c_0():
    import reward
    image, text = F.normalize(normal(200, 4, 8), dim=-1), F.normalize(normal(200, 8, 8, seed=1), dim=-1)
    chosen = []
    for lambda_c in (0.0, 2.0):
        cfg = reward.RewardConfig(lambda_c=lambda_c, lambda_p=0.3)
        i, t = reward.best_pair(image, text, normal(200, 4, seed=2), normal(200, 8, seed=3), cfg)
        group = torch.arange(200)
        chosen.append(1 + (image[group, i] * text[group, t]).sum(1).mean())
    return direction(*chosen)


def folded(features, *histories):
    """Preferences of two layers folded in from histories of items, in a graph where all items have equal degrees."""
    import gnn
    items = len(features)
    user = torch.arange(4).repeat_interleave(items)
    graph = gnn.build_graph(user, torch.arange(items).repeat(4), 4, items)
    net = gnn.ModalGNN(4, items, {"image": features}, gnn.GNNConfig(dim=8, layers=1), seeded()).double()
    person = torch.cat([torch.full((len(h),), n) for n, h in enumerate(histories)])
    return net.fold_in(graph, person, torch.tensor([i for h in histories for i in h]), len(histories))["image"]


def predict_quarter_history():
    whole, quarter = folded(normal(1, 6).expand(40, 6), range(16), range(4))
    return (quarter.norm() / whole.norm()).item()


def predict_half_history():
    whole, half = folded(normal(40, 6), range(16), range(8))
    return direction(F.cosine_similarity(half, whole, dim=0), 1.0)


def predict_many_layers():
    import gnn
    graph, x0 = random_graph(40, 60, 6), normal(100, 8)
    alike = []
    for layers in (64, 2):
        users = F.normalize(gnn.propagate(graph, x0, layers)[:40], dim=1)
        alike.append((users @ users.T).mean())
    return direction(*alike)


def predict_eta_0():
    import generators
    cfg = generators.ImageConfig(size=16, latent=2, width=8, heads=2, eta=0.0)
    net, words = generators.Denoiser(cfg, 5, 2, 3).double(), torch.ones(5, 1, dtype=torch.int64)
    times = generators.sampling_times(4)
    draws = [generators.denoise(net, normal(5, 2, 4, 4), times, words, words.expand(5, 2), seeded(s)) for s in (1, 2)]
    return (draws[0] - draws[1]).abs().max().item()


def predict_nucleus_size():
    import generators
    return generators.nucleus(torch.tensor([0.4, 0.3, 0.2, 0.1]).log(), 0.75).sum().item()


def predict_scorer_at_chance():
    import reward
    alike = F.normalize(torch.ones(64, 8), dim=1)
    return reward.info_nce(alike, alike, torch.eye(64).bool(), torch.tensor(14.0)).item()


def predict_copied_values():
    import reward
    values, user = normal(400).repeat(4), torch.arange(400).repeat(4)
    naive, robust = (reward.interval(values, cluster) for cluster in (None, user))
    return (naive["high"] - naive["low"]) / (robust["high"] - robust["low"])


# ---- make it faster: the same work for a module, whichever version of the function it holds; another one for each k

def race_faster_product(gnn):
    graph, x = gnn.Graph(*random_graph(1000, 1000, 30)), torch.randn(2000, 64, generator=seeded())
    return lambda k: gnn._bag_product(graph, x + k)


def race_faster_decoding(generators):
    torch.manual_seed(0)
    cfg = generators.TextConfig(vocab_size=64, layers=1, width=32, heads=2, context=48)
    net = generators.TextDecoder(cfg, 5, 4, 8)
    words = torch.ones(8, 2, dtype=torch.int64)
    return lambda k: generators.sample_text(net, words, torch.randint(8, (8, 4), generator=seeded(k)), seeded(k))


def race_faster_quantizer(vq):
    x, book = torch.randn(2048, 64, generator=seeded()), torch.randn(64, 64, generator=seeded(1))
    return lambda k: vq.nearest_code(x * (1 + k % 7), book)


def seconds(work, start=0, least=0.05):
    """Processor time of work(k), a mean over as many k from `start` on as take `least`: another busy process does not
    count, nor does what an answer remembers."""
    begun, runs = time.process_time(), 0
    while (spent := time.process_time() - begun) < least:
        work(start + runs)
        runs += 1
    return spent / runs


MODULE = {"faster_product": "gnn", "faster_decoding": "generators", "faster_quantizer": "vq"}


def main(kind, name):
    case = globals()[f"{kind}_{name}"]
    if kind == "race":
        work = case(__import__(MODULE[name]))
        print(f"{1000 * min(seconds(work) for _ in range(3)):.2f} ms; sum of the result, which must stay: "
              f"{work(0).double().sum().item():.6g}")
    elif kind == "watch":
        print(case.__doc__)
        for n, (text, value) in enumerate(sorted(case().items()), 1):
            print(f"{n}. {value:10.4f}  {text}")
    else:
        print(case())


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) != 3 or f"{sys.argv[1]}_{sys.argv[2]}" not in globals():
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except NotImplementedError as error:  # of a function that was handed out blank
        import traceback
        file, line, function, _ = traceback.extract_tb(error.__traceback__)[-1]
        sys.exit(f"{sys.argv[2]} calls {function} ({file}, line {line}), which is not written yet")
