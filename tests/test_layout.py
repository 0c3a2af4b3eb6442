import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepen.errors import LayoutError
from deepen.expansion import plan_layout


def afters(base_blocks, **how):
    return [block.after for block in plan_layout(base_blocks, **how).new_blocks]


def test_the_papers_layout():
    # arXiv 2401.02415 section 4.1: 32 blocks, 8 groups, one new block on each.
    layout = plan_layout(32, blocks=8)
    assert [block.after for block in layout.new_blocks] == [3, 7, 11, 15, 19, 23, 27, 31]
    assert [block.copy_of for block in layout.new_blocks] == [3, 7, 11, 15, 19, 23, 27, 31]
    assert [block.index for block in layout.new_blocks] == [4, 9, 14, 19, 24, 29, 34, 39]
    assert layout.depth == 40


@pytest.mark.parametrize(
    ("base_blocks", "how", "placed"),
    [
        (4, {"blocks": 2}, [1, 3]),
        (5, {"blocks": 3}, [0, 2, 4]),
        (5, {"blocks": 2}, [1, 4]),
        (2, {"blocks": 5}, [0, 0, 1, 1, 1]),
        (6, {"blocks": 4, "groups": 2}, [2, 2, 5, 5]),
        (4, {"blocks": 2, "placement": "suffix"}, [3, 3]),
        (4, {"blocks": 2, "placement": "prefix"}, [-1, -1]),
        (4, {"after": [3, 0, 3]}, [0, 3, 3]),
        (4, {"after": [-1], "blocks": 1}, [-1]),
    ],
)
def test_where_new_blocks_stand(base_blocks, how, placed):
    assert afters(base_blocks, **how) == placed


def test_copies_are_of_the_top_of_the_group():
    copies = [block.copy_of for block in plan_layout(8, blocks=4, groups=2).new_blocks]
    assert copies == [2, 3, 6, 7]
    assert [b.copy_of for b in plan_layout(3, blocks=2, placement="suffix").new_blocks] == [1, 2]
    assert [b.copy_of for b in plan_layout(3, blocks=2, placement="prefix").new_blocks] == [0, 1]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"blocks": 0}, "at least 1"),
        ({}, "neither blocks nor after is given"),
        ({"blocks": -1}, "at least 1"),
        ({"blocks": 10**9}, "more than 10000"),
        ({"after": []}, "after is empty"),
        ({"after": [4]}, "block 4 is out of range; the base has blocks 0 to 3"),
        ({"after": [-2]}, "out of range"),
        ({"after": [1], "blocks": 2}, "leave one of them out"),
        ({"blocks": 2, "placement": "middle"}, "interleaved, suffix or prefix"),
        ({"blocks": 2, "groups": 3}, "can be 1 to 2"),
        ({"blocks": 2, "groups": 0}, "can be 1 to 2"),
        ({"blocks": 2, "groups": 2, "placement": "suffix"}, "only interleaved"),
        ({"after": [1], "groups": 1}, "only interleaved"),
    ],
)
def test_refused(how, words):
    with pytest.raises(LayoutError, match=words):
        plan_layout(4, **how)


@given(
    base_blocks=st.integers(1, 40),
    blocks=st.integers(1, 40),
    placement=st.sampled_from(["interleaved", "suffix", "prefix"]),
    groups=st.none() | st.integers(1, 40),
)
def test_any_count_at_any_place(base_blocks, blocks, placement, groups):
    if groups is not None:
        placement, groups = "interleaved", min(groups, base_blocks, blocks)
    layout = plan_layout(base_blocks, blocks=blocks, placement=placement, groups=groups)
    assert len(layout.new_blocks) == blocks
    assert layout.depth == base_blocks + blocks
    # The base's blocks keep their order, and every place is taken exactly once.
    assert [layout.origins[position] for position in layout.base_positions] == list(range(base_blocks))
    assert sorted([*layout.base_positions, *layout.new_indices]) == list(range(layout.depth))
    for block in layout.new_blocks:
        below = sum(position < block.index for position in layout.base_positions)
        assert below == block.after + 1


@given(base_blocks=st.integers(1, 12), data=st.data())
def test_any_list(base_blocks, data):
    after = data.draw(st.lists(st.integers(-1, base_blocks - 1), min_size=1, max_size=8))
    layout = plan_layout(base_blocks, after=after)
    assert [block.after for block in layout.new_blocks] == sorted(after)
    assert all(block.copy_of == max(block.after, 0) for block in layout.new_blocks)


def test_drawing():
    assert plan_layout(4, blocks=2).draw() == "■■ □2 ■■ □5"
