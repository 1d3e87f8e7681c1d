"""Compare stacked programs with separate models; independent of `fedbn.stacked.check`."""

from __future__ import annotations

import copy

import torch

from fedbn.stacked.modules import entries


def assert_program_matches(program, net, shape, rows=(5, 2), k=3, integers=0):
    """Outputs, gradients and statistics of K clients in one program equal those of K separate models.

    ``net`` is in double precision and in the mode of the program. All clients have different entries, and take one
    step for each number of rows. With ``integers``, inputs are integers below it.
    """
    separate = [with_random_entries(net) for _ in range(k)]
    for batch_last in (False, True) if program.supports_batch_last(len(shape) + 1) else (False,):
        nets = copy.deepcopy(separate)
        stacked = {n: torch.stack([entries(m)[n] for m in nets]) for n in entries(net)}
        tensors = {n: program.lay_out(n, v).detach() for n, v in stacked.items()}
        leaves = [tensors[n].requires_grad_() for n in program.trained]
        noise = [torch.Generator().manual_seed(i) for i in range(k)]
        forward = program.bind(tensors, k, noise, batch_last=batch_last)
        masks = [torch.Generator().manual_seed(i).get_state() for i in range(k)]
        for n in rows:
            size = (n, k, *shape)
            x = torch.randint(integers, size) if integers else torch.randn(size, dtype=torch.float64)
            expected = []
            for i, model in enumerate(nets):
                torch.set_rng_state(masks[i])
                expected.append(model(x[:, i].clone()))
                masks[i] = torch.get_rng_state()
            if batch_last:
                actual = list(forward(x.flatten(2).permute(1, 2, 0)).mT)
            else:
                actual = list(forward(x.flatten(1, 2)).unflatten(1, (k, -1)).unbind(1))
            assert_close(actual, expected)
            gradients = torch.autograd.grad(loss(actual), leaves, allow_unused=True)
            own = torch.autograd.grad(loss(expected), [p for m in nets for p in m.parameters()], allow_unused=True)
            for j, (name, gradient) in enumerate(zip(program.trained, gradients, strict=True)):
                assert (gradient is None) == (own[j] is None)
                if gradient is not None:
                    assert_close(gradient, program.lay_out(name, torch.stack(own[j :: len(leaves)])))
        for n, value in tensors.items():
            assert_close(value.detach(), program.lay_out(n, torch.stack([entries(m)[n] for m in nets])))


def with_random_entries(net):
    """A copy whose entries, including running statistics, are random numbers in [.5, 1.5) with random signs."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                signs = 1 if name.endswith("running_var") else torch.randint(0, 2, value.shape) * 2 - 1
                value.copy_((torch.rand_like(value) + 0.5) * signs)
    return net


def loss(outputs):
    """Sum over clients; all elements have different weights."""
    return sum(
        (out.sin() * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)).sum() for out in outputs
    )


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
