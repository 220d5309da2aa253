"""Settings: precedence, round trip, and one line per mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from train.cli import parse
from train.config import PRESETS, TrainConfig
from train.errors import ConfigError


def parsed(*arguments: str) -> TrainConfig:
    config = parse(arguments)
    assert config is not None
    return config


def test_precedence_default_preset_file_command_line(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"epochs": 3, "optim": {"clip": 2.0}}))
    assert parsed() == TrainConfig()
    preset = parsed("--preset", "scientific")
    assert preset.epochs == PRESETS["scientific"]["epochs"]
    config = parsed("--preset=scientific", "--config", str(file), "--optim.clip", "0.5", "--seed", "9")
    assert (config.epochs, config.optim.clip, config.seed) == (3, 0.5, 9)
    assert config.optim.lr == preset.optim.lr
    assert parsed("--epochs", "7", "--config", str(file)).epochs == 7


@pytest.mark.parametrize("preset", list(PRESETS))
def test_printed_settings_are_valid_settings(
    preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--preset", preset, "--optim.lr", "0.125"]
    assert parse([*asked, "--print-config"]) is None
    out, err = capsys.readouterr()
    file = tmp_path / "settings.json"
    file.write_text(out)
    assert parsed("--config", str(file)) == parsed(*asked)
    assert "# optim.lr = 0.125 from command line" in err


def test_model_preset_names_a_shape() -> None:
    assert parsed("--model.preset", "wide").model.dim == 384
    assert parsed("--model.preset", "wide", "--model.dim", "48").model.dim == 48


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch", "3"], "unknown option --epoch; did you mean --epochs?"),
        (["--optim.learning-rate", "1"], "unknown option --optim.learning-rate; did you mean --optim.lr?"),
        (["--lr=1"], "unknown option --lr; did you mean --optim.lr?"),
        (["--qqqq"], "unknown option --qqqq; see --help"),
        (["--epochs", "x"], "--epochs: invalid literal"),
        (["--epochs", "0"], "--epochs: Input should be greater than or equal to 1"),
        (["--optim.lr", "-1"], "--optim.lr: Input should be greater than 0"),
        (["--model.dim", "7"], "dim=7 must be an even multiple of heads=2"),
        (["--nodes", "9"], "--nodes 9 needs as many ranks"),
        (["--optim.schedule", "foo"], "'foo' for argument '--optim.schedule'"),
        (["stray"], "stray"),
        (["--preset", "dmeo"], "did you mean 'demo'?"),
        (["--preset"], "--preset needs a value"),
        (["--config", "/no/such/file"], "--config /no/such/file"),
        (["--comm", "ddp"], "pass --compress none"),
        (["--wire.ddp-hook", "fp16"], "acts on --comm ddp only"),
        (["--split-head", "True"], "--split-head shares out the items over pipeline ranks: pass --pp too"),
        (["--comm", "ddp", "--compress", "none", "--profile", "True"], "DDP has no list of instructions"),
        (["--comm", "ddp", "--compress", "none", "--emulate", "1"], "leave out --comm ddp"),
        (["--emulate", "0"], "--emulate: Input should be greater than 0"),
    ],
)
def test_a_mistake_gives_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["{", "[1]", '{"epochz": 1}', '{"optim": {"lr": "fast"}}'])
def test_a_bad_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "settings.json"
    file.write_text(text)
    with pytest.raises(ConfigError):
        parse(["--config", str(file)])


def test_help_is_grouped_with_units_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    assert not stopped.value.code
    out = capsys.readouterr().out
    for text in (
        "optim options",
        "model options",
        "wire options",
        "synthetic options",
        "(default: 4)",
        "MiB",
    ):
        assert text in out
