"""The order of a run of several lanes: nothing is lost, and each lane's piece begins with long modules."""

from tests.lanes import Placed, in_lanes

SECONDS = {"long": 900, "longer": 1000, "third": 600}
MODULES = {"a": 7, "long": 2, "b": 4, "third": 3, "longer": 1, "c": 6}
TESTS = [
    Placed(f"{module}{number}", module, SECONDS.get(module, 0) if number == 0 else 0)
    for module, tests in MODULES.items()
    for number in range(tests)
]


def test_each_lane_begins_with_a_long_module() -> None:
    """The longest modules are the first of the three pieces, which are as long as those that xdist cuts."""
    order = in_lanes(TESTS, 3)
    pieces = [order[:7], order[7:15], order[15:]]
    assert [piece[0] for piece in pieces] == ["longer0", "long0", "third0"]


def test_nothing_is_lost_and_modules_keep_their_order() -> None:
    """Whatever the number of lanes: each test is there once, and those of a module follow one another as before."""
    for lanes in range(1, 40):
        order = in_lanes(TESTS, lanes)
        assert sorted(order) == sorted(test.item for test in TESTS)
        for module in MODULES:
            own = [test.item for test in TESTS if test.module == module]
            assert [item for item in order if item in own] == own
