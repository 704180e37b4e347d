"""One process, two on one host, one on each of two hosts: the same training, whatever the layout."""

import numpy as np
import pytest

from tests.distributed import layouts


@pytest.fixture(scope="module")
def alone(tiny_model, tmp_path_factory) -> dict:
    """Each training in this one process."""
    return layouts.run_all(layouts.TRAININGS, tiny_model, str(tmp_path_factory.mktemp("alone")))


RUNS = [("one_host", "layouts_ddp", name) for name in layouts.TRAININGS]
RUNS += [("two_hosts", "layouts_ddp", name) for name in layouts.TRAININGS]
RUNS += [("two_hosts", "layouts_fsdp2", name) for name in layouts.FSDP2]


@pytest.fixture(params=RUNS, ids=lambda run: "-".join(run))
def runs(request, alone) -> tuple[dict, list[dict]]:
    """A training by one process, and what either of two ranks saw of it."""
    where, job, name = request.param
    return alone[name], [rank[job][name] for rank in request.getfixturevalue(where)]


def largest_difference(first: dict, second: dict) -> float:
    return max(np.abs(np.array(first[name]) - np.array(second[name])).max() for name in first)


def test_the_hosts_are_two(one_host, two_hosts):
    places = [[rank["layouts_ddp"]["capo"]["place"] for rank in ranks] for ranks in (one_host, two_hosts)]
    assert places == [[[0, 0], [1, 1]], [[0, 0], [1, 0]]], "rank, and rank on its host"


def test_same_prompts_and_advantages(runs):
    alone, ranks = runs
    assert len(alone["seen"]) == 4
    for expected, *seen in zip(alone["seen"], *(rank["seen"] for rank in ranks), strict=True):
        assert [row for rank in seen for row in rank["rows"]] == [list(row) for row in expected["rows"]]
        for rank in seen:
            np.testing.assert_allclose(rank["advantages"], expected["advantages"], atol=1e-6)
        local = [advantage for rank in seen for advantage in rank["local_advantages"]]
        np.testing.assert_allclose(local, np.array(expected["advantages"]).flatten(), atol=1e-6)
    astride = [seen["advantages"][1] for seen in alone["seen"]]  # rows 8 to 15 of 24
    assert sum(np.abs(group[:4]).max() > 0 < np.abs(group[4:]).max() for group in astride) >= 2


def test_same_parameters(runs):
    alone, ranks = runs
    assert alone["change"] >= 4e-3
    for rank in ranks:
        assert largest_difference(rank["parameters"], alone["parameters"]) <= 1e-5


def test_same_log(runs):
    alone, ranks = runs
    for expected, actual in zip(alone["log"], ranks[0]["log"], strict=True):
        for name in (name for name in expected if name.startswith("capo/") or name in ("reward", "reward_std")):
            assert actual[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name


def test_codapo_answers_prompts_of_both_ranks_again(alone):
    """Otherwise the comparison would not show whether the second generation's prompts come from everywhere."""
    first, second = (alone["codapo"]["seen"][step]["rows"] for step in (0, 1))
    prompts = [[tuple(row[0]) for row in rows][::8] for rows in (first, second)]
    assert len(set(prompts[0])) == 3 and set(prompts[1]) < set(prompts[0])


def test_hosts_with_a_checkpoint_each_resume_exactly(two_hosts):
    for rank in two_hosts:
        assert len(rank["resume"]["resumed"]["seen"]) == 1
        whole = rank["layouts_ddp"]["codapo"]["parameters"]
        assert largest_difference(rank["resume"]["resumed"]["parameters"], whole) <= 1e-6


@pytest.mark.parametrize("way", ["newest", "folder", "script"])
def test_hosts_that_see_different_checkpoints_do_not_resume(two_hosts, way):
    for rank in two_hosts:
        assert "(process 0 step 3, process 1 none)" in rank["resume"][way]


def test_a_checkpoint_of_two_ranks_is_whole_or_passed_over(one_host):
    seen = [rank["manifest"] for rank in one_host]
    assert seen[0]["files"] == seen[1]["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "model.safetensors"} <= set(seen[0]["files"])
    assert len({id for rank in seen for id in rank["runs"]}) == 1 and seen[0]["runs"][0]
    assert [rank["steps"] for rank in seen] == [1, 1], "from checkpoint-1"


def test_ranks_stop_together_at_weights_that_are_not_finite(one_host):
    for rank in one_host:
        assert "step 2: model.norm.weight has values that are not finite" in rank["manifest"]["not_finite"]


@pytest.mark.slow
def test_hosts_with_networks_of_their_own(two_networks, alone):
    assert [rank["layouts_ddp"]["capo"]["host"] for rank in two_networks] == ["host0", "host1"]
    for name, expected in alone.items():
        for rank in two_networks:
            assert largest_difference(rank["layouts_ddp"][name]["parameters"], expected["parameters"]) <= 1e-5
