"""Second implementations of what the engines share, in float64, written from the definitions.

They use nothing of the library. The network is the MLP: linear, batch normalization, ReLU, linear.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

MEAN, VARIANCE, COUNTER = "hidden.1.running_mean", "hidden.1.running_var", "hidden.1.num_batches_tracked"
SCALE, SHIFT = "hidden.1.weight", "hidden.1.bias"


def key(*path):
    """Key of a random draw: 63 bits of BLAKE2b."""
    digest = hashlib.blake2b("/".join(map(str, path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") // 2


def mean(values, weights):
    """Weighted mean."""
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def variance_of_union(means, variances, weights):
    """Variance of a union: mean of the squares minus square of the mean."""
    squares = [v + m**2 for v, m in zip(variances, means, strict=True)]
    return mean(squares, weights) - mean(means, weights) ** 2


def rate(plan, round):
    """Learning rate of a round, from 1."""
    return plan.lr if plan.schedule == "constant" else plan.lr * math.cos(math.pi * (round - 1) / plan.rounds / 2) ** 2


def epoch(n, size, *path):
    """Shuffled batches of row indices; a last batch of one row joins the previous batch."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(key(*path)))
    starts = list(range(0, n, size))
    if n - starts[-1] == 1 and min(n, size) > 1:
        starts.pop()
    return [order[a:b] for a, b in zip(starts, [*starts[1:], n], strict=True)]


def inputs_of_norm(s, x):
    """Input of batch normalization."""
    return x.flatten(1) @ s["hidden.0.weight"].T + s["hidden.0.bias"]


def forward(s, x, statistics=None):
    """Logits, with the statistics of the state or those given."""
    m, v = statistics or (s[MEAN], s[VARIANCE])
    hidden = s[SCALE] * (inputs_of_norm(s, x) - m) / (v + 1e-5).sqrt() + s[SHIFT]
    return hidden.clamp_min(0) @ s["classifier.weight"].T + s["classifier.bias"]


def cross_entropy(logits, y):
    """Mean negative log-likelihood."""
    return -torch.stack([row[k] - row.exp().sum().log() for row, k in zip(logits, y, strict=True)]).mean()


def train(s, x, y, plan, seed, round, user, pulled, momentum):
    """Train a state in place with SGD; return the mean loss without the proximal term."""
    names = [k for k in s if k not in (MEAN, VARIANCE, COUNTER)]
    start, losses = {k: s[k].clone() for k in pulled}, []
    for e in range(plan.local_epochs):
        for rows in epoch(len(x), plan.batch_size, seed, "shuffle", round, user, e):
            leaves = s | {k: s[k].clone().requires_grad_() for k in names}
            h = inputs_of_norm(leaves, x[rows])
            m, v = h.mean(0), ((h - h.mean(0)) ** 2).mean(0)
            loss = cross_entropy(forward(leaves, x[rows], (m, v)), y[rows])
            losses += [float(loss)] * len(rows)
            distance = sum((((leaves[k] - start[k]) ** 2).sum() for k in pulled), torch.zeros(()))
            gradients = torch.autograd.grad(loss + plan.proximal / 2 * distance, [leaves[k] for k in names])
            for k, g in zip(names, gradients, strict=True):
                momentum[k] = plan.momentum * momentum.get(k, 0) + g + plan.weight_decay * s[k]
                s[k] = s[k] - rate(plan, round) * momentum[k]
            s[MEAN] = 0.9 * s[MEAN] + 0.1 * m.detach()
            s[VARIANCE] = 0.9 * s[VARIANCE] + 0.1 * v.detach() * len(rows) / (len(rows) - 1)
            s[COUNTER] = s[COUNTER] + 1
    return sum(losses) / len(losses)


def federate(clients, initial, plan, seed, local, is_pooled):
    """Federated averaging of ``clients``, pairs (x, y). Entries in ``local`` are never sent, counters neither.

    Returns the server's entries, the entries and the momentum of each client, its last statistics, and the losses.
    """
    shared = [k for k in initial if k not in {*local, COUNTER}]
    server, own, momentum, sent, losses = {k: initial[k] for k in shared}, {}, {}, {}, []
    for round in range(1, plan.rounds + 1):
        count, replies = plan.clients_per_round or len(clients), []
        draw = np.random.default_rng(key(seed, "clients", round))
        sampled = sorted(draw.choice(len(clients), count, replace=False)) if count < len(clients) else range(count)
        for i in map(int, sampled):
            momentum[i] = momentum.get(i, {}) if plan.optimizer_state == "keep" else {}
            state = initial | server | own.get(i, {})
            pulled = [k for k in shared if k not in (MEAN, VARIANCE)] if plan.proximal else []
            replies.append(
                (len(clients[i][0]), train(state, *clients[i], plan, seed, round, i, pulled, momentum[i]), state)
            )
            own[i], sent[i] = {k: state[k] for k in {*local, COUNTER}}, (state[MEAN], state[VARIANCE])
        sizes, states = [n for n, _, _ in replies], [state for _, _, state in replies]
        weights = sizes if plan.weighting == "samples" else [1] * len(sizes)
        server = {k: mean([s[k] for s in states], weights) for k in shared}
        if is_pooled:
            server[VARIANCE] = variance_of_union([s[MEAN] for s in states], [s[VARIANCE] for s in states], weights)
        losses.append(mean([loss for _, loss, _ in replies], sizes))
    return server, own, momentum, sent, losses


def recalibrated(s, x):
    """Statistics of all rows, the variance unbiased."""
    h = inputs_of_norm(s, x)
    return h.mean(0), ((h - h.mean(0)) ** 2).sum(0) / (len(h) - 1)


def online(s, x, n0):
    """Logits of a stream: every eight windows, statistics are those of ``n0`` source windows and all windows so far."""
    out, h, start = [], inputs_of_norm(s, x), (s[MEAN], s[VARIANCE])
    statistics = start
    for i in range(0, len(x), 8):
        out.append(forward(s, x[i : i + 8], statistics))
        seen = h[: i + 8]
        n, weights = len(seen), (n0, len(seen))
        means, variances = (start[0], seen.mean(0)), (start[1], seen.var(0, correction=0))
        variance = variance_of_union(means, variances, weights) * (n0 + n) / (n0 + n - 1)
        statistics = mean(means, weights), variance
    return torch.cat(out)


def cold_starts(s, sent, x):
    """Initial statistics of an unseen user with rows ``x`` from those that the clients sent last."""
    means, variances = (list(t) for t in zip(*sent, strict=True))
    h, ones, tau2 = inputs_of_norm(s, x), [1] * len(sent), torch.stack(means).var(0, correction=0)
    m, v = h.mean(0), h.var(0, correction=0)
    distances = [float(((a - m) ** 2 + (b.sqrt() - v.sqrt()) ** 2).sum().sqrt()) for a, b in sent]
    near = [1 / d for d in distances]
    pooled = mean(means, ones), variance_of_union(means, variances, ones)
    share = len(x) / (len(x) + v / tau2)
    mixed = pooled[0] + share * (m - pooled[0])
    second = (1 - share) * (pooled[1] + pooled[0] ** 2) + share * (v + m**2)
    return {
        "mean": (pooled[0], mean(variances, ones)),
        "pooled": pooled,
        "nearest": sent[distances.index(min(distances))],
        "mixture": (mean(means, near), variance_of_union(means, variances, near)),
        "prior": (mixed, second - mixed**2),
    }


def scores(logits, y):
    """Accuracy, macro-F1 over the classes that occur or are predicted, and mean loss."""
    predicted, labels = [max(range(len(r)), key=r.__getitem__) for r in logits.tolist()], y.tolist()
    f1 = []
    for k in {*predicted, *labels}:
        hits = sum(p == t == k for p, t in zip(predicted, labels, strict=True))
        f1.append(2 * hits / (predicted.count(k) + labels.count(k)))
    accuracy = sum(p == t for p, t in zip(predicted, labels, strict=True)) / len(labels)
    return accuracy, sum(f1) / len(f1), float(cross_entropy(logits, y))
