"""States of many clients, with one tensor per entry for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from fedbn.nn.roles import State


class ClientTable(MutableMapping[int, State]):
    """States of clients with the same entries, as tensors ``[N, *shape]``; a mapping from users to their states.

    The states that the mapping returns are copies, so a later round does not change them.

    Attributes:
        users: all users that can have a state, one per row.
        tensors: entries ``[N, *shape]`` by name; the rows of users without a state are undefined.

    >>> table = ClientTable([3, 5])
    >>> table[5] = {"w": torch.ones(2)}
    >>> table.write([3], {"w": torch.zeros(1, 2)})
    >>> dict(table)
    {3: {'w': tensor([0., 0.])}, 5: {'w': tensor([1., 1.])}}
    """

    def __init__(self, users: Sequence[int]) -> None:
        self.users = list(users)
        self.tensors: State = {}
        self._rows = {user: row for row, user in enumerate(self.users)}
        self._present: set[int] = set()

    @staticmethod
    def of(states: Mapping[int, State], users: Sequence[int]) -> ClientTable:
        """A table with rows for ``users`` and the given states; the same table if it already has these rows.

        Raises:
            ValueError: the states do not have the same entries, or a state is of another user.
        """
        if isinstance(states, ClientTable) and states.users == list(users):
            return states
        table = ClientTable(users)
        if isinstance(states, ClientTable) and states:
            table.write(list(states), states.take(list(states)))
        else:
            table.update(states)
        return table

    def take(self, users: Sequence[int], names: Iterable[str] | None = None) -> State:
        """Entries ``[K, *shape]`` of users that have a state, as copies; of all ``names`` that exist."""
        rows = self._rows_of(users)
        tensors = self.tensors if names is None else {n: self.tensors[n] for n in names if n in self.tensors}
        return {n: t.clone() if rows is None else t.index_select(0, rows.to(t.device)) for n, t in tensors.items()}

    def copy_to(self, tensors: State, users: Sequence[int]) -> None:
        """Write the states of those users that have one into ``tensors``, entries ``[K, *shape]`` of all ``users``.

        Entries that the table lacks do not change.
        """
        known = [i for i, user in enumerate(users) if user in self._present]
        if known:
            positions = torch.tensor(known)
            for name, values in self.take([users[i] for i in known], tensors).items():
                tensors[name].index_copy_(0, positions.to(values.device), values)

    def write(self, users: Sequence[int], tensors: State) -> None:
        """Replace the states of users by ``tensors``, entries ``[K, *shape]``.

        Raises:
            ValueError: the table has other entries, or no row for a user.
        """
        if not self._present:
            self.tensors = {n: t.new_empty((len(self.users), *t.shape[1:])) for n, t in tensors.items()}
        layout, given = ({n: (t.shape[1:], t.dtype, t.device) for n, t in x.items()} for x in (self.tensors, tensors))
        if layout != given or not self._rows.keys() >= set(users):
            raise ValueError("states of clients have different entries")
        rows = self._rows_of(users)
        for name, values in tensors.items():
            if rows is None:
                self.tensors[name].copy_(values)
            else:
                self.tensors[name].index_copy_(0, rows.to(values.device), values)
        self._present.update(users)

    def _rows_of(self, users: Sequence[int]) -> Tensor | None:
        """Rows of users; None if they are all rows in order."""
        return None if users == self.users else torch.tensor([self._rows[user] for user in users])

    def row(self, user: int) -> State:
        """The state of a user as views, which the next `write` changes."""
        if user not in self._present:
            raise KeyError(user)
        return {name: t[self._rows[user]] for name, t in self.tensors.items()}

    def __getitem__(self, user: int) -> State:
        return {name: t.clone() for name, t in self.row(user).items()}

    def __setitem__(self, user: int, state: State) -> None:
        self.write([user], {name: t[None] for name, t in state.items()})

    def __delitem__(self, user: int) -> None:
        self._present.remove(user)

    def __contains__(self, user: object) -> bool:
        return user in self._present

    def __iter__(self) -> Iterator[int]:
        return (user for user in self.users if user in self._present)

    def __len__(self) -> int:
        return len(self._present)
