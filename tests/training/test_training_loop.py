"""The loop: its learning rate, its average, and that no interruption shows in the weights."""

import csv
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from training.loop import DivergedError, LoopSettings, TrainingState, step_generator, train

SETTINGS = LoopSettings(steps=12, lr=0.01, warmup=3, decay_from=0.5, log_every=5, save_seconds=0.0)


def module() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))


def loss_fn(network: nn.Module, _step: int, generator: torch.Generator) -> dict[str, Tensor]:
    x = torch.randn(16, 4, generator=generator)
    loss = (network(x) - x.flip(1)).square().mean()
    return {"loss": loss, "root": loss.sqrt()}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_learning_rate_warms_up_stays_and_falls_along_a_cosine() -> None:
    settings = LoopSettings(steps=100, lr=2.0, warmup=10, decay_from=0.5)
    expected = {0: 0.2, 4: 1.0, 9: 2.0, 49: 2.0, 50: 2.0, 75: 1.0, 100: 0.0}
    for step, rate in expected.items():
        assert settings.learning_rate(step) == pytest.approx(rate)
    assert settings.learning_rate(99) == pytest.approx(1 + math.cos(math.pi * 49 / 50))


def test_the_average_forgets_the_start_and_then_follows_slowly(tmp_path: Path) -> None:
    state = TrainingState(nn.Linear(1, 1, bias=False), SETTINGS, tmp_path)
    state.averaged.weight.fill_(0.0)  # type: ignore[operator]
    with torch.no_grad():
        state.module.weight.fill_(1.0)  # type: ignore[operator]
    state.step = 1
    state.update_average(0.999)
    assert float(state.averaged.weight) == pytest.approx(9 / 11)  # type: ignore[arg-type]
    state.step = 100_000
    state.averaged.weight.fill_(0.0)  # type: ignore[operator]
    state.update_average(0.999)
    assert float(state.averaged.weight) == pytest.approx(0.001)  # type: ignore[arg-type]


def test_random_numbers_of_a_step_depend_on_seed_and_step_alone() -> None:
    draws = {(seed, step): torch.rand((), generator=step_generator(seed, step)) for seed in (0, 1) for step in (0, 1)}
    assert len({float(draw) for draw in draws.values()}) == 4
    assert torch.rand((), generator=step_generator(1, 1)) == draws[1, 1]
    assert torch.rand((), generator=torch.Generator().manual_seed(1)) == draws[0, 1]  # saved runs count on it


@pytest.mark.parametrize("interrupted_at", [1, 5, 8])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, interrupted_at: int) -> None:
    def interrupted(network: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        if step == interrupted_at:
            raise KeyboardInterrupt
        return loss_fn(network, step, generator)

    whole = train(module(), loss_fn, SETTINGS, tmp_path / "whole", "test")
    with pytest.raises(KeyboardInterrupt):
        train(module(), interrupted, SETTINGS, tmp_path / "pieces", "test")
    resumed = train(module(), loss_fn, SETTINGS, tmp_path / "pieces", "test")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "pieces")]
    assert str(states[0]) == str(states[1])


def test_a_resumed_run_logs_every_step_once(tmp_path: Path) -> None:
    """What was logged after the last save belongs to steps that are made again."""
    train(module(), loss_fn, SETTINGS, tmp_path / "whole", "test")

    def interrupted(network: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        if step == 11:
            raise KeyboardInterrupt
        return loss_fn(network, step, generator)

    folder = tmp_path / "pieces"
    with pytest.raises(KeyboardInterrupt):
        train(module(), interrupted, SETTINGS, folder, "test")
    state = TrainingState(module(), SETTINGS, folder)
    assert state.resume()
    state.step = 7  # as if the last save had been earlier
    state.save()
    train(module(), loss_fn, SETTINGS, folder, "test")
    assert [row["step"] for row in rows(folder)] == ["5", "10"]
    first, again = rows(tmp_path / "whole")[0], rows(folder)[0]
    assert {**first, "unix_time": ""} == {**again, "unix_time": ""}
    assert float(rows(folder)[1]["loss"]) > 0.2 * float(first["loss"])  # a mean over three steps, not a fifth of a sum


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    done = train(module(), loss_fn, SETTINGS, tmp_path, "test")

    def never(_network: nn.Module, _step: int, _generator: torch.Generator) -> dict[str, Tensor]:
        raise AssertionError("a finished run makes no step")

    again = train(module(), never, SETTINGS, tmp_path, "test")
    assert str(again.state_dict()) == str(done.state_dict())


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_diverged_run_says_what_to_do_and_keeps_its_last_good_state(tmp_path: Path, poison: str) -> None:
    def diverging(network: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        loss = loss_fn(network, step, generator)["loss"]
        if step < 4:
            return {"loss": loss}
        return {"loss": loss * math.nan if poison == "loss" else (loss - loss.detach()).sqrt()}

    with pytest.raises(DivergedError, match=r"at step 4 the loss is .* should be finite.*lower learning rate"):
        train(module(), diverging, SETTINGS, tmp_path, "test")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 4
    assert all(torch.isfinite(tensor).all() for tensor in state["module"].values())
    train(module(), loss_fn, dataclasses.replace(SETTINGS, lr=0.001), tmp_path, "test")
