from __future__ import annotations

import pytest
import torch

from fedbn.online import fit_alignment
from fedbn.online.alignments.quaternions import to_matrix
from fedbn.scenarios.base import scenario
from fedbn.scenarios.imu import MOTIONS
from tests.fedbn.helpers import rejects


def test_imu_has_known_placements():
    turned, worn = (scenario(f"imu:noise=0:users=3:unseen=1:{text}") for text in ("placement=0.6", "placement=0"))
    assert torch.equal(worn.placements(), torch.eye(3).expand(3, 3, 3))
    for user, original, turn in zip(turned.load(0).users, worn.load(0).users, turned.placements(), strict=True):
        for part, before in ((user.train, original.train), (user.test, original.test)):
            expected = torch.einsum("ij,nkjt->nkit", turn, before.x.unflatten(1, (2, 3))).flatten(1, 2)
            torch.testing.assert_close(part.x, expected, atol=1e-5, rtol=0)
            assert torch.equal(part.y, before.y)


def test_imu_has_gravity_and_steps():
    for user in scenario("imu:noise=0:users=3:unseen=1:placement=0").load(0).users:
        for k, (name, motion) in enumerate(MOTIONS.items()):
            x = user.train.x[user.train.y == k]
            assert len(x) > 8
            pitch = torch.rad2deg(torch.atan2(x[:, 0].mean(), x[:, 2].mean()))
            assert abs(pitch - motion.pitch[0]) < 4 * motion.pitch[1], name
            if not motion.steps:
                assert x.std(2).max() < 1e-6
                torch.testing.assert_close(x[:, :3].norm(dim=1), torch.ones(len(x), x.shape[2]))
                continue
            spectrum = torch.fft.rfft(x[:, 2] - x[:, 2].mean(1, keepdim=True)).abs().mean(0)
            assert spectrum.argmax() * 50 / 128 == pytest.approx(motion.steps, rel=0.25), name


def test_rotation_recovers_placements_of_unseen_people():
    imu = scenario("imu:placement=1.2:users=8:unseen=2")
    population, turns = imu.load(0), imu.placements()
    seen = [(population.users[i].train.x, population.users[i].train.y) for i in population.seen]
    aligner = fit_alignment("rotation", seen, len(MOTIONS), population.triples)
    # Estimates turn every sensor into one common frame, which is known up to one rotation of all.
    found = torch.stack([rotation_of(aligner, population.users[i].test.x[:120]) @ turns[i] for i in population.unseen])
    u, _, v = torch.linalg.svd(found.mean(0))
    angles = [angle(r @ (u @ v).T) for r in found]
    before = [angle(turns[i]) for i in population.unseen]
    assert max(angles) < 8
    assert max(before) > 20


def rotation_of(aligner, x):
    """Estimated rotation ``[3, 3]`` from a stream of windows."""
    return to_matrix(aligner.follow(x, torch.zeros(1))["align_value"][0])


def angle(rotation):
    """Angle of a rotation, in degrees."""
    return float(torch.rad2deg(torch.arccos(((rotation.trace() - 1) / 2).clamp(-1, 1))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imu:users=1", "users=1: choose 2 to 1000"),
        ("imu:unseen=12", "12 unseen of 12 users leaves no user for training"),
        ("imu:noise=-1", "placement= and noise= must not be negative"),
        ("imu:window=501", "window=501 is longer than the shortest bout, 500 samples"),
    ],
)
def test_imu_rejects_bad_options(text, message):
    rejects(message, lambda: scenario(text).load(0))
