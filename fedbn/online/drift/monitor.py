r"""Detect without labels that the person or the sensor has changed, and adjust the user's statistics.

*Signal.* The channel means :math:`m` of a window at the inputs of the first BN layers are compared with those of
earlier windows *that were predicted as the same class*, so that a new activity is no drift (for tasks without classes,
with all earlier windows). With their mean :math:`M` and variance :math:`V`, :math:`z=\overline{(m-M)^2/V}` over
channels is about 1 as long as nothing changes. The layers are those of the source model: changes of the user's
statistics do not move the signal.

*Detector.* ADWIN or Page-Hinkley from river, one per user, on :math:`z/(1+z)\in[0,1)`.

*Action.* ``decay`` reduces the weight of earlier windows. ``reset`` discards them. ``branch`` saves the statistics and
restores saved ones if they fit the last windows better. On streams in bouts, a reset loses classes that do not recur
for a while; decay is the safer choice.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedbn.online.drift.actions import Action, PersonalizedModel, UserMonitor
from fedbn.online.drift.detectors import Detector
from fedbn.online.drift.signal import Floats, GroupStatistics, InputMeans

DELAY = 12
"""Windows that are not yet added to the statistics: they may follow a change that was not detected yet."""


class DriftMonitor:
    """Wraps a personalized model: predicts and learns as ``net`` does, and acts on alarms.

    Args:
        net: the personalized model.
        model: the source model, for the signal.
        detector: creates the detector of each user.
        action: applied after an alarm.

    Attributes:
        users: monitor of each user, by name.
    """

    def __init__(self, net: PersonalizedModel, model: nn.Module, detector: Detector, action: Action) -> None:
        self.net, self.input_means, self.detector, self.action = net, InputMeans(model), detector, action
        self.users: dict[str, UserMonitor] = {}
        self._last: tuple[Tensor, list[str]] | None = None

    def predict(self, x: Tensor, user: Sequence[str]) -> Tensor:
        """Logits of the wrapped model."""
        self._last = (x, list(user))
        return self.net.predict(x, user=user)

    def commit(self, posterior: Tensor | None = None) -> None:
        """Update the wrapped model, then the detectors. Without a posterior, all windows count as one class.

        Raises:
            ValueError: `predict` was not called before.
        """
        if self._last is None:
            raise ValueError("nothing to commit: call predict() first")
        self.net.commit(posterior=posterior)
        x, users = self._last
        labels, classes = [0] * len(x), 1
        if posterior is not None:
            labels, classes = posterior.argmax(1).tolist(), posterior.shape[1]
        for means, label, user in zip(self.input_means(x).cpu().numpy(), labels, users, strict=True):
            if user not in self.users:
                statistics = GroupStatistics(classes, self.input_means.scale.cpu().numpy())
                self.users[user] = UserMonitor(self.detector.new(), statistics)
            self._observe(user, means, label)

    def _observe(self, user: str, x: Floats, label: int) -> None:
        monitor = self.users[user]
        monitor.num_windows += 1
        monitor.recent.append((x, label))
        if len(monitor.recent) > DELAY:
            old, old_label = monitor.recent.pop(0)
            monitor.statistics.update(old[None], [old_label])
        z = monitor.statistics.distance(x, label)
        if z is not None:
            monitor.alarm.update(z / (1 + z))
            if monitor.alarm.drift_detected:
                monitor.alarms.append(monitor.num_windows)
                self.action.apply(self.net, user, monitor)
                monitor.alarm, monitor.recent = self.detector.new(), []
