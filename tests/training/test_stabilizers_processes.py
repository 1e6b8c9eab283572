"""Two processes under DDP and FSDP2 make the steps that one would: penalties, SAM, normalized matrices, optimizers."""

import pytest
import torch
import yaml

from training.ranks import Ranks
from training.run import build_run

from .each_stabilizer import weights
from .test_ranks import HERE, ran, torchrun

PENALTY = {"weight": 0.5, "interval": 1}

CASES = {
    "ddp-spectral-penalties-sam": {
        "accumulation": 2,
        "activation_checkpointing": True,
        "stabilizers": {
            "sam": {"rho": 0.1},
            "spectral_norm": {},
            "gradient_penalty": PENALTY,
            "residual_l2": PENALTY,
            "activation_variance": PENALTY,
        },
    },
    "ddp-weight-lamb": {"optimizer": {"name": "lamb"}, "stabilizers": {"weight_norm": {}, "residual_l2": PENALTY}},
    "fsdp-lamb-penalties-sam-clip": {
        "parallel": "fsdp",
        "accumulation": 2,
        "optimizer": {"name": "lamb"},
        "stabilizers": {"sam": {"rho": 0.1}, "residual_l2": PENALTY, "activation_variance": PENALTY, "clip": 0.1},
    },
    "fsdp-surprise-clip": {"parallel": "fsdp", "stabilizers": {"surprise": 0.5, "clip": 0.1}},
    "fsdp-lion": {"parallel": "fsdp", "optimizer": {"name": "lion"}},
    "fsdp-sgd-sam": {"parallel": "fsdp", "optimizer": {"name": "sgd"}, "stabilizers": {"sam": {}}},
}


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(configure, tmp_path):
    alone = {}
    for name, sections in CASES.items():
        config = configure(name, precision="float64", schedule={"warmup": 0}, **sections)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        alone[name] = weights(build_run(config, Ranks(0, 1, torch.device("cpu"))))
    assert ran(torchrun(2, HERE / "each_stabilizer.py", tmp_path))
    for name, expected in alone.items():
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            # No softmax sees a key's bias: its gradient is rounding alone, which these optimizers make long.
            if not key.endswith("key.bias"):
                torch.testing.assert_close(found[key], tensor, rtol=1e-10, atol=1e-12, msg=f"{name}: {key}")
