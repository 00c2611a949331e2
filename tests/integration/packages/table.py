"""Every model of another package that the library is tested on."""

from tests.integration.packages import networks, series, vision

CASES = {**vision.CASES, **networks.CASES, **series.CASES}
