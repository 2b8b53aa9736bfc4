"""Every planted result with all that can be drawn of it, drawn anew at each call."""

import numpy as np
import torch

from probes.figures import (
    activation_attacks,
    active_dormant,
    attention_sinks,
    bigram_backcopy,
    information_flow,
    reachability,
    scan_snap,
    scan_snap_sweep,
    scan_snap_text,
    state_space,
    successor_heads,
    token_dynamics,
)
from probes.figures.token_dynamics_simulation import figure_trajectory
from probes.state_space_dynamics import Trajectory
from tests.probes.figures import plant, test_activation_attacks, test_active_dormant
from tests.probes.figures.planted import planted_result
from tests.probes.figures.test_reachability import result_of


def reached():
    heads = {
        "head_orthogonal": torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8]]),
        "head_limit": torch.tensor([[1.1, 1.2], [1.3, 1.4], [1.5, 1.6], [1.7, 1.8]]),
        "head_min_k": torch.tensor([[1, 9], [-1, 2], [1, 1], [2, 3]]),
        "bound_excluded": torch.tensor([False, False, True, False]),
        "base_rank": torch.tensor([0, 5, 7, 30]),
    }
    return result_of([0, 2, -1, 4], **heads)


def trajectory():
    time = torch.tensor([0.0, 1, 2, 4])
    x = torch.arange(1.0, 1 + 2 * 4 * 3 * 2).reshape(2, 4, 3, 2)
    return Trajectory(time, x, torch.tensor([torch.inf, 3.5]), torch.tensor([0.0, 1]))


def several():
    """Figures of several results, and those that no probe's page has."""
    attacked, dormant = test_activation_attacks.planted_result(), test_active_dormant.planted_result
    drawn = {
        "chi": activation_attacks.figure_chi({"one": attacked, "other": attacked}),
        "trajectory": figure_trajectory(trajectory(), 1, {"closed form": np.arange(1.0, 5)}),
    }
    results = [dormant(peak=peak) for peak in (2.0, 50.0)]
    return drawn | active_dormant.figures_over_revisions(results, ["step1", "step8"])


CASES = {
    "attention-sinks": lambda: attention_sinks.figures(planted_result()),
    "attention-sinks swapped": lambda: attention_sinks.figures(
        planted_result(position=3, inputs="swap")
    ),
    "attention-sinks long": lambda: attention_sinks.figures(planted_result(lengths=(300, 20))),
    "active-dormant": lambda: active_dormant.figures(test_active_dormant.planted_result()),
    "successor-heads": lambda: successor_heads.figures(plant.successors()),
    "information-flow": lambda: information_flow.figures(plant.flow()),
    "token-dynamics": lambda: token_dynamics.figures(plant.walk()),
    "state-space spectrum": lambda: token_dynamics.figures(plant.spectrum()),
    "activation-attacks": lambda: activation_attacks.figures(
        test_activation_attacks.planted_result()
    ),
    "reachability": lambda: reachability.figures(reached()),
    "bigram-backcopy": lambda: bigram_backcopy.figures(plant.bigram()),
    "scan-snap": lambda: scan_snap.figures(plant.snap()),
    "scan-snap-sweep": lambda: scan_snap_sweep.figures(plant.sweep()),
    "scan-snap-text": lambda: scan_snap_text.figures(plant.snap_text()),
    "state-space": lambda: state_space.figures(plant.state_space()),
    "several results": several,
}
