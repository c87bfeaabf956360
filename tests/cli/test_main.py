from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benthic.cli.main import main


@pytest.mark.parametrize("command", [("plan", "model", "tiny"), ("train", "tiny_cpu", "--list-settings")])
def test_a_full_disk_is_said_in_one_line(command: tuple[str, ...]) -> None:
    line = [sys.executable, "-c", "from benthic.cli.main import main; main()", *command]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "No space left on device. Free some space" in done.stderr


def test_ctrl_c_ends_a_command_without_a_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("benthic.cli.main.app", interrupted)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert not capsys.readouterr().err
