"""What the tests of several processes share: a free port, and who shares a batch under which parallelism."""

import socket

import pytest

SHARED_BATCHES = pytest.mark.parametrize(
    ("sizes", "data_parallel"),
    [
        ({}, 8),
        ({"tp_size": 2, "dp_shard_size": 4}, 4),
        ({"cp_size": 4, "dp_shard_size": 2}, 2),
        ({"sp_size": 2, "dp_shard_size": 4}, 4),
        ({"tp_size": 2, "cp_size": 2, "dp_shard_size": 2}, 2),
        ({"tp_size": 2, "sp_size": 4}, 1),
        ({"dp_replicate_size": 2, "dp_shard_size": 4}, 8),
    ],
)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
