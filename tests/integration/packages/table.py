"""Every model of another package that the library is tested on."""

from tests.integration.packages import by_hand, networks, series, vision

CASES = {**vision.CASES, **networks.CASES, **series.CASES, **by_hand.CASES}
