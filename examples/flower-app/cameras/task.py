"""Model, data and loops of the app. Nothing in this file knows about federated learning."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.norm1(self.conv1(x))), 2)
        x = nn.functional.max_pool2d(torch.relu(self.norm2(self.conv2(x))), 2)
        return self.fc(x.flatten(1))


def load_data(partition_id, num_partitions, batch_size):
    """Training and test images of one client, whose camera has its own contrast and brightness."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[partition_id::num_partitions, None] / 16
    labels = torch.tensor(digits.target)[partition_id::num_partitions]
    images = images * (1 + 2 * partition_id) + partition_id
    train, test = (TensorDataset(images[part], labels[part]) for part in (slice(0, 300), slice(300, None)))
    generator = torch.Generator().manual_seed(partition_id)
    return DataLoader(train, batch_size, shuffle=True, generator=generator), DataLoader(test, batch_size)


def train(net, loader, epochs, lr):
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
    return loss.item()


@torch.no_grad()
def test(net, loader):
    net.eval()
    correct = sum(int((net(images).argmax(1) == labels).sum()) for images, labels in loader)
    return correct / len(loader.dataset)
