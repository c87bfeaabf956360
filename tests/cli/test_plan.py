"""`benthic plan model` answers from presets, files and folders, without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from benthic.cli import main, plan
from benthic.errors import ConfigError, UnknownFieldError
from benthic.spec import presets
from benthic.spec.hf import dumps

RUN = CliRunner(env={"COLUMNS": "80", "TERM": "dumb"})
BLOCK_TORCH = """
import sys, time
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "numpy", "transformers", "triton"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK_TORCH + code], capture_output=True, text=True, check=False, timeout=60
    )


def test_the_tables_of_v3_show_the_published_figures():
    result = RUN.invoke(main.app, ["plan", "model", "deepseek-v3"])
    assert result.exit_code == 0
    for figure in (
        "671,026,419,200",
        "36,625,618,432",
        "250.46 GFLOP",
        "70,272",
        "16 N",
        "13 N",
        "3,997,696",
    ):
        assert figure in result.output
    assert all(len(line) <= 80 for line in result.output.splitlines())


def test_json_is_json():
    result = RUN.invoke(main.app, ["plan", "model", "kimi-k2", "--json", "--seq-len", "8192"])
    report = json.loads(result.output)
    assert report["seq_len"] == 8192
    assert report["totals"][0]["value"] == 1_026_408_232_448


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_model_can_be_a_folder_or_a_file(tmp_path, as_folder):
    (tmp_path / "config.json").write_text(dumps(presets.get("tiny")))
    path = tmp_path if as_folder else tmp_path / "config.json"
    result = RUN.invoke(main.app, ["plan", "model", str(path), "--json"])
    assert json.loads(result.output)["totals"][0]["value"] == 3_464_560


def test_an_unknown_model_and_a_missing_file_are_refused():
    with pytest.raises(UnknownFieldError, match="deepseek-v3"):
        RUN.invoke(main.app, ["plan", "model", "deepseek-v4"], catch_exceptions=False)
    for missing in ("nowhere/config.json", "missing.json"):
        with pytest.raises(ConfigError, match=r"no config\.json"):
            RUN.invoke(main.app, ["plan", "model", missing], catch_exceptions=False)


def test_a_refused_config_is_printed_as_an_error_and_exits_with_2(tmp_path):
    (tmp_path / "config.json").write_text(dumps(presets.get("tiny")).replace("hidden_size", "hiden_size", 1))
    result = python(
        f"sys.argv = ['benthic', 'plan', 'model', {str(tmp_path)!r}]\n"
        "from benthic.cli.main import main\nmain()\n"
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "hiden_size" in result.stderr
    assert "Did you mean 'hidden_size'?" in result.stderr


def test_it_works_where_torch_is_not_installed():
    result = python(
        "sys.argv = ['benthic', 'plan', 'model', 'tiny']\nfrom benthic.cli.main import main\nmain()\n"
    )
    assert result.returncode == 0, result.stderr
    assert "3,464,560" in result.stdout


def test_importing_the_planner_takes_under_200_ms():
    code = (
        "start = time.process_time()\n"
        "import benthic.plan, benthic.plan.model, benthic.sched.pipeline.simulate\n"
        "print(time.process_time() - start)\n"
    )
    assert min(float(python(code).stdout) for _ in range(3)) < 0.2


def test_help_names_the_presets():
    output = RUN.invoke(plan.app, ["model", "--help"]).output
    assert "deepseek-v2-lite" in output.replace("\n", "")
