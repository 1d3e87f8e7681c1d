r"""Notice without labels that the person or the sensor has changed, and do something about the statistics.

*Signal.* The channel means :math:`m` of a window at the inputs of the first BN layers are compared with those of the
windows met before *that were given the same class*, so that a new activity is no drift. With their mean :math:`M` and
variance :math:`V`, :math:`z=\overline{(m-M)^2/V}` over channels is about 1 while nothing changes. The layers are the
source model's: what a rule does to its statistics does not move the signal.

*Detector.* ADWIN or Page-Hinkley from river, one for each user, on :math:`z/(1+z)\in[0,1)`.

*Action.* ``decay`` lets what was learnt count little, ``reset`` forgets it, ``branch`` puts it aside and takes out what
was put aside before if that fits the last windows better. On streams in bouts a reset loses classes that do not come
again for a while; decay is the safer choice.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedbn.online.drift.actions import Action, Personal, UserMonitor
from fedbn.online.drift.detectors import Detector
from fedbn.online.drift.signal import ChannelMeans, Context

RECENT = 12
"""Windows that may have come after a change which was not noticed yet."""


# ---------------------------------------------------------------- signal


# ---------------------------------------------------------------- detectors


# ---------------------------------------------------------------- actions


class DriftMonitor:
    """A follower under watch: predicts and learns as ``net`` does, and acts when a user's detector speaks.

    Args:
        net: follows the users.
        model: the source, for the signal.
        notice: what detects.
        act: what is done then.
    """

    def __init__(self, net: Personal, model: nn.Module, notice: Detector, act: Action) -> None:
        self.net, self.look, self.notice, self.action = net, ChannelMeans(model), notice, act
        self.watches: dict[str, UserMonitor] = {}
        self._last: tuple[Tensor, list[str]] | None = None

    def predict(self, x: Tensor, user: Sequence[str]) -> Tensor:
        """Logits of the follower."""
        self._last = (x, list(user))
        return self.net.predict(x, user=user)

    def commit(self, posterior: Tensor | None = None) -> None:
        """Let the follower learn, then look at the windows.

        Raises:
            ValueError: nothing was predicted before.
        """
        if self._last is None or posterior is None:
            raise ValueError("commit follows a predict and takes its posterior")
        self.net.commit(posterior=posterior)
        x, users = self._last
        for m, label, user in zip(self.look(x), posterior.argmax(1).tolist(), users, strict=True):
            self._see(user, m, label)

    def _see(self, user: str, m: Tensor, label: int) -> None:
        watch = self.watches.setdefault(user, UserMonitor(self.notice.new(), Context(self.look.scale)))
        watch.met += 1
        watch.recent.append((m, label))
        if len(watch.recent) > RECENT:
            watch.context.learn(*watch.recent.pop(0))
        z = watch.context.distance(m, label)
        if z is not None:
            watch.alarm.update(z / (1 + z))
            if watch.alarm.drift_detected:
                watch.alarms.append(watch.met)
                self.action.act(self.net, user, watch)
                watch.alarm, watch.recent = self.notice.new(), []
