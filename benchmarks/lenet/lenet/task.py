"""Model, data and training in the shape of Flower's quickstart for PyTorch; the images are random."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """LeNet for images of 3 x 32 x 32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``[n, 10]`` of images ``[n, 3, 32, 32]``."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def load_data(partition: int, examples: int, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """Training and test data of a client."""
    generator = torch.Generator().manual_seed(partition)
    x = torch.randn(examples, 3, 32, 32, generator=generator)
    data = TensorDataset(x, torch.randint(10, (examples,), generator=generator))
    train, test = torch.utils.data.random_split(data, [0.8, 0.2], generator)
    return DataLoader(train, batch_size, shuffle=True), DataLoader(test, batch_size)


def train(net: nn.Module, loader: DataLoader, lr: float) -> float:
    """One epoch of SGD. Returns the last loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    for x, y in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.no_grad()
def test(net: nn.Module, loader: DataLoader) -> float:
    """Accuracy."""
    net.eval()
    correct = sum(int((net(x).argmax(1) == y).sum()) for x, y in loader)
    return correct / len(loader.dataset)  # type: ignore[arg-type]
