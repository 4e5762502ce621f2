"""Number of epochs that fit into `optim.minutes`, from measured step times."""

from __future__ import annotations

from dseqjepa.config import Config
from dseqjepa.train.clock import duration
from dseqjepa.train.rehearsal import EpochTimes


def within_minutes(config: Config, times: EpochTimes, spent_s: float = 0.0) -> tuple[Config, str]:
    """The config with the epochs that fit into its time budget, and a message about them.

    Args:
        config: resolved by `pretrain.fitting`, with the epochs that `auto` would give.
        spent_s: seconds of the budget already used.
    """
    minutes, usual = config.optim.minutes, config.optim.epochs
    assert minutes != "none"
    assert usual != "auto"
    epochs = times.epochs_within(60 * minutes - spent_s)
    line = f"optim.minutes={minutes:g}: optim.epochs={epochs}, {_shown(times, epochs)}"
    if epochs == 1 and times.first > 60 * minutes - spent_s:
        line += ", because one epoch takes longer than the budget"
    if epochs < usual:
        ratio = usual / epochs
        line += (
            f"; optim.epochs=auto, which is {usual} for this many images, would show each "
            f"{ratio:.{0 if ratio > 10 else 1}f} times as often, {_shown(times, usual)}"
        )
    optim = {"epochs": epochs, "warmup_epochs": epochs / 10}
    return config.with_(optim=optim), line


def _shown(times: EpochTimes, epochs: int) -> str:
    return f"in about {duration(times.of_run(epochs))}"
