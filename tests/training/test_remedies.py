"""Remedies: what each lever does to a step, told against explicit linear algebra, and the command that screens them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from training.experiments import remedies, rescue_spec
from training.experiments.remedies import Arm, RemedySpec, start_run
from training.experiments.remedies_levers import FORMS, operator
from training.loop import drive
from training.models.gpt import Attention
from training.step import advance

BASE: dict[str, Any] = {
    "steps": 6,
    "model": {
        "factory": "training.models.gpt:GPT",
        "arguments": {"vocabulary": 32, "length": 16, "width": 16, "depth": 2, "heads": 2, "norm": "no_norm"},
    },
    "task": {"batch": 8, "pairs": 2},
    "schedule": {"warmup": 2},
}


def spec(**sections: Any) -> RemedySpec:
    given = {"name": "tiny", "records": "records.jsonl.gz", "base": BASE, "rates": [0.01], "seeds": [7201], "arms": []}
    return RemedySpec.model_validate(given | sections)


def weights(arm: Arm, **changes: Any) -> torch.Tensor:
    run, watch = start_run(spec(), arm, 0.01, 7201, **changes)
    drive(run, [watch])
    return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])


class TestLevers:
    def test_an_arm_that_does_nothing_changes_nothing(self) -> None:
        plain = weights(Arm(name="nothing"))
        assert torch.equal(weights(Arm(name="later", start=6, rate=0.1, clip=0.1, form="paper", surprise=0.1)), plain)
        assert not torch.equal(weights(Arm(name="now", start=5, rate=0.1)), plain)

    def test_the_published_form_in_the_loss_is_that_of_the_regularizer(self) -> None:
        changes = {"kss.alpha": 0.15, "kss.interval": 2, "kss.layer_fraction": 0.5}
        own = weights(Arm(name="nothing"), **changes)
        torch.testing.assert_close(weights(Arm(name="paper", form="paper", interval=2)), own, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(weights(Arm(name="nothing")), own, rtol=1e-4, atol=1e-4)

    def test_a_gradient_that_is_applied_after_the_update_moves_by_a_share_of_it(self) -> None:
        def moved(arm: Arm) -> torch.Tensor:
            run, watch = start_run(spec(), arm, 0.01, 7201)
            before = torch.cat([parameter.detach().flatten().clone() for parameter in run.model.parameters()])
            watch.after(run, None)
            advance(run)
            return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()]) - before

        task = moved(Arm(name="nothing"))
        both = moved(Arm(name="update", form="paper", apply="update", ratio=0.3))
        assert float((both - task).norm() / task.norm()) == pytest.approx(0.3, rel=1e-3)

    def test_matrices_are_capped(self) -> None:
        run, attention = self.attentive(Arm(name="cap", weight_cap=0.05, interval=1))
        assert float(torch.linalg.matrix_norm(attention.query.weight.detach(), 2)) == pytest.approx(0.05, rel=1e-4)
        blocks = [p for name, p in run.model.named_parameters() if "blocks" in name and p.dim() == 2]
        assert max(float(torch.linalg.matrix_norm(p.detach(), 2)) for p in blocks) <= 0.05 * (1 + 1e-4)

    def test_scores_are_capped(self) -> None:
        run, attention = self.attentive(Arm(name="cap", logit_cap=0.01, interval=1))
        q, k = (part.view(8, 16, 2, 8).transpose(1, 2) for part in self.queries_and_keys(run, attention))
        assert float((q @ k.mT).abs().max()) * 8**-0.5 <= 0.01 * (1 + 1e-5)

    def test_the_form_of_a_head_is_capped_in_coordinates_of_unit_variance(self) -> None:
        """With zero biases: singular values of scale S^1/2 W_q^T W_k S^1/2, S the second moment of the input."""
        _, attention = self.attentive(Arm(name="cap", form_cap=0.01, interval=1))
        x = self.inputs[-1].flatten(0, 1).double()
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
        for head in range(2):
            rows = slice(8 * head, 8 * head + 8)
            q, k = (part.weight.detach().double()[rows] for part in (attention.query, attention.key))
            assert float(torch.linalg.matrix_norm(root @ q.T @ k @ root, 2)) * 8**-0.5 == pytest.approx(0.01, rel=1e-3)

    def attentive(self, arm: Arm) -> tuple[Any, Attention]:
        """Return a run after one capped step at rate 0, and its first attention, whose matrices were made large."""
        run, watch = start_run(spec(), arm, 1e-30, 7201)
        attention = next(module for module in run.model.modules() if isinstance(module, Attention))
        with torch.no_grad():
            attention.query.weight.mul_(1e3)
            attention.key.weight.mul_(1e3)
        self.inputs: list[torch.Tensor] = []
        attention.register_forward_hook(lambda _, inputs, __: self.inputs.append(inputs[0].detach()))
        watch.after(run, None)
        advance(run)
        return run, attention

    def queries_and_keys(self, run: Any, attention: Attention) -> list[torch.Tensor]:
        with torch.no_grad():
            return [part(self.inputs[-1]) for part in (attention.query, attention.key)]


class TestForms:
    @staticmethod
    def states() -> tuple[torch.Tensor, torch.Tensor]:
        random = np.random.default_rng(0)
        x = random.normal(size=(300, 6)) @ np.diag([1, 2, 3, 1, 0.5, 1]) + 5
        y = x @ random.normal(size=(6, 6)) + 0.1 * random.normal(size=(300, 6))
        return torch.tensor(x), torch.tensor(y)

    def test_the_whitened_operator_is_that_of_the_profile(self) -> None:
        x, y = self.states()
        a, b = (each - each.mean(0) for each in (x, y))
        values, vectors = torch.linalg.eigh(a.T @ a / len(a))
        root = vectors @ torch.diag(values.rsqrt()) @ vectors.T  # zero-phase whitening: the same singular values
        expected = torch.linalg.lstsq(a @ root, b @ root).solution.T
        found = operator(x, y, whitened=True)
        torch.testing.assert_close(torch.linalg.svdvals(found), torch.linalg.svdvals(expected), rtol=1e-9, atol=1e-9)
        plain = torch.linalg.eigvals(operator(x, y, whitened=False)).abs().sort().values
        torch.testing.assert_close(plain, torch.linalg.eigvals(expected).abs().sort().values, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("name", sorted(FORMS))
    def test_each_has_a_gradient_along_which_it_falls(self, name: str) -> None:
        x, y = self.states()
        y.requires_grad_()
        value = FORMS[name](x, y)
        (slope,) = torch.autograd.grad(value, y)
        step = 1e-6 * slope / slope.norm().clamp_min(1e-12)
        assert value.isfinite()
        assert float(slope.norm()) > 0
        assert float(FORMS[name](x, y.detach() - step)) < float(value.detach())


class TestShipped:
    SCREEN = Path(remedies.__file__).parent / "specs/remedies/screen.yaml"

    @pytest.mark.parametrize(("name", "count"), [("finalists", 45), ("twice_the_rate", 20)])
    def test_the_finalists_are_on_seeds_of_which_the_screen_has_none(self, name: str, count: int) -> None:
        finalists = rescue_spec.read_spec(self.SCREEN.parents[1] / f"rescue/{name}.yaml")
        seeds = {run.seed for run in rescue_spec.plan(finalists)}
        assert len(seeds) == count
        assert not seeds & {seed for _, _, seed in remedies.plan(remedies.read_spec(self.SCREEN))}

    def test_each_record_of_the_screen_is_of_an_arm_of_its_spec(self) -> None:
        screen = remedies.read_spec(self.SCREEN)
        arms = {remedies.key(arm.name, rate, seed): arm for arm, rate, seed in remedies.plan(screen)}
        records = remedies.read_records(self.SCREEN.parents[4] / screen.records)
        assert records
        for record in records:
            assert record["settings"] == remedies.settings_of(arms[record["key"]])


class TestMoment:
    def test_a_jump_of_the_gradient_norm_switches_on(self) -> None:
        run, watch = start_run(spec(), Arm(name="jump", start="gradient"), 0.01, 7201)
        watch.norms = [1.0] * 50 + [4.9]
        watch.after(run, None)
        assert not watch.remedy.active
        watch.norms = [1.0] * 50 + [5.1]
        watch.after(run, None)
        assert watch.remedy.active


class TestCommand:
    @pytest.fixture
    def file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.chdir(tmp_path)
        arms = [{"name": "nothing"}, {"name": "learning rate x 0.5", "rate": 0.5, "start": 2}]
        document = spec(arms=arms, reference={"arm": "nothing", "rate": 0.01}, seeds=[7201, 7202]).model_dump()
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(document | {"rates": [0.01], "seeds": [7201, 7202], "arms": arms}))
        return path

    def test_goes_on_where_it_was_and_prints_a_table(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert remedies.main([str(file), "--jobs", "1", "--arms", "nothing"]) == 0
        assert capsys.readouterr().out.count("diverged None") == 2
        assert remedies.main([str(file), "--jobs", "1"]) == 0
        assert capsys.readouterr().out.count("diverged None") == 2
        assert remedies.main([str(file), "--table"]) == 0
        nothing, half = capsys.readouterr().out.splitlines()[2:]
        assert nothing.startswith("| nothing | 0.01 | 6 | 2 | 0 | 2 | - |")
        assert nothing.split("|")[-3] == " +0.000 "
        assert half.startswith("| learning rate x 0.5 | 0.01 | 6 | 2 | 0 |")

    def test_says_what_an_arm_costs(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert remedies.main([str(file), "--overhead", "--arms", "nothing"]) == 0
        assert re.fullmatch(r"nothing: [+-][\d.]+% \([+-][\d.]+% to [+-][\d.]+%\)", capsys.readouterr().out.strip())

    def test_a_mistake_is_one_sentence(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file.write_text(file.read_text() + "unknown: 1\n")
        assert remedies.main([str(file)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert remedies.main([str(file.parent / "missing.yaml")]) == 2

    def test_unknown_names_are_refused(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert remedies.main([str(file), "--arms", "prayer"]) == 2
        assert "has no arm 'prayer'" in capsys.readouterr().err
        file.write_text(file.read_text().replace("name: nothing", "name: nothing\n  form: poem"))
        assert remedies.main([str(file)]) == 2
        assert "one of paper, hinge" in capsys.readouterr().err
