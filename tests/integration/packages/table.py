"""Every model of another package that the library is tested on."""

from tests.integration.packages import networks, vision

CASES = {**vision.CASES, **networks.CASES}
