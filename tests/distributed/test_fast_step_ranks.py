"""Repacking on two processes of which one may have nothing to keep and the other everything, under DDP and FSDP2."""

import pytest

from tests.distributed.fast_step import DDP, FSDP2


@pytest.fixture
def ddp(one_host) -> list[dict]:
    return [rank["fast_step_ddp"] for rank in one_host]


@pytest.fixture
def fsdp2(two_hosts) -> list[dict]:
    return [rank["fast_step_fsdp2"] for rank in two_hosts]


RUNS = [("ddp", name) for name in DDP] + [("fsdp2", name) for name in FSDP2]


@pytest.fixture(params=RUNS, ids=lambda run: "-".join(run))
def ranks(request) -> list[dict]:
    """What either rank saw of one scenario."""
    backend, name = request.param
    return [rank[name] for rank in request.getfixturevalue(backend)]


def test_parameters_equal_those_without_repacking(ranks):
    for rank in ranks:
        print({name: rank[name] for name in rank if "difference" in name or name == "change"})  # noqa: T201
        assert rank["change"] >= 1e-2
        assert rank["difference"] <= 1e-5
        assert rank.get("difference_to_stock", 0.0) <= 1e-5
    assert ranks[0]["checksum"] == pytest.approx(ranks[1]["checksum"], abs=1e-5)


def test_ranks_do_the_same_calls_and_rows(ranks):
    """Collectives in a sharded forward, and TRL's gather of a number a row, hang or mix rows up otherwise."""
    first, second = (rank["repacked"] for rank in ranks)
    assert first["policy_calls"] == second["policy_calls"] and first["ref_calls"] == second["ref_calls"]
    assert first["rows"] == second["rows"] and len(first["rows"]) == len(ranks[0]["unpacked"]["rows"])
    assert min(first["rows"]) >= 1
    assert first["policy_calls"] <= ranks[0]["unpacked"]["policy_calls"]
    assert first["ref_calls"] <= ranks[0]["unpacked"]["ref_calls"]


@pytest.mark.parametrize(
    "name", [name for name, scenario in DDP.items() if scenario.kind != "turns" and len(scenario.rewards) == 1]
)
def test_one_rank_has_nothing_to_keep(ddp, name):
    first, second = (rank[name]["repacked"] for rank in ddp)
    assert first["advantages"] == 0 < second["advantages"]
    if "S=2G" in name and "bnpo" not in name:
        assert sum(first["rows"]) == second["advantages"], "as many rows as the busier rank keeps"


@pytest.mark.parametrize("name", DDP)
def test_no_rank_gets_a_micro_batch_larger_than_trls(ddp, name):
    """Rows without advantage that only keep the count even must not cost a rank its memory."""
    for rank in ddp:
        largest = [max(rank[name][way]["tokens"]) for way in ("repacked", "unpacked")]
        assert largest[0] <= largest[1]
