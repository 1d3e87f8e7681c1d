"""Binding of users to the public keys of their SuperNodes.

With ``--enable-supernode-auth``, a SuperLink admits only nodes whose public key is registered, and a node signs each of
its requests with the private key. The server of a run sees the public key of every node, so a TOML file with the key of
each user defines which node serves which user, whatever the node claims::

    0 = "ecdsa-sha2-nistp384 AAAAE2VjZHNh... hospital-a"
    1 = "ecdsa-sha2-nistp384 AAAAE2VjZHNh... hospital-b"

Values are lines of OpenSSH public key files (``node0.pub``).
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)
from flwr.serverapp import Grid

from fedbn.errors import UserError


class UserKeys:
    """Public keys of the users' nodes, and the nodes that hold them.

    Attributes:
        user: public key in OpenSSH form, without comment -> user.
        ignored: ids of nodes that hold no user's key.
    """

    def __init__(self, keys: Mapping[int, str]) -> None:
        """Parse OpenSSH public keys by user.

        Raises:
            UserError: a key is invalid, or two users have the same key.
        """
        self.user: dict[bytes, int] = {}
        self.ignored: set[int] = set()
        self._user_of: dict[int, int] = {}
        for user, text in keys.items():
            try:
                key = load_ssh_public_key(text.encode()).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
            except (ValueError, UnsupportedAlgorithm):
                raise UserError(f"the key of user {user} is not an OpenSSH public key: copy it from node.pub") from None
            if key in self.user:
                raise UserError(f"users {self.user[key]} and {user} have the same key: each user needs its own")
            self.user[key] = user

    def nodes(self, grid: Grid) -> Iterator[int]:
        """Ids of the nodes that hold the key of a user; other nodes are ignored.

        Raises:
            UserError: the grid does not authenticate nodes.
        """
        for node in grid.get_nodes() if hasattr(grid, "get_nodes") else ():
            try:
                key = load_pem_public_key(node.public_key).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
            except (ValueError, UnsupportedAlgorithm):  # simulated nodes have no keys
                raise UserError("users are bound to keys, but this engine has none: remove users=...") from None
            if key in self.user:
                self._user_of[node.node_id] = self.user[key]
                yield node.node_id
            else:
                self.ignored.add(node.node_id)

    def user_of(self, node: int) -> int | None:
        """The user to whose key a node is bound."""
        return self._user_of.get(node)


def read_keys(path: Path, users: int) -> UserKeys:
    """Read the file of the users' keys.

    Args:
        path: the file.
        users: number of users, each of which needs a key.

    Raises:
        UserError: the file cannot be read, or does not have one valid key per user.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give the file of the users' keys") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f'{path} is not valid TOML ({error}): write lines such as 0 = "ecdsa-sha2-... ..."') from None
    expected = {str(user) for user in range(users)}
    if wrong := sorted(table.keys() ^ expected):
        state = "has no key for" if wrong[0] in expected else "has a key for unknown"
        raise UserError(f"{path} {state} user {wrong[0]}: users are numbered 0 to {users - 1}")
    if invalid := [user for user, key in table.items() if not isinstance(key, str)]:
        raise UserError(f"{path}: the key of user {invalid[0]} is not a string in quotes")
    return UserKeys({int(user): key for user, key in table.items()})
