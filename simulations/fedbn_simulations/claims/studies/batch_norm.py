"""Batch normalization.

Common claims about BN (Ioffe, Szegedy, 2015; Wu, He, 2018), tested on networks that train in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from fedbn.models.small_cnn import SmallCNN
from fedbn.nn.conversion import convert, norm_layers
from fedbn_simulations.claims.claim import Claim
from fedbn_simulations.claims.studies.common import DIGITS, accuracy, digits, seeded, shuffled, train

NUMERICS = 1


def _cnn(norm: str, seed: int) -> nn.Module:
    with seeded(seed, "weights"):
        model: nn.Module = SmallCNN((1, 8, 8), 10)
    if norm == "BN":
        return model
    if norm == "GN":
        return convert(model, "group", groups=4)
    return convert(model, {"LN": "layer", "EvalNorm": "evalnorm", "none": "none"}[norm])


def _mlp(norm: str, seed: int, gain: float = 1.0, p: float = 0.0) -> nn.Sequential:
    """Three hidden layers of 64 with He initialization; with torch's default, a network without BN does not train.

    Args:
        norm: ``BN`` before each nonlinearity, or none.
        seed: random seed of the weights.
        gain: factor of the initial weights.
        p: dropout probability after each nonlinearity.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(3):
        layers += [nn.Linear(64, 64), nn.BatchNorm1d(64) if norm == "BN" else nn.Identity(), nn.ReLU(), nn.Dropout(p)]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    with seeded(seed, "weights"):
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
                layer.weight.data *= gain
    return model


def rates(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Largest learning rate, as a power of two, with which plain SGD reaches 90 % training accuracy.

    The arm is a network and a normalizer.

    Raises:
        ValueError: no rate reaches it.
    """
    network, norm = arm.split()
    data, _ = digits(seed)
    for exponent in range(8, -7, -1):
        model = (_mlp if network == "MLP" else _cnn)(norm, seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=2.0**exponent)
        train(model, data, shuffled(len(data), 64, 10, seed), optimizer)
        if accuracy(model, data) >= 0.9:
            return {"largest stable rate, log2": float(exponent)}
    raise ValueError(f"{arm}: no learning rate reaches 90 % training accuracy")


def _fit(model: nn.Module, size: int, epochs: int, seed: int, *, lr: float, momentum: float = 0.0) -> dict[str, float]:
    """Test accuracy after some epochs of SGD with batches of ``size``."""
    data, test = digits(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    train(model, data, shuffled(len(data), size, epochs, seed), optimizer)
    return {"accuracy": accuracy(model, test)}


def speed(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test accuracy after a single epoch with the same learning rate."""
    return _fit(_mlp(arm, seed), 64, 1, seed, lr=0.1)


def initial(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test accuracy with initial weights multiplied by a gain; the arm is a normalizer and the gain."""
    norm, _, gain = arm.partition(" ")
    return _fit(_mlp(norm, seed, gain=float(gain)), 64, 5 if quick else 10, seed, lr=0.1)


def small_batches(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test accuracy with a learning rate proportional to the batch size; the arm is a normalizer and the batch size."""
    norm, _, size = arm.partition(" ")
    return _fit(_cnn(norm, seed), int(size), 1 if quick else 2, seed, lr=0.001 * int(size), momentum=0.9)


def placement(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test accuracy of two convolutions (8, 16) after three epochs; the arm is the position of BN."""
    layers: list[nn.Module] = []
    with seeded(seed, "weights"):
        for inputs, width in ((1, 8), (8, 16)):
            parts: dict[str, list[nn.Module]] = {
                "before the convolution": [nn.BatchNorm2d(inputs), nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()],
                "before the ReLU": [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()],
                "after the ReLU": [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(width)],
                "nowhere": [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()],
            }
            layers += [*parts[arm], nn.MaxPool2d(2)]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10))
    return _fit(model, 64, 3, seed, lr=0.05, momentum=0.9)


def regularizing(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test accuracy after long training on 200 images, and the gap to the training accuracy."""
    data, test = digits(seed)
    few = data.take(torch.arange(200))
    model = _mlp("BN" if "BN" in arm else "none", seed, p=0.5 if "dropout" in arm else 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with seeded(seed, "dropout"):
        train(model, few, shuffled(len(few), 32, 40 if quick else 100, seed), optimizer)
    test_accuracy = accuracy(model, test)
    return {"accuracy": test_accuracy, "training above test accuracy": accuracy(model, few) - test_accuracy}


def shift(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Shift of the inputs of nonlinearities during training.

    Every ten steps, the values of each unit on 256 fixed images are compared with those ten steps earlier: the
    1-Wasserstein distance divided by the standard deviation, averaged over units, layers and the whole training.
    """
    data, _ = digits(seed)
    model = _mlp(arm, seed)
    fixed, steps = data.x[:256], 0
    distances: list[float] = []
    previous: list[Tensor] = []

    def measure() -> None:
        nonlocal steps, previous
        steps += 1
        if steps % 10:
            return
        current: list[Tensor] = []
        hooks = [
            m.register_forward_pre_hook(lambda _, args: current.append(args[0].sort(0).values))
            for m in model
            if isinstance(m, nn.ReLU)
        ]
        with torch.no_grad():
            model(fixed)
        for hook in hooks:
            hook.remove()
        distances.extend(float(((a - b).abs().mean(0) / b.std(0)).mean()) for a, b in zip(current, previous))
        previous = current

    order = shuffled(len(data), 64, 5 if quick else 15, seed)
    train(model, data, order, torch.optim.SGD(model.parameters(), lr=0.1), on_step=measure)
    return {"shift in ten steps": sum(distances) / len(distances)}


def epsilon(arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Test accuracy with the eps of the arm."""
    model = _cnn("BN", seed)
    for layer in norm_layers(model).values():
        cast(nn.BatchNorm2d, layer).eps = float(arm)
    return _fit(model, 32, 4 if quick else 15, seed, lr=0.05, momentum=0.9)


GAINS = ("0.1", "0.3", "1", "3", "10")
SIZES = ("1", "2", "4", "8", "32")


def accuracy_range(values: Mapping[str, float], norm: str) -> float:
    """Best minus worst accuracy over the gains."""
    accuracies = [values[f"{norm} {gain}"] for gain in GAINS]
    return max(accuracies) - min(accuracies)


def accuracy_loss(values: Mapping[str, float], norm: str, size: str) -> float:
    """Loss of accuracy with batches of ``size`` instead of 32."""
    return values[f"{norm} 32"] - values[f"{norm} {size}"]


MLP = f"{DIGITS}; MLP with three hidden layers of 64, SGD"
claim = partial(
    Claim,
    published="not verified",
    source="Ioffe, Szegedy 2015, https://arxiv.org/abs/1502.03167",
    measure="accuracy",
    threshold=0.0,
)
in_small_batches = partial(
    claim,
    setting=f"{DIGITS}; small-cnn, learning rate 0.001 times the batch",
    run=small_batches,
    arms=tuple(f"{norm} {size}" for norm in ("BN", "GN", "LN", "EvalNorm") for size in SIZES),
    drawing="curves",
    axis="training batch size",
)

CLAIMS = (
    claim(
        name="bn-learning-rate",
        sentence="BN lets an MLP train at learning rates at least three times as large.",
        setting=f"{MLP}, rates 2^-6 to 2^8",
        run=rates,
        arms=("MLP BN", "MLP none"),
        measure="largest stable rate, log2",
        effect=lambda v: v["MLP BN"] - v["MLP none"],
        meaning="log2 of the largest stable learning rate, BN minus none",
        threshold=1.585,
    ),
    claim(
        name="bn-learning-rate-cnn",
        sentence="BN lets a CNN train at learning rates at least three times as large.",
        setting=f"{DIGITS}; small-cnn, SGD, rates 2^-6 to 2^8",
        run=rates,
        arms=("CNN BN", "CNN none"),
        measure="largest stable rate, log2",
        effect=lambda v: v["CNN BN"] - v["CNN none"],
        meaning="log2 of the largest stable learning rate, BN minus none",
        threshold=1.585,
    ),
    claim(
        name="bn-speed",
        sentence="With BN the network learns faster.",
        setting=f"{MLP}, one epoch at learning rate 0.1",
        run=speed,
        arms=("BN", "none"),
        effect=lambda v: v["BN"] - v["none"],
        meaning="test accuracy after one epoch, BN minus none",
    ),
    claim(
        name="bn-initialization",
        sentence="With BN the scale of the initial weights matters less.",
        setting=f"{MLP} 0.1; He initialization times 0.1 to 10",
        run=initial,
        arms=tuple(f"{norm} {gain}" for norm in ("BN", "none") for gain in GAINS),
        effect=lambda v: accuracy_range(v, "none") - accuracy_range(v, "BN"),
        meaning="range of the test accuracy over the gains, without BN minus with BN",
        drawing="curves",
        axis="gain of the initial weights",
    ),
    in_small_batches(
        name="bn-small-batch",
        sentence="BN loses more accuracy with batches of 2 than group normalization.",
        source="Wu, He 2018, https://arxiv.org/abs/1803.08494",
        effect=lambda v: accuracy_loss(v, "BN", "2") - accuracy_loss(v, "GN", "2"),
        meaning="loss of accuracy with batches of 2 instead of 32, BN minus GN",
    ),
    in_small_batches(
        name="bn-one-row",
        sentence="BN loses more accuracy with batches of 1 than layer normalization.",
        source="after Ba, Kiros, Hinton 2016, https://arxiv.org/abs/1607.06450",
        effect=lambda v: accuracy_loss(v, "BN", "1") - accuracy_loss(v, "LN", "1"),
        meaning="loss of accuracy with batches of 1 instead of 32, BN minus LN",
        note="in a convolution, a batch of one still has statistics over its positions",
    ),
    in_small_batches(
        name="bn-small-batch-evalnorm",
        sentence="EvalNorm recovers the accuracy that BN loses with batches of 2.",
        source="Singh, Shrivastava 2019, https://arxiv.org/abs/1904.06031",
        effect=lambda v: v["EvalNorm 2"] - v["BN 2"],
        meaning="test accuracy with batches of 2, EvalNorm minus BN",
    ),
    claim(
        name="bn-placement",
        sentence="BN works better before the nonlinearity than after it.",
        setting=f"{DIGITS}; two convolutions (8, 16), three epochs of SGD 0.05 with momentum",
        run=placement,
        arms=("before the ReLU", "after the ReLU", "before the convolution", "nowhere"),
        effect=lambda v: v["before the ReLU"] - v["after the ReLU"],
        meaning="test accuracy, BN before the ReLU minus after it",
    ),
    claim(
        name="bn-regularizes",
        sentence="BN regularizes: it reduces the gap between training and test accuracy.",
        setting=f"{MLP} 0.05 with momentum, 200 images",
        run=regularizing,
        arms=("none", "BN", "dropout", "BN + dropout"),
        measure="training above test accuracy",
        effect=lambda v: v["none"] - v["BN"],
        meaning="training minus test accuracy, without BN minus with BN",
    ),
    claim(
        name="bn-instead-of-dropout",
        sentence="Dropout helps less with BN.",
        setting=f"{MLP} 0.05 with momentum, 200 images, dropout 0.5",
        run=regularizing,
        arms=("none", "BN", "dropout", "BN + dropout"),
        effect=lambda v: (v["dropout"] - v["none"]) - (v["BN + dropout"] - v["BN"]),
        meaning="gain of test accuracy from dropout, without BN minus with BN",
    ),
    claim(
        name="bn-shift",
        sentence="BN reduces the shift of activations during training.",
        setting=f"{MLP} 0.1",
        run=shift,
        arms=("none", "BN"),
        measure="shift in ten steps",
        effect=lambda v: v["none"] - v["BN"],
        meaning="shift of the inputs of nonlinearities in ten steps, in standard deviations, none minus BN",
        note="this may not be why BN works (Santurkar et al. 2018)",
    ),
    claim(
        name="bn-epsilon",
        sentence="Any eps from 1e-5 to 1e-3 gives the same accuracy.",
        source="common practice, no paper",
        setting=f"{DIGITS}; small-cnn",
        run=epsilon,
        arms=("1e-5", "1e-3"),
        effect=lambda v: -abs(v["1e-5"] - v["1e-3"]),
        meaning="negative absolute difference in accuracy",
        threshold=-0.01,
    ),
)
