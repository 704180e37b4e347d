"""`generation="compact"` on two processes: ranks draw different completions, and none waits for another for ever."""


def test_ranks_draw_different_completions(one_host, two_hosts):
    for ranks in ([rank["compact_ddp"] for rank in one_host], [rank["compact_fsdp2"] for rank in two_hosts]):
        first, second = (rank["trained_on"] for rank in ranks)
        assert len(first) == len(second) == 2
        assert first != second


def test_a_rank_steps_alone_under_ddp(one_host):
    first, second = (rank["compact_ddp"] for rank in one_host)
    assert [len(row) for row in first["last"]] == [1] * 4
    assert len(first["forwards"]) == 1 < len(second["forwards"])


def test_sharded_ranks_step_together(two_hosts):
    first, second = (rank["compact_fsdp2"] for rank in two_hosts)
    assert [len(row) for row in first["last"]] == [1] * 4
    assert max(len(row) for row in second["last"]) > 1
    assert len(first["forwards"]) == len(second["forwards"]) == max(len(row) for row in second["last"])
    assert first["forwards"][:2] == [[1, 2], [1, 1]]  # the prompt once, then one row alone for the other's sake
