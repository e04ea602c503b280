"""各种目标函数，以及梯度的相对误差：损失的几组测试共用。"""

import itertools

from distillab.config.schema import LossConfig

DIVERGENCES = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.3},
    "skew_forward_kl": {"skew": 0.2},
    "skew_reverse_kl": {"skew": 0.2},
}
LOSSES = [
    LossConfig(divergence=name, alpha=alpha, temperature=temperature, **parameters)
    for (name, parameters), alpha, temperature in itertools.product(
        DIVERGENCES.items(), (0.0, 0.5, 1.0), (0.5, 1.0, 2.0, 5.0)
    )
]


def relative(found, expected):
    """``||found - expected|| / ||expected||``。"""
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-12)).item()
