"""What the tests of all figures share."""

import pytest

from probes import activation_attacks_scaling


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    """Figures take what resamples there are; a thousand would cost each test a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation_attacks_scaling, "N_RESAMPLES", 40)
        yield
